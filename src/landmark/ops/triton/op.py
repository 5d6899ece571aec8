"""The kernels as operators of torch, which autograd and ``torch.compile`` know: ``landmark::attention``.

Query, key and value may have any strides but in the last dimension, which lies side by side. The output has the strides
of the query. ``starts`` (B,) is int32; ``origins`` and ``ends`` (B, S) int32 are the first slot of each slot's document
and the first behind it, both or neither.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from landmark.ops.triton.backward import key_value_gradient_kernel, query_gradient_kernel
from landmark.ops.triton.configs import Tiles, config_for
from landmark.ops.triton.forward import forward_kernel

LOG2_E = 1.4426950408889634


def fused(
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
    """Output (B, H, T, D) and the gate's log-sum-exp (B, H, T); arguments as checked by ``landmark_attention``."""
    assert top_k is None and landmarks is None
    if scale <= 0:  # the kernels take maxima of scores before they scale them
        query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    origins, ends = (None, None) if segments is None else documents(segments, starts)
    starts = None if starts is None else starts.int()
    out, lse = attention(query, key, value, starts, origins, ends, block_size, query_start, scale)
    return out, lse


def documents(segments: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """First slot of the document of each slot, and the first behind it: two int32 (B, S); padding is a document."""
    length = segments.shape[1]
    slot = torch.arange(length, device=segments.device, dtype=torch.int32)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    if starts is not None:
        begins = begins | (slot == starts[:, None])
    origins = torch.where(begins, slot, 0).cummax(dim=1).values
    following = torch.full_like(origins, length)
    following[:, :-1] = torch.where(begins, slot, length)[:, 1:]
    ends = following.flip(1).cummin(dim=1).values.flip(1)
    return origins.contiguous(), ends.contiguous()


@torch.library.custom_op("landmark::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T)."""
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tiles = config_for(query.device, query.dtype, query.shape[3]).forward
    run_forward(tiles, query, key, value, out, lse, starts, origins, block_size, query_start, scale)
    return out, lse


@torch.library.custom_op("landmark::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    lse_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    config = config_for(query.device, query.dtype, query.shape[3])
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    delta = torch.empty_like(lse)
    d_query = torch.empty_like(query)
    make = torch.empty_like if starts is None else torch.zeros_like  # no program writes the gradients of padding
    d_key, d_value = make(key), make(value)
    sums = (lse, lse_grad.contiguous(), delta)
    call = (starts, origins, ends, block_size, query_start, scale)
    run_query_gradient(config.query_gradient, query, key, value, out, grad, sums, d_query, *call)
    run_key_value_gradient(config.key_value_gradient, query, key, value, grad, sums, d_key, d_value, *call)
    return d_query, d_key, d_value


@attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


@attention_backward.register_fake
def _(grad: Tensor, lse_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, origins, ends, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, *output, starts, origins, ends)


def _differentiate(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = attention_backward(grad, lse_grad, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, None, None, None, None, None, None)


attention.register_autograd(_differentiate, setup_context=_keep)


def run_forward(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> None:
    """Fills ``out`` and ``lse``."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if query.numel() == 0:
        return
    shape = _shape(tiles, block_size, query, starts, origins)
    forward_kernel[(triton.cdiv(queries, tiles.rows) * batch * heads,)](
        query, *_sources(tiles, shape, key, value), out, lse, starts, origins, *_strides(query, key, value, out),
        heads, heads // key.shape[1], queries, keys, query_start, scale * LOG2_E, **shape,
    )  # fmt: skip


def run_query_gradient(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    d_query: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> None:
    """Fills ``d_query`` and the last of ``sums``: log-sum-exp, its gradient, delta."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    if query.numel() == 0:
        return
    lse, lse_grad, delta = sums
    shape = _shape(tiles, block_size, query, starts, origins)
    query_gradient_kernel[(triton.cdiv(queries, tiles.rows) * batch * heads,)](
        query, *_sources(tiles, shape, key, value), out, lse, grad, lse_grad, delta, d_query, starts, origins,
        *_strides(query, key, value, out, grad, d_query),
        heads, heads // key.shape[1], queries, keys, query_start, scale, scale * LOG2_E, **shape,
    )  # fmt: skip


def run_key_value_gradient(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    d_key: Tensor,
    d_value: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> None:
    """Fills ``d_key`` and ``d_value`` but for padding; ``sums`` as ``run_query_gradient`` left them."""
    (batch, heads, queries, _), (groups, keys) = query.shape, key.shape[1:3]
    if key.numel() == 0:
        return
    lse, _, delta = sums
    shape = _shape(tiles, block_size, query, starts, origins)
    if origins is not None:
        shape["BLOCKS"] = 1  # the blocks of several documents are visited one by one
    programs = triton.cdiv(keys, shape["BLOCKS"] * block_size) * shape["PIECES"] * batch * groups
    query_source, grad_source = _sources(tiles, shape, query, grad, rows=tiles.rows)
    key_value_gradient_kernel[(programs,)](
        query_source, key, value, lse, grad_source, delta, d_key, d_value, starts, origins, ends,
        *_strides(query, key, value, grad, d_key, d_value),
        heads, heads // groups, queries, keys, query_start, scale, scale * LOG2_E, **shape,
    )  # fmt: skip


def _sources(tiles: Tiles, shape: dict[str, Any], *tensors: Tensor, rows: int | None = None) -> list[Any]:
    """The tensors, or descriptors of them where ``tiles`` asks for and the tensors allow it; says so in ``shape``.

    A descriptor loads ``rows`` rows, or else the keys of a tile, which must lie side by side.
    """
    adjacent = rows is not None or shape["BLOCKS"] == 1 or shape["BLOCK"] == shape["WIDTH"]
    aligned = all(
        each.data_ptr() % 16 == 0 and all(stride * each.element_size() % 16 == 0 for stride in each.stride()[:3])
        for each in tensors
    )
    shape["TMA"] = tiles.tma and adjacent and aligned and shape["DIM"] == shape["PADDED"]
    if not shape["TMA"]:
        return list(tensors)
    box = [1, 1, rows or shape["BLOCKS"] * shape["WIDTH"], shape["PADDED"]]
    return [TensorDescriptor(each, list(each.shape), list(each.stride()), box) for each in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for each in tensors for stride in each.stride()[:3]]


def _shape(
    tiles: Tiles, block_size: int, query: Tensor, starts: Tensor | None, origins: Tensor | None
) -> dict[str, Any]:
    """The constants of a kernel; a block longer than a tile is cut into pieces."""
    dim, padded = query.shape[3], triton.next_power_of_2(block_size)
    width = min(padded, tiles.keys)
    return {
        "BLOCK": block_size,
        "DIM": dim,
        "PADDED": max(16, triton.next_power_of_2(dim)),
        "ROWS": tiles.rows,
        "BLOCKS": max(1, tiles.keys // padded),
        "WIDTH": width,
        "PIECES": triton.cdiv(block_size, width),
        "TMA": False,
        "STARTS": starts is not None,
        "SEGMENTS": origins is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
