"""Saves a ``LandmarkCache`` as a folder and opens it again; ``docs/memory.md`` describes the
files.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.archive.layer import ArchivedLayer, as_bytes, dtype_of, name_of, saved_layers
from landmark.memory.archive.log import REMEDY, STATE, Archive, Damaged
from landmark.memory.archive.manifest import IDS, manifest_of
from landmark.versions import versions

if TYPE_CHECKING:
    from landmark.hf.cache import LandmarkCache

SET_MODEL = "set the model's with configure_landmark"
Streams = dict[str, Callable[[int], bytes]]  # what comes behind so many bytes, by name
SAMPLES = 64  # of each parameter, for the fingerprint


@dataclass
class Saved:
    """What a cache knows of the folder that it was opened from or saved to.

    Attributes:
        archive: the folder.
        layers: one for each layer of the model.
    """

    archive: Archive
    layers: list[ArchivedLayer]

    @property
    def notes(self) -> dict[str, Any]:
        """What was to be kept beside the memory, as JSON."""
        notes: dict[str, Any] = self.archive.manifest["notes"]
        return notes

    def stream(self, name: str) -> bytearray:
        """Returns bytes that were to be kept beside the memory; raises ``Damaged``."""
        return self.archive.read(f"kept-{name}")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A fork belongs to no folder: it is saved to one of its own."""


def fingerprint(decoder: Any) -> str:
    """Returns a number for a decoder's weights: from names, shapes, dtypes and evenly spaced values
    of all of them.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            at = (
                torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64)
                .long()
                .to(parameter.device)
            )
            found.update(as_bytes(parameter.detach().flatten()[at].cpu()))
    return found.hexdigest()


def require_reader(reader: Any, decoder: Any) -> None:
    """Raises ``ValueError`` where what ``reader`` remembered (``None``: it is gone) is not what
    ``decoder`` would.
    """
    if reader is decoder:
        return
    if reader is None:
        raise ValueError(
            "expected the model that read this cache, got another, and that one is gone: save a "
            "cache before its model goes, and open it with LandmarkCache.open"
        )
    if fingerprint(reader) != fingerprint(decoder):
        raise ValueError(
            "expected the model that read this cache, got one with other weights: make a new "
            "LandmarkCache"
        )


def save(
    cache: LandmarkCache, folder: str | Path, notes: dict[str, Any] | None, streams: Streams
) -> None:
    """As ``LandmarkCache.save``."""
    folder = Path(folder)
    decoder = cache.decoder
    if len(cache.tokens) != 1 or cache.tokens[0] == 0:
        raise ValueError(
            f"expected a memory of one row that has read something, got rows of {cache.tokens} "
            "tokens; read a text, or select one row with cache.batch_select_indices"
        )
    if decoder is None:
        raise ValueError(
            "expected a memory whose model still exists, got one without; read something with the "
            "model"
        )
    held = name_of(cache.layers_in_use()[0].store.landmark_keys.dtype)
    if held != name_of(decoder.dtype):
        raise ValueError(
            f"expected the model in {held}, in which it read this memory, got it in "
            f"{name_of(decoder.dtype)}; call model.to(torch.{held}) and save again"
        )
    saved = _bound(cache, folder)
    archive = saved.archive
    archive.lock()
    try:
        archive.check_whole()
        _write(cache, saved, decoder, notes, streams)
    except BaseException:
        archive.roll_back()
        raise
    finally:
        archive.unlock()
    for layer, memory in zip(saved.layers, cache.layers_in_use(), strict=True):
        memory.store.pool.back_by_archive(layer)
    cache.saved = saved
    cache.rewound = False


def _write(
    cache: LandmarkCache, saved: Saved, decoder: Any, notes: dict[str, Any] | None, streams: Streams
) -> None:
    """Appends what the folder lacks, and commits."""
    archive = saved.archive
    blocks = cache.slots[0] // cache.settings.block_size
    for layer, memory in zip(saved.layers, cache.layers_in_use(), strict=True):
        memory.store.save(layer, blocks)
    archive.append(IDS, as_bytes(cache.ids()[archive.length(IDS) // 4 :].contiguous()))
    for name, behind in streams.items():
        archive.append(f"kept-{name}", behind(archive.length(f"kept-{name}")))
    manifest = _manifest(cache, decoder, saved)
    tail = f"tail-{archive.commits + 1}"
    tensors = _tails(cache, blocks)
    manifest["notes"] = archive.manifest.get("notes", {}) if notes is None else notes
    manifest["tail"] = {
        "stream": tail,
        "tensors": [_described(name, each) for name, each in tensors.items()],
    }
    for each in tensors.values():
        archive.append(tail, as_bytes(each))
    old = archive.manifest.get("tail")
    archive.commit(manifest, dropped=(old["stream"],) if old else ())


def open_saved(folder: str | Path, model: Any, tier: str, budgets: dict[str, Any]) -> LandmarkCache:
    """As ``LandmarkCache.open``."""
    from landmark.hf.cache import LandmarkCache

    archive = Archive.open(folder)
    cache = LandmarkCache(model, tier, **budgets)
    try:
        _read(archive, cache, decoder_of(model))
    except Damaged:
        if not archive.is_outdated():
            raise
        return open_saved(folder, model, tier, budgets)  # a writer has replaced the tail in between
    return cache


def decoder_of(model: Any) -> Any:
    """Returns the decoder of a landmark model, which may lie inside an adapter's."""
    return next(each for each in model.modules() if hasattr(type(each), "tables_of"))


