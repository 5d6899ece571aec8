"""Landmark attention: random access to an unbounded context for RoPE language models.

The public names are imported lazily: importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "LandmarkCache": "landmark.hf.cache",
    "LandmarkConfig": "landmark.config",
    "Library": "landmark.texts.library",
    "__version__": "landmark.versions",
    "convert": "landmark.hf.convert",
    "explain": "landmark.texts.explain",
    "insert_landmarks": "landmark.blocks",
    "landmark_attention": "landmark.ops.attention",
    "load": "landmark.hf.convert",
    "remember": "landmark.texts.library",
    "strip_landmarks": "landmark.blocks",
}

__all__ = [
    "LandmarkCache",
    "LandmarkConfig",
    "Library",
    "__version__",
    "convert",
    "explain",
    "insert_landmarks",
    "landmark_attention",
    "load",
    "remember",
    "strip_landmarks",
]

if TYPE_CHECKING:
    from landmark.blocks import insert_landmarks, strip_landmarks
    from landmark.config import LandmarkConfig
    from landmark.hf.cache import LandmarkCache
    from landmark.hf.convert import convert, load
    from landmark.ops.attention import landmark_attention
    from landmark.texts.explain import explain
    from landmark.texts.library import Library, remember
    from landmark.versions import __version__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'landmark' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
