"""Operators of torch that run the kernels, for autograd and ``torch.compile``.

Query, key and value may have any strides but in the last dimension, which is contiguous. The
output has its dimensions in the order of the query's. An operator takes the fields of
``KernelArguments`` one by one: lists would cost more than the launch of a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from landmark.ops.metadata import AttentionMetadata
from landmark.ops.select import with_forced
from landmark.ops.triton.block_lists import build_block_lists
from landmark.ops.triton.configs import (
    config_for,
    kept_of,
    on_device,
    power_of_two,
    tiles_of_selection,
)
from landmark.ops.triton.launch import (
    KernelArguments,
    SoftmaxSums,
    programs,
    run_forward,
    run_key_value_gradient,
    run_query_gradient,
    sizes_of,
    strides_of,
)
from landmark.ops.triton.select import select_blocks_kernel

LEAST_SCALE = 1e-37  # a scale below this is 0 in float32


def fused(
    query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata
) -> tuple[Tensor, Tensor]:
    """Computes landmark attention by the fused kernels.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        metadata: the other arguments, as checked by ``landmark_attention``.

    Returns:
        Output (B, H, T, D) and the gate's log-sum-exp (B, H, T).
    """
    starts = metadata.starts
    segments = metadata.segments
    scale = metadata.scale
    assert metadata.landmarks is None
    # The kernels take maxima of scores before they scale them, so the scale must be above 0.
    if abs(scale) < LEAST_SCALE:
        query = query * 0
        scale = 1.0
    elif scale < 0:
        query = -query
        scale = -scale
    query, key, value = (_with_adjacent_columns(each) for each in (query, key, value))
    if starts is not None:
        starts = starts.int().clamp(min=0).contiguous()
    origins = None
    ends = None
    if segments is not None:
        origins, ends = documents_of(segments, starts)
    forced = None
    if metadata.forced is not None:
        forced = past_blocks_only(
            metadata.forced.int(),
            starts,
            origins,
            ends,
            keys=key.shape[2],
            block_size=metadata.block_size,
            query_start=metadata.query_start,
        )
    selection: tuple[Tensor | None, ...] = (None,) * 5
    if metadata.top_k is not None:
        selection = select_blocks_op(
            query.detach(),
            key.detach(),
            starts,
            origins,
            metadata.block_size,
            metadata.query_start,
            scale,
            metadata.top_k,
            forced,
        )
    selected, blocks, counts, tiles, indptr = selection
    arguments = KernelArguments(
        starts=starts,
        origins=origins,
        ends=ends,
        selected=selected,
        blocks=blocks,
        counts=counts,
        tiles=tiles,
        indptr=indptr,
        block_size=metadata.block_size,
        query_start=metadata.query_start,
        scale=scale,
    )
    run: Any = attention if _traced(query) else Attention.apply
    out, lse = run(query, key, value, *arguments)
    return out, lse


def _traced(query: Tensor) -> bool:
    """Returns whether somebody has to see the operator itself.

    That is a compiler, a dispatch mode or a subclass of tensors. Otherwise the same functions run
    without torch's bookkeeping for operators written in Python, which takes longer than a short
    kernel.
    """
    plain = type(query) in (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not plain


def _with_adjacent_columns(tensor: Tensor) -> Tensor:
    """Returns the tensor, copied if its last dimension has another stride than 1.

    It is also copied if ``torch.empty_like`` would give it another one.
    """
    adjacent = tensor.stride(3) == 1 and torch.empty_like(tensor).stride(3) == 1
    return tensor if adjacent else tensor.contiguous()


def documents_of(segments: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the first slot of each slot's document, and the first behind it.

    Both are (B, S) int32. Padding counts as a document.
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


def past_blocks_only(
    blocks: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    *,
    keys: int,
    block_size: int,
    query_start: int,
) -> Tensor:
    """Returns blocks (B, T, F) that are given for each query, -1 where one is no past block of it.

    Args:
        blocks: (B, T, F) int32, counted from the first block of the query's document.
        starts: (B,) int32, slot of each row's first text.
        origins: (B, S) int32, first slot of each slot's document; ``None`` where a row is one.
        ends: (B, S) int32, the first slot behind it.
        keys: S.
        block_size: slots of a block, landmark included.
        query_start: slot of the first query.
    """
    slots = torch.arange(blocks.shape[1], device=blocks.device, dtype=torch.int32) + query_start
    first = blocks.new_zeros(1, 1)
    end = torch.full_like(first, keys)
    if origins is not None and ends is not None:
        # The queries are the last of the keys.
        first = origins[:, query_start:]
        end = ends[:, query_start:]
    elif starts is not None:
        first = starts[:, None]
    past = torch.minimum(slots - first, end - first) // block_size
    if starts is not None:
        past = torch.where(slots < starts[:, None], 0, past)
    return torch.where((blocks >= 0) & (blocks < past[..., None]), blocks, -1)


Selection = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("landmark::select_blocks", mutates_args=())
def select_blocks_op(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
    top_k: int,
    forced: Tensor | None,
) -> Selection:
    """Selects blocks by a kernel, and lists which tiles of queries read which blocks.

    ``forced`` (B, T, F) int32 are past blocks that are kept in place of the last selected ones, -1
    for none.

    Returns:
        The selected blocks (B, H, T, top_k) int32, highest score first, -1 for none, counted from
        the first of the query's document; then the four fields of ``BlockLists``.
    """
    batch, heads, queries, dim = query.shape
    selected = torch.empty((batch, heads, queries, top_k), dtype=torch.int32, device=query.device)
    tiles = tiles_of_selection(query.dtype, dim)
    with on_device(query.device):
        if selected.numel():
            select_blocks_kernel[programs(query, tiles)](
                p_query=query,
                p_key=key,
                p_selected=selected,
                p_start=starts,
                p_origin=origins,
                **strides_of("query", query),
                **strides_of("key", key),
                **sizes_of(query, key),
                n_keys=key.shape[2],
                query_start=query_start,
                scale=scale,
                BLOCK=block_size,
                DIM=dim,
                PADDED=power_of_two(dim),
                ROWS=tiles.rows,
                LANDMARKS=tiles.keys,
                TOP_K=top_k,
                KEPT=kept_of(top_k),
                STARTS=starts is not None,
                SEGMENTS=origins is not None,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    if forced is not None:
        selected = with_forced(selected, forced)
    lists = build_block_lists(
        selected,
        starts,
        origins,
        keys=key.shape[2],
        block_size=block_size,
        query_start=query_start,
        rows=config_for(query.device, query.dtype, dim, top_k=True).forward.rows,
    )
    return selected, *lists


@select_blocks_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
    top_k: int,
    forced: Tensor | None,
) -> Selection:
    batch, heads, queries, dim = query.shape
    rows = config_for(query.device, query.dtype, dim, top_k=True).forward.rows
    tiles = -(-queries // rows)
    most = rows * top_k
    blocks = max(1, -(-key.shape[2] // block_size))

    def made(*shape: int) -> Tensor:
        return torch.empty((batch, heads, *shape), dtype=torch.int32, device=query.device)

    selected = made(queries, top_k)
    return selected, made(tiles, most), made(tiles), made(tiles * most), made(blocks + 1)


def run_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
    ends: Tensor | None,
    selected: Tensor | None,
    blocks: Tensor | None,
    counts: Tensor | None,
    tiles: Tensor | None,
    indptr: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes output (B, H, T, D) and log-sum-exp (B, H, T).

    The arguments beside query, key and value are the fields of ``KernelArguments``.
    """
    arguments = KernelArguments(
        starts=starts,
        origins=origins,
        ends=ends,
        selected=selected,
        blocks=blocks,
        counts=counts,
        tiles=tiles,
        indptr=indptr,
        block_size=block_size,
        query_start=query_start,
        scale=scale,
    )
    config = config_for(query.device, query.dtype, query.shape[3], top_k=arguments.top_k > 0)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with on_device(query.device):
        run_forward(
            config.forward,
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse,
            arguments=arguments,
        )
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
    selected: Tensor | None,
    blocks: Tensor | None,
    counts: Tensor | None,
    tiles: Tensor | None,
    indptr: Tensor | None,
    block_size: int,
    query_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of query, key and value from those of output and log-sum-exp.

    The last arguments are the fields of ``KernelArguments``.
    """
    arguments = KernelArguments(
        starts=starts,
        origins=origins,
        ends=ends,
        selected=selected,
        blocks=blocks,
        counts=counts,
        tiles=tiles,
        indptr=indptr,
        block_size=block_size,
        query_start=query_start,
        scale=scale,
    )
    config = config_for(query.device, query.dtype, query.shape[3], top_k=arguments.top_k > 0)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    sums = SoftmaxSums(lse=lse, lse_grad=lse_grad.contiguous(), delta=torch.empty_like(lse))
    d_query = torch.empty_like(query)
    # The kernels write no gradient of padding, and none at all without queries.
    unwritten = starts is not None or query.numel() == 0
    make = torch.zeros_like if unwritten else torch.empty_like
    d_key = make(key)
    d_value = make(value)
    with on_device(query.device):
        run_query_gradient(
            config.query_gradient,
            query=query,
            key=key,
            value=value,
            out=out,
            grad=grad,
            sums=sums,
            d_query=d_query,
            arguments=arguments,
        )
        run_key_value_gradient(
            config.key_value_gradient,
            query=query,
            key=key,
            value=value,
            grad=grad,
            sums=sums,
            d_key=d_key,
            d_value=d_value,
            arguments=arguments,
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
    query, key, value, *tensors = inputs[:-3]
    ctx.numbers = inputs[-3:]  # block size, query start and scale
    ctx.save_for_backward(query, key, value, *output, *tensors)


def _differentiate(
    ctx: Any, grad: Tensor, lse_grad: Tensor, run: Any = attention_backward
) -> tuple[Any, ...]:
    gradients = run(grad, lse_grad, *ctx.saved_tensors, *ctx.numbers)
    return *gradients, *(None for _ in KernelArguments._fields)


attention.register_autograd(_differentiate, setup_context=_keep)


class Attention(torch.autograd.Function):
    """Autograd function that computes what the operator ``attention`` does, at less cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Computes output and log-sum-exp, as ``run_attention``."""
        output = run_attention(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients; ``None`` for all arguments but query, key and value."""
        return _differentiate(ctx, grad, lse_grad, run_attention_backward)
