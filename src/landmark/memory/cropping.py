"""How far a cache can be cropped: blocks that its next queries see have to be kept still."""

from __future__ import annotations

from collections.abc import Sequence

from landmark.config import LandmarkConfig
from landmark.memory.geometry import oldest_needed
from landmark.memory.layer import LayerMemory


def check_crop(
    layers: Sequence[LayerMemory], config: LandmarkConfig, before: list[int], after: list[int]
) -> None:
    """Makes sure that rows can go on from where they are cropped to.

    Args:
        layers: the memory of each layer.
        config: their settings.
        before: slots of each row.
        after: slots that are to be left of each.

    Raises:
        ValueError: blocks that are needed were evicted (``max_blocks``), or more blocks than
            the selector knows queries of.
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
    limits = [layer.selector.crop_blocks for layer in layers]
    limit = min((each for each in limits if each is not None), default=None)
    if limit is None:
        return
    pairs = zip(before, after, strict=True)
    far = [old // size - new // size for old, new in pairs if new % size]
    if far and max(far) >= limit:
        raise ValueError(
            f"granularity {config.granularity} can go back less than {limit} blocks, or to a "
            f"block's border, got {max(far)} blocks; keep a cache.fork() from there instead"
        )
