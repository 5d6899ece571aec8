"""Landmark models of transformers.

Importing this package registers their classes with the Auto classes of transformers.
"""

from landmark.hf.cache import LandmarkCache
from landmark.hf.convert import convert, from_config, load
from landmark.hf.families import FAMILIES, family, register

register()

__all__ = ["FAMILIES", "LandmarkCache", "convert", "family", "from_config", "load"]
