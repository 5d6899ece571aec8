"""Reads a transformers architecture's rotary embedding into ``landmark.rotary.Rotary``, or refuses
it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from landmark.rotary import Rotary

PROBED_POSITIONS = 97
TOLERANCE = 1e-4  # the architecture computes its angles in float32


def layer_types(config: Any) -> tuple[str | None, ...]:
    """Returns the rotary type of each layer; ``None`` where the architecture has one for all."""
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    return tuple(types[:count]) if types else (None,) * count


def trained_positions(config: Any) -> int:
    """Returns the positions that the frequencies which ``read_rotaries`` reads were trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    short = (
        rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope"
        else None
    )
    return int(short or config.max_position_embeddings)


def read_rotaries(decoder: nn.Module) -> dict[str | None, Rotary]:
    """Returns the rotary embedding of each layer type of a decoder.

    Frequencies come from a fresh float32 copy of the rotary module, so a model's dtype or device
    does not matter; those of length-dependent kinds (dynamic, longrope) are the ones used for short
    texts.

    Raises:
        ValueError: the decoder has no rotary embedding, or one that is not a rotation of pairs of
            the first columns.
    """
    name = type(decoder).__name__
    module = getattr(decoder, "rotary_emb", None)
    if module is None:
        raise ValueError(
            f"{name} has no rotary embedding (RoPE): landmark positions need one; use a RoPE model"
        )
    with torch.device("cpu"), torch.no_grad():
        fresh = type(module)(config=decoder.config)
        by_type = "layer_type" in inspect.signature(type(module).forward).parameters
        kinds = set(layer_types(decoder.config)) if by_type else {None}
        rotaries = {
            kind: _read(fresh, kind, _apply_function(decoder), _head_dim(decoder.config))
            for kind in kinds
        }
    if None in kinds:
        return dict.fromkeys(layer_types(decoder.config), rotaries[None])
    return rotaries


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _apply_function(decoder: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    for base in type(decoder).__mro__:
        function = getattr(sys.modules[base.__module__], "apply_rotary_pos_emb", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise ValueError(
        f"{type(decoder).__name__} has no apply_rotary_pos_emb: its rotary embedding is not "
        "supported"
    )


def _read(
    module: nn.Module, kind: str | None, apply: Callable[..., tuple[Tensor, Tensor]], dim: int
) -> Rotary:
    cos, sin = _angles(module, kind, torch.ones(1, dim, dtype=torch.long))
    try:
        apply(
            torch.eye(dim).expand(1, 1, dim, dim), torch.eye(dim).expand(1, 1, dim, dim), cos, sin
        )
    except (
        RuntimeError
    ):  # an architecture that cuts the rotated columns off before it calls this function
        dim = cos.shape[-1]
        cos = cos[:, :dim]
        sin = sin[:, :dim]
    eye = torch.eye(dim).expand(1, 1, dim, dim)
    scaling = float((cos**2 + sin**2).mean().sqrt())
    passing = apply(eye, eye, torch.zeros_like(cos), torch.zeros_like(sin))[0][0, 0].diagonal()
    turned = apply(eye, eye, torch.zeros_like(cos), torch.ones_like(sin))[0][0, 0]
    one = apply(eye, eye, cos / scaling, sin / scaling)[0][0, 0]
    width = int((passing == 0).sum())
    if not bool((passing[:width] == 0).all()) or width % 2:
        raise ValueError(
            "this rotary embedding does not rotate a head's first columns in pairs: it is not "
            "supported"
        )
    turned = turned[:width, :width]
    partner = turned.abs().argmax(0)
    signs = turned.gather(0, partner[None])[0]
    place = torch.arange(width)
    interleaved = bool((partner == (place ^ 1)).all())
    if not interleaved and not bool((partner == (place + width // 2) % width).all()):
        raise ValueError(
            "this rotary embedding pairs columns in an unknown order: it is not supported"
        )
    estimate = torch.atan2((one[partner, place] * signs).double(), one.diagonal()[:width].double())
    known = _inverse_frequencies(module, kind).double()
    frequencies = known[(estimate[:, None] - known).abs().argmin(1)]
    rotary = Rotary(frequencies, signs.double(), interleaved)
    _verify(rotary, module, kind, apply, dim, scaling)
    return rotary


def _angles(module: nn.Module, kind: str | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.zeros(1, positions.shape[1], 1, dtype=torch.float32)
    cos, sin = module(like, positions) if kind is None else module(like, positions, kind)
    return cos, sin


def _inverse_frequencies(module: nn.Module, kind: str | None) -> Tensor:
    found = getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{type(module).__name__} keeps no inverse frequencies: this rotary embedding is not "
            "supported"
        )
    return found


def _verify(
    rotary: Rotary,
    module: nn.Module,
    kind: str | None,
    apply: Callable[..., Any],
    dim: int,
    scaling: float,
) -> None:
    positions = torch.arange(PROBED_POSITIONS)
    x = (
        torch.linspace(-1, 1, PROBED_POSITIONS * dim, dtype=torch.float32)
        .view(1, 1, PROBED_POSITIONS, dim)
        .sin()
    )
    cos, sin = _angles(module, kind, positions[None])
    expected = apply(x, x, cos / scaling, sin / scaling)[0]
    error = float((rotary.rotation(positions, x.dtype).rotate(x) - expected).abs().max())
    if error > TOLERANCE:
        raise ValueError(
            f"{type(module).__name__} could not be reproduced (error {error:.1e}): it is not "
            "supported"
        )
