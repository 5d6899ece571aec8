"""What every step of reading one layer's memory needs, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from landmark.config import LandmarkConfig
from landmark.memory.landmark_index import LandmarkIndex
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.store import BlockStore


@dataclass(frozen=True)
class LayerContext:
    """The memory of a layer and how it is read in one call.

    Attributes:
        store: the layer's blocks.
        tables: the rotations of its rotary type.
        config: the settings.
        scale: the softmax scale.
        index: finds landmarks of old blocks without scoring every one; ``None`` to score all.
    """

    store: BlockStore
    tables: RotaryTables
    config: LandmarkConfig
    scale: float
    index: LandmarkIndex | None = None
