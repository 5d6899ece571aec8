"""Geometry of blocks: where landmarks are inserted, and which block a key or query belongs to.

A block is ``block_size - 1`` text tokens followed by one landmark, counted from the first text
token of a row (or of a document in a packed row), never from padding. A *token index* counts text
tokens only; a *slot* counts text tokens and landmarks. Source: Mohtashami and Jaggi, arXiv
2305.16300, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)

IGNORE = -100


def slots_for(tokens: IntOrTensor, block_size: int) -> IntOrTensor:
    """Returns how many slots ``tokens`` text tokens take, landmarks included.

    A landmark follows at once on the last text token of its block.
    """
    return tokens + tokens // (block_size - 1)


def tokens_for(slots: IntOrTensor, block_size: int) -> IntOrTensor:
    """Returns how many of the first ``slots`` slots are text tokens."""
    return slots - slots // block_size


def slot_of(token_index: IntOrTensor, block_size: int) -> IntOrTensor:
    """Returns the slot of the text token with index ``token_index``."""
    return token_index + token_index // (block_size - 1)


def insert_landmarks(
    input_ids: Tensor, *, block_size: int, landmark_id: int, starts: Tensor | None = None
) -> Tensor:
    """Inserts a landmark after every ``block_size - 1`` text tokens.

    Args:
        input_ids: (..., T) integers; (B, T) where ``starts`` is given.
        block_size: slots of a block, landmark included.
        landmark_id: the id to insert.
        starts: (B,) index of the first text token of each row; the tokens before it are padding.

    Returns:
        (..., slots_for(T, block_size)). Rows stay aligned at their right end: the text of row ``b``
        begins at slot ``slot_starts(starts, T, block_size)[b]``, and the padding before it repeats
        the row's first id.

    Raises:
        ValueError: ``block_size`` is below 2, ids are no integers, or ``starts`` does not fit them.
    """
    _check_ids(input_ids, block_size, starts)
    tokens = input_ids.shape[-1]
    slot = torch.arange(slots_for(tokens, block_size), device=input_ids.device)
    if starts is None:
        landmark = slot % block_size == block_size - 1
        source = tokens_for(slot, block_size)
        text = input_ids[..., source.clamp(max=max(tokens - 1, 0))]
        return torch.where(landmark, landmark_id, text)
    starts = starts.to(input_ids.device)[:, None]
    offset = slot - slot_starts(starts, tokens, block_size)
    landmark = (offset >= 0) & (offset % block_size == block_size - 1)
    source = torch.where(offset < 0, 0, starts + tokens_for(offset, block_size))
    text = input_ids.gather(1, source.clamp(max=max(tokens - 1, 0)))
    return torch.where(landmark, landmark_id, text)


def strip_landmarks(input_ids: Tensor, *, block_size: int, starts: Tensor | None = None) -> Tensor:
    """Removes the ids at landmark slots; the inverse of ``insert_landmarks``.

    Args:
        input_ids: (..., S) ids with landmarks; (B, S) where ``starts`` is given.
        block_size: slots of a block, landmark included.
        starts: (B,) slot of the first text token of each row (``slot_starts`` gives it).

    Returns:
        (..., tokens_for(S, block_size)), rows aligned at their right end.

    Raises:
        ValueError: as ``insert_landmarks``.
    """
    _check_ids(input_ids, block_size, starts)
    slots = input_ids.shape[-1]
    token = torch.arange(tokens_for(slots, block_size), device=input_ids.device)
    if starts is None:
        return input_ids[..., slot_of(token, block_size)]
    starts = starts.to(input_ids.device)[:, None]
    padding = tokens_for(slots, block_size) - tokens_for(slots - starts, block_size)
    source = torch.where(token < padding, 0, starts + slot_of(token - padding, block_size))
    return input_ids.gather(1, source)


def slot_starts(starts: IntOrTensor, tokens: int, block_size: int) -> IntOrTensor:
    """Returns the slot where a row's text begins after ``insert_landmarks``.

    Args:
        starts: index of the row's first text token before.
        tokens: tokens of the row before, padding included.
        block_size: slots of a block, landmark included.
    """
    return slots_for(tokens, block_size) - slots_for(tokens - starts, block_size)


def slot_labels(labels: Tensor, *, block_size: int, starts: Tensor | None = None) -> Tensor:
    """Returns the next-token target of every slot, already shifted.

    A text token predicts the next *text* token, also across a landmark. A landmark predicts
    nothing.

    Args:
        labels: (..., T) targets aligned with the text ids, ``IGNORE`` where there is no loss.
        block_size: slots of a block, landmark included.
        starts: (B,) index of the first text token of each row; padding gets ``IGNORE``.

    Returns:
        (..., slots_for(T, block_size)), ``IGNORE`` at landmarks, padding and the last text token.

    Raises:
        ValueError: as ``insert_landmarks``.
    """
    _check_ids(labels, block_size, starts)
    shifted = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORE)], dim=-1)
    if starts is not None:
        index = torch.arange(labels.shape[-1], device=labels.device)
        shifted = torch.where(index < starts.to(labels.device)[:, None], IGNORE, shifted)
    return insert_landmarks(shifted, block_size=block_size, landmark_id=IGNORE, starts=starts)


class SlotGrid(NamedTuple):
    """Block of each slot of a batch; ``R`` is B, or 1 where all rows are alike.

    Attributes:
        block: (R, S) number of the slot's block within its row, -1 for padding. Numbers grow along
            the row, and no two documents share one.
        landmark: (R, S) whether the slot is a landmark.
        first: (R, S) number of the first block of the slot's document.
    """

    block: Tensor
    landmark: Tensor
    first: Tensor


def key_grid(
    length: int,
    *,
    block_size: int,
    starts: Tensor | None = None,
    segments: Tensor | None = None,
    landmarks: Tensor | None = None,
    device: torch.device | str | None = None,
) -> SlotGrid:
    """Numbers the blocks of ``length`` keys.

    Args:
        length: S, the number of slots.
        block_size: slots of a block, landmark included; unused where ``landmarks`` is given.
        starts: (B,) slot of each row's first text; the slots before it are padding.
        segments: (B, S) ids of documents; a document is a run of equal ids.
        landmarks: (B, S) booleans, whether a slot is a landmark; blocks may have any length.
        device: device of the grid.
    """
    slot = torch.arange(length, device=device)[None]
    origin = (
        torch.zeros_like(slot) if starts is None else starts.to(slot.device, slot.dtype)[:, None]
    )
    begins = slot == origin
    if segments is not None:
        run = torch.ones_like(segments, dtype=torch.bool)
        run[:, 1:] = segments[:, 1:] != segments[:, :-1]
        begins = begins | run
        origin = torch.where(begins, slot, 0).cummax(dim=1).values
    padding = slot < (0 if starts is None else starts.to(slot.device)[:, None])
    if landmarks is None:
        landmark = ((slot - origin) % block_size == block_size - 1) & ~padding
    else:
        landmark = landmarks & ~padding
    after = torch.zeros_like(begins.expand_as(landmark | begins))
    after[:, 1:] = landmark[:, :-1]
    block = ((begins | after) & ~padding).cumsum(dim=1) - 1
    first = torch.where(begins & ~padding, block, -1).cummax(dim=1).values
    return SlotGrid(block, landmark, first)


def query_blocks(
    grid: SlotGrid, queries: Tensor, *, block_size: int, regular: bool
) -> tuple[Tensor, Tensor]:
    """Returns the own block of each query and the first block of its document.

    Args:
        grid: the grid of the keys.
        queries: (T,) slots of the queries. From S on a query lies behind all keys. On a regular
            grid it is in the block that its slot falls into; otherwise in the last block, or in a
            new one where a landmark closed that.
        block_size: slots of a block, landmark included.
        regular: whether every ``block_size``-th slot is a landmark.

    Returns:
        (R, T) own block and (R, T) first block; the own block is -1 for padding.
    """
    length = grid.block.shape[1]
    if length == 0:
        block = queries // block_size if regular else torch.zeros_like(queries)
        return block.expand(grid.block.shape[0], -1), torch.zeros_like(block).expand(
            grid.block.shape[0], -1
        )
    inside = queries.clamp(max=length - 1)
    block = grid.block[:, inside]
    first = grid.first[:, inside]
    beyond = queries - (length - 1)
    if regular:
        last = grid.block[:, -1:]
        filled = (grid.block == last).sum(dim=1, keepdim=True)
        later = last + (filled - 1 + beyond) // block_size
    else:
        later = grid.block[:, -1:] + grid.landmark[:, -1:].long()
    return torch.where(beyond > 0, torch.where(grid.block[:, -1:] < 0, -1, later), block), first


def _check_ids(ids: Tensor, block_size: int, starts: Tensor | None) -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2:
        raise ValueError(
            f"block_size: expected an integer of at least 2, got {block_size!r}; one text token "
            "and one landmark are the least"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() == 0:
        raise ValueError(
            f"ids: expected integers of shape (..., T), got {ids.dtype} of shape "
            f"{tuple(ids.shape)}; pass token ids"
        )
    if starts is None:
        return
    if (
        ids.dim() != 2
        or starts.shape != ids.shape[:1]
        or starts.is_floating_point()
        or starts.dtype == torch.bool
    ):
        raise ValueError(
            f"starts: expected integers of shape (B,) for ids of shape (B, T), got {starts.dtype} "
            f"of shape {tuple(starts.shape)} for {tuple(ids.shape)}; pass the index of each row's "
            "first text token"
        )
