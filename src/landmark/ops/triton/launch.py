"""Launches of the attention kernels: their grids, tensor descriptors, strides and constants."""

from __future__ import annotations

from functools import cache
from sys import intern
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from landmark.ops.triton.backward import key_value_gradient_kernel, query_gradient_kernel
from landmark.ops.triton.configs import (
    PIPELINED_BLOCK,
    PIPELINED_STAGES,
    Tiles,
    kept_of,
    pipelines,
    power_of_two,
)
from landmark.ops.triton.forward import forward_kernel

LOG2_E = 1.4426950408889634


class KernelArguments(NamedTuple):
    """What the kernels take beside query, key and value.

    Attributes:
        starts: (B,) int32, slot of each row's first text.
        origins: (B, S) int32, first slot of each slot's document; only with ``segments``.
        ends: (B, S) int32, first slot behind each slot's document; only with ``segments``.
        selected: (B, H, T, K) int32, selected blocks, counted from the first of the query's
            document, -1 for none; only with ``top_k``, as are the next four, the fields of
            ``BlockLists``.
        blocks: (B, H, tiles, M) int32.
        counts: (B, H, tiles) int32.
        tiles: (B, H, tiles * M) int32.
        indptr: (B, H, N + 1) int32.
        block_size: slots of a block, landmark included.
        query_start: slot of the first query.
        scale: factor of the scores, above 0.
    """

    starts: Tensor | None
    origins: Tensor | None
    ends: Tensor | None
    selected: Tensor | None
    blocks: Tensor | None
    counts: Tensor | None
    tiles: Tensor | None
    indptr: Tensor | None
    block_size: int
    query_start: int
    scale: float

    @property
    def top_k(self) -> int:
        """Past blocks that a query selects, 0 for all."""
        return 0 if self.selected is None else self.selected.shape[3]


class SoftmaxSums(NamedTuple):
    """Numbers of each query that the backward kernels share, (B, H, T) float32.

    Attributes:
        lse: log-sum-exp of the gate.
        lse_grad: its gradient.
        delta: product of output and its gradient, less ``lse_grad``. ``run_query_gradient`` fills
            it, ``run_key_value_gradient`` reads it.
    """

    lse: Tensor
    lse_grad: Tensor
    delta: Tensor


class _Sources(NamedTuple):
    """Two tensors as a kernel takes them: both as descriptors (``tma``), or both as they are."""

    first: Any
    second: Any
    tma: bool


def run_forward(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: KernelArguments,
) -> None:
    """Fills ``out`` (B, H, T, D) and ``lse`` (B, H, T)."""
    if query.numel() == 0:
        return
    if runs_pipelined(query, key, value, arguments):
        return run_pipelined(query, key, value, out, lse, arguments)
    constants = _constants(tiles, query, arguments)
    sources = _key_sources(tiles, constants, key, value)
    forward_kernel[programs(query, tiles)](
        p_query=query,
        p_key=sources.first,
        p_value=sources.second,
        p_landmark_key=key,
        p_out=out,
        p_lse=lse,
        p_start=arguments.starts,
        p_origin=arguments.origins,
        p_selected=arguments.selected,
        p_listed=arguments.blocks,
        p_counts=arguments.counts,
        listed_stride=_last_size(arguments.blocks),
        **strides_of("query", query),
        **strides_of("key", key),
        **strides_of("value", value),
        **strides_of("out", out),
        **sizes_of(query, key),
        n_keys=key.shape[2],
        query_start=arguments.query_start,
        factor=arguments.scale * LOG2_E,
        TMA=sources.tma,
        **constants,
    )


