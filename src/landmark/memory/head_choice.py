"""Selector ``head``: the tokens of a block select together, for each head (paper, section 3.2).

A token selects by the maximum of the landmark probabilities over the tokens of its block up to
itself. Some of these came in earlier calls, so the selector keeps that maximum, the *peak*, and the
latest queries, from which the peak is computed again after a crop.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.context import LayerContext
from landmark.memory.geometry import CallGeometry, QueryGrid
from landmark.memory.retrieval import (
    Selection,
    Selector,
    landmark_scores,
    probabilities,
    select_by_merit,
)

RECENT_BLOCKS = 8  # blocks whose queries are kept, so that a cache can be cropped into them


class HeadSelector(Selector):
    """``head``: all tokens of a block up to the query select together.

    With ``local="chunk"`` all queries of a call select together, and no state is needed.

    Args:
        config: the settings.
    """

    name = "head"
    keeps_state = True
    crop_blocks = RECENT_BLOCKS

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__(config)
        self.selects_whole_call = config.local == "chunk"
        # Peaks (B, G, R, P) of the rows' unfinished blocks; below 0 for a row of which none is
        # known.
        self._peak: Tensor | None = None
        # Latest queries (B, G, R, RECENT_BLOCKS, L, D), rotated by their offset inside the block.
        self._queries: Tensor | None = None
        # `_queries` before a call that may still fail in another layer.
        self._queries_before: Tensor | None = None
        # Peaks of this call's first own blocks over earlier calls.
        self._earlier: Tensor | None = None
        # The first kept block when the peak was computed: indices of its last dimension count on
        # it.
        self._first_kept = 1

    def begin_call(
        self, query: Tensor, geometry: CallGeometry, context: LayerContext, *, retrieve: bool
    ) -> None:
        """Computes the peaks of earlier calls, and keeps the queries of this one."""
        if context.store.first != self._first_kept:
            self._peak = None
            self._first_kept = context.store.first
        self._earlier = None
        needs_earlier = self.config.local == "blocks" and any(geometry.filled_before)
        if retrieve and needs_earlier:
            self._earlier = self._earlier_peak(geometry, context)
        self._keep_queries(query, geometry.grid)
        if not retrieve:
            self._peak = None

    def select(
        self,
        query: Tensor,
        grid: QueryGrid,
        candidates: int,
        context: LayerContext,
        *,
        is_first: bool,
    ) -> Selection:
        """See ``Selector.select``."""
        landmarks = context.store.landmarks_before(candidates)
        scores = landmark_scores(query * context.scale, grid, landmarks, context)
        peaks = head_peaks(scores, grid, self.config, self._earlier if is_first else None)
        self._keep_peak(peaks, grid)
        return select_by_merit(peaks, landmarks, self.config.top_k)

    def commit(self) -> None:
        """See ``Selector.commit``."""
        self._queries_before = None

    def rollback(self) -> None:
        """See ``Selector.rollback``; blocks need none, as a repeated call writes the same slots."""
        if self._queries_before is not None:
            self._queries = self._queries_before
            self._queries_before = None
        self._peak = None

    def note_crop(self) -> None:
        """See ``Selector.note_crop``: the peak of the unfinished block is computed again."""
        self._peak = None

    def state(self) -> dict[str, Tensor]:
        """See ``Selector.state``."""
        found = {"queries": self._queries, "peak": self._peak}
        if self._peak is not None:
            found["first_kept"] = torch.tensor(self._first_kept)
        return {name: each for name, each in found.items() if each is not None}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See ``Selector.load_state``."""
        self._queries = tensors.get("queries")
        self._peak = None
        if "first_kept" in tensors:  # older archives lack it: computed again from queries
            self._peak = tensors["peak"]
            self._first_kept = int(tensors["first_kept"])

    def select_rows(self, rows: Tensor) -> None:
        """See ``Selector.select_rows``."""
        if self._peak is not None:
            self._peak = self._peak.index_select(0, rows.to(self._peak.device))
        if self._queries is not None:
            self._queries = self._queries.index_select(0, rows.to(self._queries.device))

    def _keep_queries(self, query: Tensor, grid: QueryGrid) -> None:
        """Keeps the queries of the latest blocks of a call."""
        batch, groups, repeats, _, _, dim = query.shape
        if self._queries is None:
            shape = (batch, groups, repeats, RECENT_BLOCKS, self.config.block_size, dim)
            self._queries = query.new_zeros(shape)
        rows, own_index, slot_index = grid.valid.nonzero(as_tuple=True)
        is_recent = grid.own[rows, own_index] > grid.own[rows, -1] - RECENT_BLOCKS
        rows = rows[is_recent]
        own_index = own_index[is_recent]
        slot_index = slot_index[is_recent]
        at = grid.own[rows, own_index] % RECENT_BLOCKS
        offsets = grid.offsets[rows, own_index, slot_index]
        self._queries_before = self._queries
        self._queries = self._queries.clone()
        self._queries[rows, :, :, at, offsets] = query[rows, :, :, own_index, slot_index]

    def _keep_peak(self, peaks: Tensor, grid: QueryGrid) -> None:
        """Keeps the maximum after each row's last query; -1 for a row of which nothing is known."""
        if self.config.local == "chunk":
            return
        stands = grid.valid.flatten(1)
        order = torch.arange(1, stands.shape[1] + 1, device=peaks.device)
        last = (stands * order).argmax(1)
        rows = torch.arange(len(peaks), device=peaks.device)
        peak = peaks.flatten(3, 4)[rows, :, :, last].clamp(min=0)
        old = peak.new_tensor(-1.0)
        if self._peak is not None:
            old = torch.nn.functional.pad(self._peak, (0, peak.shape[-1] - self._peak.shape[-1]))
        self._peak = torch.where(stands.any(1)[:, None, None, None], peak, old)

    def _earlier_peak(self, geometry: CallGeometry, context: LayerContext) -> Tensor:
        """Returns the maximum over queries of each row's first own block in earlier calls."""
        device = geometry.flat_index.device
        filled = torch.tensor(geometry.filled_before, device=device)
        has_begun = filled[:, None, None, None] > 0
        if self._peak is None or bool(((self._peak < 0) & has_begun).any()):
            self._peak = self._peak_from_queries(filled, geometry, context)
        return self._peak * has_begun

    def _peak_from_queries(
        self, filled: Tensor, geometry: CallGeometry, context: LayerContext
    ) -> Tensor:
        """Computes the peaks of the first own blocks again; ``filled (B,)`` slots came earlier."""
        assert self._queries is not None
        first_own = geometry.grid.narrow(0, 1)
        offsets = torch.arange(self.config.block_size, device=filled.device)
        offsets = offsets.expand(len(filled), 1, -1)
        grid = replace(first_own, offsets=offsets, valid=offsets < filled[:, None, None])
        rows = torch.arange(len(filled), device=filled.device)
        query = self._queries[rows, :, :, grid.own[:, 0] % RECENT_BLOCKS][:, :, :, None]
        landmarks = context.store.landmarks_before(geometry.candidates)
        scores = landmark_scores(query * context.scale, grid, landmarks, context)
        peaks = head_peaks(scores, grid, self.config, None)
        return peaks[:, :, :, 0, -1].clamp(min=0)


