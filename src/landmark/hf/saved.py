"""Saves a ``LandmarkCache`` as a folder and opens it again; ``docs/memory.md`` describes the files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.memory.archive import Archive
from landmark.memory.saved import AT_ONCE, SavedLayer, as_bytes
from landmark.versions import versions

if TYPE_CHECKING:
    from landmark.hf.cache import LandmarkCache
    from landmark.memory.layer import LayerMemory

IDS = "text-ids"
SAMPLES = 64  # of each parameter, for the fingerprint


@dataclass
class Saved:
    """What a cache knows of the folder that it was opened from or saved to.

    Attributes:
        archive: the folder.
        layers: one for each layer of the model.
    """

    archive: Archive
    layers: list[SavedLayer]

    @property
    def notes(self) -> dict[str, Any]:
        """What was to be kept beside the memory, as JSON."""
        notes: dict[str, Any] = self.archive.manifest["notes"]
        return notes

    def stream(self, name: str) -> bytes:
        """Returns bytes that were to be kept beside the memory; raises ``Damaged``."""
        return self.archive.read(f"text-{name}")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A fork belongs to no folder: it is saved to one of its own."""


def fingerprint(decoder: Any) -> str:
    """Returns a number for a decoder's weights: from names, shapes, dtypes and evenly spaced values of all of them."""
    found = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            at = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64).long().to(parameter.device)
            found.update(as_bytes(parameter.detach().flatten()[at].cpu()))
    return found.hexdigest()


