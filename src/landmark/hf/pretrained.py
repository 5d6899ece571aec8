"""Reads a model by folder or hub name with transformers.

A file that is missing or damaged is named in a message of one line.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.base import MergedAdapter, PinnedBase, has_pinned_base, merge, split_base
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
from landmark.hf.families import PREFIX, check_landmark_config, family

# Loading arguments that say where to look for a hub name.
HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
# Loading arguments that concern weights or code, not the config.
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
        path: a folder or hub name.
        hub: loading arguments for finding a hub name.
        base: folder or hub name of the model that the adapter names; ``None`` where the model is in
            the same folder, from which transformers reads both at once.
    """

    path: str
    hub: dict[str, Any]
    base: str | None


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and whose weights are not read yet.

    Attributes:
        path: folder or hub name of the weights.
        adapter: the adapter that is put on them, if any.
        config: the config, with the fields that were given as loading arguments.
        loading: the other loading arguments, for ``from_pretrained``.
        wants_info: whether the caller asked for the loading info.
        merged: the adapter in ``path`` that is merged into its base, if it is one.
    """

    path: str
    adapter: Adapter | None
    config: Any
    loading: dict[str, Any]
    wants_info: bool
    merged: MergedAdapter | None = None

    @property
    def name(self) -> str:
        """The name of the model in messages."""
        return _name(self.path if self.merged is None else self.merged.name, self.adapter)


def read_config(path: Any, **loading: Any) -> Any:
    """Returns the config of a model; see ``find``."""
    return find(path, **loading).config


def find(path: Any, **loading: Any) -> ModelSource:
    """Finds a model and reads its config, as ``AutoModelForCausalLM.from_pretrained`` does.

    Args:
        path: a folder or hub name, of a model or of an adapter of peft; or an adapter with a pinned
            base (``landmark.hf.base``), ``FOLDER`` or ``FOLDER@BASE``.
        **loading: arguments of ``from_pretrained``: where to look (``subfolder``, ``revision``,
            ...), ``config``, fields of the config, and those about weights.

    Raises:
        ValueError: ``path`` is neither, the config is damaged or cannot be that of a landmark
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
    wants_info = bool(loading.pop("output_loading_info", False))
    model = os.path.expanduser(os.fsdecode(path))
    merged = _merged(model, loading)
    adapter = None if merged is not None else _adapter(model, loading)
    if adapter is not None and adapter.base is not None:
        model = adapter.base
        loading = {
            name: value for name, value in loading.items() if name not in ("subfolder", "revision")
        }
        merged = _merged(model, loading)
    name = _name(model, adapter)
    if merged is not None:
        model = merged.folder
        loading = {name: value for name, value in loading.items() if name not in merged.finding}
    config, rest = _config(model, name, loading)
    if config.model_type.startswith(PREFIX):
        try:
            check_landmark_config(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return ModelSource(
        path=model,
        adapter=adapter,
        config=config,
        loading=rest,
        wants_info=wants_info,
        merged=merged,
    )


def read_weights(source: ModelSource) -> tuple[Any, dict[str, Any]]:
    """Returns a model and its loading info.

    Raises:
        ValueError: the weights are damaged, of other shapes, or not complete. Weights that are not
            complete are no error where the caller asked for the loading info.
        FileNotFoundError: there are no weights.
        ModuleNotFoundError: the package with the base weights is not installed, or gguf.
    """
    other_shapes = bool(source.loading.get("ignore_mismatched_sizes"))
    if source.merged is not None:
        model, info = _read_merged(source, source.merged)
    else:
        with _reading(source.path, source.name, source.loading, partial(_check_files, source)):
            # Weights of other shapes are refused below, by name.
            arguments = {**unpacked_gguf(source.loading), "ignore_mismatched_sizes": True}
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
    if missing and not source.wants_info:
        raise ValueError(
            f"{source.name}: expected all weights of {type(model).__name__}, got none for "
            f"{len(missing)} of its tensors ({_first(missing)}); save the whole model again"
        )
    return model, info


def _merged(path: str, loading: dict[str, Any]) -> MergedAdapter | None:
    """Returns the adapter at a path that is merged into its base, if it is one."""
    folder, named = split_base(path)
    if not has_pinned_base(folder):
        return None
    of_base = () if named is None else (*HUB, "gguf_file")
    finding = {name: loading[name] for name in of_base if name in loading}
    return MergedAdapter(folder, named, finding)


def _read_merged(source: ModelSource, adapter: MergedAdapter) -> tuple[Any, dict[str, Any]]:
    """Returns the model of an adapter that is merged into its base, and its loading info.

    The config notes the base, and whether anything was measured on it.

    Raises:
        ValueError, FileNotFoundError: as ``read_weights``.
        ModuleNotFoundError: as ``PinnedBase.read``.
    """
    pinned = PinnedBase.of(adapter.folder)
    if adapter.named is None:
        weights = pinned.read(source.config)
    else:
        weights = _named_base(source, adapter.named, adapter.finding)
    merge(weights, adapter.folder, adapter.named or pinned.file)
    if adapter.named is not None:
        warnings.warn(
            f"{pinned.name} on {adapter.named}: not measured; what its card says was measured on "
            f"{pinned.file}",
            stacklevel=4,
        )
    source.config.base = adapter.provenance
    arguments = {name: value for name, value in source.loading.items() if name not in HUB}
    arguments["ignore_mismatched_sizes"] = True
    made = family(source.config.model_type.removeprefix(PREFIX)).causal_lm
    with in_one_line(source.name):
        model, info = made.from_pretrained(
            None, config=source.config, state_dict=weights, output_loading_info=True, **arguments
        )
        if (Path(adapter.folder) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(adapter.folder)
    model.name_or_path = adapter.name
    model.config.name_or_path = adapter.name
    return model, info


def _named_base(source: ModelSource, named: str, finding: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights of a base that the user named, in float32.

    Raises:
        ValueError: it is of another architecture, or rotates otherwise.
    """
    stock = find(named, dtype=torch.float32, **finding)
    if stock.config.model_type.startswith(PREFIX):
        raise ValueError(
            f"{source.name}: expected the plain model that was converted, got the landmark model "
            f"{named}; name a plain one"
        )
    expected = _kind(source.config)
    found = _kind(stock.config)
    if found != expected:
        raise ValueError(
            f"{source.name}: expected a base like that which the adapter was trained on, "
            f"{expected}, got {found}; name another one"
        )
    weights: dict[str, Tensor] = read_weights(stock)[0].state_dict()
    return weights


def _kind(config: Any) -> str:
    """Returns the architecture of a config and how it rotates, in words."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = config.model_type.removeprefix(PREFIX)
    theta = float(rope.get("rope_theta", 0))
    return f"{kind} with RoPE {rope.get('rope_type')!r}, theta {theta:.0f}"


def _name(path: str, adapter: Adapter | None) -> str:
    return path if adapter is None else f"{adapter.path} (an adapter of {path})"


def _first(names: set[str]) -> str:
    shown = sorted(names)[:3]
    if len(names) > len(shown):
        shown.append("...")
    return ", ".join(shown)


def _of_other_shapes(tensors: Any) -> str:
    """Returns the message about tensors of other shapes.

    Args:
        tensors: for each its name, its shape in the file and its shape in the model.
    """
    name, found, wanted = min(tensors)
    return (
        f"expected weights of the shapes that config.json says, got {len(tensors)} of other "
        f"shapes ({name}: {tuple(found)} in place of {tuple(wanted)}); save weights and config "
        "together again"
    )


def _check_files(source: ModelSource, folder: Path) -> None:
    """Raises ``ValueError`` for a damaged file, ``FileNotFoundError`` for a missing one."""
    check_weights(folder, source.loading.get("variant"), source.loading.get("use_safetensors"))
    if source.adapter is not None and source.adapter.base is None:
        check_adapter(folder)


def _reading(
    path: str, name: str, loading: dict[str, Any], check: Callable[[Path], None], remedy: str = ""
) -> AbstractContextManager[None]:
    """Turns a failure inside into one line that names the damaged file.

    Args:
        path: the folder or hub name that is read.
        name: its name in messages.
        loading: the loading arguments.
        check: finds the damaged file in a folder. Where a GGUF file is read, that one is checked
            instead.
        remedy: what to do where no file is damaged.
    """
    file = loading.get("gguf_file")
    if file is None:
        return in_one_line(name, partial(_look, path, loading, check), remedy)
    look = partial(_look, path, loading, lambda folder: check_gguf(folder / file))
    remedy = "download it again, or convert the model that it was made of"
    return in_one_line(str(Path(path, loading.get("subfolder") or "", file)), look, remedy)


def _look(path: str, loading: dict[str, Any], check: Callable[[Path], None]) -> None:
    """Runs a check on a folder, or on the cached files of a hub name."""
    folder = Path(path, loading.get("subfolder") or "")
    if folder.is_dir():
        check(folder)
        return
    cache = {
        key: loading[key] for key in ("cache_dir", "revision", "subfolder") if loading.get(key)
    }
    for name in (CONFIG, ADAPTER):
        # OSError: the file is not cached, also as there may be none at this path.
        with suppress(OSError):
            file = cached_file(path, name, local_files_only=True, **cache)
            check(Path(str(file)).parent)
            return


def _config(path: str, name: str, loading: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the config of a model and the loading arguments that are not its fields.

    Args:
        path: the folder or hub name.
        name: its name in messages.
        loading: all loading arguments.
    """
    given = loading.get("config")
    rest = {key: value for key, value in loading.items() if key != "config"}
    if isinstance(given, PretrainedConfig):
        return given, rest
    if given is not None:
        path = os.path.expanduser(os.fsdecode(given))
        name = path
    check = partial(check_config, trusted=bool(rest.get("trust_remote_code")))
    of_gguf = rest.get("gguf_file") is not None and given is None
    if os.path.isdir(path) and not of_gguf:
        _look(path, rest, check)
    fields = {key: value for key, value in rest.items() if key not in NOT_OF_CONFIGS}
    remote = {key: rest[key] for key in ("trust_remote_code", "code_revision") if key in rest}
    remote.setdefault("trust_remote_code", False)  # transformers asks on the terminal for None
    read = rest if of_gguf else {**rest, "gguf_file": None}
    with _reading(path, name, read, check, "correct config.json, or the fields that were given"):
        config, unused = AutoConfig.from_pretrained(
            path, return_unused_kwargs=True, **fields, **remote
        )
    kept = {key: rest[key] for key in (*HUB, *NOT_OF_CONFIGS, "gguf_file") if key in rest}
    return config, {**unused, **kept}


def _adapter(path: str, loading: dict[str, Any]) -> Adapter | None:
    """Returns the adapter of peft at a path or hub name, if there is one."""
    subfolder = loading.get("subfolder") or ""
    folder = Path(path, subfolder)
    if os.path.isfile(folder):
        raise FileNotFoundError(
            f"{folder}: expected a folder or hub name, it is a file; a GGUF file is named by "
            "gguf_file= beside its folder"
        )
    if os.path.isdir(path) and not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{path}: expected a subfolder {subfolder!r}, found none; name one that is there"
        )
    hub = {name: loading[name] for name in HUB if name in loading}
    if os.path.isdir(folder):
        hub.pop("subfolder", None)
        return _adapter_in(folder, hub)
    if not _has_peft():
        return None
    with in_one_line(path):
        file = find_adapter_config_file(path, **hub)
    if file is None:
        return None
    return Adapter(path, hub, base=_base(Path(file), Path(path)))


def _adapter_in(folder: Path, hub: dict[str, Any]) -> Adapter | None:
    """Returns the adapter in a folder on this machine, if there is one."""
    if not (folder / ADAPTER).is_file():
        return None
    if not _has_peft():
        raise ModuleNotFoundError(
            f"{folder}: it is an adapter: pip install 'landmark-attention[peft]'"
        )
    base = None
    if not (folder / CONFIG).is_file():
        base = _base(folder / ADAPTER, folder)
    return Adapter(str(folder), hub, base)


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _base(file: Path, folder: Path) -> str:
    """Returns the model that the config of an adapter names.

    A relative path may be meant from the working folder, from the adapter's folder, or from the
    folder around it.

    Args:
        file: the adapter's config.
        folder: the adapter's folder.

    Raises:
        ValueError: the config names none.
    """
    named = read_json(file).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{file}: expected the adapter's base model, {ADAPTER} names no base model "
            "(base_model_name_or_path); save it again"
        )
    candidates = (Path(named), folder / named, folder.parent / named)
    folders = [path for path in candidates if path.is_dir()]
    models = [path for path in folders if (path / CONFIG).is_file()]
    for found in (*models, *folders):
        return str(found)
    return named


def _load_adapter(model: Any, source: ModelSource, adapter: Adapter, missing: set[str]) -> set[str]:
    """Loads the tensors of an adapter that ``from_pretrained`` has not loaded with the model.

    Args:
        model: the model as it was read.
        source: what it was read from.
        adapter: its adapter.
        missing: names of tensors that were not in its weights.

    Returns:
        the names of tensors that are neither in the weights nor in the adapter.

    Raises:
        ValueError: the adapter has tensors that the model has not.
    """
    foreign: set[str] = set()
    with in_one_line(source.name, partial(_look, adapter.path, adapter.hub, check_adapter)):
        if adapter.base is not None:
            info = model.load_adapter(adapter.path, adapter_kwargs=dict(adapter.hub))
            missing = missing | set(info.missing_keys)
            foreign = set(info.unexpected_keys)
        left = load_saved_modules(model, adapter.path, missing | foreign, adapter.hub)
    if left & foreign:
        raise ValueError(
            f"{source.name}: expected the tensors of the model, got tensors that are not in the "
            f"model ({_first(left & foreign)}); load the base that the adapter was trained on"
        )
    return left
