"""Block table of a cached pool: which block each physical block holds.

Physical block 0 holds block 0. The next ``W`` physical blocks are the window: block ``b`` stands at
``1 + b % W``, the same for all heads, so that the blocks of the call and the local blocks before it
are found without a search. The last ``H`` physical blocks of each row and key/value head are an LRU
cache of older blocks.

A *row head* is the number ``row * G + head`` of a row and key/value head. The tables lie on the
device, so that a kernel can look blocks up (``triton/page_in.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MANY = 2**32  # more than there are blocks


@dataclass(frozen=True)
class Misses:
    """Blocks that have to be copied to the device, and the physical block that each is given.

    Attributes:
        row_head: ``(M,)``, ascending.
        block: ``(M,)``.
        physical: ``(M,)``.
    """

    row_head: Tensor
    block: Tensor
    physical: Tensor


@dataclass(frozen=True)
class Translation:
    """Physical blocks of the blocks that a call reads.

    Attributes:
        shared: ``(B, ...)`` physical blocks, ``None`` where some block is not in the window.
        selected: ``(B, G, ...)`` physical blocks, ``None`` where they do not fit the LRU cache.
        misses: those of ``selected`` that have to be copied first, ``None`` for none.
    """

    shared: Tensor | None
    selected: Tensor | None
    misses: Misses | None


class BlockTable:
    """Which block each physical block of a pool holds, and when it was used last.

    Args:
        rows: rows of the batch.
        heads: key/value heads.
        lru_size: physical blocks of the LRU cache of each row head.
        device: where the tables lie.

    Attributes:
        window: ``(B, W)`` block in each physical block of the window, -1 for none.
        window_host: the same on the CPU.
        lru: ``(B * G, H)`` block in each physical block of the LRU cache, -1 for none.
        last_used: ``(B * G, H)`` when it was used last, by a count of each row head.
        stats: ``(3,)`` hits, misses, and blocks that a kernel copied, since ``take_stats``.
    """

    def __init__(self, rows: int, heads: int, lru_size: int, device: torch.device) -> None:
        self.heads = heads
        self.window_host = torch.full((rows, 0), -1)
        self.window = self.window_host.to(device)
        self.lru = torch.full((rows * heads, lru_size), -1, device=device)
        self.last_used = torch.zeros_like(self.lru)
        self.stats = torch.zeros(3, dtype=torch.int64, device=device)

    @property
    def window_size(self) -> int:
        """Physical blocks of the window."""
        return self.window_host.shape[1]

    @property
    def lru_size(self) -> int:
        """Physical blocks of the LRU cache of each row head."""
        return self.lru.shape[1]

    def take_stats(self) -> list[int]:
        """Returns hits, misses and blocks that a kernel copied since the last call of this."""
        counts: list[int] = self.stats.tolist()
        self.stats.zero_()
        return counts

    def window_index(self, blocks: Tensor) -> Tensor:
        """Returns the physical blocks of blocks in the window; 0 for block 0 and for no block."""
        return torch.where(blocks <= 0, 0, 1 + blocks % self.window_size)

    def is_in_window(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Returns whether blocks are in the window of their rows, or are block 0 or no block."""
        return (blocks <= 0) | (self.window[rows, blocks % self.window_size] == blocks)

    def translate(self, shared: Tensor, selected: Tensor | None) -> Translation:
        """Returns physical blocks; selected blocks that are missing evict those used longest ago.

        Args:
            shared: ``(B, ...)`` blocks that all heads of a row read.
            selected: ``(B, G, ...)`` blocks that each head reads.
        """
        found = None
        if bool(self.is_in_window(_rows_like(shared), shared).all()):
            found = self.window_index(shared)
        if selected is None:
            return Translation(found, None, None)
        if bool(self.is_in_window(_rows_like(selected), selected).all()):
            return Translation(found, self.window_index(selected), None)
        row_head, block, inverse = self.distinct(selected)
        now = self._now()
        physical = self.touch(row_head, block)
        missing = physical < 0
        in_cache = missing | (physical > self.window_size)
        if int(torch.bincount(row_head[in_cache]).max()) > self.lru_size:
            return Translation(found, None, None)
        misses = None
        if bool(missing.any()):
            misses = self._insert(row_head[missing], block[missing], now)
            physical[missing] = misses.physical
        return Translation(found, physical[inverse], misses)

    def distinct(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each block of each row head once, ascending, and where ``blocks`` find theirs.

        Args:
            blocks: ``(B, G, ...)``; below 0 counts as block 0.

        Returns:
            row heads ``(M,)``, blocks ``(M,)``, and the index into these, of the shape of
            ``blocks``.
        """
        numbers = torch.arange(len(self.lru), device=blocks.device)
        numbers = numbers.view(-1, self.heads, *[1] * (blocks.ndim - 2))
        numbered = numbers * MANY + blocks.clamp(min=0)
        distinct, inverse = torch.unique(numbered, return_inverse=True)
        return distinct // MANY, distinct % MANY, inverse

    def touch(self, row_head: Tensor, block: Tensor) -> Tensor:
        """Returns as ``lookup``, marks those of the LRU cache as used now, counts hits and misses.

        Args:
            row_head: ``(M,)``.
            block: ``(M,)`` distinct blocks of each row head.
        """
        physical = self.lookup(row_head, block)
        is_hit = physical > self.window_size
        now = self._now()
        self.last_used[row_head[is_hit], self._lru_slot(physical[is_hit])] = now[row_head[is_hit]]
        self.stats[:2] += torch.stack((is_hit.sum(), (physical < 0).sum()))
        return physical

    def lookup(self, row_head: Tensor, block: Tensor) -> Tensor:
        """Returns the physical block of each block, -1 for those that are not on the device."""
        rows = torch.arange(len(self.lru), device=row_head.device)[:, None]
        held, order = (rows * MANY + self.lru).flatten().sort()
        wanted = row_head * MANY + block
        at = torch.searchsorted(held, wanted).clamp_(max=len(held) - 1)
        in_lru = 1 + self.window_size + order[at] % self.lru_size
        cached = torch.where(held[at] == wanted, in_lru, -1)
        in_window = self.is_in_window(row_head // self.heads, block)
        return torch.where(in_window, self.window_index(block), cached)

    def remove(self, misses: Misses) -> None:
        """Takes back what ``translate`` gave to blocks that could not be copied."""
        self.lru[misses.row_head, self._lru_slot(misses.physical)] = -1

    def place_in_window(self, own: Tensor) -> None:
        """Gives the blocks ``own (B, n)`` of a call their physical blocks in the window."""
        rows = torch.arange(len(own))[:, None]
        self.window_host[rows, own % self.window_size] = own
        self._copy_to_device()

    def forget_after(self, first: Tensor) -> None:
        """Forgets blocks from ``first (B,)`` on: they were cropped, or are of a call that failed.

        ``first`` is the own block in which the next call begins. The window keeps it, as the call
        goes on writing there. The LRU cache must not: it holds finished blocks alone, and a copy of
        this one would be read again when it has become an older block, with the text of before.
        Where no block of the window is later, nothing was taken back, and the cache has no block
        from ``first`` on either.
        """
        later = self.window_host > first[:, None]
        if not bool(later.any()):
            return
        self.window_host.masked_fill_(later, -1)
        first_of = first.repeat_interleave(self.heads)[:, None].to(self.lru.device)
        self.lru.masked_fill_(self.lru >= first_of, -1)

    def resize_window(self, size: int, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Changes the size of the window; blocks that still fit stay.

        Args:
            size: physical blocks of the new window.
            own: ``(B,)`` the latest block of each row.

        Returns:
            rows, old physical blocks and new physical blocks of those that stay, ``(M,)`` each.
        """
        rows, old = (self.window_host > (own - size)[:, None]).nonzero(as_tuple=True)
        blocks = self.window_host[rows, old]
        stay = blocks > 0
        rows = rows[stay]
        old = old[stay]
        blocks = blocks[stay]
        self.window_host = torch.full((len(own), size), -1)
        self.window_host[rows, blocks % size] = blocks
        self._copy_to_device()
        return rows, 1 + old, 1 + blocks % size

    def select_rows(self, rows: Tensor, lru_size: int) -> None:
        """Replaces the batch by the given rows; each row head keeps ``lru_size`` cached blocks."""
        heads = torch.arange(self.heads, device=rows.device)
        row_heads = (rows[:, None] * self.heads + heads).flatten()
        self.lru = self.lru[row_heads, :lru_size]
        self.last_used = self.last_used[row_heads, :lru_size]
        self.window = self.window[rows]
        self.window_host = self.window_host[rows.cpu()]

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the tables contradict themselves."""
        assert torch.equal(self.window.cpu(), self.window_host), "the window differs on the device"
        slots = torch.arange(self.window_size).expand_as(self.window_host)
        held = self.window_host > 0
        assert torch.equal(self.window_host[held] % self.window_size, slots[held]), (
            "a block of the window stands where it is not looked for"
        )
        for row_head, blocks in enumerate(self.lru.tolist()):
            cached = [block for block in blocks if block >= 0]
            assert len(cached) == len(set(cached)), f"row head {row_head} holds a block twice"

    def _insert(self, row_head: Tensor, block: Tensor, now: Tensor) -> Misses:
        """Gives blocks the physical blocks that were used longest ago."""
        slot = self.last_used.argsort(dim=1, stable=True)[row_head, rank_in_group(row_head)]
        self.lru[row_head, slot] = block
        self.last_used[row_head, slot] = now[row_head]
        return Misses(row_head, block, 1 + self.window_size + slot)

    def _now(self) -> Tensor:
        """Returns the next count of each row head."""
        return self.last_used.amax(1) + 1

    def _lru_slot(self, physical: Tensor) -> Tensor:
        return physical - 1 - self.window_size

    def _copy_to_device(self) -> None:
        """Shows the window to kernels, at the same address as long as it keeps its size."""
        if self.window.shape != self.window_host.shape:
            self.window = self.window_host.to(self.lru.device, copy=True)
        self.window.copy_(self.window_host)


def rank_in_group(numbers: Tensor) -> Tensor:
    """Counts the entries of each equal run of ascending ``numbers (M,)``, from 0."""
    counts = torch.bincount(numbers)
    begin = counts.cumsum(0) - counts
    return torch.arange(len(numbers), device=numbers.device) - begin[numbers]


def _rows_like(blocks: Tensor) -> Tensor:
    """Returns the row of each entry of ``(B, ...)``, to be broadcast."""
    rows = torch.arange(len(blocks), device=blocks.device)
    return rows.view(-1, *[1] * (blocks.ndim - 1))
