"""Arguments that several kernels take, each group by name, to be passed as ``**group``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import SCHEMES
from landmark.memory.storage.pool import ResidentBlocks
from landmark.ops.triton.configs import power_of_two
from landmark.rotary import Rotation

ALL_BLOCKS = 2**30  # more than there are
LEAST_ROWS = 16  # of a tile of queries
MOST_ROWS = 64  # of a tile of queries
LANDMARK_STAGES = 3  # of a loop over tiles of landmark keys
LANDMARK_BYTES = 3 * 2**14  # of a tile that is loaded in so many stages, at most
WARPS = 4


def launch(
    kernel: Any,
    programs: tuple[int, ...],
    *,
    num_warps: int,
    num_stages: int | None = None,
    **arguments: Any,
) -> None:
    """Launches a kernel with named arguments.

    Triton binds arguments faster by position than by name, so they are put in order here.

    Args:
        kernel: a kernel of ``triton.jit``.
        programs: how many, by dimension.
        num_warps: of a program.
        num_stages: of its loops, ``None`` for Triton's default.
        **arguments: all that the kernel takes, by name.
    """
    assert len(kernel.arg_names) == len(arguments), set(kernel.arg_names) ^ set(arguments)
    options = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    kernel[programs](*_in_order(kernel)(arguments), **options)


@cache
def _in_order(kernel: Any) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Returns what puts the arguments of a kernel in order."""
    return itemgetter(*kernel.arg_names)


def rotation_arguments(rotation: Rotation, query: Tensor, context: LayerContext) -> dict[str, Any]:
    """Returns a table of rotations, and how the columns of a head are rotated."""
    dim = query.shape[-1]
    return {
        "p_cos": rotation.cos.contiguous(),
        "p_sin": rotation.sin.contiguous(),
        "DIM": dim,
        "PADDED": power_of_two(dim),
        "ROTATED": len(context.tables.rotary.frequencies),
        "INTERLEAVED": context.tables.rotary.interleaved,
    }


def distance_rotation(query: Tensor, largest: int, context: LayerContext) -> dict[str, Any]:
    """Returns the rotations by ``0..largest`` blocks."""
    table = context.tables.distance_table(query.device, query.dtype, largest)
    return rotation_arguments(table, query, context)


def grid_strides(query: Tensor) -> dict[str, int]:
    """Returns the strides of queries ``(B, G, R, n, W, D)``."""
    batch, group, repeat, own, slot, _ = query.stride()
    return {
        "query_batch": batch,
        "query_group": group,
        "query_repeat": repeat,
        "query_own": own,
        "query_slot": slot,
    }


def store_arguments(blocks: ResidentBlocks) -> dict[str, Any]:
    """Returns the keys and values that blocks are read from."""
    batch, group, *_ = blocks.keys.stride()
    return {
        "p_keys": blocks.keys,
        "p_values": blocks.values,
        "store_batch": batch,
        "store_group": group,
    }


def landmark_arguments(keys: Tensor) -> dict[str, Any]:
    """Returns landmark keys ``(B, G, P, D)``."""
    batch, group, *_ = keys.stride()
    return {"p_landmark": keys, "landmark_batch": batch, "landmark_group": group}


def scored_landmarks(grid: QueryGrid, candidates: int, context: LayerContext) -> tuple[Tensor, int]:
    """Returns landmark keys as they are scored, and a distance that none of them exceeds.

    Under exact positions each key is rotated to its own block, so that the query is rotated once.
    """
    store = context.store
    keys = store.landmark_keys[:, :, : store.kept.count_before(candidates)]
    largest = SCHEMES[context.config.positions].largest_distance(grid, context)
    if context.config.positions == "stingy":
        return keys, largest
    blocks = store.kept.blocks_before(candidates, keys.device)
    rotation = context.tables.by_distance(blocks, torch.float32, largest)
    return rotation.rotate(keys.float()), largest


def latest_candidates(config: LandmarkConfig) -> int:
    """Returns how many of the latest older blocks are candidates; 0 leaves block 0 alone."""
    return ALL_BLOCKS if config.max_blocks is None else config.max_blocks


def dot_precision(query: Tensor) -> str:
    """Returns the precision of products in float32: exact, or in three parts of tf32."""
    return "ieee" if query.dtype == torch.float32 else "tf32x3"


def tile_rows(query: Tensor) -> int:
    """Returns the rows of a tile of queries of one own block."""
    return max(LEAST_ROWS, min(MOST_ROWS, power_of_two(query.shape[4])))


def programs(query: Tensor, rows: int) -> int:
    """Returns the number of tiles of ``rows`` queries."""
    return query.shape[:4].numel() * -(-query.shape[4] // rows)


def landmark_stages(tile_bytes: int) -> int:
    """Returns the stages of a loop over tiles of landmark keys.

    Args:
        tile_bytes: of a tile, with any copy in float32. Two large tiles on their way at once would
            exceed the 99 KiB of shared memory of some cards.
    """
    return LANDMARK_STAGES if tile_bytes <= LANDMARK_BYTES else 1


def to_int32(tensor: Tensor) -> Tensor:
    """Returns integers as the kernels read them."""
    return tensor.int().contiguous()


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns the multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
