"""The text that a cache has read, column by column as the caller sees it, padding included.

It is compared with a text or a mask that is given later.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

COMPARED_COLUMNS = 4096  # columns embedded at once, to be compared with given embeddings
SAME_EMBEDDING = 0.01  # largest relative difference of one embedding in two precisions
SKETCH = 1 << 30  # sketches are integers from -SKETCH to -2
UNKNOWN = -1  # id of a column of which neither an id nor an embedding is known
# Of one embedding in two precisions: a cosine of 0.002, as bfloat16 moves an embedding by at most
# 2^-9 of its norm.
SAME_SKETCH = SKETCH // 1000


class Columns(NamedTuple):
    """Columns of all rows.

    Attributes:
        mask: ``(B, columns)`` bool, True for text.
        ids: ``(B, columns)`` int32 token ids, sketches of embeddings, or ``UNKNOWN``.
    """

    mask: Tensor
    ids: Tensor


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
        # (B, T) bool and (B, T) int32, each of some calls in a row; they are never written to.
        self._masks: list[Tensor] = []
        self._ids: list[Tensor] = []

    def __len__(self) -> int:
        return self._count

    def __deepcopy__(self, memo: dict[int, Any]) -> TextColumns:
        """Returns a copy, as ``copy`` does."""
        return self.copy()

    def append(self, mask: Tensor, ids: Tensor | None) -> None:
        """Adds columns.

        Args:
            mask: ``(B, T)`` bool on the CPU, True for text.
            ids: ``(B, T)`` token ids, or sketches where only embeddings are known; ``None`` for
                neither.
        """
        before = self.tokens or [0] * len(mask)
        new = mask.sum(1).tolist()
        self.tokens = [seen + more for seen, more in zip(before, new, strict=True)]
        self._masks.append(mask.clone())
        if ids is None:
            self._ids.append(torch.full(mask.shape, UNKNOWN, dtype=torch.int32))
        else:
            self._ids.append(ids.to("cpu", torch.int32, copy=True))
        # Many small tensors that stay would fragment host memory, so the last parts are joined.
        while len(self._masks) > 1 and self._masks[-2].shape[1] <= 2 * self._masks[-1].shape[1]:
            self._masks[-2:] = [torch.cat(self._masks[-2:], dim=1)]
            self._ids[-2:] = [torch.cat(self._ids[-2:], dim=1)]
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
        if self._count == 0:
            self._masks = []
            self._ids = []
            self.tokens = []
            return
        self._masks = [mask]
        self._ids = [ids]
        self.tokens = mask.sum(1).tolist()

    def all(self) -> Columns:
        """Returns all columns; joined, they are kept so."""
        if not self._masks:
            empty = torch.empty(0, 0)
            return Columns(mask=empty.bool(), ids=empty.int())
        if len(self._masks) > 1:
            self._masks = [torch.cat(self._masks, dim=1)]
            self._ids = [torch.cat(self._ids, dim=1)]
        return Columns(self._masks[0], self._ids[0])

    def ids_of(self, row: int) -> Tensor:
        """Returns the token ids of a row, ``(tokens,)`` int32, padding left out.

        An id is ``UNKNOWN`` where only an embedding was given.
        """
        columns = self.all()
        if len(columns.mask) == 0:
            return columns.ids.flatten()
        return columns.ids[row, columns.mask[row]].clamp(min=UNKNOWN)

    def check_beginning(
        self, text: Tensor, attention_mask: Tensor | None, embedding: nn.Module, repeats: int
    ) -> None:
        """Makes sure that a text begins with these columns.

        Args:
            text: ``(B * repeats, T)`` token ids, or ``(B * repeats, T, hidden)`` embeddings.
            attention_mask: ``(B * repeats, T)``, 0 for columns of the text that do not count.
            embedding: the module that embeds token ids.
            repeats: rows of the text for each row here.

        Raises:
            ValueError: the text begins otherwise; the message names the first column that differs.
        """
        columns = self.all()
        mask = columns.mask[:, : text.shape[1]].repeat_interleave(repeats, dim=0)
        ids = columns.ids[:, : text.shape[1]].repeat_interleave(repeats, dim=0)
        comparable = mask & (ids != UNKNOWN)
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
        """Returns whether a mask is that of all columns, without a copy.

        Args:
            mask: ``(B, columns)`` bool on the CPU.
        """
        if not self._masks or mask.shape[1] != len(self):
            return False
        widths = [each.shape[1] for each in self._masks]
        parts = torch.split(mask, widths, dim=1)
        return all(torch.equal(ours, given) for ours, given in zip(self._masks, parts, strict=True))

    def check_mask(self, wanted: Tensor, repeats: int = 1) -> None:
        """Makes sure that a mask removes no more than the last tokens of rows.

        Args:
            wanted: ``(B * repeats, columns)`` bool.
            repeats: rows of the mask for each row here.

        Raises:
            ValueError: another shape, a 0 over a token that is followed by one that stays, or a 1
                over padding.
        """
        mask = self.all().mask.repeat_interleave(repeats, dim=0)
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
                row, wrong_column = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"attention_mask: expected the mask that row {row} was read with, or 0 from "
                    f"one of its tokens on, got {what} (column {wrong_column}); read the text "
                    "anew"
                )


def sketch_of(embeds: Tensor) -> Tensor:
    """Returns a sketch of each embedding ``(..., hidden)``: an integer from -SKETCH to -2.

    It is the cosine to one fixed direction, so that rounding moves it little, and other embeddings
    seldom have a near one.
    """
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(embeds.shape[-1], generator=random).to(embeds.device)
    values = embeds.detach().float()
    cosine = (values * direction / direction.norm()).sum(-1) / values.norm(dim=-1).clamp(min=1e-30)
    scaled = -SKETCH / 2 * (1 + cosine.cpu().double())
    sketches: Tensor = scaled.clamp(-SKETCH, -2).to(torch.int32)
    return sketches


def _is_other_text(text: Tensor, ids: Tensor, embedding: nn.Module) -> Tensor:
    """Returns where a text differs from known columns, ``(B, T)`` bool.

    Args:
        text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
        ids: ``(B, T)`` token ids or sketches.
        embedding: the module that embeds token ids.
    """
    if text.ndim == 2 and bool((ids >= UNKNOWN).all()):
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
        other_sketch = (sketches - known).abs() > SAME_SKETCH
        parts.append(torch.where(known < UNKNOWN, other_sketch, other))
    return torch.cat(parts, dim=1) if parts else ids.bool()


def device_of(embedding: nn.Module) -> torch.device:
    """Returns the device that token ids for an embedding have to be on.

    It is that of the first weight. An embedding without weights, or with offloaded ones, takes them
    from the CPU.
    """
    weight = next(itertools.chain(embedding.parameters(), embedding.buffers()), None)
    if weight is None or weight.is_meta:
        return torch.device("cpu")
    return weight.device
