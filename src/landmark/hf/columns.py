"""The text that a memory has read, in columns as the caller sees them: token ids and mask, padding
included.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

COMPARED_COLUMNS = 4096  # embedded at once, to be compared with embeddings that were given
SAME_EMBEDDING = 0.01  # relative difference of an embedding in another precision, at most
SKETCH = 1 << 30  # sketches are integers from -SKETCH to -2
# Of one embedding in two precisions: a cosine of 0.002, as bfloat16 moves an embedding by at most
# 2^-9 of its norm.
SAME_SKETCH = SKETCH // 1000


class TextColumns:
    """Token ids and mask of all rows, on the CPU.

    Attributes:
        tokens: text tokens of each row, padding not counted.
        changes: how often columns were added, or lost for good.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.changes = 0
        self._count = 0
        self._masks: list[
            Tensor
        ] = []  # (B, T) bool of some calls each, never written to; see `append`
        self._ids: list[
            Tensor
        ] = []  # (B, T) int32 likewise; for an embedding its sketch, -1 for neither

    def __len__(self) -> int:
        return self._count

    def __deepcopy__(self, memo: dict[int, Any]) -> TextColumns:
        """As ``copy``."""
        return self.copy()

    def append(self, mask: Tensor, ids: Tensor | None) -> None:
        """Adds columns.

        Args:
            mask: ``(B, T)`` bool on the CPU, True for text.
            ids: ``(B, T)`` token ids, or sketches where only embeddings are known, ``None`` for
                neither.
        """
        counts = mask.sum(1).tolist()
        self.tokens = [a + b for a, b in zip(self.tokens or [0] * len(mask), counts, strict=True)]
        self._masks.append(mask.clone())
        known = (
            torch.full(mask.shape, -1, dtype=torch.int32)
            if ids is None
            else ids.to("cpu", torch.int32, copy=True)
        )
        self._ids.append(known)
        while len(self._masks) > 1 and self._masks[-2].shape[1] <= 2 * self._masks[-1].shape[1]:
            for each in (
                self._masks,
                self._ids,
            ):  # few parts: small tensors that stay scatter the memory of calls
                each[-2:] = [torch.cat(each[-2:], dim=1)]
        self._count += mask.shape[1]
        self.changes += 1

    def copy(self) -> TextColumns:
        """Returns a copy that shares the tensors, which are never written to."""
        other = copy.copy(self)
        other._masks = list(self._masks)
        other._ids = list(self._ids)
        return other

    def replace(self, mask: Tensor, ids: Tensor) -> None:
        """Replaces all columns; arguments as for ``append``."""
        self._count = mask.shape[1]
        self._masks = [mask] if len(self) else []
        self._ids = [ids] if len(self) else []
        self.tokens = mask.sum(1).tolist() if len(self) else []

    def all(self) -> tuple[Tensor, Tensor]:
        """Returns mask and ids of all columns, ``(B, columns)``, and keeps them so."""
        if not self._masks:
            return torch.empty(0, 0, dtype=torch.bool), torch.empty(0, 0, dtype=torch.int32)
        if len(self._masks) > 1:
            self._masks = [torch.cat(self._masks, dim=1)]
            self._ids = [torch.cat(self._ids, dim=1)]
        return self._masks[0], self._ids[0]

    def ids_of(self, row: int) -> Tensor:
        """Returns a row's token ids ``(tokens,)`` int32, padding left out; -1 where only embeddings
        were given.
        """
        mask, ids = self.all()
        return ids[row, mask[row]].clamp(min=-1) if len(mask) else ids[0:0].flatten()

    def check_beginning(
        self, text: Tensor, attention_mask: Tensor | None, embedding: nn.Module, repeats: int
    ) -> None:
        """Makes sure that a text begins with these columns.

        Args:
            text: ``(B * repeats, T)`` token ids, or ``(B * repeats, T, hidden)`` embeddings.
            attention_mask: ``(B * repeats, T)``, 0 for columns of the text that do not count.
            embedding: gives the embeddings of token ids.
            repeats: rows of the text for each row here.

        Raises:
            ValueError: it does not; the message names the first column that differs.
        """
        mask, ids = (
            each[:, : text.shape[1]].repeat_interleave(repeats, dim=0) for each in self.all()
        )
        comparable = mask & (ids != -1)
        if attention_mask is not None and attention_mask.shape[1] == text.shape[1]:
            comparable = comparable & attention_mask[:, : ids.shape[1]].bool().cpu()
        differs = comparable & _is_other_text(text[:, : ids.shape[1]], ids, embedding)
        found = differs.any(0).nonzero()
        if len(found) == 0 and text.shape[1] >= len(self):
            return
        column = text.shape[1]
        how = "the text ends there"
        if len(found):
            column = int(found[0])
            row = int(differs[:, column].nonzero()[0])
            got = f"token {int(text[row, column])}" if text.ndim == 2 else "another embedding"
            known = int(ids[row, column])
            held = f"token {known}" if known >= 0 else "an embedding"
            how = f"row {row} has {got}, the cache {held}"
        raise ValueError(
            f"expected a text that begins with the {len(self)} columns that the cache has read, "
            f"got one that differs from column {column} on ({how}); pass the whole text, or new "
            "text with an attention_mask over all columns"
        )

    def are_read_with(self, mask: Tensor) -> bool:
        """Whether a mask ``(B, columns)``, bool on the CPU, is that of all columns; nothing is
        copied.
        """
        parts = (
            torch.split(mask, [each.shape[1] for each in self._masks], dim=1)
            if mask.shape[1] == len(self)
            else ()
        )
        return len(parts) > 0 and all(
            torch.equal(*pair) for pair in zip(parts, self._masks, strict=True)
        )

    def check_mask(self, wanted: Tensor, repeats: int = 1) -> None:
        """Makes sure that a mask ``(B * repeats, columns)``, bool, takes back no more than the last
        tokens of rows.

        Raises:
            ValueError: another shape, a 0 over a token that is followed by one that stays, or a 1
                over padding.
        """
        mask = self.all()[0].repeat_interleave(repeats, dim=0)
        if wanted.shape != mask.shape:
            raise ValueError(
                f"attention_mask: expected shape {tuple(mask.shape)} over the columns that were "
                f"read, got {tuple(wanted.shape)}"
            )
        column = torch.arange(1, mask.shape[1] + 1)
        last = (wanted * column).amax(1, keepdim=True)
        for wrong, what in (
            (wanted & ~mask, "1 over a column that was read as padding"),
            (mask & ~wanted & (column < last), "0 over a token before one that stays"),
        ):
            if bool(wrong.any()):
                row, place = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"attention_mask: expected the mask that row {row} was read with, or 0 from "
                    f"one of its tokens on, got {what} (column {place}); read the text anew"
                )


