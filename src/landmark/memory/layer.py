"""One layer's memory: files new keys and values, retrieves blocks, attends (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.archive.layer import SavedLayer
from landmark.memory.faiss_index import LandmarkIndex
from landmark.memory.fused import FEW_QUERIES, FEW_WIDTH, FUSED_TOP_K, runs_fused
from landmark.memory.geometry import CallGeometry, QueryGrid, from_grid, to_grid
from landmark.memory.positions import RotaryTables, final_distances
from landmark.memory.retrieval import (
    Retrieval,
    choose,
    head_peaks,
    landmark_keys_at,
    landmark_scores,
    select_per_query,
    select_with_index,
)
from landmark.memory.storage.store import BlockStore
from landmark.memory.storage.tiers import OffloadConfig

SLAB_BYTES = {"cpu": 2**26, "cuda": 2**31}  # fetched blocks and scores alive at once
COPIES = 8  # of a score that are alive while softmaxes are taken
RECENT_BLOCKS = 8  # blocks whose queries `head` keeps, so that a cache can be cropped into them


class LayerMemory:
    """All that one layer remembers of the rows of a batch.

    Args:
        config: the settings.
        tables: rotations of this layer's rotary type.
        layer: the layer's index.
        tiers: where its blocks live, ``None`` for the device; budgets of this layer.
        index: one of ``landmark.memory.faiss_index.KINDS``. Where all old landmarks are equal no
            index can tell them apart, and every one is scored.
    """

    def __init__(
        self,
        config: LandmarkConfig,
        tables: RotaryTables,
        layer: int,
        tiers: OffloadConfig | None = None,
        index: str = "exact",
    ) -> None:
        self.config = config
        self.tables = tables
        self.layer = layer
        self.store = BlockStore(
            config.block_size,
            local_blocks=config.local_blocks,
            shared_landmark=layer == 0 and config.positions == "stingy",
            tiers=tiers,
        )
        self.retrieves = config.mode == "retrieval" and (
            config.layers is None or layer in config.layers
        )
        indexed = index != "exact" and self.retrieves and not self.store.shared_landmark
        self.index = LandmarkIndex(index) if indexed else None
        # (B, G, R, P), `head` only: of the rows' unfinished blocks.
        self._peak: Tensor | None = None
        self._queries: Tensor | None = None  # (B, G, R, RECENT_BLOCKS, L, D), `head` only
        # `_queries` before a call that may still fail in another layer.
        self._queries_before: Tensor | None = None

    def prepare(self, plan: CallGeometry, like: Tensor) -> None:
        """Makes room for a call of keys like ``like (B, G, *, D)``, and drops what no query will
        see.
        """
        self._evict(plan)
        self.store.reserve(plan.blocks, like)
        self.store.open(plan)

    def depends(self, plan: CallGeometry) -> tuple[Any, ...] | None:
        """Prepares a call and returns what it would find it again by if it were captured in a CUDA
        graph.

        Addresses, and numbers that are not on the device; ``None`` where a call asks the device
        something.
        """
        if not (self.retrieves and plan.candidates and self._chooses_fused() and self.store.places):
            return None
        self.prepare(plan, self.store.landmark_keys)
        found = self.store.depends()
        return None if found is None else (*found, *self.tables.depends())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: CallGeometry,
        *,
        scale: float,
        retrieve: bool,
        record: bool,
        prepared: bool = False,
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
            prepared: whether ``prepare`` was called.

        Returns:
            the output ``(B, T, H, D)``, and what was retrieved where asked for.
        """
        if not prepared:
            self.prepare(plan, key)
        query = torch.unflatten(query, 1, (key.shape[1], -1))
        retrieve = retrieve and self.retrieves and plan.candidates > 0
        fused = runs_fused(query, self.config)
        if retrieve and fused and self._are_few(query, plan):
            return self._attend_few(query, key, value, plan, scale, record=record)
        rotation = self.tables.by_offset(plan.offsets, key.dtype)[:, None]
        self.store.write(rotation.rotate(key), value, plan.writes)
        if self.index is not None:
            self.index.follow(
                self.store, (plan.grid.local_first[:, 0] - self.config.top_k).clamp(min=0).tolist()
            )
        query = to_grid(rotation[:, None].rotate(query), plan.grid)
        sink = plan.candidates > 0 and not retrieve
        earlier = self._earlier_peak(plan, scale) if retrieve and self._needs_peak(plan) else None
        if self.config.granularity == "head" and self.retrieves:
            self._remember_queries(query, plan.grid)
        outputs = []
        found = []
        step, wide = self._slab(query, plan, retrieve=retrieve, fused=fused)
        for begin in range(0, query.shape[3], step):
            grid = plan.grid.narrow(begin, begin + step)
            part = query[:, :, :, begin : begin + step]
            chosen = None
            if retrieve:
                chosen = self._choose(
                    part, grid, plan.candidates, scale, None if begin else earlier, fused=fused
                )
            output, read = self._attend_slab(
                part, grid, chosen, scale, wide, sink=sink, fused=fused
            )
            outputs.append(output)
            if record and read is not None:
                found.append(read)
        if not retrieve:
            self._peak = None
        retrieval = self._record(plan, found, query) if record else None
        return from_grid(torch.cat(outputs, dim=3), plan.cells), retrieval

    def _choose(
        self,
        query: Tensor,
        grid: QueryGrid,
        blocks: int,
        scale: float,
        earlier: Tensor | None,
        *,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns chosen blocks and whether each is valid, ``(B, G or 1, R or 1, n, W, K)``."""
        if fused and self._chooses_fused():
            from landmark.memory.triton.launch import select_fused

            count = self._scored(blocks)
            places, valid = select_fused(
                query, grid, count, self.store, self.tables, self.config, scale
            )
            return self.store.block_of(places), valid
        if self.config.granularity == "token_head":
            rest = (self.store, self.tables, self.config)
            if self.index is not None:
                return select_with_index(query * scale, grid, *rest, self.index)
            return select_per_query(
                query * scale, grid, self._scored(blocks), *rest, self._scored_at_once(query)
            )
        scores = self._scores(query, grid, blocks, scale)
        peaks = None
        if self.config.granularity == "head":
            peaks = head_peaks(scores, grid, self.config, earlier)
            self._keep_peak(peaks, grid)
        places, valid = choose(scores, self.config, peaks)
        shape = (*places.shape[:3], *query.shape[3:5], places.shape[-1])
        return self.store.block_of(places).expand(shape), valid.expand(shape)

    def _are_few(self, query: Tensor, plan: CallGeometry) -> bool:
        """Whether one row's queries are so few, and stand in one block, that the kernels for
        decoding take them.
        """
        _, _, repeats, width, _ = query.shape
        alone = self._chooses_fused() and plan.grid.own.shape[1] == 1
        return alone and width <= FEW_WIDTH and repeats * width <= FEW_QUERIES

    def _attend_few(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: CallGeometry,
        scale: float,
        *,
        record: bool,
    ) -> tuple[Tensor, Retrieval | None]:
        """As ``attend``, prepared, for few queries ``(B, G, R, T, D)``: they stand on the grid as
        they come.
        """
        from landmark.memory.triton.launch import decode, file

        query = file(query, key, value, plan.grid, self.store, self.tables)
        self.store.finish(plan.writes)
        count = self._scored(plan.candidates)
        output, places, gates = decode(
            query, plan.grid, count, self.store, self.tables, self.config, scale
        )
        if not record:
            return output, None
        blocks = torch.where(places >= 0, self.store.block_of(places), -1)
        return output, self._record(plan, [(blocks, gates)], query)

    def _chooses_fused(self) -> bool:
        """The other granularities need every score, for their softmax; an index was asked for by
        name.
        """
        alone = self.config.granularity == "token_head" and self.index is None
        return alone and self.config.top_k <= FUSED_TOP_K

    def _scores(self, query: Tensor, grid: QueryGrid, blocks: int, scale: float) -> Tensor:
        marks = landmark_keys_at(self.store, 0, self._scored(blocks))
        return landmark_scores(query * scale, grid, marks, self.tables, self.config)

    def _scored_at_once(self, query: Tensor) -> int:
        """Places whose scores by these queries are alive at once."""
        budget = SLAB_BYTES.get(query.device.type, SLAB_BYTES["cpu"])
        return max(
            1,
            budget // (COPIES * max(query.element_size(), 4) * (query.numel() // query.shape[-1])),
        )

    def _scored(self, blocks: int) -> int:
        """Places that hold all of the blocks ``0..blocks - 1`` that are kept."""
        return max(1, blocks - self.store.first + 1)

    def _attend_slab(
        self,
        query: Tensor,
        grid: QueryGrid,
        chosen: tuple[Tensor, Tensor] | None,
        scale: float,
        wide: int,
        *,
        sink: bool,
        fused: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Output of some own blocks, ``wide`` places of each at a time; also what was chosen,
        weighed.
        """
        if fused:
            from landmark.memory.triton.launch import attend
        else:
            from landmark.memory.eager import attend
        blocks = grid.local
        distances = torch.where(grid.local >= 0, grid.own[..., None] - grid.local, -1)
        if sink:
            block = torch.zeros_like(grid.own)
            there = grid.local_first > 0
            distance = self._distances(
                block[:, None, None, :, None, None], there[:, None, None, :, None, None], grid
            )
            blocks = torch.cat((blocks, block[..., None]), dim=-1)
            distances = torch.cat((distances, distance[:, 0, 0, :, 0]), dim=-1)
        shared = self.store.place_of(blocks), distances
        past = (
            None
            if chosen is None
            else (self.store.place_of(chosen[0]), self._distances(*chosen, grid))
        )
        outputs = []
        gates = []
        rest = (self.store, self.tables, scale, self._farthest(grid))
        for left in range(0, query.shape[4], wide):
            cut = slice(left, left + wide)
            some = None if past is None else (past[0][:, :, :, :, cut], past[1][:, :, :, :, cut])
            output, weights = attend(query[:, :, :, :, cut], grid.within(cut), shared, some, *rest)
            outputs.append(output)
            gates.append(weights)
        output = torch.cat(outputs, dim=4)
        if chosen is None:
            return output, None
        weights = torch.cat(gates, dim=4)
        return output, (torch.where(chosen[1], chosen[0], -1).expand(weights.shape), weights)

    def _distances(self, blocks: Tensor, valid: Tensor, grid: QueryGrid) -> Tensor:
        """Distances of retrieved blocks from the queries' own, -1 where there is none."""
        found = final_distances(blocks, valid, grid, self.config.top_k, self.config.positions)
        return found.masked_fill(~valid, -1)

    def _farthest(self, grid: QueryGrid) -> int:
        """Largest distance in blocks at which a block may stand."""
        if self.config.mode == "all" or self.config.positions == "exact":
            return self.store.first + self.store.places
        return self.config.top_k + 1 + grid.local.shape[-1]

    def _slab(
        self, query: Tensor, plan: CallGeometry, *, retrieve: bool, fused: bool
    ) -> tuple[int, int]:
        """Own blocks, and places in them, attended at once, so that what is alive stays within the
        budget.
        """
        batch, groups, repeats, blocks, width, dim = query.shape
        size = self.config.block_size
        local = plan.grid.local.shape[-1]
        stored = query.element_size()
        scored = COPIES * batch * groups * repeats * max(stored, 4)
        each = scored * (local + 2) * size
        shared = 2 * batch * groups * (local + 2) * size * dim * stored
        choice = 0
        if retrieve:
            each += batch * groups * repeats * self.config.top_k * (3 * dim * stored + COPIES * 8)
            choice = 0 if self.config.granularity == "token_head" else scored * plan.candidates
        # The kernels copy no blocks and keep no scores; lists of chosen blocks remain, and what lay
        # lower.
        if fused:
            each = COPIES * batch * groups * repeats * (self.config.top_k * 8 + dim * 4)
            shared = 0
            if retrieve and self.store.fetches:
                fetchers = groups * (
                    repeats if self.config.granularity in ("token_head", "head") else 1
                )
                each += 2 * batch * fetchers * self.config.top_k * size * dim * stored
        budget = SLAB_BYTES.get(query.device.type, SLAB_BYTES["cpu"])
        step = min(blocks, max(1, budget // (width * (each + choice) + shared)))
        if retrieve and self.config.granularity == "head" and self.config.local == "chunk":
            step = blocks  # all queries of the call choose together
        return step, min(width, max(1, budget // (step * each)))

    def _evict(self, plan: CallGeometry) -> None:
        """Drops what neither this call nor a later one sees; what a call needs is there again if it
        fails.
        """
        before = self.store.first
        self.store.evict(
            plan.seen_from if self.retrieves or self.config.mode == "all" else plan.local_from
        )
        if self.store.first != before:
            self._peak = None

    def _record(
        self, plan: CallGeometry, found: list[tuple[Tensor, Tensor]], query: Tensor
    ) -> Retrieval:
        batch, groups, repeats = query.shape[:3]
        if not found:
            none = plan.positions.new_full(
                (batch, groups * repeats, plan.cells.shape[1], self.config.top_k), -1
            ).cpu()
            return Retrieval(
                self.layer, plan.positions.cpu(), none, none.clamp(min=0).to(query.dtype)
            )
        blocks, weights = (torch.cat(parts, dim=3) for parts in zip(*found, strict=True))
        blocks, weights = (
            from_grid(x, plan.cells).transpose(1, 2).cpu() for x in (blocks.long(), weights)
        )
        nobody = plan.positions.cpu()[:, None, :, None] < 0
        blocks = blocks.masked_fill(nobody, -1)
        weights = weights.masked_fill(nobody, 0)
        return Retrieval(self.layer, plan.positions.cpu(), blocks, weights)

    # `head` chooses by a maximum over tokens, some of which came in earlier calls.

    def _needs_peak(self, plan: CallGeometry) -> bool:
        return (
            self.config.granularity == "head" and self.config.local == "blocks" and any(plan.within)
        )

    def _remember_queries(self, query: Tensor, grid: QueryGrid) -> None:
        batch, groups, repeats, _, _, dim = query.shape
        if self._queries is None:
            shape = (batch, groups, repeats, RECENT_BLOCKS, self.config.block_size, dim)
            self._queries = query.new_zeros(shape)
        rows, ns, ws = grid.valid.nonzero(as_tuple=True)
        recent = grid.own[rows, ns] > grid.own[rows, -1] - RECENT_BLOCKS
        rows = rows[recent]
        ns = ns[recent]
        ws = ws[recent]
        place = grid.own[rows, ns] % RECENT_BLOCKS
        self._queries_before, self._queries = self._queries, self._queries.clone()
        self._queries[rows, :, :, place, grid.offsets[rows, ns, ws]] = query[rows, :, :, ns, ws]

    def _keep_peak(self, peaks: Tensor, grid: QueryGrid) -> None:
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

    def _earlier_peak(self, plan: CallGeometry, scale: float) -> Tensor:
        """Maximum over the queries of each row's first own block that came in earlier calls."""
        within = torch.tensor(plan.within, device=plan.cells.device)[:, None, None, None] > 0
        if self._peak is None or bool(((self._peak < 0) & within).any()):
            assert self._queries is not None
            grid = plan.grid.narrow(0, 1)
            offsets = torch.arange(self.config.block_size, device=within.device).expand(
                len(within), 1, -1
            )
            whole = replace(
                grid,
                offsets=offsets,
                valid=offsets < torch.tensor(plan.within, device=within.device)[:, None, None],
            )
            rows = torch.arange(len(within), device=within.device)
            query = self._queries[rows, :, :, grid.own[:, 0] % RECENT_BLOCKS][:, :, :, None]
            peaks = head_peaks(
                self._scores(query, whole, plan.candidates, scale), whole, self.config, None
            )
            self._peak = peaks[:, :, :, 0, -1].clamp(min=0)
        return self._peak * within

    def tail(self, blocks: int, slots: int) -> dict[str, Tensor]:
        """What an archive has to hold of the one row beside its first ``blocks`` blocks, which are
        finished.

        Args:
            blocks: finished blocks.
            slots: slots of the block behind them.
        """
        _, groups, _, dim = self.store.landmark_keys.shape
        tail = self.store.landmark_keys.new_zeros(groups, 2, self.config.block_size, dim)
        if slots:
            place = self.store.place_of(torch.tensor([[[blocks]]], device=tail.device))
            tail[:, 0, :slots], tail[:, 1, :slots] = (
                each[0, :, 0, :slots] for each in self.store.gather(place)
            )
        found = {"tail": tail, "queries": self._queries, "peak": self._peak}
        return {name: each for name, each in found.items() if each is not None}

    def resume(
        self, saved: SavedLayer, first: int, parts: dict[str, Tensor], device: torch.device
    ) -> None:
        """Goes on from an archive.

        Args:
            saved: the finished blocks.
            first: the first of them that is kept, but for block 0.
            parts: what ``tail`` gave.
            device: the model's.

        Raises:
            Damaged: what was saved is not what was written.
        """
        self.store.resume(saved, first, parts["tail"].to(device)[None])
        self._queries, self._peak = (
            parts[name].to(device) if name in parts else None for name in ("queries", "peak")
        )

    def settle(self) -> None:
        """Called when all layers have done a call: it will not be undone."""
        self._queries_before = None

    def undo(self) -> None:
        """Called when a call failed in some layer: what `head` knows is that of the call before.

        Blocks need no undoing, as a repeated call writes the same slots.
        """
        if self._queries_before is not None:
            self._queries = self._queries_before
            self._queries_before = None
        self._peak = None

    def forget_peak(self) -> None:
        """Called when the rows were cropped: what `head` knew of the unfinished block is computed
        again.
        """
        self._peak = None

    def nbytes(self, tier: str) -> int:
        """Bytes held in a tier; an index counts on the host."""
        indexed = self.index.nbytes if self.index is not None and tier == "host" else 0
        return self.store.nbytes(tier) + indexed

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
        self.store.select_rows(rows)
        if self.index is not None:
            self.index.select_rows(rows.tolist())
        if self._peak is not None:
            self._peak = self._peak.index_select(0, rows.to(self._peak.device))
        if self._queries is not None:
            self._queries = self._queries.index_select(0, rows.to(self._queries.device))
