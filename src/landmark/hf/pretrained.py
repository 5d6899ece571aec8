"""Reading a folder or hub name with transformers; what is missing or damaged is said in one line."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.compat import forget_gguf, load_saved_modules, unpacked_gguf

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
NOT_OF_CONFIGS = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code", "code_revision")
ADAPTER = "adapter_config.json"
REASON = 200  # characters of what transformers says: it may name all its architectures


@dataclass(frozen=True)
class Source:
    """A model that is about to be read.

    Attributes:
        path: a folder or hub name with the weights.
        adapter: a folder or hub name with an adapter of peft to put on them, if any.
        apart: whether the adapter lies apart from its model, so that transformers does not load both at once.
        hub: where the adapter is to be looked for.
        config: the config, with the fields that were given as loading arguments.
        loading: the other loading arguments, for ``from_pretrained``.
        told: whether the caller wants the loading info.
    """

    path: str
    adapter: str | None
    apart: bool
    hub: dict[str, Any]
    config: Any
    loading: dict[str, Any]
    told: bool


def read_config(path: Any, **loading: Any) -> Any:
    """Returns the config of a model; see ``find``."""
    return find(path, **loading).config


def find(path: Any, **loading: Any) -> Source:
    """Finds a model and reads its config, as ``AutoModelForCausalLM.from_pretrained`` does.

    Args:
        path: a folder or hub name, of a model or of an adapter of peft.
        **loading: what ``from_pretrained`` takes: where to look (``subfolder``, ``revision``, ...), ``config``, fields
            of the config, and what concerns the weights.

    Raises:
        ValueError: ``path`` is neither, its config is damaged, or another attention is asked for.
        FileNotFoundError: there is no model.
        ModuleNotFoundError: it is an adapter and peft is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"expected a transformers model or a path, got {type(path).__name__}")
    attention = loading.pop("attn_implementation", None)
    if attention not in (None, IMPLEMENTATION):
        raise ValueError(
            f"a landmark model attends by {IMPLEMENTATION!r} only, got attn_implementation={attention!r}; leave it out"
        )
    told = bool(loading.pop("output_loading_info", False))
    place = os.path.expanduser(os.fsdecode(path))
    folder = Path(place, loading.get("subfolder") or "")
    hub = {name: loading[name] for name in HUB if name in loading and not (name == "subfolder" and folder.is_dir())}
    adapter, base = _adapter(place, folder, hub)
    if base is not None:
        loading = {name: value for name, value in loading.items() if name not in ("subfolder", "revision")}
    with _in_one_line(base or place, adapter):
        config, rest = _config(base or place, loading)
    return Source(base or place, adapter, base is not None, hub, config, rest, told)


def read_weights(source: Source) -> tuple[Any, dict[str, Any]]:
    """Returns the model that was found, and what transformers says of loading it.

    Raises:
        ValueError: its weights are damaged, of other shapes, or not all there; the last not where the caller is told.
        FileNotFoundError: it has no weights.
    """
    with _in_one_line(source.path, source.adapter):
        arguments = unpacked_gguf(source.loading)
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path, config=source.config, output_loading_info=True, **arguments
        )
        if arguments is not source.loading:
            forget_gguf(model)
    missing = set(info["missing_keys"])
    if source.adapter is not None:
        missing = _put_on(model, source, missing)
    if missing and not source.told:
        names = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        where = source.path if source.adapter is None else f"{source.adapter} (an adapter of {source.path})"
        raise ValueError(
            f"{where}: expected all weights of {type(model).__name__}, got none for {len(missing)} of its "
            f"tensors ({names}); save the whole model again"
        )
    return model, info


