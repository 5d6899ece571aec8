"""Saves a ``LandmarkCache`` as a folder and reads it back; see ``docs/archive-format.md``.

``LandmarkCache.save`` and ``LandmarkCache.open`` are the public way in. This module does not know
that class: a cache hands over its contents, and takes what was read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.memory.archive.layer import ArchivedLayer, as_bytes, dtype_of, name_of, saved_layers
from landmark.memory.archive.log import REMEDY, STATE, Archive, Damaged
from landmark.memory.archive.manifest import IDS, manifest_of
from landmark.memory.layer import LayerMemory
from landmark.versions import versions

# By name: a function that is given how many bytes the folder keeps, and returns those behind them.
Attachments = dict[str, Callable[[int], bytes]]
SET_MODEL = "set the model's with configure_landmark"
SAMPLES = 64  # values of each parameter that the fingerprint reads


@dataclass
class Saved:
    """The folder that a cache was opened from or saved to.

    Attributes:
        archive: the folder.
        layers: the archive of each layer of the model.
    """

    archive: Archive
    layers: list[ArchivedLayer]

    @property
    def notes(self) -> dict[str, Any]:
        """The JSON that was saved beside the memory."""
        notes: dict[str, Any] = self.archive.manifest["notes"]
        return notes

    def attachment(self, name: str) -> bytearray:
        """Returns the bytes that were saved beside the memory under a name; raises ``Damaged``."""
        return self.archive.read(f"kept-{name}")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Returns ``None``: a fork belongs to no folder and is saved to one of its own."""


@dataclass(frozen=True)
class CacheContents:
    """All of a cache that is saved.

    Attributes:
        settings: the landmark settings.
        tokens: text tokens of each row.
        ids: ``(tokens,)`` int32 token ids of the first row.
        memories: the memory of each layer.
        decoder: the decoder that read the text, ``None`` if it is gone.
        saved: the folder that the cache belongs to, if any.
        rewound: whether something was removed that this folder holds.
    """

    settings: LandmarkConfig
    tokens: list[int]
    ids: Tensor
    memories: list[LayerMemory]
    decoder: Any
    saved: Saved | None
    rewound: bool

    @property
    def slots(self) -> int:
        """Slots of the first row: its tokens and landmarks."""
        return slots_for(self.tokens[0], self.settings.block_size)

    @property
    def blocks(self) -> int:
        """Finished blocks of the first row."""
        return self.slots // self.settings.block_size


@dataclass(frozen=True)
class Loaded:
    """What ``load`` returns beside the memories of the layers.

    Attributes:
        ids: ``(tokens,)`` int32 token ids.
        saved: the folder.
    """

    ids: Tensor
    saved: Saved


