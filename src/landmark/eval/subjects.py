"""The models under test: a landmark model, or a plain one with one of three kinds of attention."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.data.characters import require_utf8
from landmark.data.errors import first_line
from landmark.data.tokenizer import require_savable
from landmark.eval.window import SINK, window_attention
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
class Subject:
    """A model in eval mode with its tokenizer.

    Attributes:
        name: as given by the user.
        attention: ``landmark``; ``full``, ``window`` or ``dynamic`` for a plain model.
        window: latest tokens a query of a windowed plain model sees beside the first block.
        rope_factor: of dynamic RoPE scaling.
        folder: where a model that was loaded from a folder lies, from the root; a bundled one has
            none.
    """

    name: str
    model: Any
    tokenizer: Any
    attention: str
    window: int | None = None
    rope_factor: float | None = None
    folder: str | None = None

    @property
    def device(self) -> str:
        """The device of the weights, as ``torch.device`` writes it."""
        return str(next(self.model.parameters()).device)

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def trained_length(self) -> int | None:
        """Positions the model was trained on, as far as its configuration says."""
        if self.attention == "landmark":
            trained: int | None = self.model.landmark.trained_length
        else:
            trained = getattr(self.model.config, "max_position_embeddings", None)
        return trained

    def settings(self) -> dict[str, Any]:
        """Returns all settings of the attention as JSON types."""
        if self.attention == "landmark":
            fields: dict[str, Any] = self.model.landmark.to_dict()
            return fields
        if self.attention == "window":
            return {"sink": SINK, "window": self.window}
        if self.attention == "dynamic":
            return {"rope_factor": self.rope_factor}
        return {}

    def beyond_trained(self, length: int) -> bool | None:
        """Whether an input of ``length`` text tokens makes attention use positions beyond the
        trained length.
        """
        trained = self.trained_length
        if trained is None:
            return None
        return self._positions_used(length) > trained

    def _positions_used(self, length: int) -> int:
        if self.attention == "window":
            assert self.window is not None
            return min(length, SINK + self.window)
        if self.attention != "landmark":
            return length
        config: LandmarkConfig = self.model.landmark
        everything = slots_for(length, config.block_size)
        if config.positions == "exact":
            return everything
        if config.local == "chunk":
            started = config.block_size - 1 if config.chunk_tokens % config.text_per_block else 0
            chunk = started + slots_for(config.chunk_tokens, config.block_size)
            return min(everything, (config.top_k + 1) * config.block_size + chunk)
        return min(everything, config.stingy_positions)

    @torch.no_grad()
    def logits(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Returns the logits ``(B, keep, V)`` of the last ``keep`` tokens of ``ids (B, T)``, of all
        for 0.
        """
        arguments: dict[str, Any] = {"logits_to_keep": keep}
        if self.attention != "landmark":
            arguments["use_cache"] = False
        if self.attention == "window":
            assert self.window is not None
            with window_attention(self.model, self.window) as extra:
                logits: Tensor = self.model(ids, **arguments, **extra(ids)).logits
                return logits
        return self.model(ids, **arguments).logits  # type: ignore[no-any-return]

    @contextmanager
    def configured(self, **changes: Any) -> Iterator[None]:
        """Changes settings of a landmark model inside a ``with``; nothing for a plain model."""
        if self.attention != "landmark":
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
        ValueError: a device torch does not know or does not have here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: expected auto, cpu or an available cuda device, got {device!r} "
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
        raise ValueError(f"--dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def load(name: str | None, device: str = "auto", dtype: str = "auto") -> Subject:
    """Loads a landmark or plain causal language model with its tokenizer.

    Args:
        name: folder, hub name, ``landmark`` or ``twin`` (the bundled ones); ``None`` is
            ``landmark``.
        device: ``auto``, ``cpu`` or a cuda device.
        dtype: ``auto`` or a dtype's name.

    Raises:
        ValueError: nothing that transformers can load is there.
        FileNotFoundError: a path that does not exist.
    """
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    folder = str(model_path()) if name is None else model_folder(name)
    require_utf8(folder, "--model")
    require_model(folder)
    try:
        source = find(folder)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # transformers raises many kinds for what is missing or damaged
        raise ValueError(
            f"--model: expected a model of transformers, got {folder} ({first_line(error)})"
        ) from None
    model_type = source.config.model_type
    if source.adapter is not None and not str(model_type).startswith(PREFIX):
        raise ValueError(
            f"--model: expected an adapter of a landmark model, got {folder}, one of the plain "
            f"{model_type} in {source.path}; merge it into its base and convert that"
        )
    found = build(name or "landmark", folder, source.config, where, precision)
    return (
        replace(found, folder=os.path.abspath(folder))
        if folder == name and os.path.isdir(folder)
        else found
    )


def build(
    name: str, folder: str, config: Any, device: str, dtype: torch.dtype, rope: float | None = None
) -> Subject:
    """Loads the weights in ``folder`` under ``config`` (see ``load``); ``rope`` is a factor of
    dynamic scaling.
    """
    from transformers import AutoTokenizer

    is_landmark = str(config.model_type).startswith(PREFIX)
    try:
        source = find(folder, config=config, dtype=dtype)
        model, _ = read_weights(source)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder, source.path))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # transformers raises many kinds for what is missing or damaged
        raise ValueError(
            f"--model: expected weights and a tokenizer of transformers in {folder}, got "
            f"{first_line(error)}; save both with save_pretrained"
        ) from None
    attention = "landmark" if is_landmark else "full" if rope is None else "dynamic"
    return Subject(name, model.to(device).eval(), tokenizer, attention, rope_factor=rope)


