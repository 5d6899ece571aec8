"""Selection of the best blocks with a rule for ties: the lower index wins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def select_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best places along the last dimension; equal scores are taken from the lower index
    on.

    ``torch.topk`` promises no order among ties and differs between devices. Here its places count
    only where they lie above the k-th value; those equal to it are taken from the lower index on,
    by integer keys that never tie.

    Args:
        scores: (..., N). ``-inf`` and NaN are never chosen.
        k: places wanted, at least 1.

    Returns:
        ``indices`` (..., K) int64 and ``valid`` (..., K) bool, ``K = min(k, N)``. Indices ascend;
        places that could not be filled come last, hold index 0 and are not valid.
    """
    count = scores.shape[-1]
    k = min(k, count)
    scores = scores.detach()
    place = torch.arange(count, device=scores.device, dtype=torch.int32)
    if k == count:
        key = torch.where(scores > -torch.inf, count - place, 0)
    else:
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best, found = scores.topk(k, dim=-1)
        least = best[..., -1:]
        above = best > least
        tied = torch.where(scores == least, count - place, 0).topk(k, dim=-1).values
        wanted = (place[:k] < k - above.sum(dim=-1, keepdim=True)) & (least > -torch.inf)
        key = torch.cat(
            [torch.where(above, count - found, 0), torch.where(wanted, tied, 0)], dim=-1
        )
    key = key.sort(dim=-1, descending=True).values[..., :k].long()
    valid = key > 0
    return torch.where(valid, count - key, 0), valid


def best_of(
    scores: Callable[[int, int], Tensor], count: int, k: int, at_once: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` best of ``count`` places, as by ``select_top``, with the scores of only ``at_once``
    of them alive.

    Args:
        scores: called with ``begin, end``: the scores ``(..., end - begin)`` of these places.
        count: how many there are, at least 1.
        k: places wanted, at least 1.
        at_once: places scored at once, at least 1.

    Returns:
        scores, places and valid, ``(..., min(k, count))`` each, ordered as by ``select_top``;
        ``-inf`` where not valid.
    """
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for begin in range(0, count, at_once):
        part = _best(scores(begin, min(count, begin + at_once)), k)
        part = part[0], part[1] + begin, part[2]
        if best is not None:
            both = torch.cat((best[0], part[0]), dim=-1), torch.cat((best[1], part[1]), dim=-1)
            merged, found, valid = _best(both[0], k)
            part = merged, torch.where(valid, both[1].gather(-1, found), 0), valid
        best = part
    assert best is not None
    return best


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    found, valid = select_top(scores, k)
    return scores.gather(-1, found).masked_fill(~valid, -torch.inf), found, valid
