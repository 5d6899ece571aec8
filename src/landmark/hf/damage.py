"""Why a model could not be read, in one line: its files are looked at again, and the damaged one is
named.
"""

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
# What Git LFS puts in the place of a file that it did not fetch begins like this.
LFS = b"version https://git-lfs"
REASON = 200  # characters of what another library says: it may name all its architectures
ANEW = "save or download it again"


@contextmanager
def in_one_line(
    name: str, look: Callable[[], None] = lambda: None, remedy: str = ""
) -> Iterator[None]:
    """Turns whatever transformers raises into one line.

    Args:
        name: what is read.
        look: is called after a failure; raises ``FileNotFoundError`` or ``ValueError`` for a file
            that is missing or damaged.
        remedy: what to do where ``look`` finds nothing.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _found_by(look) or _line(name, error, remedy) from None


def _found_by(look: Callable[[], None]) -> Exception | None:
    try:
        look()
    except (FileNotFoundError, ValueError) as found:
        return found
    return None


def _line(name: str, error: Exception, remedy: str) -> Exception:
    """Returns an error of one line for one of transformers about files that are not damaged."""
    reason = _shortened(str(error)) or type(error).__name__
    if isinstance(error, ImportError):
        return ModuleNotFoundError(f"{name}: {reason}")
    if (
        isinstance(error, OSError) and error.errno is None and not os.path.exists(name)
    ):  # of a name, not of a file
        return FileNotFoundError(
            f"{name}: expected a model's folder or hub name, found none ({reason})"
        )
    return ValueError(
        f"{name}: expected what transformers can load, got {reason}{remedy and f'; {remedy}'}"
    )


def _shortened(text: str) -> str:
    """Returns a text of any length as a part of one line."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= REASON else f"{line[:REASON]}..."


def check_config(folder: Path, trusted: bool) -> None:
    """Makes sure that the config of a folder can be read here.

    Args:
        folder: with config.json.
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
        folder: of the model.
        variant, use_safetensors: as for ``from_pretrained``.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: a file is damaged.
    """
    kinds = {
        True: (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        False: (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    }
    wanted = [*kinds[True], *kinds[False]] if use_safetensors is None else kinds[use_safetensors]
    names = [
        name if variant is None else f".{variant}.".join(name.rsplit(".", 1)) for name in wanted
    ]
    found = next(
        (name for name in names if (folder / name).is_file()), None
    )  # the first is what transformers reads
    if found is None:
        raise FileNotFoundError(
            f"{folder}: expected a folder with config.json and weights, found none of "
            f"{', '.join(names)}; save the whole model there"
        )
    for file in _shards(folder / found) if found.endswith(".json") else [folder / found]:
        _check_tensors(file)


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
    _check_tensors(found)


def check_gguf(file: Path) -> None:
    """Makes sure that this is a GGUF file, by its first bytes; raises as ``check_weights`` does."""
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
    """Returns the object in a file; raises ``ValueError`` where there is none."""
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


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index names; raises ``FileNotFoundError`` for one that is
    missing.
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


def _check_tensors(file: Path) -> None:
    """Raises ``ValueError`` for a file without tensors in the form that its name says."""
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
    except Exception as error:  # any of the many that pickles of anything may raise
        said = (
            str(error)
            .rpartition("WeightsUnpickler error: ")[2]
            .strip()
            .partition("\n")[0]
            .partition(". ")[0]
        )
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
    """Raises ``ValueError`` for a file of no bytes, and for what Git LFS puts in the place of
    one.
    """
    with file.open("rb") as opened:
        begins = opened.read(len(LFS))
    if not begins:
        raise ValueError(f"{file}: expected its content, got no bytes; {ANEW}")
    if begins == LFS:
        raise ValueError(
            f"{file}: expected its content, got a pointer of Git LFS; fetch it by git lfs pull"
        )
