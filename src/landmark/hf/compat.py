"""Everything that differs between the versions of transformers that the package supports, with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
# 5.24 renamed the argument of forward and generate, and the field of outputs, from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


def cache_by_installed_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments with the cache under the name that the installed transformers gives it.

    Raises:
        ValueError: caches under both names.
    """
    given = {name: value for name, value in arguments.items() if name in CACHE_NAMES and value is not None}
    if len(given) > 1:
        types = " and ".join(f"a {type(value).__name__} as {name}" for name, value in given.items())
        raise ValueError(f"expected one cache, got {types}: they are two names of one argument, leave one out")
    rest = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return {**rest, CACHE: next(iter(given.values()))} if given else rest


def columns_of_step(arguments: dict[str, Any]) -> int | None:
    """Returns how many of the last ids a step inside ``generate`` is about, ``None`` where stock code does not say.

    It says so by ``next_sequence_length`` since 5.3, and by the places of the columns (``cache_position``) before.
    """
    count: int | None = arguments.get("next_sequence_length")
    places = arguments.get("cache_position")
    return len(places) if count is None and places is not None else count
