"""What lies beside the computation: the contract of a tier, and its null implementation, where
every block does.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from landmark.memory.archive.layer import AT_ONCE, SavedLayer
from landmark.memory.geometry import CacheWrites, CallGeometry
from landmark.memory.storage.tiers import TransferStats


class BlockPool(Protocol):
    """The contract of a tier. Blocks are named by place, as in ``BlockStore``.

    Attributes:
        keys: ``(B, G, frames, L, D)`` on the model's device.
        values: likewise.
    """

    keys: Tensor
    values: Tensor

    @property
    def traffic(self) -> TransferStats:
        """What moved."""

    def reserve(self, places: int, like: Tensor) -> None:
        """Makes room for so many places of keys like ``like (B, G, *, D)``."""

    def open(self, plan: CallGeometry) -> None:
        """Begins a call: the blocks that it writes and their unfinished parts are near until the
        next.
        """

    def depends(self) -> tuple[int, ...] | None:
        """Returns what a captured call depends on; ``None`` where ``fetch`` asks the device
        something.
        """

    def write(self, key: Tensor, value: Tensor, writes: CacheWrites, places: Tensor) -> None:
        """Files slots; ``places (M,)`` are those of ``writes.blocks``."""

    def finish(self, rows: Tensor, places: Tensor, landmark: Tensor | None) -> None:
        """Told that blocks are finished, ``(M,)`` each; ``landmark (M, G, D)`` replaces their last
        key.
        """

    def resume(self, saved: SavedLayer, first: int, tail: Tensor) -> None:
        """Goes on from an archive, in one row; room was made.

        Args:
            saved: the finished blocks.
            first: block at place 1.
            tail: ``(G, 2, L, D)`` keys and values of the block behind them, not finished, on the
                model's device.
        """

    def fetch(self, *places: Tensor) -> tuple[Tensor, ...]:
        """Brings blocks near.

        Args:
            *places: ``(B, G, ...)`` place of each block; ``G`` may be 1 in all of them for "the
                same for all heads".

        Returns:
            keys and values ``(B, G, frames, L, D)``, then for each of ``places`` the frames, of its
            shape; valid until the next call of this memory.
        """

    def take(self, owners: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies blocks: keys and values ``(M, L, D)`` of owners ``row * G + head`` and places,
        ``(M,)`` each.
        """

    def evict(self, drop: int) -> None:
        """Drops the blocks at places ``1..drop``; those after them take their places."""

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""

    def nbytes(self, tier: str) -> int:
        """Bytes of keys and values held in a tier."""


class DevicePool:
    """Tier ``device``: frames are places, nothing moves.

    Args:
        block_size: positions of a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    @property
    def traffic(self) -> TransferStats:
        """As ``BlockPool.traffic``: nothing moves."""
        return TransferStats()

    def reserve(self, places: int, like: Tensor) -> None:
        """As ``BlockPool.reserve``."""
        shape = (*like.shape[:2], places, self.block_size, like.shape[-1])
        self.keys = grown(self.keys, like.new_zeros(shape))
        self.values = grown(self.values, like.new_zeros(shape))

    def open(self, plan: CallGeometry) -> None:
        """As ``BlockPool.open``."""

    def depends(self) -> tuple[int, ...] | None:
        """As ``BlockPool.depends``."""
        return self.keys.data_ptr(), self.values.data_ptr()

    def write(self, key: Tensor, value: Tensor, writes: CacheWrites, places: Tensor) -> None:
        """As ``BlockPool.write``."""
        self.keys[writes.rows, :, places, writes.offsets] = key[writes.rows, :, writes.columns]
        self.values[writes.rows, :, places, writes.offsets] = value[writes.rows, :, writes.columns]

    def finish(self, rows: Tensor, places: Tensor, landmark: Tensor | None) -> None:
        """As ``BlockPool.finish``."""
        if landmark is not None:
            self.keys[rows, :, places, self.block_size - 1] = landmark

    def resume(self, saved: SavedLayer, first: int, tail: Tensor) -> None:
        """As ``BlockPool.resume``: reads all blocks."""
        kept = [0, *range(max(first, 1), saved.count)] if saved.count else []
        for begin in range(0, len(kept), AT_ONCE):
            blocks = torch.tensor(kept[begin : begin + AT_ONCE])
            data = saved.of_all_heads(blocks).to(self.keys.device)
            places = slice(begin, begin + len(blocks))
            self.keys[0, :, places] = data[:, :, 0].transpose(0, 1)
            self.values[0, :, places] = data[:, :, 1].transpose(0, 1)
        self.keys[0, :, len(kept)] = tail[:, 0]
        self.values[0, :, len(kept)] = tail[:, 1]

    def fetch(self, *places: Tensor) -> tuple[Tensor, ...]:
        """As ``BlockPool.fetch``."""
        return self.keys, self.values, *places

    def take(self, owners: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """As ``BlockPool.take``."""
        return taken(self.keys, self.values, owners, places)

    def evict(self, drop: int) -> None:
        """As ``BlockPool.evict``."""
        shift(self.keys, drop)
        shift(self.values, drop)

    def select_rows(self, rows: Tensor) -> None:
        """As ``BlockPool.select_rows``."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def nbytes(self, tier: str) -> int:
        """As ``BlockPool.nbytes``."""
        return _bytes(self.keys) + _bytes(self.values) if tier == "device" else 0


def grown(old: Tensor, new: Tensor) -> Tensor:
    """Returns ``new (B, G, more, ...)`` that begins with ``old``."""
    if old.numel():
        new[:, :, : old.shape[2]] = old
    return new


def taken(keys: Tensor, values: Tensor, owners: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Copies the blocks at ``frames`` of ``owners``, ``(M,)`` each, from keys and values ``(B, G,
    frames, L, D)``.
    """
    numbers = owners * keys.shape[2] + frames
    (length, dim) = keys.shape[3:]
    found = (
        each.view(-1, length * dim).index_select(0, numbers).view(-1, length, dim)
        for each in (keys, values)
    )
    return next(found), next(found)


def shift(tensor: Tensor, drop: int) -> None:
    """Drops the places ``1..drop`` of ``(B, G, places, ...)``."""
    kept = tensor[:, :, 1 + drop :].clone()
    tensor[:, :, 1 : 1 + kept.shape[2]] = kept


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
