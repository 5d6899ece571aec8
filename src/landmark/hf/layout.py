"""The slots of one call: at which slot each text token and each landmark stands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark.blocks import slot_of, slots_for
from landmark.config import LandmarkConfig


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context without autocast.

    Autocast in bfloat16 refuses to join tensors in float16, and the reverse.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@dataclass(frozen=True)
class TextLayout:
    """The slots of one call, ``width`` in each row, aligned at the left.

    Attributes:
        block_size: slots of a block.
        width: slots of a row.
        positions: ``(width,)`` or ``(B, width)`` position of each slot inside its document, where
            the documents begin in this call.
        slots: ``(B, T)`` slot of each text column, ``width`` for padding; ``None`` when no row has
            padding or packing.
        sources: ``(B, width)`` text column of each slot, ``T`` for a landmark, ``T + 1`` for
            an empty slot; ``None`` as ``slots``.
        segments: ``(B, width)`` document of each slot of packed rows.
    """

    block_size: int
    width: int
    positions: Tensor
    slots: Tensor | None = None
    sources: Tensor | None = None
    segments: Tensor | None = None

    def training_positions(
        self, batch: int, settings: LandmarkConfig, restarts: Tensor | None = None
    ) -> Tensor:
        """Returns positions that jump after landmarks and start again, as the settings say.

        Args:
            batch: rows.
            settings: ``position_gap`` and ``position_span``.
            restarts: ``(B,)`` integers, the block at which those of a row start again first, less
                than the blocks of a span, or -1 for a row in which they go on; ``None`` to draw a
                block for each row.

        Returns:
            ``(width,)`` or ``(B, width)``.
        """
        gap = settings.position_gap
        span = settings.position_span
        has_restarts = span is not None and self.width > span
        if not gap and not has_restarts:
            return self.positions
        size = self.block_size
        device = self.positions.device
        blocks = (self.positions // size).expand(batch, self.width)
        begins = torch.zeros_like(blocks)  # block from which the positions of a block are counted
        if span is not None and has_restarts:
            count = span // size
            if restarts is None:
                restarts = (torch.rand(batch, device=device) * count).floor().long()
            first = restarts[:, None] % count
            begins = ((blocks - first + count) // count * count + first - count).clamp(min=0)
            begins = torch.where(restarts[:, None] < 0, 0, begins)
        positions = self.positions - begins * size
        if gap:
            reach = (torch.rand(batch, 1, device=device) * (gap + 1)).floor()
            has_gaps = torch.rand(batch, 1, device=device) < 0.5
            reach = torch.where(has_gaps, reach, 0)
            number = self.width // size + 1
            gaps = (torch.rand(batch, number, device=device) * (reach + 1)).floor().long()
            before = torch.nn.functional.pad(gaps.cumsum(1), (1, 0))
            positions = positions + before.gather(1, blocks) - before.gather(1, begins)
        return positions

    def insert(self, embeds: Tensor, landmark: Tensor) -> Tensor:
        """Inserts landmarks among text embeddings.

        Args:
            embeds: ``(B, T, hidden)`` embeddings of text.
            landmark: ``(hidden,)`` embedding of a landmark.

        Returns:
            ``(B, width, hidden)``.
        """
        with without_autocast(embeds.device):
            return self._insert(embeds, landmark.to(embeds.dtype))

    def _insert(self, embeds: Tensor, landmark: Tensor) -> Tensor:
        batch, tokens, hidden = embeds.shape
        if self.sources is None:
            text = self.block_size - 1
            blocks = -(-tokens // text)
            padded = torch.nn.functional.pad(embeds, (0, 0, 0, blocks * text - tokens))
            padded = padded.view(batch, blocks, text, hidden)
            joined = torch.cat((padded, landmark.expand(batch, blocks, 1, hidden)), dim=2)
            return joined.flatten(1, 2)[:, : self.width]
        extra = torch.stack((landmark, torch.zeros_like(landmark))).expand(batch, 2, hidden)
        sources = self.sources[..., None].expand(-1, -1, hidden)
        return torch.cat((embeds, extra), dim=1).gather(1, sources)

    def extract(self, states: Tensor, tokens: int) -> Tensor:
        """Returns the states of text without those of landmarks.

        Args:
            states: ``(B, width, hidden)``.
            tokens: text columns of the call.

        Returns:
            ``(B, tokens, hidden)``, zeros at padding.
        """
        batch, _, hidden = states.shape
        if self.slots is None:
            text = self.block_size - 1
            size = self.block_size
            blocks = -(-tokens // text)
            padded = torch.nn.functional.pad(states, (0, 0, 0, blocks * size - self.width))
            return padded.view(batch, blocks, size, hidden)[:, :, :text].flatten(1, 2)[:, :tokens]
        slots = self.slots.clamp(max=self.width - 1)[..., None].expand(-1, -1, hidden)
        padding = (self.slots == self.width)[..., None]
        return states.gather(1, slots).masked_fill(padding, 0)


def plain_layout(tokens: int, block_size: int, device: torch.device) -> TextLayout:
    """Returns the layout of rows without padding that start at their first token."""
    width = slots_for(tokens, block_size)
    return TextLayout(block_size, width, positions=torch.arange(width, device=device))


def padded_layout(
    mask: Tensor, block_size: int, seen: Tensor | None = None, width: int | None = None
) -> TextLayout:
    """Returns the layout of rows with padding.

    Args:
        mask: ``(B, T)`` bool, True for text.
        block_size: slots of a block.
        seen: ``(B,)`` text tokens of each row that came in earlier calls.
        width: slots of the call where known; by default as many as ``T`` tokens could take.
    """
    batch, tokens = mask.shape
    if seen is None:
        before = torch.zeros(batch, 1, dtype=torch.long, device=mask.device)
    else:
        before = seen[:, None]
    if width is None:
        width = slots_for(tokens, block_size)
    index = mask.long().cumsum(1) - 1 + before
    slot = slot_of(index, block_size) - slots_for(before, block_size)
    closes = mask & (index % (block_size - 1) == block_size - 2)
    slots = torch.where(mask, slot, width)
    return TextLayout(
        block_size,
        width,
        positions=torch.arange(width, device=mask.device),
        slots=slots,
        sources=_sources(slots, closes, width, tokens),
    )


def packed_layout(documents: Tensor, block_size: int) -> TextLayout:
    """Returns the layout of packed rows.

    Args:
        documents: ``(B, T)`` document of each column, as ``document_numbers`` gives it.
        block_size: slots of a block.
    """
    batch, tokens = documents.shape
    column = torch.arange(tokens, device=documents.device).expand(batch, tokens)
    begins = document_begins(documents)
    index = column - torch.where(begins, column, 0).cummax(1).values
    closes = index % (block_size - 1) == block_size - 2
    slots = column + closes.long().cumsum(1) - closes.long()
    width = slots_for(tokens, block_size)
    own_slot = slot_of(index, block_size)
    positions = _spread(slots, closes, text=own_slot, landmark=own_slot + 1, width=width, fill=0)
    segments = _spread(slots, closes, text=documents, landmark=documents, width=width, fill=tokens)
    return TextLayout(
        block_size,
        width,
        positions=positions,
        slots=slots,
        sources=_sources(slots, closes, width, tokens),
        segments=segments,
    )


def document_begins(ids: Tensor) -> Tensor:
    """Returns ``(B, T)`` bool: a document begins wherever the id of a column is another one."""
    first = torch.ones_like(ids[:, :1], dtype=torch.bool)
    return torch.cat((first, ids[:, 1:] != ids[:, :-1]), dim=1)


def document_numbers(ids: Tensor) -> Tensor:
    """Returns the document of each column, ``(B, T)``, rising by one from 0 in each row.

    Args:
        ids: ``(B, T)`` an id of its document for each column; neighbours have other ids.
    """
    return document_begins(ids).long().cumsum(1) - 1


def documents_by_position(position_ids: Tensor) -> Tensor:
    """As ``document_numbers``: a document begins wherever ``(B, T)`` positions do not go on."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    return document_numbers(position_ids - columns)