def _config(base: str, loading: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the config and the loading arguments that are no fields of it."""
    given = loading.get("config")
    rest = {name: value for name, value in loading.items() if name != "config"}
    if isinstance(given, PretrainedConfig):
        return given, rest
    place = base if given is None else os.path.expanduser(os.fsdecode(given))
    if not rest.get("gguf_file") or given is not None:
        _check_folder(place, rest.get("subfolder") or "", rest.get("trust_remote_code", False))
    fields = {name: value for name, value in rest.items() if name not in NOT_OF_CONFIGS}
    remote = {name: rest[name] for name in ("trust_remote_code", "code_revision") if name in rest}
    remote.setdefault("trust_remote_code", False)  # None asks on the terminal
    config, unused = AutoConfig.from_pretrained(place, return_unused_kwargs=True, **fields, **remote)
    kept = {name: rest[name] for name in (*HUB, *NOT_OF_CONFIGS, "gguf_file") if name in rest}
    return config, {**unused, **kept}


def _check_folder(place: str, subfolder: str, trusted: bool) -> None:
    """Raises ``OSError`` or ``ValueError`` for a folder without a config, or with one that cannot be read here."""
    folder = Path(place, subfolder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError("config.json is missing")
    for name in ("config.json", "generation_config.json"):
        found = _json(folder / name) if (folder / name).is_file() else {}
        kind = found.get("model_type")
        if "auto_map" in found and isinstance(kind, str) and kind not in CONFIG_MAPPING and not trusted:
            raise ValueError(
                f"{name}: model_type {kind!r} is known neither to this landmark-attention nor to this transformers; "
                f"update them, or run the folder's own code by trust_remote_code=True"
            )


def _json(file: Path) -> dict[str, Any]:
    """Returns the object in a file; raises ``ValueError`` where there is none."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file.name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: expected a JSON object, got {type(found).__name__}")
    return found


def _adapter(place: str, folder: Path, hub: dict[str, Any]) -> tuple[str | None, str | None]:
    """Returns where an adapter of peft lies, if there is one, and the model that it names where none lies beside it."""
    with _in_one_line(place, None):
        if folder.is_file():
            raise OSError("it is a file; a GGUF file is named by gguf_file= beside its folder")
        local = folder.is_dir()
        if local:
            file: Any = folder / ADAPTER if (folder / ADAPTER).is_file() else None
        else:
            file = find_adapter_config_file(place, **hub) if _has_peft() else None
        if file is None:
            return None, None
        if not _has_peft():
            raise ModuleNotFoundError("it is an adapter: pip install 'landmark-attention[peft]'")
        adapter = str(folder) if local else place
        if (folder / "config.json").is_file():
            return adapter, None
        base = _json(Path(file)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter}: {ADAPTER} names no base model (base_model_name_or_path)")
    beside = [path for path in (Path(base), folder / base, folder.parent / base) if path.is_dir()]
    return adapter, str(beside[0]) if beside else base


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _put_on(model: Any, source: Source, missing: set[str]) -> set[str]:
    """Loads the adapter into the model, as stock code does for its folder, and returns what is missing even so."""
    assert source.adapter is not None
    with _in_one_line(source.path, source.adapter):
        foreign: set[str] = set()
        if source.apart:
            info = model.load_adapter(source.adapter, adapter_kwargs=dict(source.hub))
            missing, foreign = missing | set(info.missing_keys), set(info.unexpected_keys)
        left = load_saved_modules(model, source.adapter, missing | foreign, source.hub)
        if left & foreign:
            raise ValueError(f"tensors that are not in the model ({', '.join(sorted(left & foreign)[:3])})")
    return left


@contextmanager
def _in_one_line(path: str, adapter: str | None) -> Iterator[None]:
    """Turns whatever transformers raises into one line that names the folder."""
    name = path if adapter is None else f"{adapter} (an adapter of {path})"
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason if len(reason) <= REASON else f"{reason[:REASON]}..."
        if isinstance(error, ImportError):
            raise ModuleNotFoundError(f"{name}: {reason}") from None
        if isinstance(error, SafetensorError):
            raise ValueError(
                f"{name}: expected weights in safetensors files, got damaged ones ({reason}); save it again"
            ) from None
        if isinstance(error, OSError):
            what = "a folder with config.json and weights" if Path(path).exists() else "a model's folder or hub name"
            raise FileNotFoundError(f"{name}: expected {what}, found none ({reason})") from None
        raise ValueError(f"{name}: expected what transformers can load, got {reason}") from None
