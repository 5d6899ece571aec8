"""One layer's memory: files new keys and values, retrieves blocks, attends (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.plan import Grid, Plan
from landmark.memory.positions import RotationTables, final_distances
from landmark.memory.retrieval import choose, head_peaks, landmark_scores
from landmark.memory.store import BlockStore

SLAB_BYTES = {"cpu": 2**26, "cuda": 2**31}  # fetched blocks and scores alive at once
COPIES = 8  # of a score that are alive while softmaxes are taken
RECENT_BLOCKS = 8  # blocks whose queries `head` keeps, so that a cache can be cropped into them


@dataclass(frozen=True)
class Retrieval:
    """What one layer retrieved in one call.

    Attributes:
        layer: the layer's index.
        positions: ``(B, T)`` slot of each query, ``-1`` where the row has none.
        blocks: ``(B, H, T, K)`` retrieved blocks, ``-1`` for none.
        weights: ``(B, H, T, K)`` their gate weights.
    """

    layer: int
    positions: Tensor
    blocks: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Past:
    """Finished blocks that queries see: scores, gates' places and values, ``S`` sharing heads (``R`` or 1)."""

    scores: Tensor  # (B, G, R, n, W, K, L)
    valid: Tensor  # broadcasts to (B, G, R, n, W, K)
    values: Tensor  # (B, G, K, L, D) after (B, G, n) or (B, G, S, n, W)


