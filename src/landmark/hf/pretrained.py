"""Reading a folder or hub name with transformers; what is missing or damaged is said in one
line.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.compat import forget_gguf, load_saved_modules, unpacked_gguf
from landmark.hf.damage import (
    ADAPTER,
    CONFIG,
    check_adapter,
    check_config,
    check_gguf,
    check_weights,
    in_one_line,
    read_json,
)
from landmark.hf.families import PREFIX, check_landmark_config

HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
NOT_OF_CONFIGS = (
    "dtype",
    "torch_dtype",
    "quantization_config",
    "trust_remote_code",
    "code_revision",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft.

    Attributes:
        place: a folder or hub name.
        hub: where to look for a hub name.
        base: the model that it names, a folder or hub name; ``None`` where its model lies in the
            same folder, from which transformers reads both at once.
    """

    place: str
    hub: dict[str, Any]
    base: str | None


@dataclass(frozen=True)
class Source:
    """A model that is about to be read.

    Attributes:
        path: a folder or hub name with the weights.
        adapter: what is put on them, if anything.
        config: the config, with the fields that were given as loading arguments.
        loading: the other loading arguments, for ``from_pretrained``.
        told: whether the caller wants the loading info.
    """

    path: str
    adapter: Adapter | None
    config: Any
    loading: dict[str, Any]
    told: bool

    @property
    def name(self) -> str:
        """What messages call it."""
        return _name(self.path, self.adapter)


def read_config(path: Any, **loading: Any) -> Any:
    """Returns the config of a model; see ``find``."""
    return find(path, **loading).config


def find(path: Any, **loading: Any) -> Source:
    """Finds a model and reads its config, as ``AutoModelForCausalLM.from_pretrained`` does.

    Args:
        path: a folder or hub name, of a model or of an adapter of peft.
        **loading: what ``from_pretrained`` takes: where to look (``subfolder``, ``revision``, ...),
            ``config``, fields of the config, and what concerns the weights.

    Raises:
        ValueError: ``path`` is neither, its config is damaged or cannot be that of a landmark
            model, or another attention is asked for.
        FileNotFoundError: there is no model.
        ModuleNotFoundError: it is an adapter and peft is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"expected a transformers model or a path, got {type(path).__name__}")
    attention = loading.pop("attn_implementation", None)
    if attention not in (None, IMPLEMENTATION):
        raise ValueError(
            f"a landmark model attends by {IMPLEMENTATION!r} only, got "
            f"attn_implementation={attention!r}; leave it out"
        )
    told = bool(loading.pop("output_loading_info", False))
    place = os.path.expanduser(os.fsdecode(path))
    adapter = _adapter(place, loading)
    if adapter is not None and adapter.base is not None:
        place = adapter.base
        loading = {
            name: value for name, value in loading.items() if name not in ("subfolder", "revision")
        }
    name = _name(place, adapter)
    config, rest = _config(place, name, loading)
    if config.model_type.startswith(PREFIX):
        try:
            check_landmark_config(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Source(place, adapter, config, rest, told)


def read_weights(source: Source) -> tuple[Any, dict[str, Any]]:
    """Returns the model that was found, and what transformers says of loading it.

    Raises:
        ValueError: its weights are damaged, of other shapes, or not all there; the last not where
            the caller is told.
        FileNotFoundError: it has no weights.
    """
    other_shapes = bool(source.loading.get("ignore_mismatched_sizes"))
    with _reading(source.path, source.name, source.loading, partial(_check_files, source)):
        arguments = {
            **unpacked_gguf(source.loading),
            "ignore_mismatched_sizes": True,
        }  # refused below, by name
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path, config=source.config, output_loading_info=True, **arguments
        )
        if source.loading.get("gguf_file") is not None:
            forget_gguf(model)
    if info["mismatched_keys"] and not other_shapes:
        raise ValueError(f"{source.name}: {_of_other_shapes(info['mismatched_keys'])}")
    missing = set(info["missing_keys"])
    if source.adapter is not None:
        missing = _load_adapter(model, source, source.adapter, missing)
    if missing and not source.told:
        raise ValueError(
            f"{source.name}: expected all weights of {type(model).__name__}, got none for "
            f"{len(missing)} of its tensors ({_first(missing)}); save the whole model again"
        )
    return model, info


def _name(path: str, adapter: Adapter | None) -> str:
    return path if adapter is None else f"{adapter.place} (an adapter of {path})"


def _first(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _of_other_shapes(tensors: Any) -> str:
    """Returns what is wrong with tensors that are given as (name, shape in the file, shape in the
    model).
    """
    name, found, wanted = min(tensors)
    return (
        f"expected weights of the shapes that config.json says, got {len(tensors)} of other "
        f"shapes ({name}: {tuple(found)} in place of {tuple(wanted)}); save weights and config "
        "together again"
    )


def _check_files(source: Source, folder: Path) -> None:
    """Raises ``ValueError`` or ``FileNotFoundError`` for a file of a model that is damaged or
    missing.
    """
    check_weights(folder, source.loading.get("variant"), source.loading.get("use_safetensors"))
    if source.adapter is not None and source.adapter.base is None:
        check_adapter(folder)


def _reading(
    place: str, name: str, loading: dict[str, Any], check: Callable[[Path], None], remedy: str = ""
) -> AbstractContextManager[None]:
    """Says a failure in one line, by the file that is damaged.

    Args:
        place: the folder or hub name that is read.
        name: what messages call it.
        loading: the loading arguments.
        check: finds the damaged file in a folder; where a GGUF file is read, that one is looked at
            instead.
        remedy: what to do where no file is damaged.
    """
    file = loading.get("gguf_file")
    if file is None:
        return in_one_line(name, partial(_look, place, loading, check), remedy)
    look = partial(_look, place, loading, lambda folder: check_gguf(folder / file))
    remedy = "download it again, or convert the model that it was made of"
    return in_one_line(str(Path(place, loading.get("subfolder") or "", file)), look, remedy)


def _look(place: str, loading: dict[str, Any], check: Callable[[Path], None]) -> None:
    """Runs a check on a folder, or on what is cached of a hub name: there, nothing is known of what
    is missing.
    """
    folder = Path(place, loading.get("subfolder") or "")
    if folder.is_dir():
        check(folder)
        return
    cache = {
        key: loading[key] for key in ("cache_dir", "revision", "subfolder") if loading.get(key)
    }
    for name in (CONFIG, ADAPTER):
        with suppress(OSError):  # it is not cached, or this is a path where nothing is
            file = cached_file(place, name, local_files_only=True, **cache)
            check(Path(str(file)).parent)
            return


def _config(place: str, name: str, loading: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the config and the loading arguments that are no fields of it; ``name`` is for
    messages.
    """
    given = loading.get("config")
    rest = {key: value for key, value in loading.items() if key != "config"}
    if isinstance(given, PretrainedConfig):
        return given, rest
    if given is not None:
        name = place = os.path.expanduser(os.fsdecode(given))
    check = partial(check_config, trusted=bool(rest.get("trust_remote_code")))
    of_gguf = rest.get("gguf_file") is not None and given is None
    if os.path.isdir(place) and not of_gguf:
        _look(place, rest, check)
    fields = {key: value for key, value in rest.items() if key not in NOT_OF_CONFIGS}
    remote = {key: rest[key] for key in ("trust_remote_code", "code_revision") if key in rest}
    remote.setdefault("trust_remote_code", False)  # None asks on the terminal
    read = rest if of_gguf else {**rest, "gguf_file": None}
    with _reading(place, name, read, check, "correct config.json, or the fields that were given"):
        config, unused = AutoConfig.from_pretrained(
            place, return_unused_kwargs=True, **fields, **remote
        )
    kept = {key: rest[key] for key in (*HUB, *NOT_OF_CONFIGS, "gguf_file") if key in rest}
    return config, {**unused, **kept}


