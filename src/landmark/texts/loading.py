"""Load a landmark or plain model together with its tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from landmark.data.characters import require_utf8
from landmark.data.errors import first_line
from landmark.data.tokenizer import require_savable
from landmark.hf.base import PinnedBase, has_pinned_base, split_base
from landmark.hf.bundled import MODEL_FILES, model_folder, model_path
from landmark.hf.damage import ADAPTER
from landmark.hf.families import PREFIX
from landmark.hf.pretrained import find, read_weights

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode, with its tokenizer.

    Attributes:
        name: as given by the user.
        model: a landmark model or a plain model of transformers.
        tokenizer: of transformers.
        folder: absolute path of the folder it was loaded from; ``None`` for a bundled model and
            for one of the hub.
    """

    name: str
    model: Any
    tokenizer: Any
    folder: str | None = None

    @property
    def is_landmark(self) -> bool:
        """Whether it is a landmark model."""
        return hasattr(self.model, "landmark")

    @property
    def device(self) -> str:
        """The device of the weights, as ``torch.device`` writes it."""
        return str(next(self.model.parameters()).device)

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @contextmanager
    def configured(self, **changes: Any) -> Iterator[None]:
        """Changes settings of a landmark model inside a ``with``; nothing for a plain model."""
        if not self.is_landmark:
            yield
            return
        before = self.model.landmark
        self.model.configure_landmark(**changes)
        try:
            yield
        finally:
            self.model.config.landmark = before.to_dict()


def pick_device(device: str) -> str:
    """Returns ``device``, or for ``auto`` a GPU where there is one.

    Raises:
        ValueError: a device that torch does not know or does not have here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected auto, cpu or an available cuda device, got {device!r} "
            f"({first_line(error)})"
        ) from None
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Returns the torch dtype of a name; ``auto`` is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ValueError: an unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load(name: str | None, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a landmark or plain causal language model with its tokenizer.

    Args:
        name: folder, hub name, or ``landmark`` or ``smollm2`` (the bundled ones); ``None`` is
            ``landmark``.
        device: ``auto``, ``cpu`` or a cuda device.
        dtype: ``auto`` or a dtype's name.

    Raises:
        ValueError: nothing that transformers can load is there.
        FileNotFoundError: a path that does not exist.
        ModuleNotFoundError: a package that the model needs is missing.
    """
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    folder = str(model_path()) if name is None else model_folder(name)
    require_utf8(folder, "model")
    require_model(folder)
    try:
        source = find(folder)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # transformers raises many kinds for what is missing or damaged
        raise ValueError(
            f"model: expected a model of transformers, got {folder} ({first_line(error)})"
        ) from None
    model_type = source.config.model_type
    if source.adapter is not None and not str(model_type).startswith(PREFIX):
        raise ValueError(
            f"model: expected an adapter of a landmark model, got {folder}, one of the plain "
            f"{model_type} in {source.path}; merge it into its base and convert that"
        )
    loaded = load_configured(name or "landmark", folder, source.config, where, precision)
    if folder == name and os.path.isdir(folder):
        return replace(loaded, folder=os.path.abspath(folder))
    return loaded


def load_configured(
    name: str, folder: str, config: Any, device: str, dtype: torch.dtype
) -> LoadedModel:
    """Loads the weights in a folder under a given config, and the tokenizer there.

    Args:
        name: what the user calls the model.
        folder: folder or hub name.
        config: of transformers, in place of the folder's own.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: weights or tokenizer are missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        source = find(folder, config=config, dtype=dtype)
        model, _ = read_weights(source)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder, source.path))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # transformers raises many kinds for what is missing or damaged
        says_what = isinstance(error, (ValueError, FileNotFoundError))
        if says_what and has_pinned_base(split_base(folder)[0]):
            raise
        raise ValueError(
            f"model: expected weights and a tokenizer of transformers in {folder}, got "
            f"{first_line(error)}; save both with save_pretrained"
        ) from None
    return LoadedModel(name, model.to(device).eval(), tokenizer)


def tokenizer_folder(folder: str, base: str) -> str:
    """Returns where the tokenizer of a model is.

    An adapter has the tokenizer of its base unless it was saved with its own.
    """
    folder, _ = split_base(folder)
    has_own = (Path(folder) / "tokenizer_config.json").is_file()
    return folder if has_own or not (Path(folder) / ADAPTER).is_file() else base


def require_landmark(loaded: LoadedModel) -> None:
    """Raises ``ValueError`` for a plain model."""
    if not loaded.is_landmark:
        raise ValueError(
            f"model: expected a landmark model, got the plain {type(loaded.model).__name__} in "
            f"{loaded.name}; convert it with landmark convert and train it with landmark train"
        )


def tokenizer_of(source: str) -> Any:
    """Returns the tokenizer of a model, ``None`` where it has none.

    Raises:
        ValueError: a damaged one.
    """
    from transformers import AutoTokenizer

    here = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many kinds for what is missing or damaged
        if not here and isinstance(error, (OSError, ValueError, KeyError)):
            return None
        raise ValueError(
            f"model: expected a tokenizer of transformers in {source}, got a damaged one "
            f"({', '.join(here)}: {first_line(error)}); save it again, or remove its files to "
            "convert without"
        ) from None
    require_savable(tokenizer, f"model: {source}")
    return tokenizer


def require_model(folder: str) -> None:
    """Checks that a model can be in a folder, before anything is loaded.

    Raises:
        FileNotFoundError: ``folder`` is written as a path and is no folder with a config.json.
        ModuleNotFoundError, ValueError: the base weights of an adapter are not installed, or are
            others.
    """
    folder, base = split_base(folder)
    if base is None and has_pinned_base(folder):
        PinnedBase.of(folder).find()
    path = Path(folder)
    looks_local = path.is_absolute() or folder.startswith((".", "~")) or folder.count("/") != 1
    if path.is_dir() and any((path / file).is_file() for file in MODEL_FILES):
        return
    if path.exists() or looks_local:
        raise FileNotFoundError(
            "model: expected a folder with a config.json or a hub name like org/model, got "
            f"{folder}; save a model there with save_pretrained"
        )


def quiet() -> None:
    """Silences transformers' progress bars and hints below warnings."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
