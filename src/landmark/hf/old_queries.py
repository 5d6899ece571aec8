"""Queries as retrieval scores old landmarks with them."""

from __future__ import annotations

import torch
from torch import Tensor

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
