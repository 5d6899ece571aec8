"""Launches the kernels of the operation: grids, descriptors, strides and constants."""

from __future__ import annotations

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


class Call(NamedTuple):
    """The arguments beside query, key and value, and what follows from them.

    Attributes:
        starts: (B,) int32.
        origins: (B, S) int32, the first slot of each slot's document; only with ``segments``.
        ends: (B, S) int32, the first slot behind it.
        chosen: (B, H, T, K) int32, only with ``top_k``; the next four are those of ``Meetings``.
        block_size: slots of a block.
        query_start: slot of the first query.
        scale: above 0.
    """

    starts: Tensor | None
    origins: Tensor | None
    ends: Tensor | None
    chosen: Tensor | None
    blocks: Tensor | None
    counts: Tensor | None
    tiles: Tensor | None
    borders: Tensor | None
    block_size: int
    query_start: int
    scale: float

    @property
    def top_k(self) -> int:
        """Blocks that a query keeps, 0 for all."""
        return 0 if self.chosen is None else self.chosen.shape[3]


def run_forward(
    tiles: Tiles, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> None:
    """Fills ``out`` and ``lse``."""
    if query.numel() == 0:
        return
    if runs_pipelined(query, key, value, call):
        return run_pipelined(query, key, value, out, lse, call)
    shape = _shape(tiles, query, call)
    forward_kernel[programs(query, tiles)](
        query,
        *_sources(tiles, shape, key, value),
        key,
        out,
        lse,
        *_seen(call),
        *_strides(query, key, value, out),
        *_numbers(query, key, call),
        call.scale * LOG2_E,
        **shape,
    )


def run_pipelined(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> None:
    """Fills ``out`` and ``lse`` where ``runs_pipelined``."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Descriptor

    from landmark.ops.triton.hopper import LAYOUT, ROWS, pipelined_kernel

    marks = key[:, :, PIPELINED_BLOCK - 1 :: PIPELINED_BLOCK]
    box = [1, 1, PIPELINED_BLOCK, query.shape[3]]
    sources = [
        Descriptor(x, list(x.shape), list(x.stride()), box, LAYOUT) for x in (key, value, marks)
    ]
    heads, group, queries, _, query_start = _numbers(query, key, call)
    pipelined_kernel[(-(-queries // ROWS.value) * len(query) * heads,)](
        query,
        *sources,
        out,
        lse,
        *_strides(query, out),
        heads,
        group,
        queries,
        query_start,
        call.scale * LOG2_E,
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
    sums: tuple[Tensor, Tensor, Tensor],
    d_query: Tensor,
    call: Call,
) -> None:
    """Fills ``d_query`` and the last of ``sums``: log-sum-exp, its gradient, delta."""
    if query.numel() == 0:
        return
    lse, lse_grad, delta = sums
    shape = _shape(tiles, query, call)
    query_gradient_kernel[programs(query, tiles)](
        query,
        *_sources(tiles, shape, key, value),
        out,
        lse,
        grad,
        lse_grad,
        delta,
        d_query,
        *_seen(call),
        *_strides(query, key, value, out, grad, d_query),
        *_numbers(query, key, call),
        call.scale,
        call.scale * LOG2_E,
        **shape,
    )


def run_key_value_gradient(
    tiles: Tiles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    d_key: Tensor,
    d_value: Tensor,
    call: Call,
) -> None:
    """Fills ``d_key`` and ``d_value`` but for padding; ``sums`` as ``run_query_gradient`` left
    them.
    """
    if key.numel() == 0 or query.numel() == 0:
        return
    batch, groups, keys, _ = key.shape
    shape = _shape(tiles, query, call)
    if call.origins is not None:
        shape["BLOCKS"] = 1  # the blocks of several documents are visited one by one
    programs = -(-keys // (shape["BLOCKS"] * call.block_size)) * shape["PIECES"] * batch * groups
    query_source, grad_source = _sources(tiles, shape, query, grad, rows=tiles.rows)
    key_value_gradient_kernel[(programs,)](
        query_source,
        key,
        value,
        sums[0],
        grad_source,
        sums[2],
        d_key,
        d_value,
        call.starts,
        call.origins,
        call.ends,
        call.chosen,
        call.tiles,
        call.borders,
        0 if call.tiles is None else call.tiles.shape[2],
        *_strides(query, key, value, grad, d_key, d_value),
        *_numbers(query, key, call),
        call.scale,
        call.scale * LOG2_E,
        **shape,
    )


def runs_pipelined(query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
    """Whether the forward pass of ``hopper.py`` computes a call: its tiles of queries are two whole
    blocks.

    All queries stand at slots that have keys, so that only their own text has to be masked.
    """
    if not pipelines(query.device, query.dtype, query.shape[3]):
        return False
    if call.starts is not None or call.origins is not None or call.chosen is not None:
        return False
    if (
        call.block_size != PIPELINED_BLOCK
        or call.query_start % PIPELINED_BLOCK
        or key.shape[2] < PIPELINED_BLOCK
    ):
        return False
    return call.query_start + query.shape[2] <= key.shape[2] and _describable(key, value)


def programs(query: Tensor, tiles: Tiles) -> tuple[int]:
    """Returns the grid of a kernel whose programs own tiles of queries."""
    batch, heads, queries, _ = query.shape
    return (-(-queries // tiles.rows) * batch * heads,)


def _seen(
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:
    """What the kernels over tiles of queries take of a call; last the distance between two tiles'
    lists of blocks.
    """
    distance = 0 if call.blocks is None else call.blocks.shape[3]
    return call.starts, call.origins, call.chosen, call.blocks, call.counts, distance


def _numbers(query: Tensor, key: Tensor, call: Call) -> tuple[int, int, int, int, int]:
    heads, queries = query.shape[1:3]
    return heads, heads // key.shape[1], queries, key.shape[2], call.query_start


def _sources(
    tiles: Tiles, shape: dict[str, Any], *tensors: Tensor, rows: int | None = None
) -> list[Any]:
    """The tensors, or descriptors of them where ``tiles`` asks for and the tensors allow it; says
    so in ``shape``.

    A descriptor loads ``rows`` rows, or else the keys of a tile, which must lie side by side.
    """
    adjacent = rows is not None or shape["BLOCKS"] == 1 or shape["BLOCK"] == shape["WIDTH"]
    shape["TMA"] = (
        tiles.tma and adjacent and shape["DIM"] == shape["PADDED"] and _describable(*tensors)
    )
    if not shape["TMA"]:
        return list(tensors)
    box = [1, 1, rows or shape["BLOCKS"] * shape["WIDTH"], shape["PADDED"]]
    return [TensorDescriptor(each, list(each.shape), list(each.stride()), box) for each in tensors]


def _describable(*tensors: Tensor) -> bool:
    """Whether there can be descriptors of the tensors."""
    return all(
        each.numel() > 0
        and each.data_ptr() % 16 == 0
        and all(
            stride > 0 and stride * each.element_size() % 16 == 0 for stride in each.stride()[:3]
        )
        for each in tensors
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for each in tensors for stride in each.stride()[:3]]


def _shape(tiles: Tiles, query: Tensor, call: Call) -> dict[str, Any]:
    """The constants of a kernel; a block longer than a tile is cut into pieces."""
    dim = query.shape[3]
    padded = power_of_two(call.block_size)
    width = min(padded, tiles.keys)
    return {
        "BLOCK": call.block_size,
        "DIM": dim,
        "PADDED": power_of_two(dim),
        "ROWS": tiles.rows,
        "BLOCKS": 1 if call.top_k else max(1, tiles.keys // padded),
        "WIDTH": width,
        "PIECES": -(-call.block_size // width),
        "STARTS": call.starts is not None,
        "SEGMENTS": call.origins is not None,
        "TOP_K": call.top_k,
        "KEPT": kept_of(call.top_k) if call.top_k else 0,
        "TMA": False,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
