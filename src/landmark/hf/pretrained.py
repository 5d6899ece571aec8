"""Reading a folder or hub name with transformers; what is missing or damaged is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig


def read_config(path: Any) -> Any:
    """Returns the config of a model.

    Args:
        path: a folder or hub name.

    Raises:
        ValueError: ``path`` is neither, or its config is damaged.
        FileNotFoundError: there is no model.
    """
    if not isinstance(path, (str, PathLike)):
        raise ValueError(f"expected a transformers model or a path, got {type(path).__name__}")
    with _in_one_line(path):
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise OSError("config.json is missing")
        try:
            return AutoConfig.from_pretrained(path)
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{fspath(path)}: expected the config.json of a model, got a damaged one ({error}); save it again"
            ) from None


def read_weights(model_class: Any, path: Any, **loading: Any) -> Any:
    """Returns ``model_class.from_pretrained(path, **loading)``.

    Raises:
        ValueError: its weights are damaged.
        FileNotFoundError: it has no weights.
    """
    with _in_one_line(path):
        return model_class.from_pretrained(path, **loading)


@contextmanager
def _in_one_line(path: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, SafetensorError):
            raise ValueError(
                f"{fspath(path)}: expected weights in safetensors files, got damaged ones ({reason}); save it again"
            ) from None
        what = "a folder with config.json and weights" if Path(path).is_dir() else "a model's folder or hub name"
        raise FileNotFoundError(f"{fspath(path)}: expected {what}, found none ({reason})") from None
