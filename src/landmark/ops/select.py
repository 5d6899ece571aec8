"""Selection of the best blocks with a rule for ties: the lower index wins."""

from __future__ import annotations

import torch
from torch import Tensor


def select_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best places along the last dimension; equal scores are taken from the lower index on.

    ``torch.topk`` promises no order among ties and differs between devices. Here it only finds the k-th value; places
    above it, then places equal to it from the lower index on, are picked by integer keys that never tie.

    Args:
        scores: (..., N). ``-inf`` and NaN are never chosen.
        k: places wanted, at least 1.

    Returns:
        ``indices`` (..., K) int64 and ``valid`` (..., K) bool, ``K = min(k, N)``. Indices ascend; places that could not
        be filled come last, hold index 0 and are not valid.
    """
    count = scores.shape[-1]
    k = min(k, count)
    scores = scores.detach()
    place = torch.arange(count, device=scores.device, dtype=torch.int32)
    key = torch.where(scores > -torch.inf, count - place, 0)
    if k < count:
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        least = scores.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        key = torch.where(scores > least, key + count, torch.where(scores == least, key, 0))
        key = key.topk(k, dim=-1, sorted=False).values
        key = torch.where(key > count, key - count, key)
    key = key.sort(dim=-1, descending=True).values.long()
    valid = key > 0
    return torch.where(valid, count - key, 0), valid
