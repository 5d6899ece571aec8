"""Tiers ``host`` and ``disk``: some blocks near in frames, all finished ones below (``shelf.py``).

Frame 0 holds block 0. The next ``recent`` frames are a ring, the same for all heads: block ``b``
stands at ``b`` modulo their number, so that the blocks of the call in progress and the local ones
are there without being looked for. The last ``hot`` frames of each row and key/value head hold
older blocks; the one that was not asked for longest makes room. What is where is known beside the
frames, so that a kernel can look it up (``triton/bring.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.memory.archive.layer import SavedLayer
from landmark.memory.geometry import CacheWrites, CallGeometry
from landmark.memory.storage.offload import OffloadStore
from landmark.memory.storage.pool import taken
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

HOT_BLOCKS = 128  # of each row and key/value head, where no budget is given
MOST_HOT_BLOCKS = 512  # of each row and key/value head, whatever the budget; a power of two
MANY = 2**32  # more than there are blocks
SPARE_RING = 4  # a ring more than so many times as long as a call needs is made shorter


class CachedPool:
    """As ``near.BlockPool``, for blocks most of which lie lower.

    Args:
        block_size: positions of a block.
        local_blocks: finished blocks before a query's own that it always sees.
        tiers: the budgets of this layer.
    """

    def __init__(self, block_size: int, local_blocks: int, tiers: OffloadConfig) -> None:
        self.block_size = block_size
        self.local_blocks = local_blocks
        self.tiers = tiers
        self._traffic = TransferStats()
        self.shelf = OffloadStore(tiers, self._traffic)
        self.first = 1  # block at place 1
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self._recent = torch.empty(0)  # `recent`, on the CPU; all below lies beside the keys
        self.recent = torch.empty(0)  # (B, N) block in each frame of the ring, -1 for none
        self.hot = torch.empty(0)  # (B * G, H) block in each hot frame, -1 for none
        self.asked = torch.empty(
            0
        )  # (B * G, H) when it was asked for last, by the count of the row and head
        self._spans: list[tuple[int, int]] | None = None  # of the call that was opened last
        self._closed: list[tuple[int, int]] = []  # likewise
        self.counted = torch.empty(
            0
        )  # (3,) hits, misses and blocks that a kernel fetched, since `traffic` was asked

    @property
    def traffic(self) -> TransferStats:
        """As ``BlockPool.traffic``."""
        if self.counted.numel():
            hits, misses, fetched = self.counted.tolist()
            self.counted.zero_()
            self._traffic.count("hits", hits)
            self._traffic.count("misses", misses)
            self._traffic.count("fetched_host", fetched * 2 * self.keys[0, 0, 0].nbytes)
        return self._traffic

    def reserve(self, places: int, like: Tensor) -> None:
        """As ``BlockPool.reserve``.

        Raises:
            ValueError: the budget does not hold one block.
        """
        if self.keys.numel():
            return
        batch, heads, _, dim = like.shape
        hot = self._affordable(batch, heads * self.block_size * dim * like.itemsize)
        self.keys = like.new_zeros(batch, heads, 1 + hot, self.block_size, dim)
        self.values = torch.zeros_like(self.keys)
        self._recent = torch.full((batch, 0), -1)
        self.recent = self._recent.to(like.device)
        self.hot = torch.full((batch * heads, hot), -1, device=like.device)
        self.asked = torch.zeros_like(self.hot)
        self.counted = torch.zeros(3, dtype=torch.int64, device=like.device)

    def open(self, plan: CallGeometry) -> None:
        """As ``BlockPool.open``."""
        self._closed = plan.closed
        if plan.spans == self._spans:
            return
        first, last = torch.tensor(plan.spans).T
        self._forget_from(first)
        span = int((last - first).max()) + 1 + self.local_blocks
        if not span <= self._recent.shape[1] <= SPARE_RING * span:
            self._resize(span, first)
        ring = self._recent.shape[1]
        rows = torch.arange(len(first))
        started = (torch.tensor(plan.within) > 0) & (first > 0)
        rows = rows[started & (self._recent[rows, first % ring] != first)]
        if len(rows):
            self._load_unfinished(rows, first[rows])
        own = torch.minimum(first[:, None] + torch.arange(span - self.local_blocks), last[:, None])
        self._recent[torch.arange(len(own))[:, None], own % ring] = own
        self._spans = plan.spans
        self._show_recent()

    def depends(self) -> tuple[int, ...] | None:
        """As ``BlockPool.depends``: kernels fetch where all blocks lie in the memory of the CPU."""
        addresses = self.shelf.addresses(self.keys.device)
        if addresses is None:
            return None
        tensors = (
            self.keys,
            self.values,
            self.recent,
            self.hot,
            self.asked,
            self.counted,
            addresses,
        )
        return (
            self.first,
            self.keys.shape[2],
            self.shelf.length,
            *(each.data_ptr() for each in tensors),
        )

    def write(self, key: Tensor, value: Tensor, writes: CacheWrites, places: Tensor) -> None:
        """As ``BlockPool.write``."""
        frames = self._recent_frame(self._block_of(places))
        self.keys[writes.rows, :, frames, writes.offsets] = key[writes.rows, :, writes.columns]
        self.values[writes.rows, :, frames, writes.offsets] = value[writes.rows, :, writes.columns]

    def finish(self, rows: Tensor, places: Tensor, landmark: Tensor | None) -> None:
        """As ``BlockPool.finish``; finished blocks are copied down."""
        blocks = self._block_of(places)
        frames = self._recent_frame(blocks)
        if landmark is not None:
            self.keys[rows, :, frames, self.block_size - 1] = landmark
        data = torch.stack((self.keys[rows, :, frames], self.values[rows, :, frames]), dim=2)
        batch = len(self.recent)
        closed_rows, closed_blocks = torch.tensor(self._closed).T  # known without asking the device
        self.shelf.write(closed_rows, closed_blocks, data, batch)

    def resume(self, saved: SavedLayer, first: int, tail: Tensor) -> None:
        """As ``BlockPool.resume``: reads block 0 alone."""
        self.first = first
        self.shelf.resume(saved, first)
        own = torch.tensor([saved.count])
        self._resize(1 + self.local_blocks, own)
        self._recent[0, saved.count % self._recent.shape[1]] = saved.count
        self._show_recent()
        frames = [(self._recent_frame(own), tail[None])]
        if saved.count:
            frames.append((torch.tensor([0]), saved.of_all_heads(torch.tensor([0]))))
        for frame, data in frames:
            here = data.to(self.keys.device)
            self.keys[:, :, frame] = here[:, :, 0][:, :, None]
            self.values[:, :, frame] = here[:, :, 1][:, :, None]

    def fetch(self, *places: Tensor) -> tuple[Tensor, ...]:
        """As ``BlockPool.fetch``.

        More blocks than there are hot frames, and older ones that all heads ask for, lie in frames
        of this call alone.
        """
        batch, heads = self.keys.shape[:2]
        blocks = self._block_of(torch.cat([each.flatten(2) for each in places], dim=2))
        rows = torch.arange(batch, device=blocks.device)[:, None, None]
        if bool(self._is_recent(rows, blocks).all()):
            keys = self.keys
            values = self.values
            frames = self._recent_frame(blocks)
        else:
            owner = torch.arange(batch * heads, device=blocks.device).view(batch, heads, 1)
            distinct, inverse = torch.unique(owner * MANY + blocks, return_inverse=True)
            keys, values, frame = self._bring(
                distinct // MANY, distinct % MANY, alike=blocks.shape[1] < heads
            )
            frames = frame[inverse[:, : blocks.shape[1]]]
        parts = torch.split(frames, [each[0, 0].numel() for each in places], dim=2)
        return (
            keys,
            values,
            *(part.view(each.shape) for part, each in zip(parts, places, strict=True)),
        )

    def take(self, owners: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """As ``BlockPool.take``."""
        blocks = self._block_of(places)
        if bool(self._is_recent(owners // self.keys.shape[1], blocks).all()):
            keys = self.keys
            values = self.values
            frames = self._recent_frame(blocks)
        else:
            distinct, inverse = torch.unique(owners * MANY + blocks, return_inverse=True)
            keys, values, frame = self._bring(distinct // MANY, distinct % MANY, alike=False)
            frames = frame[inverse]
        return taken(keys, values, owners, frames)

    def evict(self, drop: int) -> None:
        """As ``BlockPool.evict``."""
        self.first += drop
        self.shelf.drop(self.first)

    def select_rows(self, rows: Tensor) -> None:
        """As ``BlockPool.select_rows``; more rows have fewer hot frames each, where there is a
        budget.
        """
        heads = self.keys.shape[1]
        hot = min(self.hot.shape[1], self._affordable(len(rows), self.keys[0, :, 0].nbytes))
        near = slice(1 + self.recent.shape[1] + hot)
        self.keys, self.values = (
            each[:, :, near].index_select(0, rows) for each in (self.keys, self.values)
        )
        owners = (rows[:, None] * heads + torch.arange(heads, device=rows.device)).flatten()
        self.recent = self.recent[rows]
        self.hot = self.hot[owners, :hot]
        self.asked = self.asked[owners, :hot]
        self._recent = self._recent[rows.cpu()]
        self._spans = None
        self.shelf.select_rows(rows.cpu())

    def nbytes(self, tier: str) -> int:
        """As ``BlockPool.nbytes``."""
        if tier == "device":
            return sum(each.numel() * each.itemsize for each in (self.keys, self.values))
        return self.shelf.nbytes(tier)

    def _affordable(self, batch: int, key_bytes: int) -> int:
        """Hot frames of each row and head, where the keys of a block of a row take
        ``key_bytes``.
        """
        one = 2 * batch * key_bytes
        budget = self.tiers.device_bytes
        if budget is None:
            return HOT_BLOCKS
        if budget < one:
            raise ValueError(
                f"device_bytes: expected at least {one} bytes in each layer, one block of all "
                f"rows and heads, got {budget}: give more"
            )
        return min(budget // one, MOST_HOT_BLOCKS)

    def _block_of(self, places: Tensor) -> Tensor:
        return torch.where(places == 0, 0, places.long() + self.first - 1)

    def _recent_frame(self, blocks: Tensor) -> Tensor:
        return torch.where(blocks == 0, 0, 1 + blocks % self.recent.shape[1])

    def _forget_from(self, first: Tensor) -> None:
        """Forgets what frames hold of later blocks than ``first (B,)``: cropped, or of a call that
        failed.
        """
        later = self._recent > first[:, None]
        if not bool(later.any()):
            return
        self._recent.masked_fill_(later, -1)
        first_of = first.repeat_interleave(self.keys.shape[1])[:, None].to(self.hot.device)
        self.hot.masked_fill_(self.hot >= first_of, -1)

    def _resize(self, ring: int, own: Tensor) -> None:
        """Makes the ring as long as that; ``own (B,)`` is the latest block of each row."""
        rows, frames = (self._recent > (own - ring)[:, None]).nonzero(as_tuple=True)
        blocks = self._recent[rows, frames]
        rows, frames, blocks = (each[blocks > 0] for each in (rows, frames, blocks))
        recent = torch.full((len(own), ring), -1)
        recent[rows, blocks % ring] = blocks
        for name in ("keys", "values"):
            old = getattr(self, name)
            batch, heads, count, size, dim = old.shape
            new = old.new_zeros(batch, heads, count + ring - self._recent.shape[1], size, dim)
            new[:, :, 0] = old[:, :, 0]
            new[:, :, 1 + ring :] = old[:, :, 1 + self._recent.shape[1] :]
            new[rows, :, 1 + blocks % ring] = old[rows, :, 1 + frames]
            setattr(self, name, new)
        self._recent = recent
        self._show_recent()

    def _show_recent(self) -> None:
        """Puts what is known of the ring beside the frames, at the same place as long as the ring
        is.
        """
        if self.recent.shape != self._recent.shape:
            self.recent = self._recent.to(self.keys.device, copy=True)
        self.recent.copy_(self._recent)

    def _load_unfinished(self, rows: Tensor, blocks: Tensor) -> None:
        """Brings blocks that were finished and are no more, after a crop, to where they are
        written.
        """
        heads = self.keys.shape[1]
        owner = (rows[:, None] * heads + torch.arange(heads)).flatten()
        data = self._read(owner, blocks.repeat_interleave(heads))
        data = torch.unflatten(data, 0, (len(rows), heads))
        frames = self._recent_frame(blocks)
        self.keys[rows, :, frames] = data[:, :, 0]
        self.values[rows, :, frames] = data[:, :, 1]
        self._traffic.count("misses", len(owner))

    def _bring(self, owner: Tensor, block: Tensor, *, alike: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and frames ``(M,)`` of distinct blocks ``(M,)``, ascending by row and head
        ``owner``.

        ``alike``: the frames are to be the same for all heads of a row, which have the same blocks.
        """
        frame = self._find(owner, block)
        ring = 1 + self.recent.shape[1]
        old = frame >= ring
        missing = frame < 0
        now = self.asked.amax(1) + 1
        self.asked[owner[old], frame[old] - ring] = now[owner[old]]
        self.counted[:2] += torch.stack((old.sum(), missing.sum()))
        data = self.keys.new_empty(0, 2, *self.keys.shape[3:])
        if bool(missing.any()):
            data = self._read(owner[missing], block[missing])
        if alike or int(torch.bincount(owner[old | missing]).max()) > self.hot.shape[1]:
            return self._apart(owner, frame, data)
        frame[missing] = self._admit(owner[missing], block[missing], data, now)
        return self.keys, self.values, frame

    def _is_recent(self, row: Tensor, block: Tensor) -> Tensor:
        return (block == 0) | (self.recent[row, block % self.recent.shape[1]] == block)

    def _find(self, owner: Tensor, block: Tensor) -> Tensor:
        """The frame of each block, -1 for those that are not near."""
        owners = torch.arange(len(self.hot), device=owner.device)[:, None]
        held, order = (owners * MANY + self.hot).flatten().sort()
        wanted = owner * MANY + block
        at = torch.searchsorted(held, wanted).clamp_(max=len(held) - 1)
        hot = torch.where(
            held[at] == wanted, 1 + self.recent.shape[1] + order[at] % self.hot.shape[1], -1
        )
        return torch.where(
            self._is_recent(owner // self.keys.shape[1], block), self._recent_frame(block), hot
        )

    def _read(self, owner: Tensor, block: Tensor) -> Tensor:
        """Keys and values ``(M, 2, L, D)`` from below."""
        heads = self.keys.shape[1]
        owner = owner.cpu()
        return self.shelf.read(owner // heads, block.cpu(), owner % heads).to(self.keys.device)

    def _admit(self, owner: Tensor, block: Tensor, data: Tensor, now: Tensor) -> Tensor:
        """Puts blocks ``data (M, 2, L, D)`` into the hot frames that were not asked for longest."""
        place = self.asked.argsort(dim=1, stable=True)[owner, _rank(owner)]
        frame = 1 + self.recent.shape[1] + place
        for tensor, part in ((self.keys, data[:, 0]), (self.values, data[:, 1])):
            tensor.view(-1, *tensor.shape[2:])[owner, frame] = part
        self.hot[owner, place] = block
        self.asked[owner, place] = now[owner]
        return frame

    def _apart(self, owner: Tensor, frame: Tensor, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies what is near and ``data (M, 2, L, D)``, the missing, to frames of this call
        alone.
        """
        place = _rank(owner)
        there = frame >= 0
        found = []
        for tensor, part in ((self.keys, data[:, 0]), (self.values, data[:, 1])):
            new = tensor.new_empty(len(self.hot), int(place.max()) + 1, *tensor.shape[3:])
            new[owner[there], place[there]] = tensor.flatten(0, 1)[owner[there], frame[there]]
            new[owner[~there], place[~there]] = part
            found.append(torch.unflatten(new, 0, tensor.shape[:2]))
        return found[0], found[1], place


def _rank(owner: Tensor) -> Tensor:
    """Counts the entries of each owner, ascending ``(M,)``, from 0."""
    counts = torch.bincount(owner)
    return torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