def _adapter(place: str, loading: dict[str, Any]) -> Adapter | None:
    """Returns the adapter of peft that lies at a place, if one does."""
    subfolder = loading.get("subfolder") or ""
    folder = Path(place, subfolder)
    if os.path.isfile(folder):
        raise FileNotFoundError(
            f"{folder}: expected a folder or hub name, it is a file; a GGUF file is named by "
            "gguf_file= beside its folder"
        )
    if os.path.isdir(place) and not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{place}: expected a subfolder {subfolder!r}, found none; name one that is there"
        )
    hub = {name: loading[name] for name in HUB if name in loading}
    if os.path.isdir(folder):
        return _adapter_in(
            folder, {name: value for name, value in hub.items() if name != "subfolder"}
        )
    if not _has_peft():
        return None
    with in_one_line(place):
        file = find_adapter_config_file(place, **hub)
    return None if file is None else Adapter(place, hub, _base(Path(file), Path(place)))


def _adapter_in(folder: Path, hub: dict[str, Any]) -> Adapter | None:
    """Returns the adapter in a folder on this machine, if there is one."""
    if not (folder / ADAPTER).is_file():
        return None
    if not _has_peft():
        raise ModuleNotFoundError(
            f"{folder}: it is an adapter: pip install 'landmark-attention[peft]'"
        )
    with_model = (folder / CONFIG).is_file()
    return Adapter(str(folder), hub, None if with_model else _base(folder / ADAPTER, folder))


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _base(file: Path, place: Path) -> str:
    """Returns the model that an adapter's config names: one that is a path may be meant from
    several folders.

    Args:
        file: the adapter's config.
        place: the adapter's folder.
    """
    named = read_json(file).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{file}: expected the adapter's base model, {ADAPTER} names no base model "
            "(base_model_name_or_path); save it again"
        )
    folders = [path for path in (Path(named), place / named, place.parent / named) if path.is_dir()]
    models = [path for path in folders if (path / CONFIG).is_file()]
    return str(next(iter(models or folders), named))


def _load_adapter(model: Any, source: Source, adapter: Adapter, missing: set[str]) -> set[str]:
    """Loads what stock code has not loaded of an adapter together with its model.

    Args:
        model: the model as it was read.
        source: where it was read from.
        adapter: the adapter of it.
        missing: names of tensors that were not in its weights.

    Returns:
        the names of tensors that are neither there nor in the adapter.
    """
    foreign: set[str] = set()
    with in_one_line(source.name, partial(_look, adapter.place, adapter.hub, check_adapter)):
        if adapter.base is not None:
            info = model.load_adapter(adapter.place, adapter_kwargs=dict(adapter.hub))
            missing = missing | set(info.missing_keys)
            foreign = set(info.unexpected_keys)
        left = load_saved_modules(model, adapter.place, missing | foreign, adapter.hub)
    if left & foreign:
        raise ValueError(
            f"{source.name}: expected the tensors of the model, got tensors that are not in the "
            f"model ({_first(left & foreign)}); load the base that the adapter was trained on"
        )
    return left
