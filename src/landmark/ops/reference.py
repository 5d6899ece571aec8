"""The definition of landmark attention in plain PyTorch: slow and clear.

It makes a T x S tensor of scores and expands key/value heads. Every other implementation is
compared with this file, and it calls none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.blocks import key_grid, query_blocks
from landmark.ops.metadata import AttentionMetadata
from landmark.ops.select import select_top


def reference(
    query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata
) -> tuple[Tensor, Tensor]:
    """Computes landmark attention as it is defined.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        metadata: the other arguments, as checked by ``landmark_attention``.

    Returns:
        Output (B, H, T, D) and the gate's log-sum-exp (B, H, T).
    """
    if key.shape[2] == 0:
        return query * 0, query.new_full(query.shape[:3], -torch.inf)
    exact = torch.promote_types(query.dtype, torch.float32)
    group_size = query.shape[1] // key.shape[1]
    keys = key.to(exact).repeat_interleave(group_size, dim=1)
    values = value.to(exact).repeat_interleave(group_size, dim=1)
    scores = metadata.scale * (query.to(exact) @ keys.transpose(-1, -2))

    length = key.shape[2]
    device = key.device
    grid = key_grid(
        length,
        block_size=metadata.block_size,
        starts=metadata.starts,
        segments=metadata.segments,
        landmarks=metadata.landmarks,
        device=device,
    )
    slots = torch.arange(query.shape[2], device=device) + metadata.query_start
    own_block, first_block = query_blocks(
        grid, slots, block_size=metadata.block_size, regular=metadata.landmarks is None
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
    landmark_scores = empty.scatter(-1, torch.where(text, length, block), scores)[..., :length]
    inner, has_text = _softmax_by_block(scores.masked_fill(~text, -torch.inf), block)

    number = torch.arange(length, device=device)
    past = (
        (number >= first_block)
        & (number < own_block)
        & has_text[..., :length]
        & (landmark_scores > -torch.inf)
    )
    if metadata.top_k is not None:
        candidates = landmark_scores.detach().masked_fill(~past, -torch.inf)
        if metadata.forced is not None:
            forced = metadata.forced[:, None, :, :, None] == (number - first_block)[..., None, :]
            candidates = candidates.masked_fill(forced.any(dim=-2) & past, torch.inf)
        selected, valid = select_top(candidates, metadata.top_k)
        past = torch.zeros_like(landmark_scores).scatter_add(-1, selected, valid.to(exact)) > 0

    past_logits = landmark_scores.masked_fill(~past, -torch.inf)
    own_logits = scores.masked_fill(~own, -torch.inf)
    gate, lse = _softmax(torch.cat([past_logits, own_logits], dim=-1))
    gate_of_block = torch.cat([gate[..., :length], torch.zeros_like(gate[..., :1])], dim=-1)
    weights = gate[..., length:] + gate_of_block.gather(-1, block) * inner
    return (weights @ values).to(query.dtype), lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax over the last dimension and its log-sum-exp.

    Where every logit is ``-inf``, these are zeros and ``-inf``.
    """
    peak = logits.detach().amax(dim=-1, keepdim=True)
    seen = peak > -torch.inf
    weights = torch.exp(logits - torch.where(seen, peak, 0.0))
    total = torch.where(seen, weights.sum(dim=-1, keepdim=True), 1.0)
    lse = torch.where(seen, total.log() + peak, -torch.inf)
    return weights / total, lse.squeeze(-1)


def _softmax_by_block(scores: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax inside each block, and which blocks hold text.

    Args:
        scores: (..., S) scores of the keys, ``-inf`` at landmarks.
        block: (..., S) block of each key, S for padding.

    Returns:
        In-block weights (..., S), and whether a block holds text, (..., S + 1).
    """
    length = scores.shape[-1]
    peaks = scores.new_full((*scores.shape[:-1], length + 1), -torch.inf)
    peaks = peaks.scatter_reduce(-1, block, scores.detach(), "amax")
    has_text = peaks > -torch.inf
    weights = torch.exp(scores - torch.where(has_text, peaks, 0.0).gather(-1, block))
    totals = torch.zeros_like(peaks).scatter_add(-1, block, weights)
    return weights / torch.where(has_text, totals, 1.0).gather(-1, block), has_text
