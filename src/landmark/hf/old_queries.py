"""Sums of queries, as retrieval scores old landmarks with them.

A landmark's score is linear in the query. So the sum of its scores for several tokens is its score
for the sum of their queries, whatever the number of landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory


def old_queries(memory: LayerMemory, query: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Returns queries as retrieval scores old landmarks with them under ``stingy``.

    These are the queries of a text that is long enough to have all its local blocks.

    Args:
        memory: of their layer.
        query: ``(B, H, T, D)``, not rotated.
        offsets: ``(B, T)`` place of each query inside its block.
        scale: the softmax scale.

    Returns:
        ``(B, H, T, D)``, at least float32.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    distance = torch.tensor(
        memory.config.top_k + 1 + memory.config.local_blocks, device=query.device
    )
    inside = memory.tables.by_offset(offsets, query.dtype)[:, None].rotate(query).to(precise)
    return memory.tables.by_distance(distance, precise, int(distance)).rotate(inside * scale)


class QuerySums:
    """An observer of a ``LandmarkCache`` that sums up the queries of each layer.

    Args:
        slots: ``(B, n)`` slots of each row whose queries count, -1 for none; ``None`` for all.

    Attributes:
        totals: by layer, ``(B, H, D)``: the sum over these slots, see ``old_queries``.
    """

    def __init__(self, slots: Tensor | None = None) -> None:
        self.slots = slots
        self.totals: dict[int, Tensor] = {}

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        """Adds the queries ``(B, H, T, D)`` of one call of one layer."""
        counts = geometry.slots >= 0
        if self.slots is not None:
            slots = self.slots.to(query.device)
            counts = counts & (geometry.slots[:, :, None] == slots[:, None]).any(-1)
        queries = old_queries(memory, query, geometry.offsets, scale)
        summed = queries.masked_fill(~counts[:, None, :, None], 0).sum(2)
        before = self.totals.get(memory.layer)
        self.totals[memory.layer] = summed if before is None else before + summed