def _sources(slots: Tensor, closes: Tensor, width: int, tokens: int) -> Tensor:
    """Returns ``TextLayout.sources``; ``closes (B, T)`` says which tokens close a block."""
    column = torch.arange(tokens, device=slots.device).expand_as(slots)
    landmark = torch.full_like(column, tokens)
    return _spread(slots, closes, text=column, landmark=landmark, width=width, fill=tokens + 1)


def _spread(
    slots: Tensor, closes: Tensor, *, text: Tensor, landmark: Tensor, width: int, fill: int
) -> Tensor:
    """Takes a value for each text token and each landmark from columns to slots.

    Args:
        slots: ``(B, T)`` slot of each text token.
        closes: ``(B, T)`` whether a token closes a block, so that a landmark comes behind it.
        text: ``(B, T)`` value of each token.
        landmark: ``(B, T)`` value of the landmark behind each token.
        width: slots of a row.
        fill: value of empty slots.

    Returns:
        ``(B, width)``.
    """
    spread = slots.new_full((len(slots), width + 1), fill).scatter(1, slots, text)
    landmark_slots = torch.where(closes, slots + 1, width).clamp(max=width)
    landmark_values = torch.where(closes, landmark, fill)
    return spread.scatter(1, landmark_slots, landmark_values)[:, :width]
