"""How far rows can go back: what their next queries see has to be there still."""

from __future__ import annotations

from collections.abc import Iterable

from landmark.config import LandmarkConfig
from landmark.memory.geometry import oldest_needed
from landmark.memory.head_choice import RECENT_BLOCKS
from landmark.memory.layer import LayerMemory


def check_crop(
    layers: Iterable[LayerMemory], config: LandmarkConfig, before: list[int], after: list[int]
) -> None:
    """Makes sure that rows can go on from where they are cropped to.

    Args:
        layers: the memory of each layer.
        config: their settings.
        before: slots of each row.
        after: slots that are to be left of each.

    Raises:
        ValueError: blocks that are needed were evicted (``max_blocks``), or more blocks than
            ``head`` knows queries of.
    """
    size = config.block_size
    own = min(slots // size for slots in after)
    for layer in layers:
        lowest = oldest_needed(own, config) if layer.retrieves else own - config.local_blocks
        if max(1, lowest) < layer.store.first:
            raise ValueError(
                f"cannot go back to where block {lowest} is seen: blocks before "
                f"{layer.store.first} were evicted; keep a cache.fork() from there instead"
            )
    if config.granularity == "head":
        far = [
            old // size - new // size for old, new in zip(before, after, strict=True) if new % size
        ]
        if far and max(far) >= RECENT_BLOCKS:
            raise ValueError(
                f"granularity head can go back less than {RECENT_BLOCKS} blocks, or to a block's "
                f"border, got {max(far)} blocks; keep a cache.fork() from there instead"
            )
