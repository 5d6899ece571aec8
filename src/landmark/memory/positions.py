"""Position schemes: the RoPE positions assigned to retrieved blocks.

A scheme says at which distance from a query, in blocks, a landmark is scored, and at which distance
a selected block is read. ``stingy`` (paper, section 3.3.2) places a prefix of ``top_k + 1`` slots
of one block each before the local blocks, so that any distance maps into the positions the model
was trained on: a query whose own block follows ``n`` local blocks has its own block at slot ``top_k
+ 1 + n``. ``exact`` keeps true distances. ``policies.py`` says how to add a scheme.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.storage.store import LandmarkKeys
from landmark.rotary import Rotation


class PositionScheme(Protocol):
    """Where landmarks are scored and selected blocks are read.

    Attributes:
        name: value of ``LandmarkConfig.positions``.
        in_kernels: whether the Triton kernels compute this scheme; otherwise plain PyTorch does.
    """

    name: str
    in_kernels: bool

    def scores(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """Scores landmarks.

        Args:
            query: ``(B, G, R, n, W, D)``, at least float32, rotated by its offset inside the block
                and multiplied by the softmax scale.
            grid: where these queries stand.
            landmarks: ``P`` landmarks.
            context: the layer.

        Returns:
            ``(B, G, R, n, W, P)``, also for blocks that are no candidate.
        """

    def distances(
        self, blocks: Tensor, valid: Tensor, grid: QueryGrid, config: LandmarkConfig
    ) -> Tensor:
        """Returns the distance, in blocks, at which each selected block is read.

        Args:
            blocks: ``(B, G, R, n, W, K)`` selected blocks, ascending, those not ``valid`` last.
            valid: the same shape, bool.
            grid: the queries.
            config: the settings.
        """

    def largest_distance(self, grid: QueryGrid, context: LayerContext) -> int:
        """Returns a distance that none of a call exceeds."""


class StingyPositions:
    """Any distance maps into the trained length (paper, section 3.3.2)."""

    name = "stingy"
    in_kernels = True

    def scores(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """Scores all landmarks at the start of the prefix.

        Those of the latest ``top_k`` candidates are then scored again, at their true distances.
        """
        count = landmarks.keys.shape[2]
        top_k = context.config.top_k
        keys = landmarks.keys.to(query.dtype)
        largest = self.largest_distance(grid, context)
        table = context.tables.distance_table(query.device, query.dtype, largest)
        at_start = self._rotate_to_start(query, grid, context.config, table)
        if landmarks.equal:
            same = (at_start * keys[:, :, None, None, None, 0]).sum(-1, keepdim=True)
            scores = same.expand(*query.shape[:-1], count)
        else:
            scores = scores_of(at_start, keys)
        recent = grid.local_first[..., None] - 1 - torch.arange(top_k, device=query.device)
        blocks = landmarks.blocks.expand(len(query), count).contiguous()
        at = torch.searchsorted(blocks, recent.flatten(1)).clamp(max=count - 1)
        is_there = (blocks.gather(1, at) == recent.flatten(1)).view_as(recent)
        at = at.view_as(recent)
        rotation = table.at((grid.own[..., None] - recent).clamp(0, largest))
        rows = torch.arange(len(query), device=query.device)[:, None, None]
        recent_keys = keys[rows, :, at].movedim(3, 1)
        recent_query = rotation[:, None, None, :, None].rotate(query[..., None, :])
        recent_scores = torch.einsum("bgrnwkd,bgnkd->bgrnwk", recent_query, recent_keys)
        # One more column takes the scores of recent blocks that are not among these landmarks.
        at = torch.where(is_there, at, count)[:, None, None, :, None].expand_as(recent_scores)
        with_spare = torch.nn.functional.pad(scores, (0, 1))
        return with_spare.scatter_(-1, at, recent_scores)[..., :count]

    def distances(
        self, blocks: Tensor, valid: Tensor, grid: QueryGrid, config: LandmarkConfig
    ) -> Tensor:
        """Returns distances to slots of the prefix.

        The ``k`` selected blocks, ``r = 0..k - 1``, stand at slot ``r + (top_k - k) + [age <
        top_k]``: old ones packed to the left, recent ones at their true places.
        """
        first = grid.local_first[:, None, None, :, None, None]
        rank = torch.arange(blocks.shape[-1], device=blocks.device)
        is_recent = (first - 1 - blocks < config.top_k).long()
        slot = rank + config.top_k - valid.sum(-1, keepdim=True) + is_recent
        return self.own_slot(grid, config)[:, None, None, :, None, None] - slot

    def largest_distance(self, grid: QueryGrid, context: LayerContext) -> int:
        """See ``PositionScheme.largest_distance``."""
        if context.config.mode == "all":
            return context.store.first + context.store.capacity
        return context.config.top_k + 1 + int(grid.local.shape[-1])

    def own_slot(self, grid: QueryGrid, config: LandmarkConfig) -> Tensor:
        """Returns the slot of each own block ``(B, n)``: its distance to the prefix's start."""
        return config.top_k + 1 + grid.own - grid.local_first

    def at_prefix_start(self, query: Tensor, grid: QueryGrid, context: LayerContext) -> Tensor:
        """Rotates queries ``(B, G, R, n, W, D)`` to where old landmarks are scored."""
        largest = self.largest_distance(grid, context)
        table = context.tables.distance_table(query.device, query.dtype, largest)
        return self._rotate_to_start(query, grid, context.config, table)

    def _rotate_to_start(
        self, query: Tensor, grid: QueryGrid, config: LandmarkConfig, table: Rotation
    ) -> Tensor:
        rotation = table.at(self.own_slot(grid, config))
        return rotation[:, None, None, :, None].rotate(query)


class ExactPositions:
    """True distances, which grow beyond the trained length with the text."""

    name = "exact"
    in_kernels = True

    def scores(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """Scores each landmark at its true distance."""
        by_distance = context.tables.by_distance
        rotation = by_distance(landmarks.blocks, query.dtype, landmarks.end)
        keys = rotation[:, None].rotate(landmarks.keys.to(query.dtype))
        own = by_distance(grid.own, query.dtype, landmarks.end)
        return scores_of(own[:, None, None, :, None].rotate(query), keys)

    def distances(
        self, blocks: Tensor, valid: Tensor, grid: QueryGrid, config: LandmarkConfig
    ) -> Tensor:
        """Returns true distances."""
        return grid.own[:, None, None, :, None, None] - blocks

    def largest_distance(self, grid: QueryGrid, context: LayerContext) -> int:
        """See ``PositionScheme.largest_distance``."""
        return context.store.first + context.store.capacity


STINGY = StingyPositions()
EXACT = ExactPositions()
SCHEMES: dict[str, PositionScheme] = {each.name: each for each in (STINGY, EXACT)}


def scores_of(query: Tensor, keys: Tensor) -> Tensor:
    """Multiplies ``(B, G, R, n, W, D)`` with ``(B, G, P, D)`` to ``(B, G, R, n, W, P)``."""
    products = query.flatten(2, 4) @ keys.transpose(-1, -2)
    return torch.unflatten(products, 2, query.shape[2:5])
