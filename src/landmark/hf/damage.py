"""Finds the file for which a model could not be read, and says what is wrong in one line."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "config.json"
# Git LFS leaves a pointer in place of a file that it did not fetch, which begins like this.
LFS = b"version https://git-lfs"
REASON = 200  # characters kept of another library's message, which may name all architectures
ANEW = "save or download it again"


@contextmanager
def in_one_line(
    name: str, look: Callable[[], None] = lambda: None, remedy: str = ""
) -> Iterator[None]:
    """Turns whatever transformers raises inside into an error of one line.

    Args:
        name: the name of the model in messages.
        look: called after a failure; raises ``FileNotFoundError`` or ``ValueError`` for a file that
            is missing or damaged.
        remedy: what to do where ``look`` finds no such file.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _found_by(look) or _other_error(name, error, remedy) from None


def _found_by(look: Callable[[], None]) -> Exception | None:
    """Returns the error that a look at the files raises, if any."""
    try:
        look()
    except (FileNotFoundError, ValueError) as found:
        return found
    return None


def _other_error(name: str, error: Exception, remedy: str) -> Exception:
    """Returns an error of one line for an error of transformers that no damaged file explains."""
    reason = _shortened(str(error)) or type(error).__name__
    if isinstance(error, ImportError):
        return ModuleNotFoundError(f"{name}: {reason}")
    of_name = isinstance(error, OSError) and error.errno is None  # an errno means a file
    if of_name and not os.path.exists(name):
        return FileNotFoundError(
            f"{name}: expected a model's folder or hub name, found none ({reason})"
        )
    message = f"{name}: expected what transformers can load, got {reason}"
    if remedy:
        message = f"{message}; {remedy}"
    return ValueError(message)


def _shortened(text: str) -> str:
    """Returns a message of any length as part of one line."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= REASON else f"{line[:REASON]}..."


def check_config(folder: Path, trusted: bool) -> None:
    """Makes sure that the config of a folder can be read here.

    Args:
        folder: the folder of config.json.
        trusted: whether the folder's own code may run.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: a file that is no JSON, or a ``model_type`` that is not known.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder}: expected a folder with config.json and weights, config.json is missing"
        )
    fields = read_json(folder / CONFIG)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    kind = fields.get("model_type")
    if (trusted and "auto_map" in fields) or (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return
    if not isinstance(kind, str):
        raise ValueError(
            f"{folder / CONFIG}: expected the name of an architecture as model_type, got "
            f"{kind!r}; {ANEW}"
        )
    own_code = (
        ", or run the folder's own code by trust_remote_code=True" if "auto_map" in fields else ""
    )
    raise ValueError(
        f"{folder / CONFIG}: model_type {kind!r} is known neither to this landmark-attention nor "
        f"to this transformers; update them{own_code}"
    )


def check_weights(folder: Path, variant: str | None, use_safetensors: bool | None) -> None:
    """Makes sure that the weights of a folder can be read.

    Args:
        folder: the folder of the model.
        variant, use_safetensors: as for ``from_pretrained``.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is damaged.
    """
    names = []
    if use_safetensors is not False:
        names += [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if use_safetensors is not True:
        names += [WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    if variant is not None:
        names = [f".{variant}.".join(name.rsplit(".", 1)) for name in names]
    # transformers reads the first that is there.
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder}: expected a folder with config.json and weights, found none of "
            f"{', '.join(names)}; save the whole model there"
        )
    for file in shards(folder / found) if found.endswith(".json") else [folder / found]:
        check_tensors(file)


def check_adapter(folder: Path) -> None:
    """Makes sure that an adapter of peft can be read; raises as ``check_weights`` does."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = read_json(folder / ADAPTER).get("peft_type")
    if kind not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ValueError(
            f"{folder / ADAPTER}: expected a peft_type that this peft knows, such as LORA, got "
            f"{kind!r}; update peft, or save the adapter again"
        )
    found = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder}: expected an adapter with weights, found none of "
            f"{', '.join(ADAPTER_WEIGHTS)}; save it again"
        )
    check_tensors(found)


def check_gguf(file: Path) -> None:
    """Makes sure that a file begins like a GGUF file; raises as ``check_weights`` does."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: expected a GGUF file, found none; gguf_file= names one in the folder"
        )
    _check_fetched(file)
    with file.open("rb") as opened:
        begins = opened.read(4)
    if begins != b"GGUF":
        raise ValueError(
            f"{file}: expected a GGUF file, got one that begins with {begins!r}; download it again"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises ``ValueError`` where there is none."""
    _check_fetched(file)
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{file}: expected a JSON object, got what is no JSON ({_shortened(str(error))}); "
            f"{ANEW}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}; {ANEW}")
    return found


def shards(index: Path) -> list[Path]:
    """Returns the files that an index of shards names.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index names none.
    """
    names = read_json(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise ValueError(
            f"{index}: expected a weight_map with the file of each tensor, got "
            f"{_shortened(repr(names))}; save the whole model again"
        )
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: expected the weights that {index.name} names, found no such file; {ANEW}"
            )
    return files


def check_tensors(file: Path) -> None:
    """Raises ``ValueError`` for a file that does not hold tensors as its suffix says."""
    _check_fetched(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                opened.keys()
            return
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected weights in safetensors, got a damaged file "
            f"({_shortened(str(error))}); {ANEW}"
        ) from None
    except Exception as error:  # a pickle may raise anything
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        said = said.partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{file}: expected weights that torch.load reads with weights_only, got a damaged "
            f"file or another one ({type(error).__name__}: {_shortened(said)}); {ANEW}"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        raise ValueError(
            f"{file}: expected a dict of tensors, got another {type(found).__name__}; {ANEW}"
        )


def _check_fetched(file: Path) -> None:
    """Raises ``ValueError`` for a file without bytes, and for a pointer of Git LFS."""
    with file.open("rb") as opened:
        begins = opened.read(len(LFS))
    if not begins:
        raise ValueError(f"{file}: expected its content, got no bytes; {ANEW}")
    if begins == LFS:
        raise ValueError(
            f"{file}: expected its content, got a pointer of Git LFS; fetch it by git lfs pull"
        )