def head_peaks(
    scores: Tensor, grid: QueryGrid, config: LandmarkConfig, earlier: Tensor | None
) -> Tensor:
    """Returns each query's maximum of probabilities over the tokens that select with it.

    Args:
        scores: ``(B, G, R, n, W, P)``, as ``landmark_scores`` gives them.
        grid: where these queries stand.
        config: with ``local="chunk"`` all queries of the call select together, otherwise those of
            the own block up to the query.
        earlier: ``(B, G, R, P)`` maximum over queries of the first own block in earlier calls
            (zeros where there are none), or ``None``.

    Returns:
        ``(B, G, R, n, W, P)``, or ``(B, G, R, 1, 1, P)`` for a local chunk; ``-inf`` where there is
        no candidate.
    """
    stands = grid.valid[:, None, None, ..., None]
    shares = probabilities(scores).masked_fill(~stands, -torch.inf)
    if config.local == "chunk":
        return shares.amax((3, 4), keepdim=True)
    peaks = shares.cummax(4).values
    if earlier is None:
        return peaks
    earlier = torch.nn.functional.pad(earlier, (0, peaks.shape[-1] - earlier.shape[-1]))
    first = peaks[:, :, :, :1]
    earlier = torch.where(first == -torch.inf, first, earlier[:, :, :, None, None])
    return torch.cat((torch.maximum(first, earlier), peaks[:, :, :, 1:]), dim=3)
