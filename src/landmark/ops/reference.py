"""The definition of landmark attention in plain PyTorch, with a T x S tensor and expanded heads:
slow and clear.

Everything else is measured against this file; it calls none of the other implementations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.blocks import key_grid, query_blocks
from landmark.ops.select import select_top


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float,
    top_k: int | None,
    query_start: int,
    starts: Tensor | None,
    segments: Tensor | None,
    landmarks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and the gate's log-sum-exp (B, H, T); arguments as checked by
    ``landmark_attention``.
    """
    if key.shape[2] == 0:
        return query * 0, query.new_full(query.shape[:3], -torch.inf)
    exact = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    keys = key.to(exact).repeat_interleave(group, dim=1)
    values = value.to(exact).repeat_interleave(group, dim=1)
    scores = scale * (query.to(exact) @ keys.transpose(-1, -2))

    length = key.shape[2]
    device = key.device
    grid = key_grid(
        length,
        block_size=block_size,
        starts=starts,
        segments=segments,
        landmarks=landmarks,
        device=device,
    )
    slots = torch.arange(query.shape[2], device=device) + query_start
    own_block, first_block = query_blocks(
        grid, slots, block_size=block_size, regular=landmarks is None
    )
    key_block = grid.block[:, None, None, :]
    text = ~grid.landmark[:, None, None, :]
    own_block = own_block[:, None, :, None]
    first_block = first_block[:, None, :, None]
    own = (
        text
        & (key_block == own_block)
        & (key_block >= 0)
        & (torch.arange(length, device=device) <= slots[:, None])
    )

    # No row has more blocks than keys; padding is counted in one more.
    block = torch.where(key_block < 0, length, key_block).expand_as(scores)
    empty = scores.new_full((*scores.shape[:-1], length + 1), -torch.inf)
    marks = empty.scatter(-1, torch.where(text, length, block), scores)[..., :length]
    inner, has_text = _softmax_by_block(scores.masked_fill(~text, -torch.inf), block)

    number = torch.arange(length, device=device)
    past = (
        (number >= first_block)
        & (number < own_block)
        & has_text[..., :length]
        & (marks > -torch.inf)
    )
    if top_k is not None:
        chosen, valid = select_top(marks.detach().masked_fill(~past, -torch.inf), top_k)
        past = torch.zeros_like(marks).scatter_add(-1, chosen, valid.to(exact)) > 0

    logits = torch.cat(
        [marks.masked_fill(~past, -torch.inf), scores.masked_fill(~own, -torch.inf)], dim=-1
    )
    gate, lse = _softmax(logits)
    gate_of_block = torch.cat([gate[..., :length], torch.zeros_like(gate[..., :1])], dim=-1)
    weights = gate[..., length:] + gate_of_block.gather(-1, block) * inner
    return (weights @ values).to(query.dtype), lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; zeros and ``-inf`` where every logit is
    ``-inf``.
    """
    peak = logits.detach().amax(dim=-1, keepdim=True)
    seen = peak > -torch.inf
    weights = torch.exp(logits - torch.where(seen, peak, 0.0))
    total = torch.where(seen, weights.sum(dim=-1, keepdim=True), 1.0)
    lse = torch.where(seen, total.log() + peak, -torch.inf)
    return weights / total, lse.squeeze(-1)


def _softmax_by_block(scores: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """In-block softmax over keys (..., S) with block numbers (..., S), and which blocks (..., S +
    1) hold text.
    """
    length = scores.shape[-1]
    peaks = scores.new_full((*scores.shape[:-1], length + 1), -torch.inf)
    peaks = peaks.scatter_reduce(-1, block, scores.detach(), "amax")
    has_text = peaks > -torch.inf
    weights = torch.exp(scores - torch.where(has_text, peaks, 0.0).gather(-1, block))
    totals = torch.zeros_like(peaks).scatter_add(-1, block, weights)
    return weights / torch.where(has_text, totals, 1.0).gather(-1, block), has_text