def weights_fingerprint(decoder: Any) -> str:
    """Returns a hash of a decoder's weights.

    It covers the name, shape and dtype of every parameter, and evenly spaced values of each.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        index = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64).long()
        values = parameter.detach().flatten()[index.to(parameter.device)]
        found.update(as_bytes(values.cpu()))
    return found.hexdigest()


def require_reader(reader: Any, decoder: Any) -> None:
    """Makes sure that a decoder has the weights of the one that read a cache.

    Args:
        reader: the decoder that read the cache, ``None`` if it is gone.
        decoder: the decoder that is to go on.

    Raises:
        ValueError: the reader is gone, or has other weights.
    """
    if reader is decoder:
        return
    if reader is None:
        raise ValueError(
            "expected the model that read this cache, got another, and that one is gone: save a "
            "cache before its model goes, and open it with LandmarkCache.open"
        )
    if weights_fingerprint(reader) != weights_fingerprint(decoder):
        raise ValueError(
            "expected the model that read this cache, got one with other weights: make a new "
            "LandmarkCache"
        )


def require_settings(ours: LandmarkConfig, theirs: LandmarkConfig, owner: str, remedy: str) -> None:
    """Makes sure that two settings compute the same from a cache.

    Args:
        ours: the settings of the cache.
        theirs: the settings of ``owner``.
        owner: what the message calls the other side.
        remedy: the end of the message.

    Raises:
        ValueError: they differ in a field that changes results.
    """
    differing = ours.differences(theirs)
    if differing:
        raise ValueError(f"cache and {owner} differ in {differing} (cache, {owner}): {remedy}")


def save(
    contents: CacheContents,
    folder: Path,
    notes: dict[str, Any] | None,
    attachments: Attachments,
) -> Saved:
    """Writes a cache to a folder, as ``LandmarkCache.save`` describes.

    Returns:
        the folder, which the cache belongs to from then on.
    """
    decoder = contents.decoder
    if len(contents.tokens) != 1 or contents.tokens[0] == 0:
        raise ValueError(
            f"expected a memory of one row that has read something, got rows of {contents.tokens} "
            "tokens; read a text, or select one row with cache.batch_select_indices"
        )
    if decoder is None:
        raise ValueError(
            "expected a memory whose model still exists, got one without; read something with the "
            "model"
        )
    held = name_of(contents.memories[0].store.landmark_keys.dtype)
    if held != name_of(decoder.dtype):
        raise ValueError(
            f"expected the model in {held}, in which it read this memory, got it in "
            f"{name_of(decoder.dtype)}; call model.to(torch.{held}) and save again"
        )
    saved = _folder_for(contents, folder)
    archive = saved.archive
    archive.lock()
    try:
        archive.check_whole()
        _write(contents, saved, notes, attachments)
    except BaseException:
        archive.roll_back()
        raise
    finally:
        archive.unlock()
    for layer, memory in zip(saved.layers, contents.memories, strict=True):
        memory.store.pool.back_by_archive(layer)
    return saved


def _write(
    contents: CacheContents,
    saved: Saved,
    notes: dict[str, Any] | None,
    attachments: Attachments,
) -> None:
    """Appends what the folder lacks, and commits."""
    archive = saved.archive
    for layer, memory in zip(saved.layers, contents.memories, strict=True):
        memory.store.save(layer, contents.blocks)
    new_ids = contents.ids[archive.length(IDS) // contents.ids.itemsize :]
    archive.append(IDS, as_bytes(new_ids.contiguous()))
    for name, bytes_behind in attachments.items():
        file = f"kept-{name}"
        archive.append(file, bytes_behind(archive.length(file)))
    partial_file = f"tail-{archive.commits + 1}"
    tensors = _partial_blocks(contents)
    manifest = _manifest(contents, saved)
    manifest["notes"] = archive.manifest.get("notes", {}) if notes is None else notes
    manifest["tail"] = {
        "stream": partial_file,
        "tensors": [_description(name, tensor) for name, tensor in tensors.items()],
    }
    for tensor in tensors.values():
        archive.append(partial_file, as_bytes(tensor))
    replaced = archive.manifest.get("tail")
    archive.commit(manifest, dropped=(replaced["stream"],) if replaced else ())


def load(
    archive: Archive,
    settings: LandmarkConfig,
    decoder: Any,
    memory_of: Callable[[int], LayerMemory],
) -> Loaded:
    """Reads an archive into the memories of an empty cache.

    Args:
        archive: the folder.
        settings: the landmark settings of the cache.
        decoder: the decoder that is to go on.
        memory_of: gives the memory of a layer by its index.

    Raises:
        ValueError: the memory was made with another model, dtype or other settings.
        Damaged: a file is not what was written.
    """
    manifest_of(archive)
    _check_model(archive, settings, decoder)
    layers = saved_layers(archive)
    tensors = _read_partial_blocks(archive)
    for index, layer in enumerate(layers):
        prefix = f"{index}."
        partial = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        first = archive.manifest["first"][index]
        try:
            memory_of(index).resume(layer, first, partial, decoder.device)
        except KeyError as error:
            raise Damaged(
                f"{archive.folder / STATE}: it names no tensor {error} of layer {index}; {REMEDY}"
            ) from None
    ids = torch.frombuffer(archive.read(IDS), dtype=torch.int32)
    return Loaded(ids, Saved(archive, layers))


def decoder_of(model: Any) -> Any:
    """Returns the decoder of a landmark model, also of one inside an adapter's model."""
    return next(each for each in model.modules() if hasattr(type(each), "tables_of"))


