"""Top-k with a fixed rule for ties: of equal scores the lower index wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def select_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the indices of the ``k`` highest scores along the last dimension.

    Of equal scores the lower index is taken. ``torch.topk`` promises no order among ties and
    differs between devices. So its indices are used only for scores above the k-th value. Those
    equal to it are taken from the lower index on, by integer keys that never tie.

    Args:
        scores: (..., N). ``-inf`` and NaN are never taken.
        k: indices wanted, at least 1.

    Returns:
        ``indices`` (..., K) int64 and ``valid`` (..., K) bool, with ``K = min(k, N)``. Valid
        indices come first and ascend; the others are 0.
    """
    count = scores.shape[-1]
    k = min(k, count)
    scores = scores.detach()
    index = torch.arange(count, device=scores.device, dtype=torch.int32)
    if k == count:
        key = torch.where(scores > -torch.inf, count - index, 0)
    else:
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best, found = scores.topk(k, dim=-1)
        least = best[..., -1:]
        above = best > least
        tied = torch.where(scores == least, count - index, 0).topk(k, dim=-1).values
        wanted = (index[:k] < k - above.sum(dim=-1, keepdim=True)) & (least > -torch.inf)
        key = torch.cat(
            [torch.where(above, count - found, 0), torch.where(wanted, tied, 0)], dim=-1
        )
    key = key.sort(dim=-1, descending=True).values[..., :k].long()
    valid = key > 0
    return torch.where(valid, count - key, 0), valid


def with_forced(selected: Tensor, forced: Tensor) -> Tensor:
    """Returns selected blocks with the forced ones in place of the last that are none of them.

    Args:
        selected: (B, H, T, K) blocks, those of highest score first; -1 for none.
        forced: (B, T, F) blocks; -1 for none. Of more than K the lower ones are taken.

    Returns:
        (B, H, T, K): the forced blocks, ascending, then the others in their order; -1 for none.
    """
    none = torch.iinfo(forced.dtype).max
    forced = torch.where(forced < 0, none, forced).sort(dim=-1).values
    repeated = torch.zeros_like(forced, dtype=torch.bool)
    repeated[..., 1:] = forced[..., 1:] == forced[..., :-1]
    forced = torch.where(repeated | (forced == none), -1, forced)[:, None].to(selected.dtype)
    is_forced = (selected[..., :, None] == forced[..., None, :]).any(dim=-1)
    others = torch.where(is_forced, -1, selected)
    both = torch.cat([forced.expand(*selected.shape[:-1], -1), others], dim=-1)
    stays = both >= 0
    most = selected.shape[-1]
    # What does not stay, or is one too many, goes to one more column that is cut off.
    column = torch.where(stays, stays.cumsum(dim=-1) - 1, most).clamp(max=most)
    found = both.new_full((*both.shape[:-1], most + 1), -1)
    return found.scatter_(-1, column, both)[..., :most].contiguous()


class TopK(NamedTuple):
    """The ``k`` highest of some scores, ordered as by ``select_top``.

    Attributes:
        scores: (..., K), ``-inf`` where not valid.
        indices: (..., K) int64.
        valid: (..., K) bool.
    """

    scores: Tensor
    indices: Tensor
    valid: Tensor


def running_top_k(scores: Callable[[int, int], Tensor], count: int, k: int, at_once: int) -> TopK:
    """Returns the ``k`` highest of ``count`` scores while few of them are alive at a time.

    Args:
        scores: called with ``begin, end``; returns the scores ``(..., end - begin)`` of these
            indices.
        count: N, how many scores there are, at least 1.
        k: indices wanted, at least 1.
        at_once: scores computed at once, at least 1.

    Returns:
        What ``select_top`` would give for all scores together, ``K = min(k, count)``.
    """
    best: TopK | None = None
    for begin in range(0, count, at_once):
        part = _top_k(scores(begin, min(count, begin + at_once)), k)
        part = part._replace(indices=part.indices + begin)
        best = part if best is None else _merge(best, part, k)
    assert best is not None
    return best


def _top_k(scores: Tensor, k: int) -> TopK:
    indices, valid = select_top(scores, k)
    return TopK(scores.gather(-1, indices).masked_fill(~valid, -torch.inf), indices, valid)


def _merge(earlier: TopK, later: TopK, k: int) -> TopK:
    """Returns the ``k`` highest of two parts; all indices of ``earlier`` are the lower ones."""
    scores = torch.cat((earlier.scores, later.scores), dim=-1)
    indices = torch.cat((earlier.indices, later.indices), dim=-1)
    merged = _top_k(scores, k)
    return merged._replace(indices=torch.where(merged.valid, indices.gather(-1, merged.indices), 0))
