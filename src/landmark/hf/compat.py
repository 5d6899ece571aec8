"""What differs between the versions of transformers, each with its reason; nothing else asks for a
version.
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

# The range that the tests ran on: a later version is warned about by name, once.
OLDEST_TESTED = "5.0.0"
NEWEST_TESTED = "5.24.0"

CACHE_NAMES = ("cache", "past_key_values")
_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
# 5.24 renamed the argument of forward and generate, and the field of outputs, from
# `past_key_values` to `cache`.
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


def cache_by_installed_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments with the cache under the name that the installed transformers gives
    it.

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
    rest = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return {**rest, CACHE: next(iter(given.values()))} if given else rest


def columns_of_step(arguments: dict[str, Any]) -> int:
    """Returns how many of the last ids a step inside ``generate`` is about.

    Stock code says so by ``next_sequence_length`` since 5.3, and by the places of the columns
    before.
    """
    count: int | None = arguments.get("next_sequence_length")
    return len(arguments["cache_position"]) if count is None else count


def check_assisted(left_out: int) -> None:
    """Raises ``ValueError`` where assisted decoding would cut off what a memory has read.

    Before 5.14 stock code crops the cache to a length that it counts by the ids that it was given.

    Args:
        left_out: columns of the memory that these ids leave out.
    """
    if left_out and _numbers(installed_version()) < (5, 14):
        raise ValueError(
            "assisted decoding of new text alone: expected transformers 5.14 or later, got "
            f"{installed_version()}; pass the whole text"
        )


def warn_untested() -> None:
    """Warns, once, where transformers is newer than any that this package was tested with."""
    if _numbers(installed_version()) > _numbers(NEWEST_TESTED):
        _warn_of(installed_version())


def installed_version() -> str:
    """Returns the version of transformers, whose module replaces itself while it is imported."""
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
    """Whether transformers has the architecture in the form that a landmark model is made of."""
    if model_type not in CONFIG_MAPPING:
        return False
    decoder = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    # Before it had this class, Gemma scaled embeddings in the decoder: another landmark embedding
    # for the same model.
    return model_type != "gemma" or hasattr(
        sys.modules[decoder.__module__], "GemmaTextScaledWordEmbedding"
    )


def unpacked_gguf(loading: dict[str, Any]) -> dict[str, Any]:
    """Returns loading arguments that make plain weights of a GGUF file.

    5.23 may leave them packed, in layers that cannot be saved; 5.12 has no such layers.
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
    """Takes the quantizer off that 5.23 leaves on a model of a GGUF file, whose weights are plain:
    it cannot save.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.dequantize:
        quantizer.remove_quantization_config(model)


def load_saved_modules(model: Any, adapter: str, left: set[str], hub: dict[str, Any]) -> set[str]:
    """Reads whole modules that an adapter was saved with (the landmark embedding).

    transformers 5.0 leaves them as they were when it loads an adapter, with no more than a line in
    its report.

    Args:
        model: the model with the adapter.
        adapter: where the adapter lies.
        left: names of tensors that the model or the adapter has alone.
        hub: where to look for a hub name.

    Returns:
        those of ``left`` that are so even now.
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