class LayerMemory:
    """All that one layer remembers of the rows of a batch.

    Args:
        config: the settings.
        tables: rotations of this layer's rotary type.
        layer: the layer's index.
    """

    def __init__(self, config: LandmarkConfig, tables: RotationTables, layer: int) -> None:
        self.config, self.tables, self.layer = config, tables, layer
        self.store = BlockStore(config.block_size, shared_landmark=layer == 0 and config.positions == "stingy")
        self.retrieves = config.mode == "retrieval" and (config.layers is None or layer in config.layers)
        self._peak: Tensor | None = None  # (B, G, R, P), `head` only: of the rows' unfinished blocks
        self._queries: Tensor | None = None  # (B, G, R, RECENT_BLOCKS, L, D), `head` only
        self._queries_before: Tensor | None = None  # `_queries` before a call that may still fail in another layer

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float, retrieve: bool, record: bool
    ) -> tuple[Tensor, Retrieval | None]:
        """Files the call's keys and values, then attends.

        Args:
            query: ``(B, H, T, D)``, not rotated.
            key: ``(B, G, T, D)``, not rotated.
            value: ``(B, G, T, D)``.
            plan: the geometry of the call, on the same device.
            scale: the softmax scale.
            retrieve: whether to retrieve; otherwise the local context and block 0 are seen.
            record: whether to return what was retrieved.

        Returns:
            the output ``(B, T, H, D)``, and what was retrieved where asked for.
        """
        groups = key.shape[1]
        self._evict(plan)
        rotation = self.tables.by_offset(plan.offsets, key.dtype)[:, None]
        self.store.reserve(plan.blocks, key)
        self.store.write(rotation.rotate(key), value, plan.writes)
        query = _to_grid(torch.unflatten(rotation.rotate(query), 1, (groups, -1)), plan.grid)
        retrieve = retrieve and self.retrieves and plan.candidates > 0
        sink = plan.candidates > 0 and not retrieve
        earlier = self._earlier_peak(plan, scale) if retrieve and self._needs_peak(plan) else None
        if self.config.granularity == "head" and self.retrieves:
            self._remember_queries(query, plan.grid)
        outputs, found = [], []
        step, wide = self._slab(query, plan, retrieve)
        for begin in range(0, query.shape[3], step):
            grid, part = plan.grid.narrow(begin, begin + step), query[:, :, :, begin : begin + step]
            chosen = None
            if retrieve:
                chosen = self._choose(part, grid, plan.candidates, scale, earlier if begin == 0 else None)
            output, read = self._attend_slab(part, grid, chosen, scale, wide, sink=sink)
            outputs.append(output)
            if record and read is not None:
                found.append(read)
        if not retrieve:
            self._peak = None
        retrieval = self._record(plan, found, query) if record else None
        return _from_grid(torch.cat(outputs, dim=3), plan.cells), retrieval

    def _choose(
        self, query: Tensor, grid: Grid, blocks: int, scale: float, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns chosen blocks and whether each is valid, ``(B, G or 1, R or 1, n, W, K)``."""
        scores = self._scores(query, grid, blocks, scale)
        peaks = None
        if self.config.granularity == "head":
            peaks = head_peaks(scores, grid, self.config, earlier)
            self._keep_peak(peaks, grid)
        places, valid = choose(scores, self.config, peaks)
        shape = (*places.shape[:3], *query.shape[3:5], places.shape[-1])
        return self.store.block_of(places).expand(shape), valid.expand(shape)

    def _scores(self, query: Tensor, grid: Grid, blocks: int, scale: float) -> Tensor:
        count = max(1, blocks - self.store.first + 1)
        return landmark_scores(query * scale, grid, count, self.store, self.tables, self.config)

    def _attend_slab(
        self, query: Tensor, grid: Grid, chosen: tuple[Tensor, Tensor] | None, scale: float, wide: int, *, sink: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Attends with ``wide`` places of every own block at a time."""
        outputs, found = [], []
        for left in range(0, query.shape[4], wide):
            cut = slice(left, left + wide)
            some = None if chosen is None else (chosen[0][:, :, :, :, cut], chosen[1][:, :, :, :, cut])
            output, read = self._attend(query[:, :, :, :, cut], grid.within(cut), some, scale, sink=sink)
            outputs.append(output)
            if read is not None:
                found.append(read)
        output = torch.cat(outputs, dim=4)
        if not found:
            return output, None
        blocks, weights = (torch.cat(parts, dim=4) for parts in zip(*found, strict=True))
        return output, (blocks, weights)

    def _attend(
        self, query: Tensor, grid: Grid, chosen: tuple[Tensor, Tensor] | None, scale: float, *, sink: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Attends to own text, local blocks, and the chosen ones in one gate softmax; also what was chosen, weighed."""
        size = self.config.block_size
        keys, values = self.store.gather(self.store.place_of(grid.own)[:, None])
        own = torch.einsum("bgrnwd,bgnld->bgrnwl", query * scale, keys)
        place = torch.arange(size, device=query.device)
        seen = (place <= grid.offsets[..., None]) & (place < size - 1)
        own = _at_least_float32(own).masked_fill(~seen[:, None, None], -torch.inf)
        past = [self._local(query, grid, scale)]
        if sink:
            block = torch.zeros_like(grid.own)[:, None, None, :, None, None]
            valid = (grid.local_first > 0)[:, None, None, :, None, None]
            past.append(self._retrieved(query, grid, block, valid, scale, shared=True))
        elif chosen is not None:
            past.append(self._retrieved(query, grid, *chosen, scale, shared=False))
        logits = [own, *(_effective(p).flatten(-2) for p in past)]
        weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
        parts = torch.split(weights.to(values.dtype), [part.shape[-1] for part in logits], dim=-1)
        output = torch.einsum("bgrnwl,bgnld->bgrnwd", parts[0], values)
        for part, blocks in zip(parts[1:], past, strict=True):
            output = output + _weighted(torch.unflatten(part, -1, (-1, size)), blocks.values)
        if chosen is None:
            return output, None
        gates = torch.unflatten(weights[..., -parts[-1].shape[-1] :], -1, (-1, size)).sum(-1)
        found = torch.where(chosen[1], chosen[0], -1).expand(gates.shape)
        return output, (found, gates)

    def _local(self, query: Tensor, grid: Grid, scale: float) -> _Past:
        """The local finished blocks, shared by the queries of an own block."""
        keys, values = self.store.gather(self.store.place_of(grid.local)[:, None])
        largest = self.store.first + self.store.places if self.config.mode == "all" else grid.local.shape[-1]
        distance = grid.own[..., None] - grid.local
        turned = self.tables.by_blocks(distance, query.dtype, largest)[:, None, None, :, None].rotate(
            query[..., None, :] * scale
        )
        scores = torch.einsum("bgrnwkd,bgnkld->bgrnwkl", turned, keys)
        return _Past(_at_least_float32(scores), (grid.local >= 0)[:, None, None, :, None], values)

    def _retrieved(
        self, query: Tensor, grid: Grid, blocks: Tensor, valid: Tensor, scale: float, *, shared: bool
    ) -> _Past:
        """Blocks at their final slots; ``shared`` if all queries of an own block read the same."""
        stingy = self.config.positions == "stingy"
        largest = self.config.top_k + 1 + grid.local.shape[-1] if stingy else self.store.first + self.store.places
        distance = final_distances(blocks, valid, grid, self.config.top_k, self.config.positions)
        turned = self.tables.by_blocks(distance, query.dtype, largest).rotate(query[..., None, :] * scale)
        places = self.store.place_of(blocks)
        if shared:
            keys, values = self.store.gather(places[:, :, 0, :, 0])
            scores = torch.einsum("bgrnwkd,bgnkld->bgrnwkl", turned, keys)
        else:
            keys, values = self.store.gather(places)
            scores = _per_query(turned, keys)
        return _Past(_at_least_float32(scores), valid, values)

    def _slab(self, query: Tensor, plan: Plan, retrieve: bool) -> tuple[int, int]:
        """Own blocks, and places in them, attended at once, so that what is alive stays within the budget."""
        batch, groups, repeats, blocks, width, dim = query.shape
        size, local, stored = self.config.block_size, plan.grid.local.shape[-1], query.element_size()
        scored = COPIES * batch * groups * repeats * max(stored, 4)
        seen = local + 1 + (self.config.top_k if retrieve else 1)
        each, shared = scored * seen * size, 2 * batch * groups * (local + 1) * size * dim * stored
        choice = 0
        if retrieve:
            fetchers = groups * (repeats if self.config.granularity in ("token_head", "head") else 1)
            each += 2 * batch * fetchers * self.config.top_k * size * dim * stored
            choice = scored * plan.candidates
        budget = SLAB_BYTES.get(query.device.type, SLAB_BYTES["cpu"])
        step = min(blocks, max(1, budget // (width * (each + choice) + shared)))
        if retrieve and self.config.granularity == "head" and self.config.local == "chunk":
            step = blocks  # all queries of the call choose together
        return step, min(width, max(1, budget // (step * each)))

    def _evict(self, plan: Plan) -> None:
        """Drops what neither this call nor a later one sees; what a call needs is there again if it fails."""
        before = self.store.first
        self.store.evict(plan.seen_from if self.retrieves or self.config.mode == "all" else plan.local_from)
        if self.store.first != before:
            self._peak = None

    def _record(self, plan: Plan, found: list[tuple[Tensor, Tensor]], query: Tensor) -> Retrieval:
        batch, groups, repeats = query.shape[:3]
        if not found:
            none = plan.positions.new_full((batch, groups * repeats, plan.cells.shape[1], self.config.top_k), -1).cpu()
            return Retrieval(self.layer, plan.positions.cpu(), none, none.clamp(min=0).to(query.dtype))
        blocks, weights = (torch.cat(parts, dim=3) for parts in zip(*found, strict=True))
        blocks, weights = (_from_grid(x, plan.cells).transpose(1, 2).cpu() for x in (blocks, weights))
        nobody = plan.positions.cpu()[:, None, :, None] < 0
        blocks, weights = blocks.masked_fill(nobody, -1), weights.masked_fill(nobody, 0)
        return Retrieval(self.layer, plan.positions.cpu(), blocks, weights)

    # `head` chooses by a maximum over tokens, some of which came in earlier calls.

    def _needs_peak(self, plan: Plan) -> bool:
        return self.config.granularity == "head" and self.config.local == "blocks" and any(plan.within)

    def _remember_queries(self, query: Tensor, grid: Grid) -> None:
        batch, groups, repeats, _, _, dim = query.shape
        if self._queries is None:
            shape = (batch, groups, repeats, RECENT_BLOCKS, self.config.block_size, dim)
            self._queries = query.new_zeros(shape)
        rows, ns, ws = grid.valid.nonzero(as_tuple=True)
        recent = grid.own[rows, ns] > grid.own[rows, -1] - RECENT_BLOCKS
        rows, ns, ws = rows[recent], ns[recent], ws[recent]
        place = grid.own[rows, ns] % RECENT_BLOCKS
        self._queries_before, self._queries = self._queries, self._queries.clone()
        self._queries[rows, :, :, place, grid.offsets[rows, ns, ws]] = query[rows, :, :, ns, ws]

    def _keep_peak(self, peaks: Tensor, grid: Grid) -> None:
        """Keeps the maximum after each row's last query; -1 for a row of which nothing is known."""
        if self.config.local == "chunk":
            return
        reached = grid.valid.flatten(1)
        last = (reached * torch.arange(1, reached.shape[1] + 1, device=peaks.device)).argmax(1)
        rows = torch.arange(len(peaks), device=peaks.device)
        peak = peaks.flatten(3, 4)[rows, :, :, last].clamp(min=0)
        old = peak.new_tensor(-1.0)
        if self._peak is not None:
            old = torch.nn.functional.pad(self._peak, (0, peak.shape[-1] - self._peak.shape[-1]))
        self._peak = torch.where(reached.any(1)[:, None, None, None], peak, old)

    def _earlier_peak(self, plan: Plan, scale: float) -> Tensor:
        """Maximum over the queries of each row's first own block that came in earlier calls."""
        within = torch.tensor(plan.within, device=plan.cells.device)[:, None, None, None] > 0
        if self._peak is None or bool(((self._peak < 0) & within).any()):
            assert self._queries is not None
            grid = plan.grid.narrow(0, 1)
            offsets = torch.arange(self.config.block_size, device=within.device).expand(len(within), 1, -1)
            whole = replace(
                grid, offsets=offsets, valid=offsets < torch.tensor(plan.within, device=within.device)[:, None, None]
            )
            rows = torch.arange(len(within), device=within.device)
            query = self._queries[rows, :, :, grid.own[:, 0] % RECENT_BLOCKS][:, :, :, None]
            peaks = head_peaks(self._scores(query, whole, plan.candidates, scale), whole, self.config, None)
            self._peak = peaks[:, :, :, 0, -1].clamp(min=0)
        return self._peak * within

    def settle(self) -> None:
        """Called when all layers have done a call: it will not be undone."""
        self._queries_before = None

    def undo(self) -> None:
        """Called when a call failed in some layer: what `head` knows is that of the call before.

        Blocks need no undoing, as a repeated call writes the same slots.
        """
        if self._queries_before is not None:
            self._queries, self._queries_before = self._queries_before, None
        self._peak = None

    def forget_peak(self) -> None:
        """Called when the rows were cropped: what `head` knew of the unfinished block is computed again."""
        self._peak = None

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
        self.store.select_rows(rows)
        if self._peak is not None:
            self._peak = self._peak.index_select(0, rows.to(self._peak.device))
        if self._queries is not None:
            self._queries = self._queries.index_select(0, rows.to(self._queries.device))


def _to_grid(query: Tensor, grid: Grid) -> Tensor:
    """``(B, G, R, T, D)`` to ``(B, G, R, n, W, D)``."""
    rows = torch.arange(len(query), device=query.device)[:, None, None]
    return query.permute(0, 3, 1, 2, 4)[rows, grid.columns].permute(0, 3, 4, 1, 2, 5)


def _from_grid(x: Tensor, cells: Tensor) -> Tensor:
    """``(B, G, R, n, W, X)`` to ``(B, T, H, X)``."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x.permute(0, 3, 4, 1, 2, 5).flatten(1, 2)[rows, cells].flatten(2, 3)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _effective(past: _Past) -> Tensor:
    """Logits of past text in the one softmax, ``text + (landmark - logsumexp(text))`` by block; landmarks ``-inf``."""
    text, landmark = past.scores[..., :-1], past.scores[..., -1].masked_fill(~past.valid, -torch.inf)
    logits = text + (landmark - text.logsumexp(-1))[..., None]
    return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)


def _per_query(query: Tensor, keys: Tensor) -> Tensor:
    """Scores ``(B, G, R, n, W, K, L)`` against keys ``(B, G, S, n, W, K, L, D)``, where ``S`` is ``R`` or 1."""
    if keys.shape[2] == 1:
        return torch.einsum("bgrnwkd,bgnwkld->bgrnwkl", query, keys[:, :, 0])
    return (keys @ query[..., None])[..., 0]


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sums values by ``weights (B, G, R, n, W, K, L)``."""
    if values.ndim == 6:
        return torch.einsum("bgrnwkl,bgnkld->bgrnwd", weights, values)
    if values.shape[2] == 1:
        return torch.einsum("bgrnwkl,bgnwkld->bgrnwd", weights, values[:, :, 0])
    return (weights.flatten(-2)[..., None, :] @ values.flatten(5, 6))[..., 0, :]