def sketch_of(embeds: Tensor) -> Tensor:
    """Returns an integer from -SKETCH to -2 for each embedding ``(..., hidden)``: others seldom
    have a near one.

    It is the cosine to one fixed direction, so that rounding moves it little.
    """
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(embeds.shape[-1], generator=random).to(embeds.device)
    values = embeds.detach().float()
    cosine = (values * direction / direction.norm()).sum(-1) / values.norm(dim=-1).clamp(min=1e-30)
    sketches: Tensor = (
        (-SKETCH / 2 * (1 + cosine.cpu().double())).clamp(-SKETCH, -2).to(torch.int32)
    )
    return sketches


def _is_other_text(text: Tensor, ids: Tensor, embedding: nn.Module) -> Tensor:
    """Where a text ``(B, T)``, or its embeddings ``(B, T, hidden)``, is not that of ids or
    sketches, ``(B, T)``.
    """
    if text.ndim == 2 and bool((ids >= -1).all()):
        return text.cpu() != ids
    parts = []
    device = device_of(embedding)
    for begin in range(0, ids.shape[1], COMPARED_COLUMNS):
        columns = slice(begin, begin + COMPARED_COLUMNS)
        known = ids[:, columns]
        given = text[:, columns]
        if given.ndim == 2:
            sketches = sketch_of(embedding(given.to(device)))
            other = given.cpu() != known
        else:
            sketches = sketch_of(given)
            expected = embedding(known.clamp(min=0).to(device)).float()
            apart = (given.to(expected.device).float() - expected).norm(dim=-1)
            other = (apart > SAME_EMBEDDING * expected.norm(dim=-1)).cpu()
        parts.append(torch.where(known < -1, (sketches - known).abs() > SAME_SKETCH, other))
    return torch.cat(parts, dim=1) if parts else ids.bool()


def device_of(embedding: nn.Module) -> torch.device:
    """Returns where ids for an embedding may lie: by its first weight, anywhere if that is
    offloaded.
    """
    weight = next(itertools.chain(embedding.parameters(), embedding.buffers()), None)
    return torch.device("cpu") if weight is None or weight.is_meta else weight.device
