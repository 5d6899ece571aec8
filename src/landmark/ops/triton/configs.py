"""Sizes of tiles by architecture, dtype and head dim; nothing is tuned at run time.

Each kernel has its queries and keys of a tile, its warps, and the stages of its software pipeline.
The sizes of ``HOPPER`` for head dims up to 128 are the fastest of about fifty that were timed on
one H200 (8,192 slots at head dim 128, 4,096 at 64, blocks of 64, bfloat16). All others fit the
shared memory and compile; they are not measured.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch


class Tiles(NamedTuple):
    """Tiles of one kernel.

    Attributes:
        rows: queries of a tile.
        keys: columns of a tile of keys.
        warps: warps of a program.
        stages: stages of the software pipeline.
        tma: whether to load by tensor descriptors where the tensors allow it.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False


class Config(NamedTuple):
    """Tiles of the three attention kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_value_gradient: Tiles


# For head dims up to the key; 16-bit numbers.
HOPPER = {
    64: Config(Tiles(64, 128, 4, 2, True), Tiles(64, 64, 4, 3, True), Tiles(64, 64, 4, 3, True)),
    128: Config(Tiles(64, 64, 4, 3, True), Tiles(128, 64, 8, 3, True), Tiles(64, 64, 4, 2, True)),
    256: Config(Tiles(128, 64, 8, 2, True), Tiles(64, 64, 8, 1, True), Tiles(64, 64, 8, 1, True)),
}
SAFE = {
    64: Config(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1)),
    128: Config(Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1)),
    256: Config(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
}
# The same for float32, whose products do not run on tensor cores.
FLOAT32 = {
    64: Config(Tiles(64, 64, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1)),
    128: Config(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    256: Config(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
# Bytes of a tile of queries where blocks are selected; fits the smallest shared memory.
SELECTION_BYTES = 2**14
# The forward pass of ``hopper.py``, for 16-bit numbers. Gluon may change between versions of
# Triton, so it runs only on those that were tried: 3.6 measured on one H200, 3.7 compiled.
PIPELINED_BLOCK = 64
PIPELINED_DIMS = (128,)  # at 64 it is no faster than ``forward.py``
PIPELINED_STAGES = 2
PIPELINED_TRITON = ("3.6.", "3.7.")
INTERPRETED = Config(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))


def config_for(
    device: torch.device, dtype: torch.dtype, dim: int, *, top_k: bool = False
) -> Config:
    """Returns the tiles for tensors of ``dtype`` and head dim ``dim`` on ``device``.

    On a CPU they are those for Triton's interpreter. With ``top_k`` they are those of
    ``with_top_k``.
    """
    if device.type == "cpu":
        config = INTERPRETED
    elif dtype == torch.float32:
        config = _of_width(FLOAT32, dim)
    else:
        config = _of_width(HOPPER if is_hopper(device) else SAFE, dim)
    return with_top_k(config) if top_k else config


def with_top_k(config: Config) -> Config:
    """Returns tiles in which all three kernels have the same queries, as ``BlockLists`` needs."""
    tiles = config.key_value_gradient
    return Config(config.forward._replace(rows=tiles.rows, warps=tiles.warps), tiles, tiles)


@cache
def pipelines(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Returns whether the forward pass of ``hopper.py`` runs for such tensors."""
    if device.type != "cuda" or dtype == torch.float32 or dim not in PIPELINED_DIMS:
        return False
    import triton

    return is_hopper(device) and triton.__version__.startswith(PIPELINED_TRITON)


def tiles_of_selection(dtype: torch.dtype, dim: int) -> Tiles:
    """Returns the tiles of the kernel that selects blocks; its keys are landmarks."""
    width = next(widest for widest in SAFE if dim <= widest)
    rows = SELECTION_BYTES // (dtype.itemsize * width)
    return Tiles(max(16, min(64, rows)), 64, 4, 1)


@cache
def is_hopper(device: torch.device) -> bool:
    """Returns whether a GPU is of compute capability 9."""
    return torch.cuda.get_device_capability(device)[0] == 9


def _of_width(table: dict[int, Config], dim: int) -> Config:
    return next(config for widest, config in table.items() if dim <= widest)


def on_device(device: torch.device) -> Any:
    """Returns a context in which kernels are launched on ``device``."""
    return torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()


def power_of_two(number: int) -> int:
    """Returns the least power of two that is not below ``number``.

    Triton's own function wraps its result for use inside kernels.
    """
    return 1 << (number - 1).bit_length()


def kept_of(top_k: int) -> int:
    """Returns how many blocks the selecting kernels keep for ``top_k``: a power of two."""
    return max(2, power_of_two(top_k))