def _read(archive: Archive, cache: LandmarkCache, decoder: Any) -> None:
    """Brings an archive's memory into an empty cache."""
    manifest_of(archive)
    _check_model(archive, cache, decoder)
    layers = saved_layers(archive)
    tensors = _read_tail(archive)
    for index, layer in enumerate(layers):
        memory = cache.memory(index, decoder.tables_of(index))
        prefix = f"{index}."
        parts = {
            name.removeprefix(prefix): each
            for name, each in tensors.items()
            if name.startswith(prefix)
        }
        try:
            memory.resume(layer, archive.manifest["first"][index], parts, decoder.device)
        except KeyError as error:
            raise Damaged(
                f"{archive.folder / STATE}: it names no tensor {error} of layer {index}; {REMEDY}"
            ) from None
    cache.resume(torch.frombuffer(archive.read(IDS), dtype=torch.int32), decoder)
    cache.saved = Saved(archive, layers)


def _bound(cache: LandmarkCache, folder: Path) -> Saved:
    """The folder that the cache goes on writing, or a new one."""
    saved = cache.saved
    if saved is not None and saved.archive.folder.resolve() == folder.resolve():
        if cache.rewound:
            raise ValueError(
                f"expected a memory that only grew since it was saved to {str(folder)!r}, got one "
                "that was cropped; save it to a new folder"
            )
        return saved
    archive = Archive.create(folder)
    size = cache.settings.block_size
    marks = [memory.store.landmark_keys for memory in cache.layers_in_use()]
    layers = [
        ArchivedLayer(archive, i, (m.shape[1], size, m.shape[3]), m.dtype)
        for i, m in enumerate(marks)
    ]
    return Saved(archive, layers)


def _manifest(cache: LandmarkCache, decoder: Any, saved: Saved) -> dict[str, Any]:
    return {
        "model": {"type": decoder.config.model_type, "fingerprint": fingerprint(decoder)},
        "settings": cache.settings.to_dict(),
        "dtype": name_of(saved.layers[0].dtype),
        "layers": [list(layer.shape) for layer in saved.layers],
        "first": [memory.store.first for memory in cache.layers_in_use()],
        "tokens": cache.tokens[0],
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str | None]:
    """What writes here, asked for once: a commit is asked of git."""
    return versions("torch", "transformers")


def _tails(cache: LandmarkCache, blocks: int) -> dict[str, Tensor]:
    """What is not in finished blocks, by ``layer.name``, on the CPU."""
    found = {}
    for index, memory in enumerate(cache.layers_in_use()):
        for name, each in memory.archive_tensors(
            blocks, cache.slots[0] % cache.settings.block_size
        ).items():
            found[f"{index}.{name}"] = each.cpu().contiguous()
    return found


def _described(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": name_of(tensor.dtype)}


def _read_tail(archive: Archive) -> dict[str, Tensor]:
    tail = archive.manifest["tail"]
    data = archive.read(tail["stream"])
    at = 0
    found = {}
    for each in tail["tensors"]:
        dtype = dtype_of(each["dtype"])
        shape = torch.Size(each["shape"])
        found[each["name"]] = torch.frombuffer(
            data, dtype=dtype, count=shape.numel(), offset=at
        ).view(shape)
        at += shape.numel() * dtype.itemsize
    return found


def _check_model(archive: Archive, cache: LandmarkCache, decoder: Any) -> None:
    """Raises ``ValueError`` where a memory was made with another model, dtype or other settings."""
    manifest = archive.manifest
    theirs = {"type": decoder.config.model_type, "fingerprint": fingerprint(decoder)}
    folder = str(archive.folder)
    dtype = name_of(decoder.dtype)
    made_in = manifest["dtype"]
    if made_in != dtype:
        raise ValueError(
            f"{folder!r} was made in {made_in}, the model is in {dtype}; load the model with "
            f"dtype {made_in!r}"
        )
    cache.check_settings(
        LandmarkConfig.from_dict(manifest["settings"]), f"memory {folder!r}", SET_MODEL
    )
    if manifest["model"] != theirs:
        raise ValueError(
            f"{folder!r} was made with another model ({manifest['model']['type']} "
            f"{manifest['model']['fingerprint'][:12]}, this is {theirs['type']} "
            f"{theirs['fingerprint'][:12]}); open it with that one, or remember the texts anew"
        )
