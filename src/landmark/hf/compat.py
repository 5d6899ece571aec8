"""The differences between versions of transformers, each with its reason.

No other module of the package asks for the version of transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import warnings
from typing import Any

import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

# The range that the tests ran on. A later version is warned about once.
OLDEST_TESTED = "5.0.0"
NEWEST_TESTED = "5.24.0"

CACHE_NAMES = ("cache", "past_key_values")
_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
# 5.24 renamed the argument of forward and generate, and the field of outputs, from
# `past_key_values` to `cache`.
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


def cache_by_installed_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments with the cache under the name in the installed transformers.

    Raises:
        ValueError: caches under both names.
    """
    given = {
        name: value
        for name, value in arguments.items()
        if name in CACHE_NAMES and value is not None
    }
    if len(given) > 1:
        types = " and ".join(f"a {type(value).__name__} as {name}" for name, value in given.items())
        raise ValueError(
            f"expected one cache, got {types}: they are two names of one argument, leave one out"
        )
    named = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    for cache in given.values():
        named[CACHE] = cache
    return named


def columns_of_step(arguments: dict[str, Any]) -> int:
    """Returns how many of the last ids a step inside ``generate`` runs.

    Stock code says so by ``next_sequence_length`` since 5.3, and by ``cache_position`` before.
    """
    count: int | None = arguments.get("next_sequence_length")
    if count is None:
        return len(arguments["cache_position"])
    return count


def check_assisted(left_out: int) -> None:
    """Makes sure that assisted decoding does not crop a cache too far.

    Before 5.14 stock code crops the cache to a length that it counts by the ids it was given.

    Args:
        left_out: columns in the cache that these ids leave out.

    Raises:
        ValueError: some are left out, and transformers is older.
    """
    if left_out and _numbers(installed_version()) < (5, 14):
        raise ValueError(
            "assisted decoding of new text alone: expected transformers 5.14 or later, got "
            f"{installed_version()}; pass the whole text"
        )


def warn_untested() -> None:
    """Warns once where transformers is newer than any version this package was tested with."""
    if _numbers(installed_version()) > _numbers(NEWEST_TESTED):
        _warn_of(installed_version())


def installed_version() -> str:
    """Returns the version of the installed transformers."""
    # Its module replaces itself in sys.modules while it is imported.
    version: str = sys.modules["transformers"].__version__
    return version


@functools.cache
def _warn_of(version: str) -> None:
    warnings.warn(
        f"transformers {version} is newer than {NEWEST_TESTED}, the newest that landmark was "
        f"tested with; if something fails, install transformers<={NEWEST_TESTED}",
        stacklevel=4,
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def installed(model_type: str) -> bool:
    """Returns whether transformers has an architecture in a form that can be converted."""
    if model_type not in CONFIG_MAPPING:
        return False
    if model_type == "gemma":
        # Before it had this class, Gemma scaled embeddings in the decoder, so that the same
        # landmark model would need another landmark embedding.
        decoder = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
        return hasattr(sys.modules[decoder.__module__], "GemmaTextScaledWordEmbedding")
    return True


def unpacked_gguf(loading: dict[str, Any]) -> dict[str, Any]:
    """Returns loading arguments by which the weights of a GGUF file are dequantized.

    5.23 may keep them quantized, in layers that cannot be saved; 5.12 has no such layers.
    """
    packed = getattr(transformers, "GgufConfig", None)
    if (
        loading.get("gguf_file") is None
        or packed is None
        or loading.get("quantization_config") is not None
    ):
        return loading
    return {**loading, "quantization_config": packed(dequantize=True)}


def forget_gguf(model: Any) -> None:
    """Removes the quantizer from a model of a GGUF file whose weights were dequantized.

    5.23 leaves it there, and such a model cannot be saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.dequantize:
        quantizer.remove_quantization_config(model)


def load_saved_modules(model: Any, adapter: str, left: set[str], hub: dict[str, Any]) -> set[str]:
    """Loads the whole modules of an adapter, such as the landmark embedding (``modules_to_save``).

    transformers 5.0 does not load them with the adapter, and only mentions it in its report.

    Args:
        model: the model with the adapter.
        adapter: folder or hub name of the adapter.
        left: names of tensors that only the model or only the adapter has.
        hub: arguments for finding a hub name.

    Returns:
        the names of ``left`` that were not loaded here either.
    """
    from peft.utils import load_peft_weights

    whole = ".modules_to_save.default"
    names = [name for name, _ in model.named_parameters() if whole in name]
    weights = load_peft_weights(adapter, device="cpu", **hub) if names else {}
    for name in names:
        plain = name.replace(whole, "")
        saved = weights.get(f"base_model.model.{plain}")
        if saved is not None:
            model.get_parameter(name).data.copy_(saved)
            left = left - {name, plain}
    return left