def _folder_for(contents: CacheContents, folder: Path) -> Saved:
    """Returns the folder that the cache belongs to, where it is this one; otherwise a new one."""
    saved = contents.saved
    if saved is not None and saved.archive.folder.resolve() == folder.resolve():
        if contents.rewound:
            raise ValueError(
                f"expected a memory that only grew since it was saved to {str(folder)!r}, got one "
                "that was cropped; save it to a new folder"
            )
        return saved
    archive = Archive.create(folder)
    layers = []
    for index, memory in enumerate(contents.memories):
        keys = memory.store.landmark_keys
        shape = (keys.shape[1], contents.settings.block_size, keys.shape[3])
        layers.append(ArchivedLayer(archive, index, shape, keys.dtype))
    return Saved(archive, layers)


def _manifest(contents: CacheContents, saved: Saved) -> dict[str, Any]:
    decoder = contents.decoder
    return {
        "model": {"type": decoder.config.model_type, "fingerprint": weights_fingerprint(decoder)},
        "settings": contents.settings.to_dict(),
        "dtype": name_of(saved.layers[0].dtype),
        "layers": [list(layer.shape) for layer in saved.layers],
        "first": [memory.store.first for memory in contents.memories],
        "tokens": contents.tokens[0],
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str | None]:
    """Returns the versions that write here; asked for once, as the commit is asked of git."""
    return versions("torch", "transformers")


def _partial_blocks(contents: CacheContents) -> dict[str, Tensor]:
    """Returns what is in no finished block, on the CPU, by ``layer.name``."""
    filled = contents.slots % contents.settings.block_size
    found = {}
    for index, memory in enumerate(contents.memories):
        for name, tensor in memory.archive_tensors(contents.blocks, filled).items():
            found[f"{index}.{name}"] = tensor.cpu().contiguous()
    return found


def _description(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": name_of(tensor.dtype)}


def _read_partial_blocks(archive: Archive) -> dict[str, Tensor]:
    """Returns what ``_partial_blocks`` gave when the folder was written."""
    entry = archive.manifest["tail"]
    data = archive.read(entry["stream"])
    offset = 0
    found = {}
    for each in entry["tensors"]:
        dtype = dtype_of(each["dtype"])
        shape = torch.Size(each["shape"])
        flat = torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=offset)
        found[each["name"]] = flat.view(shape)
        offset += shape.numel() * dtype.itemsize
    return found


def _check_model(archive: Archive, settings: LandmarkConfig, decoder: Any) -> None:
    """Raises ``ValueError`` for a memory of another model, dtype or other settings."""
    manifest = archive.manifest
    folder = str(archive.folder)
    dtype = name_of(decoder.dtype)
    made_in = manifest["dtype"]
    if made_in != dtype:
        raise ValueError(
            f"{folder!r} was made in {made_in}, the model is in {dtype}; load the model with "
            f"dtype {made_in!r}"
        )
    made_with = LandmarkConfig.from_dict(manifest["settings"])
    require_settings(settings, made_with, f"memory {folder!r}", SET_MODEL)
    model = {"type": decoder.config.model_type, "fingerprint": weights_fingerprint(decoder)}
    if manifest["model"] != model:
        raise ValueError(
            f"{folder!r} was made with another model ({manifest['model']['type']} "
            f"{manifest['model']['fingerprint'][:12]}, this is {model['type']} "
            f"{model['fingerprint'][:12]}); open it with that one, or remember the texts anew"
        )