def tokenizer_folder(folder: str, base: str) -> str:
    """Returns where the tokenizer of a model is: an adapter has that of its base unless it was
    saved with its own.
    """
    has_own = (Path(folder) / "tokenizer_config.json").is_file()
    return folder if has_own or not (Path(folder) / ADAPTER).is_file() else base


def load_all(
    model: str | None,
    compare: str | None,
    device: str,
    dtype: str,
    window: int | None,
    rope: float | None,
) -> list[Subject]:
    """Loads one model or two; each plain one in all its variants (see ``load`` and
    ``plain_variants``).

    Raises:
        ValueError, FileNotFoundError: as these do, and for a window or scaling without a plain
            model.
    """
    loaded = [load(model, device, dtype)] + (
        [load(compare, device, dtype)] if compare is not None else []
    )
    plain = [subject for subject in loaded if subject.attention != "landmark"]
    if not plain and (window is not None or rope is not None):
        option = "--rope" if window is None else "--window"
        raise ValueError(
            f"{option}: expected a plain model, got landmark models only; add for example "
            "--compare twin"
        )
    tested = [subject for subject in loaded if subject.attention == "landmark"]
    for subject in plain:
        tested += plain_variants(subject, window, rope)
    return tested


def plain_variants(subject: Subject, window: int | None, rope: float | None) -> list[Subject]:
    """Returns a plain model as it is and, where asked for, with a window and with dynamic RoPE
    scaling.

    Args:
        subject: a plain model.
        window: the latest tokens a query sees beside the first block of 64.
        rope: factor of dynamic RoPE scaling.

    Raises:
        ValueError: a window below 1 or a factor below 1.
    """
    variants = [subject]
    if window is not None:
        if not 1 <= window < 2**31:
            raise ValueError(
                f"--window: expected 1 to {2**31 - 1} tokens, got {window}; pass for example "
                "--window 384"
            )
        variants.append(
            Subject(subject.name, subject.model, subject.tokenizer, "window", window=window)
        )
    if rope is not None:
        if not 1 <= rope < math.inf:
            raise ValueError(
                f"--rope: expected a factor of at least 1, got {rope}; pass for example --rope "
                "dynamic:2"
            )
        config = type(subject.model.config).from_dict(subject.model.config.to_dict())
        old = getattr(config, "rope_parameters", None) or {}
        config.rope_parameters = {**old, "rope_type": "dynamic", "factor": rope}
        variants.append(
            build(
                subject.name,
                model_folder(subject.name),
                config,
                subject.device,
                next(subject.model.parameters()).dtype,
                rope,
            )
        )
    return variants


def require_landmark(subject: Subject) -> None:
    """Raises ``ValueError`` for a plain model."""
    if subject.attention != "landmark":
        raise ValueError(
            f"--model: expected a landmark model, got the plain {type(subject.model).__name__} in "
            f"{subject.name}; convert it with landmark convert and train it with landmark train"
        )


def tokenizer_of(source: str, option: str) -> Any:
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
            f"{option}: expected a tokenizer of transformers in {source}, got a damaged one "
            f"({', '.join(here)}: {first_line(error)}); save it again, or remove its files to "
            "convert without"
        ) from None
    require_savable(tokenizer, f"{option} {source}")
    return tokenizer


def require_model(folder: str, option: str = "--model") -> None:
    """Raises ``FileNotFoundError`` when ``folder`` is written as a path and is no folder with a
    config.json.
    """
    path = Path(folder)
    looks_local = path.is_absolute() or folder.startswith((".", "~")) or folder.count("/") != 1
    if path.is_dir() and any((path / file).is_file() for file in MODEL_FILES):
        return
    if path.exists() or looks_local:
        raise FileNotFoundError(
            f"{option}: expected a folder with a config.json or a hub name like org/model, got "
            f"{folder}; save a model there with save_pretrained"
        )


def quiet() -> None:
    """Silences transformers' progress bars and hints below warnings."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
