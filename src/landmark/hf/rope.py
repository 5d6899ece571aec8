"""Reads the rotary embedding of an architecture into a ``landmark.rotary.Rotary``, or refuses it.

It is probed with unit vectors, as architectures differ in what they rotate and how.
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
TOLERANCE = 1e-4  # architectures compute angles in float32


def layer_types(config: Any) -> tuple[str | None, ...]:
    """Returns the rotary type of each layer; ``None`` where the architecture has one for all."""
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    return tuple(types[:count]) if types else (None,) * count


def trained_positions(config: Any) -> int:
    """Returns the positions that a model was trained on.

    Under longrope these are the positions that the frequencies for short texts were trained on,
    which ``read_rotaries`` reads.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        short = rope.get("original_max_position_embeddings")
        if short:
            return int(short)
    return int(config.max_position_embeddings)


def read_rotaries(decoder: nn.Module) -> dict[str | None, Rotary]:
    """Returns the rotary embedding of each layer type of a decoder.

    Frequencies come from a new float32 copy of the rotary module, so the dtype and device of the
    model do not matter. Length-dependent kinds (dynamic, longrope) give those for short texts.

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
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _apply_function(decoder: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the function by which the decoder's architecture applies RoPE."""
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
    """Reads one rotary type of a rotary module.

    Args:
        module: the rotary module, in float32 on the CPU.
        kind: the rotary type, ``None`` where the module has one.
        apply: the function by which the architecture applies it.
        dim: dimension of a head.

    Raises:
        ValueError: it is not a rotation of pairs of the first columns.
    """
    cos, sin = _angles(module, kind, torch.ones(1, dim, dtype=torch.long))
    eye = torch.eye(dim).expand(1, 1, dim, dim)
    try:
        apply(eye, eye, cos, sin)
    except RuntimeError:
        # Some architectures pass this function the rotated columns alone.
        dim = cos.shape[-1]
        cos = cos[:, :dim]
        sin = sin[:, :dim]
        eye = torch.eye(dim).expand(1, 1, dim, dim)
    scaling = float((cos**2 + sin**2).mean().sqrt())
    zeros = torch.zeros_like(cos)
    passing = apply(eye, eye, zeros, zeros)[0][0, 0].diagonal()  # 1 where a column is not rotated
    turned = apply(eye, eye, zeros, torch.ones_like(sin))[0][0, 0]  # rotated by a right angle
    one = apply(eye, eye, cos / scaling, sin / scaling)[0][0, 0]  # at position 1
    width = int((passing == 0).sum())
    if not bool((passing[:width] == 0).all()) or width % 2:
        raise ValueError(
            "this rotary embedding does not rotate a head's first columns in pairs: it is not "
            "supported"
        )
    turned = turned[:width, :width]
    partner = turned.abs().argmax(0)
    signs = turned.gather(0, partner[None])[0]
    column = torch.arange(width)
    interleaved = bool((partner == (column ^ 1)).all())
    halves = bool((partner == (column + width // 2) % width).all())
    if not interleaved and not halves:
        raise ValueError(
            "this rotary embedding pairs columns in an unknown order: it is not supported"
        )
    sine = one[partner, column] * signs
    cosine = one.diagonal()[:width]
    estimate = torch.atan2(sine.double(), cosine.double())
    known = _inverse_frequencies(module, kind).double()
    frequencies = known[(estimate[:, None] - known).abs().argmin(1)]
    rotary = Rotary(frequencies, signs.double(), interleaved)
    _verify(rotary, module, kind, apply, dim=dim, scaling=scaling)
    return rotary


def _angles(module: nn.Module, kind: str | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of a rotary module at positions ``(1, T)``."""
    like = torch.zeros(1, positions.shape[1], 1, dtype=torch.float32)
    arguments = (like, positions) if kind is None else (like, positions, kind)
    cos, sin = module(*arguments)
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
    *,
    dim: int,
    scaling: float,
) -> None:
    """Raises ``ValueError`` where ``rotary`` does not rotate as the architecture does."""
    positions = torch.arange(PROBED_POSITIONS)
    values = torch.linspace(-1, 1, PROBED_POSITIONS * dim, dtype=torch.float32).sin()
    x = values.view(1, 1, PROBED_POSITIONS, dim)
    cos, sin = _angles(module, kind, positions[None])
    expected = apply(x, x, cos / scaling, sin / scaling)[0]
    error = float((rotary.rotation(positions, x.dtype).rotate(x) - expected).abs().max())
    if error > TOLERANCE:
        raise ValueError(
            f"{type(module).__name__} could not be reproduced (error {error:.1e}): it is not "
            "supported"
        )