def save(cache: LandmarkCache, folder: str | Path, notes: dict[str, Any] | None, streams: dict[str, bytes]) -> None:
    """As ``LandmarkCache.save``."""
    folder, decoder = Path(folder), cache.decoder
    if len(cache.tokens) != 1:
        raise ValueError(f"expected a memory of one row to save, got {len(cache.tokens)}; select one of them first")
    if decoder is None:
        raise ValueError("expected a memory whose model still exists, got one without; read something with the model")
    saved = _bound(cache, folder)
    archive, done = saved.archive, [each.count for each in saved.layers]
    archive.lock()
    try:
        blocks = cache.slots[0] // cache.settings.block_size
        for layer, memory in zip(saved.layers, cache.made(), strict=True):
            for begin in range(layer.count, blocks, AT_ONCE):
                layer.append(*memory.store.finished(begin, min(begin + AT_ONCE, blocks)))
        archive.append(IDS, as_bytes(cache.ids()[archive.length(IDS) // 4 :].contiguous()))
        for name, data in streams.items():
            archive.append(f"text-{name}", data[archive.length(f"text-{name}") :])
        kept = archive.manifest.get("notes", {}) if notes is None else notes
        manifest = {**_manifest(cache, decoder, saved), "notes": kept}
        tail = f"tail-{archive.commits + 1}"
        tensors = _tails(cache, blocks)
        manifest["tail"] = {"stream": tail, "tensors": [_described(name, each) for name, each in tensors.items()]}
        for each in tensors.values():
            archive.append(tail, as_bytes(each))
        old = archive.manifest.get("tail")
        archive.commit(manifest, dropped=(old["stream"],) if old else ())
    except BaseException:
        archive.roll_back()
        for layer, count in zip(saved.layers, done, strict=True):
            layer.cut(count)
        raise
    finally:
        archive.unlock()
    for layer, memory in zip(saved.layers, cache.made(), strict=True):
        memory.store.adopt(layer)
    cache.saved = saved


def open_saved(folder: str | Path, model: Any, tier: str, budgets: dict[str, Any]) -> LandmarkCache:
    """As ``LandmarkCache.open``."""
    from landmark.hf.cache import LandmarkCache

    archive = Archive.open(folder)
    cache = LandmarkCache(model, tier, **budgets)
    decoder = model.base_model
    _check_model(archive, cache, decoder)
    manifest = archive.manifest
    tokens = manifest["tokens"]
    blocks = slots_for(tokens, cache.settings.block_size) // cache.settings.block_size
    layers = [
        SavedLayer(archive, index, (groups, size, dim), getattr(torch, manifest["dtype"]), blocks)
        for index, (groups, size, dim) in enumerate(manifest["layers"])
    ]
    tensors = _read_tail(archive)
    for index, layer in enumerate(layers):
        memory = cache.memory(index, decoder.tables_of(index))
        prefix = f"{index}."
        parts = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        memory.resume(layer, manifest["first"][index], parts, decoder.device)
    cache.resume(torch.frombuffer(bytearray(archive.read(IDS)), dtype=torch.int32), decoder)
    cache.saved = Saved(archive, layers)
    return cache


def _bound(cache: LandmarkCache, folder: Path) -> Saved:
    """The folder that the cache goes on writing, or a new one."""
    saved, size = cache.saved, cache.settings.block_size
    if saved is not None and saved.archive.folder.resolve() == folder.resolve():
        kept = cache.tokens[0], cache.slots[0] // size
        if kept[0] < saved.archive.manifest["tokens"] or kept[1] < saved.layers[0].count or cache.rewound:
            raise ValueError(
                f"expected a memory that only grew since it was saved to {str(folder)!r}, got one that was cropped; "
                "save it to a new folder"
            )
        return saved
    shapes = [_shape(memory, size) for memory in cache.made()]
    archive = Archive.create(folder, {})
    dtype = cache.made()[0].store.landmark_keys.dtype
    return Saved(archive, [SavedLayer(archive, index, shape, dtype, 0) for index, shape in enumerate(shapes)])


def _shape(memory: LayerMemory, size: int) -> tuple[int, int, int]:
    marks = memory.store.landmark_keys
    return marks.shape[1], size, marks.shape[3]


def _manifest(cache: LandmarkCache, decoder: Any, saved: Saved) -> dict[str, Any]:
    return {
        "model": {"type": decoder.config.model_type, "fingerprint": fingerprint(decoder)},
        "settings": cache.settings.to_dict(),
        "dtype": str(saved.layers[0].dtype).removeprefix("torch."),
        "layers": [list(layer.shape) for layer in saved.layers],
        "first": [memory.store.first for memory in cache.made()],
        "tokens": cache.tokens[0],
        "blocks": saved.layers[0].count,
        "versions": versions("torch", "transformers"),
    }


def _tails(cache: LandmarkCache, blocks: int) -> dict[str, Tensor]:
    """What is not in finished blocks, by ``layer.name``, on the CPU."""
    found = {}
    for index, memory in enumerate(cache.made()):
        for name, each in memory.tail(blocks, cache.slots[0] % cache.settings.block_size).items():
            found[f"{index}.{name}"] = each.cpu().contiguous()
    return found


def _described(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _read_tail(archive: Archive) -> dict[str, Tensor]:
    tail = archive.manifest["tail"]
    data, at, found = bytearray(archive.read(tail["stream"])), 0, {}
    for each in tail["tensors"]:
        dtype, shape = getattr(torch, each["dtype"]), torch.Size(each["shape"])
        found[each["name"]] = torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=at).view(shape)
        at += shape.numel() * dtype.itemsize
    return found


def _check_model(archive: Archive, cache: LandmarkCache, decoder: Any) -> None:
    """Raises ``ValueError`` where a memory was made with another model, dtype or other settings."""
    manifest, theirs = archive.manifest, {"type": decoder.config.model_type, "fingerprint": fingerprint(decoder)}
    folder = str(archive.folder)
    dtype = str(decoder.dtype).removeprefix("torch.")
    if manifest["dtype"] != dtype:
        raise ValueError(f"{folder!r} was made in {manifest['dtype']}, the model is in {dtype}; load it in the former")
    saved = LandmarkConfig.from_dict(manifest["settings"])
    cache.check_settings(saved, f"memory {folder!r}")
    if manifest["model"] != theirs:
        raise ValueError(
            f"{folder!r} was made with another model ({manifest['model']['type']} "
            f"{manifest['model']['fingerprint'][:12]}, this is {theirs['type']} {theirs['fingerprint'][:12]}); open it "
            "with that one, or remember the texts anew"
        )
