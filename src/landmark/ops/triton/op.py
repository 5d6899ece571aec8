"""The kernels as operators of torch, which autograd and ``torch.compile`` know:
``landmark::attention``.

Query, key and value may have any strides but in the last dimension, which lies side by side. The
output has its dimensions in the order of the query's. An operator takes the fields of ``Call`` one
by one: lists would cost more than the launch of a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from landmark.ops.triton.configs import (
    config_for,
    kept_of,
    on_device,
    power_of_two,
    tiles_of_choice,
)
from landmark.ops.triton.launch import (
    Call,
    programs,
    run_forward,
    run_key_value_gradient,
    run_query_gradient,
)
from landmark.ops.triton.meetings import meetings
from landmark.ops.triton.select import choice_kernel

LEAST_SCALE = 1e-37  # less is 0 in float32


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
    """Output (B, H, T, D) and the gate's log-sum-exp (B, H, T); arguments as checked by
    ``landmark_attention``.
    """
    assert landmarks is None and (top_k is None or segments is None)
    if scale < LEAST_SCALE:  # the kernels take maxima of scores before they scale them
        query, scale = (query * 0, 1.0) if abs(scale) < LEAST_SCALE else (-query, -scale)
    query, key, value = (_side_by_side(each) for each in (query, key, value))
    if starts is not None:
        starts = starts.int().clamp(min=0).contiguous()
    origins, ends = (None, None) if segments is None else documents_of(segments, starts)
    choice: tuple[Tensor | None, ...] = (None,) * 5
    if top_k is not None:
        choice = choose(query.detach(), key.detach(), starts, block_size, query_start, scale, top_k)
    run: Any = attention if _traced(query) else Attention.apply
    out, lse = run(
        query, key, value, starts, origins, ends, *choice, block_size, query_start, scale
    )
    return out, lse


def _traced(query: Tensor) -> bool:
    """Whether someone has to see the operator itself: a compiler, a dispatch mode, a kind of tensor
    of its own.

    Otherwise the same functions run without torch's bookkeeping for operators written in Python,
    which takes longer than a short kernel.
    """
    plain = type(query) in (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not plain


def _side_by_side(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension does not lie side by side, or would not in a tensor
    made like it.
    """
    whole = tensor.stride(3) == 1 and torch.empty_like(tensor).stride(3) == 1
    return tensor if whole else tensor.contiguous()


def documents_of(segments: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """First slot of the document of each slot, and the first behind it: two int32 (B, S); padding
    is a document.
    """
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


Chosen = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("landmark::choose", mutates_args=())
def choose(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
    top_k: int,
) -> Chosen:
    """The chosen blocks (B, H, T, top_k) int32, -1 for none, the highest score first; and the four
    of ``Meetings``.
    """
    batch, heads, queries, dim = query.shape
    chosen = torch.empty((batch, heads, queries, top_k), dtype=torch.int32, device=query.device)
    tiles = tiles_of_choice(query.dtype, dim)
    with on_device(query.device):
        if chosen.numel():
            choice_kernel[programs(query, tiles)](
                query,
                key,
                chosen,
                starts,
                *query.stride()[:3],
                *key.stride()[:3],
                heads,
                heads // key.shape[1],
                queries,
                key.shape[2],
                query_start,
                scale,
                BLOCK=block_size,
                DIM=dim,
                PADDED=power_of_two(dim),
                ROWS=tiles.rows,
                MARKS=tiles.keys,
                TOP_K=top_k,
                KEPT=kept_of(top_k),
                STARTS=starts is not None,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    rows = config_for(query.device, query.dtype, dim, top_k=True).forward.rows
    grid = {"keys": key.shape[2], "block_size": block_size, "query_start": query_start}
    return chosen, *meetings(chosen, starts, **grid, rows=rows)


@choose.register_fake
def _(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
    top_k: int,
) -> Chosen:
    batch, heads, queries, dim = query.shape
    rows = config_for(query.device, query.dtype, dim, top_k=True).forward.rows
    tiles = -(-queries // rows)
    most = rows * top_k
    blocks = -(-key.shape[2] // block_size)
    shapes = (queries, top_k), (tiles, most), (tiles,), (tiles * most,), (max(1, blocks) + 1,)
    made = [
        torch.empty((batch, heads, *shape), dtype=torch.int32, device=query.device)
        for shape in shapes
    ]
    return made[0], made[1], made[2], made[3], made[4]


def run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    chosen: Tensor | None,
    blocks: Tensor | None,
    counts: Tensor | None,
    tiles: Tensor | None,
    borders: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T)."""
    choice = chosen, blocks, counts, tiles, borders
    call = Call(starts, origins, ends, *choice, block_size, query_start, scale)
    config = config_for(query.device, query.dtype, query.shape[3], top_k=call.top_k > 0)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query.device):
        run_forward(config.forward, query, key, value, out, lse, call)
    return out, lse


def run_attention_backward(
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
    chosen: Tensor | None,
    blocks: Tensor | None,
    counts: Tensor | None,
    tiles: Tensor | None,
    borders: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    choice = chosen, blocks, counts, tiles, borders
    call = Call(starts, origins, ends, *choice, block_size, query_start, scale)
    config = config_for(query.device, query.dtype, query.shape[3], top_k=call.top_k > 0)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    sums = (lse, lse_grad.contiguous(), torch.empty_like(lse))
    d_query = torch.empty_like(query)
    unwritten = starts is not None or query.numel() == 0  # of padding, or where nobody looks
    make = torch.zeros_like if unwritten else torch.empty_like
    d_key = make(key)
    d_value = make(value)
    with on_device(query.device):
        run_query_gradient(config.query_gradient, query, key, value, out, grad, sums, d_query, call)
        run_key_value_gradient(
            config.key_value_gradient, query, key, value, grad, sums, d_key, d_value, call
        )
    return d_query, d_key, d_value


attention = torch.library.custom_op("landmark::attention", run_attention, mutates_args=())
attention_backward = torch.library.custom_op(
    "landmark::attention_backward", run_attention_backward, mutates_args=()
)


@attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty(
        query.shape[:3], dtype=torch.float32, device=query.device
    )


@attention_backward.register_fake
def _(
    grad: Tensor, lse_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *call = inputs
    ctx.numbers = call[-3:]
    ctx.save_for_backward(query, key, value, *output, *call[:-3])


def _differentiate(
    ctx: Any, grad: Tensor, lse_grad: Tensor, run: Any = attention_backward
) -> tuple[Any, ...]:
    return *run(grad, lse_grad, *ctx.saved_tensors, *ctx.numbers), *(None,) * len(Call._fields)


attention.register_autograd(_differentiate, setup_context=_keep)


class Attention(torch.autograd.Function):
    """The operator ``attention`` without the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """As ``run_attention``."""
        output = run_attention(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all arguments of ``attention``."""
        return _differentiate(ctx, grad, lse_grad, run_attention_backward)
