"""A plain model with a window: every query attends to the first block and to the latest tokens.

The comparison that a landmark model has to beat. The first block stays because it serves as
attention sink; distances to it are capped at what fits the window, so no position beyond ``SINK +
window`` is used (Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
2309.17453). Memory is linear in the length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SINK = 64
_NAME = "landmark_eval_window"
_QUERIES = 512


@dataclass(frozen=True)
class _Window:
    """A window of ``size`` latest tokens, and the rotary embedding of the model."""

    size: int
    rotary: Any

    def rotate(self, module: Any, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates ``x (B, heads, T, D)`` to ``positions (T,)`` as the architecture does it."""
        apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
        cos, sin = self.rotary(x, positions[None])
        rotated: Tensor = apply(x, x, cos, sin)[0]
        return rotated


@contextmanager
def window_attention(model: Any, window: int) -> Iterator[Callable[[Tensor], dict[str, Any]]]:
    """Gives ``model`` the windowed attention inside a ``with``.

    Yields a function from input ids ``(B, T)`` to the further arguments of the model's forward.

    Raises:
        ValueError: the architecture has no rotary embedding to place keys with.
    """
    from transformers import AttentionInterface

    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None:
        raise ValueError(
            "window: expected a model with rotary position embedding, got "
            f"{type(model).__name__}; leave it out"
        )
    AttentionInterface.register(_NAME, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield lambda ids: {
            "position_ids": torch.zeros_like(ids[:1]),
            "sink_window": _Window(window, rotary),
        }
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    sink_window: _Window,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attends as an attention function of transformers.

    Unrotated ``(B, H, T, D)`` in, ``(B, T, H, D)`` out.
    """
    length = query.shape[2]
    window = sink_window.size
    scale = rest.get("scaling") or query.shape[-1] ** -0.5
    positions = torch.arange(length, device=query.device)
    sink = min(SINK, length)
    capped = sink_window.rotate(module, query, positions.clamp(max=SINK + window - 1)) * scale
    query = sink_window.rotate(module, query, positions) * scale
    key = sink_window.rotate(module, key, positions)
    parts = []
    for start in range(0, length, _QUERIES):
        stop = min(start + _QUERIES, length)
        first = max(0, start - window + 1)
        queries = positions[start:stop, None]
        keys = positions[None, first:stop]
        latest = (keys <= queries) & (keys > queries - window) & (keys >= SINK)
        seen = torch.cat((positions[None, :sink] <= queries, latest), dim=1)
        scores = torch.cat(
            (
                _scores(capped[:, :, start:stop], key[:, :, :sink]),
                _scores(query[:, :, start:stop], key[:, :, first:stop]),
            ),
            dim=-1,
        )
        precise = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.to(precise).masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
        values = torch.cat((value[:, :, :sink], value[:, :, first:stop]), dim=2)
        parts.append((weights @ values[:, :, None]).flatten(1, 2))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Scores ``(B, G, H / G, T, S)`` of ``query (B, H, T, D)`` with ``key (B, G, S, D)``."""
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], length, width)
    return torch.matmul(grouped, key[:, :, None].transpose(-1, -2))
