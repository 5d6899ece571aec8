"""One layer in an archive: its finished blocks, their checksums and its landmark keys.

``layer-NN.blocks`` is a plain array ``(blocks, G, 2, L, D)``, so that a block of one head is read
without its neighbours; ``layer-NN.sums`` holds the CRC-32 of each, ``(blocks, G)``;
``layer-NN.landmarks`` is ``(blocks, G, D)``.
"""

from __future__ import annotations

import os
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.memory.archive.log import REMEDY, STATE, Archive, Damaged
from landmark.memory.archive.manifest import are_shapes

SUM_BYTES = 4
AT_ONCE = 256  # blocks read or written together


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


class ArchivedLayer:
    """The finished blocks of one layer, as many as their archive counts.

    Args:
        archive: where they lie.
        layer: the layer's index.
        shape: ``(G, L, D)``.
        dtype: of keys and values.

    Raises:
        Damaged: their checksums are not what was written.
    """

    def __init__(
        self, archive: Archive, layer: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.archive = archive
        self.layer = layer
        self.shape = shape
        self.dtype = dtype
        self._part = 2 * shape[1] * shape[2] * dtype.itemsize  # bytes of one block in one head
        self._sums = array("I")
        if self.count:
            self._sums.frombytes(archive.read(self.name("sums")))
        self._file: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ArchivedLayer:
        """Returns itself: what was committed does not change."""
        return self

    @property
    def count(self) -> int:
        """Blocks, those that were appended and not committed yet included."""
        return self.archive.length(self.name("sums")) // (SUM_BYTES * self.shape[0])

    def name(self, kind: str) -> str:
        """Returns the name of the file of a kind."""
        return f"layer-{self.layer:02d}.{kind}"

    def landmarks(self) -> Tensor:
        """Returns the landmark keys ``(1, G, count, D)``; raises ``Damaged``."""
        groups, _, dim = self.shape
        if self.count == 0:
            return torch.empty(1, groups, 0, dim, dtype=self.dtype)
        data = self.archive.read(self.name("landmarks"))
        return torch.frombuffer(data, dtype=self.dtype).view(-1, groups, dim).transpose(0, 1)[None]

    def read(self, blocks: Tensor, heads: Tensor) -> Tensor:
        """Returns keys and values ``(M, 2, L, D)`` of blocks ``(M,)`` in the given key/value heads.

        Raises:
            Damaged: one of them is not what was written.
        """
        groups, size, dim = self.shape
        found = torch.empty(
            len(blocks), 2, size, dim, dtype=self.dtype, pin_memory=torch.cuda.is_available()
        )
        view = as_bytes(found)
        for index, (block, head) in enumerate(zip(blocks.tolist(), heads.tolist(), strict=True)):
            assert block < self.count
            part = view[index * self._part : (index + 1) * self._part]
            self._read_part(part, block * groups + head)
        return found

    def of_all_heads(self, blocks: Tensor) -> Tensor:
        """Returns keys and values ``(M, G, 2, L, D)`` of blocks ``(M,)``; raises ``Damaged``."""
        groups = self.shape[0]
        heads = torch.arange(groups).repeat(len(blocks))
        return torch.unflatten(
            self.read(blocks.repeat_interleave(groups), heads), 0, (len(blocks), groups)
        )

    def open_blocks(self) -> None:
        """Opens the file of the blocks, so that they can be read after the folder was renamed."""
        if self._file is None:
            path = self.archive.folder / self.name("blocks")
            # A pipe in its place is not waited for.
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            weakref.finalize(self, os.close, self._file)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of all heads."""
        return self.shape[0] * self._part

    def append(self, data: Tensor, landmarks: Tensor) -> None:
        """Appends the next finished blocks; they count from the archive's next commit on.

        Args:
            data: ``(n, G, 2, L, D)`` on the CPU.
            landmarks: ``(n, G, D)`` on the CPU.
        """
        view = as_bytes(data.contiguous())
        sums = array(
            "I", (zlib.crc32(view[i : i + self._part]) for i in range(0, len(view), self._part))
        )
        self.archive.append(self.name("blocks"), view, summed=False)
        self._append_rest(sums, landmarks)

    def skip(self, blocks: int) -> None:
        """Skips blocks that were dropped: zeros are read there, and take no room on disk."""
        groups, _, dim = self.shape
        self.archive.skip(self.name("blocks"), blocks * self.block_bytes)
        sums = array("I", [zlib.crc32(bytes(self._part))]) * (blocks * groups)
        self._append_rest(sums, torch.zeros(blocks, groups, dim, dtype=self.dtype))

    def _append_rest(self, sums: array[int], landmarks: Tensor) -> None:
        """Appends the checksums and landmark keys of blocks that were appended."""
        del self._sums[self.count * self.shape[0] :]  # of blocks that were never committed
        self._sums.extend(sums)
        self.archive.append(self.name("landmarks"), as_bytes(landmarks.contiguous()))
        self.archive.append(self.name("sums"), memoryview(sums))

    def verify(self) -> Iterator[str]:
        """Yields a line for each block of a head that is not what was written."""
        groups = self.shape[0]
        part = memoryview(bytearray(self._part))
        for index in range(self.count * groups):
            try:
                self._read_part(part, index)
            except Damaged as error:
                yield str(error)

    def _read_part(self, part: memoryview, index: int) -> None:
        self.open_blocks()
        assert self._file is not None
        length = os.preadv(self._file, [part], index * self._part)
        if length != len(part) or zlib.crc32(part) != self._sums[index]:
            block, head = divmod(index, self.shape[0])
            path = self.archive.folder / self.name("blocks")
            begin = index * self._part
            end = (index + 1) * self._part
            raise Damaged(
                f"{path}: block {block}, key/value head {head} (bytes {begin}-{end}) is not what "
                f"was written; {REMEDY}"
            )


def saved_layers(archive: Archive) -> list[ArchivedLayer]:
    """Returns the layers that an archive's manifest names; raises ``Damaged``."""
    return [_saved_layer(archive, index) for index in _layers(archive)]


def _layers(archive: Archive) -> range:
    """Returns the numbers of the layers of the manifest; raises ``Damaged`` for no layers."""
    if not are_shapes(archive.manifest.get("layers")):
        raise Damaged(
            f"{archive.folder / STATE}: expected the shapes of layers, got others; {REMEDY}"
        )
    return range(len(archive.manifest["layers"]))


def _saved_layer(archive: Archive, index: int) -> ArchivedLayer:
    groups, size, dim = archive.manifest["layers"][index]
    return ArchivedLayer(archive, index, (groups, size, dim), dtype_of(archive.manifest["dtype"]))


def verify(
    folder: str | Path, progress: Callable[[str, int, int], None] | None = None
) -> list[str]:
    """Reads all of a memory without a model, and says what is damaged.

    Args:
        folder: where it lies.
        progress: called before each layer with what is done, how much of it, and of how much.

    Returns:
        a line for each part of it that is not what was written.

    Raises:
        FileNotFoundError: there is no memory in the folder.
        ValueError: a format of a later version.
    """
    try:
        archive = Archive.open(folder, whole=False)
        layers = _layers(archive)
    except Damaged as error:
        return [str(error)]
    found = list(archive.verify())
    for index in layers:
        if progress is not None:
            progress("layers verified", index, len(layers))
        try:
            found += _saved_layer(archive, index).verify()
        except (Damaged, OSError) as error:
            if not found:  # otherwise its checksums or its file are named already
                found.append(str(error))
    return verify(folder, progress) if found and archive.is_outdated() else found


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name as manifests have it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of a name; raises ``ValueError`` for any other name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected the name of a dtype of torch, got {name!r}; {REMEDY}")
    return found
