"""From text columns to slots and back: where each token and landmark of one call stands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark.blocks import slot_of, slots_for


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Tensors are computed and joined as they are: autocast in bfloat16 refuses to join float16,
    and the reverse.
    """
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


@dataclass(frozen=True)
class Layout:
    """Slots of one call, ``width`` per row, every row's first at its left.

    Attributes:
        block_size: slots of a block.
        width: slots of the call.
        positions: ``(width,)`` or ``(B, width)`` slot inside its document, of a call that starts
            documents.
        slots: ``(B, T)`` slot of each text column, ``width`` for padding; ``None`` when no row has
            padding or packing.
        sources: ``(B, width)`` text column of each slot, ``T`` for a landmark, ``T + 1`` for
            nothing.
        segments: ``(B, width)`` document of each slot of packed rows.
    """

    block_size: int
    width: int
    positions: Tensor
    slots: Tensor | None = None
    sources: Tensor | None = None
    segments: Tensor | None = None

    def insert(self, embeds: Tensor, landmark: Tensor) -> Tensor:
        """Puts landmarks among text embeddings: ``(B, T, hidden)`` and ``(hidden,)`` to ``(B,
        width, hidden)``.
        """
        with without_autocast(embeds.device):
            return self._insert(embeds, landmark.to(embeds.dtype))

    def _insert(self, embeds: Tensor, landmark: Tensor) -> Tensor:
        batch, tokens, hidden = embeds.shape
        if self.sources is None:
            text = self.block_size - 1
            blocks = -(-tokens // text)
            padded = torch.nn.functional.pad(embeds, (0, 0, 0, blocks * text - tokens)).view(
                batch, blocks, text, hidden
            )
            joined = torch.cat((padded, landmark.expand(batch, blocks, 1, hidden)), dim=2)
            return joined.flatten(1, 2)[:, : self.width]
        extra = torch.stack((landmark, torch.zeros_like(landmark))).expand(batch, 2, hidden)
        return torch.cat((embeds, extra), dim=1).gather(
            1, self.sources[..., None].expand(-1, -1, hidden)
        )

    def extract(self, states: Tensor, tokens: int) -> Tensor:
        """Takes the states of text out: ``(B, width, hidden)`` to ``(B, tokens, hidden)``, zeros
        for padding.
        """
        batch, _, hidden = states.shape
        if self.slots is None:
            text = self.block_size - 1
            size = self.block_size
            blocks = -(-tokens // text)
            padded = torch.nn.functional.pad(states, (0, 0, 0, blocks * size - self.width))
            return padded.view(batch, blocks, size, hidden)[:, :, :text].flatten(1, 2)[:, :tokens]
        found = states.gather(
            1, self.slots.clamp(max=self.width - 1)[..., None].expand(-1, -1, hidden)
        )
        return found.masked_fill((self.slots == self.width)[..., None], 0)


def plain_layout(tokens: int, block_size: int, device: torch.device) -> Layout:
    """Returns the layout of rows without padding that start at their first token."""
    width = slots_for(tokens, block_size)
    return Layout(block_size, width, torch.arange(width, device=device))


def padded_layout(
    mask: Tensor, block_size: int, seen: Tensor | None = None, width: int | None = None
) -> Layout:
    """Returns the layout of rows with padding.

    Args:
        mask: ``(B, T)`` bool, True for text.
        block_size: slots of a block.
        seen: ``(B,)`` text tokens of each row that came in earlier calls.
        width: slots of the call where known; by default as many as ``T`` tokens could take.
    """
    batch, tokens = mask.shape
    index = mask.long().cumsum(1) - 1
    before = (
        torch.zeros(batch, 1, dtype=torch.long, device=mask.device)
        if seen is None
        else seen[:, None]
    )
    slot = slot_of(index + before, block_size) - slots_for(before, block_size)
    closes = mask & ((index + before) % (block_size - 1) == block_size - 2)
    width = slots_for(tokens, block_size) if width is None else width
    slots = torch.where(mask, slot, width)
    return Layout(
        block_size,
        width,
        torch.arange(width, device=mask.device),
        slots,
        _sources(slots, closes, width, tokens),
    )


def packed_layout(documents: Tensor, block_size: int) -> Layout:
    """Returns the layout of packed rows; ``documents (B, T)`` rises by one where a new document
    begins, from 0.
    """
    batch, tokens = documents.shape
    column = torch.arange(tokens, device=documents.device).expand(batch, tokens)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    index = column - torch.where(begins, column, 0).cummax(1).values
    closes = index % (block_size - 1) == block_size - 2
    slots = column + closes.long().cumsum(1) - closes.long()
    width = slots_for(tokens, block_size)
    own_slot = slot_of(index, block_size)
    positions = _spread(slots, closes, own_slot, own_slot + 1, width, 0)
    segments = _spread(slots, closes, documents, documents, width, tokens)
    return Layout(
        block_size, width, positions, slots, _sources(slots, closes, width, tokens), segments
    )


def documents_of(position_ids: Tensor) -> Tensor:
    """Returns the document of each column of packed rows, ``(B, T)``: a new one wherever positions
    do not go on.
    """
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(jumps.long().cumsum(1), (1, 0))


def _sources(slots: Tensor, closes: Tensor, width: int, tokens: int) -> Tensor:
    column = torch.arange(tokens, device=slots.device).expand_as(slots)
    return _spread(slots, closes, column, torch.full_like(column, tokens), width, tokens + 1)


def _spread(
    slots: Tensor, closes: Tensor, text: Tensor, landmark: Tensor, width: int, fill: int
) -> Tensor:
    """Writes ``text`` at ``slots`` and ``landmark`` at the next slot where a token closes a block;
    ``(B, width)``.
    """
    out = slots.new_full((len(slots), width + 1), fill)
    out = out.scatter(1, slots, text)
    return out.scatter(
        1,
        torch.where(closes, slots + 1, width).clamp(max=width),
        torch.where(closes, landmark, fill),
    )[:, :width]