def run_pipelined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: KernelArguments,
) -> None:
    """Fills ``out`` and ``lse`` as ``run_forward``, where ``runs_pipelined``."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Descriptor

    from landmark.ops.triton.hopper import LAYOUT, ROWS, pipelined_kernel

    batch, heads, queries, dim = query.shape
    landmark_keys = key[:, :, PIPELINED_BLOCK - 1 :: PIPELINED_BLOCK]
    box = [1, 1, PIPELINED_BLOCK, dim]
    described = [
        Descriptor(each, list(each.shape), list(each.stride()), box, LAYOUT)
        for each in (key, value, landmark_keys)
    ]
    pipelined_kernel[(-(-queries // ROWS.value) * batch * heads,)](
        p_query=query,
        key=described[0],
        value=described[1],
        landmark_key=described[2],
        p_out=out,
        p_lse=lse,
        **strides_of("query", query),
        **strides_of("out", out),
        **sizes_of(query, key),
        query_start=arguments.query_start,
        factor=arguments.scale * LOG2_E,
        STAGES=PIPELINED_STAGES,
        num_warps=4,
    )


def run_query_gradient(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad: Tensor,
    sums: SoftmaxSums,
    d_query: Tensor,
    arguments: KernelArguments,
) -> None:
    """Fills ``d_query`` (B, H, T, D) and ``sums.delta``."""
    if query.numel() == 0:
        return
    constants = _constants(tiles, query, arguments)
    sources = _key_sources(tiles, constants, key, value)
    query_gradient_kernel[programs(query, tiles)](
        p_query=query,
        p_key=sources.first,
        p_value=sources.second,
        p_out=out,
        p_lse=sums.lse,
        p_grad=grad,
        p_lse_grad=sums.lse_grad,
        p_delta=sums.delta,
        p_d_query=d_query,
        p_start=arguments.starts,
        p_origin=arguments.origins,
        p_selected=arguments.selected,
        p_listed=arguments.blocks,
        p_counts=arguments.counts,
        listed_stride=_last_size(arguments.blocks),
        **strides_of("query", query),
        **strides_of("key", key),
        **strides_of("value", value),
        **strides_of("out", out),
        **strides_of("grad", grad),
        **strides_of("d_query", d_query),
        **sizes_of(query, key),
        n_keys=key.shape[2],
        query_start=arguments.query_start,
        scale=arguments.scale,
        factor=arguments.scale * LOG2_E,
        TMA=sources.tma,
        **constants,
    )


def run_key_value_gradient(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    sums: SoftmaxSums,
    d_key: Tensor,
    d_value: Tensor,
    arguments: KernelArguments,
) -> None:
    """Fills ``d_key`` and ``d_value`` (B, G, S, D), but for padding."""
    if key.numel() == 0 or query.numel() == 0:
        return
    batch, groups, keys, _ = key.shape
    constants = _constants(tiles, query, arguments)
    if arguments.origins is not None:  # the blocks of several documents are visited one by one
        constants = {**constants, "BLOCKS": 1}
    parts = -(-keys // (constants["BLOCKS"] * arguments.block_size)) * constants["PIECES"]
    sources = _sources(tiles, constants, query, grad, rows=tiles.rows)
    key_value_gradient_kernel[(parts * batch * groups,)](
        p_query=sources.first,
        p_key=key,
        p_value=value,
        p_lse=sums.lse,
        p_grad=sources.second,
        p_delta=sums.delta,
        p_d_key=d_key,
        p_d_value=d_value,
        p_start=arguments.starts,
        p_origin=arguments.origins,
        p_end=arguments.ends,
        p_selected=arguments.selected,
        p_tiles=arguments.tiles,
        p_indptr=arguments.indptr,
        tiles_stride=_last_size(arguments.tiles),
        **strides_of("query", query),
        **strides_of("key", key),
        **strides_of("value", value),
        **strides_of("grad", grad),
        **strides_of("d_key", d_key),
        **strides_of("d_value", d_value),
        **sizes_of(query, key),
        n_keys=keys,
        query_start=arguments.query_start,
        scale=arguments.scale,
        factor=arguments.scale * LOG2_E,
        TMA=sources.tma,
        **constants,
    )


def runs_pipelined(query: Tensor, key: Tensor, value: Tensor, arguments: KernelArguments) -> bool:
    """Returns whether the forward pass of ``hopper.py`` computes a call.

    Its tiles of queries are two whole blocks. All queries must stand at slots that have keys, so
    that only their own text has to be masked.
    """
    if not pipelines(query.device, query.dtype, query.shape[3]):
        return False
    if (
        arguments.starts is not None
        or arguments.origins is not None
        or arguments.selected is not None
    ):
        return False
    if (
        arguments.block_size != PIPELINED_BLOCK
        or arguments.query_start % PIPELINED_BLOCK
        or key.shape[2] < PIPELINED_BLOCK
    ):
        return False
    return arguments.query_start + query.shape[2] <= key.shape[2] and _describable(key, value)


def programs(query: Tensor, tiles: Tiles) -> tuple[int]:
    """Returns the grid of a kernel with one program for each tile of queries."""
    batch, heads, queries, _ = query.shape
    return (-(-queries // tiles.rows) * batch * heads,)


def strides_of(name: str, tensor: Tensor) -> dict[str, int]:
    """Returns the strides of a tensor (B, heads, rows, D), but for the last, as named arguments."""
    batch, head, row, _ = tensor.stride()
    names = _stride_names(name)
    return {names[0]: batch, names[1]: head, names[2]: row}


@cache
def _stride_names(name: str) -> tuple[str, str, str]:
    # Interned, as Python finds the parameter of a keyword much faster then.
    return intern(f"{name}_batch"), intern(f"{name}_head"), intern(f"{name}_stride")


def sizes_of(query: Tensor, key: Tensor) -> dict[str, int]:
    """Returns the sizes that every kernel takes, as named arguments."""
    heads, queries = query.shape[1:3]
    return {"n_heads": heads, "group_size": heads // key.shape[1], "n_queries": queries}


def _last_size(lists: Tensor | None) -> int:
    return 0 if lists is None else lists.shape[-1]


def _constants(tiles: Tiles, query: Tensor, arguments: KernelArguments) -> dict[str, Any]:
    """Returns the constants of a kernel and its launch options, as named arguments."""
    return _constants_of(
        tiles,
        query.shape[3],
        arguments.block_size,
        arguments.top_k,
        starts=arguments.starts is not None,
        segments=arguments.origins is not None,
    )


@cache
def _constants_of(
    tiles: Tiles, dim: int, block_size: int, top_k: int, *, starts: bool, segments: bool
) -> dict[str, Any]:
    padded = power_of_two(block_size)
    width = min(padded, tiles.keys)  # a block longer than a tile is cut into pieces
    return {
        "BLOCK": block_size,
        "DIM": dim,
        "PADDED": power_of_two(dim),
        "ROWS": tiles.rows,
        "BLOCKS": 1 if top_k else max(1, tiles.keys // padded),
        "WIDTH": width,
        "PIECES": -(-block_size // width),
        "STARTS": starts,
        "SEGMENTS": segments,
        "TOP_K": top_k,
        "KEPT": kept_of(top_k) if top_k else 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _key_sources(tiles: Tiles, constants: dict[str, Any], key: Tensor, value: Tensor) -> _Sources:
    """Returns keys and values as a kernel loads them, one tile of keys at a time."""
    adjacent = constants["BLOCKS"] == 1 or constants["BLOCK"] == constants["WIDTH"]
    if not adjacent:
        return _Sources(key, value, tma=False)
    return _sources(tiles, constants, key, value, rows=constants["BLOCKS"] * constants["WIDTH"])


def _sources(
    tiles: Tiles, constants: dict[str, Any], first: Tensor, second: Tensor, *, rows: int
) -> _Sources:
    """Returns two tensors as a kernel loads them, ``rows`` adjacent rows at a time.

    They are descriptors where ``tiles`` asks for it and the tensors allow it.
    """
    whole = constants["DIM"] == constants["PADDED"]
    if not (tiles.tma and whole and _describable(first, second)):
        return _Sources(first, second, tma=False)
    box = [1, 1, rows, constants["PADDED"]]
    described = [
        TensorDescriptor(each, list(each.shape), list(each.stride()), box)
        for each in (first, second)
    ]
    return _Sources(described[0], described[1], tma=True)


def _describable(*tensors: Tensor) -> bool:
    """Returns whether tensors can be loaded by descriptors."""
    for each in tensors:
        if each.numel() == 0 or each.data_ptr() % 16:
            return False
        element_bytes = each.element_size()
        for stride in each.stride()[:3]:
            if stride <= 0 or stride * element_bytes % 16:
                return False
    return True
