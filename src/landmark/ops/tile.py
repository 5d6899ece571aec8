"""Products of one tile of queries with keys laid out as blocks, around the softmaxes of ``gate``.

Shapes: queries (B, G, H/G, T, D), pieces of keys and values (B, G, P, W, D), landmark keys
(B, G, N, D). ``H/G`` query heads read one key/value head. Masks have ``R`` rows: B, or 1 where all
rows are alike. ``layout`` says what a piece is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark.ops.gate import HIDDEN, Weights, weigh, weigh_backward
from landmark.ops.layout import BlockLayout
from landmark.ops.select import select_top


class Operands(NamedTuple):
    """Keys and values that a tile reads, or the gradients of them that it adds to.

    Attributes:
        keys: (B, G, P, W, D) text keys.
        values: (B, G, P, W, D) their values.
        landmark_keys: (B, G, N, D).
    """

    keys: Tensor
    values: Tensor
    landmark_keys: Tensor


class TileView(NamedTuple):
    """What the queries of a tile may see.

    Attributes:
        slots: (T,) slots of the queries.
        reach: (R, P, W) slot of each text key, ``FAR`` where a piece has none.
        own: (R, 1, 1, T, N) whether a block is a query's own.
        past: (R, 1, 1, T, N) whether a block is a past block of a query.
        own_block: (R, 1, 1, T, 1) number of a query's own block among these, -1 for none.
        piece_block: (R, 1, 1, 1, P) block of each piece, ``None`` where pieces are blocks.
        scale: factor of the scores.
        forced: (B, 1, 1, T, N) whether a past block is kept whatever its score; ``None`` for none.
        selected: (B, G, H/G, T, K) numbers of the selected blocks, -1 for none; ``None`` without
            ``top_k``.
        gather: whether selected blocks are gathered; otherwise the other blocks are masked.
    """

    slots: Tensor
    reach: Tensor
    own: Tensor
    past: Tensor
    own_block: Tensor
    piece_block: Tensor | None
    scale: float
    forced: Tensor | None = None
    selected: Tensor | None = None
    gather: bool = False


def view_of(
    layout: BlockLayout,
    slots: Tensor,
    *,
    queries: slice,
    blocks: slice,
    scale: float,
    forced: Tensor | None = None,
) -> TileView:
    """Returns what some queries may see of some blocks, before any is selected.

    Args:
        layout: the layout of the tile's rows.
        slots: (T,) slots of all queries of the call.
        queries: the queries of the tile.
        blocks: the blocks of the tile.
        scale: factor of the scores.
        forced: (B, T, F) as for ``landmark_attention``, of the tile's rows.
    """
    number = torch.arange(layout.landmark_slot.shape[1], device=slots.device)[blocks]
    own_block = layout.own_block[:, None, None, queries, None]
    first_block = layout.first_block[:, None, None, queries, None]
    is_past = (number < own_block) & (number >= first_block)
    count = number.shape[0]
    relative = own_block - (blocks.start or 0)
    piece_block = layout.piece_block
    past = layout.can_be_past[:, None, None, None, blocks] & is_past
    kept = None
    if forced is not None:
        wanted = forced[:, None, None, queries, :, None] == (number - first_block)[..., None, :]
        kept = wanted.any(dim=-2) & past
    return TileView(
        slots=slots[queries],
        reach=layout.slot[:, blocks] if piece_block is None else layout.slot,
        own=number == own_block,
        past=past,
        own_block=torch.where((relative >= 0) & (relative < count), relative, -1),
        piece_block=None if piece_block is None else piece_block[:, None, None, None, :],
        scale=scale,
        forced=kept,
    )


def select_blocks(query: Tensor, landmark_keys: Tensor, view: TileView, top_k: int) -> Tensor:
    """Selects the past blocks of highest landmark score, and those that are forced first.

    Args:
        query: (B, G, H/G, T, D).
        landmark_keys: (B, G, N, D).
        view: what the queries may see.
        top_k: blocks of each query.

    Returns:
        (B, G, H/G, T, min(top_k, N)) numbers of blocks, ascending; -1 for none.
    """
    scores = (_dots(query, landmark_keys[:, :, :, None]) * view.scale).squeeze(-1)
    scores = scores.masked_fill(~view.past, -torch.inf)
    if view.forced is not None:
        scores = scores.masked_fill(view.forced, torch.inf)
    indices, valid = select_top(scores, top_k)
    return torch.where(valid, indices, -1)


def tile_forward(query: Tensor, operands: Operands, view: TileView) -> tuple[Tensor, Tensor]:
    """Computes output (B, G, H/G, T, D) and log-sum-exp (B, G, H/G, T) of a tile."""
    if view.gather:
        gathered = _Gathered(operands, view)
        scored = gathered.weigh(query)
        return _mix_each(scored.weights.of_text(None), gathered.values), scored.weights.lse
    weights, _ = _weigh_all(query, operands, view)
    text_weights = weights.of_text(view.piece_block).to(query.dtype)
    return _mix(text_weights, operands.values), weights.lse


def tile_backward(
    query: Tensor, grad: Tensor, delta: Tensor, operands: Operands, view: TileView
) -> tuple[Tensor, Operands]:
    """Computes the gradients of a tile's queries and operands.

    Args:
        query: (B, G, H/G, T, D).
        grad: (B, G, H/G, T, D) gradient of the output.
        delta: (B, G, H/G, T) product of ``grad`` and output, less the gradient of the log-sum-exp.
        operands: as in the forward pass.
        view: as in the forward pass.
    """
    if view.gather:
        return _Gathered(operands, view).backward(query, grad, delta)
    weights, past = _weigh_all(query, operands, view)
    dots = _dots(grad, operands.values).to(delta.dtype)
    text, landmarks = weigh_backward(weights, dots, delta, view.own, past, view.piece_block)
    text = (text * view.scale).to(query.dtype)
    landmarks = (landmarks * view.scale).to(query.dtype)[..., None]
    landmark_keys = operands.landmark_keys[:, :, :, None]
    text_weights = weights.of_text(view.piece_block).to(query.dtype)
    grads = Operands(
        values=_outer(text_weights, grad),
        keys=_outer(text, query),
        landmark_keys=_outer(landmarks, query)[:, :, :, 0],
    )
    return _mix(text, operands.keys) + _mix(landmarks, landmark_keys), grads


def _weigh_all(query: Tensor, operands: Operands, view: TileView) -> tuple[Weights, Tensor]:
    """Returns the weights of all blocks of a tile, and which of them are past blocks."""
    exact = torch.promote_types(query.dtype, torch.float32)
    text = _dots(query, operands.keys).to(exact) * view.scale
    landmarks = _dots(query, operands.landmark_keys[:, :, :, None]).to(exact) * view.scale
    landmarks = landmarks.squeeze(-1)
    visible = view.reach[:, None, None, None] <= view.slots[:, None, None]
    past = view.past
    if view.selected is not None:
        hits = torch.zeros_like(landmarks).scatter_add_(
            -1, view.selected.clamp(min=0), (view.selected >= 0).to(exact)
        )
        past = hits > 0
    text = torch.where(visible, text, HIDDEN)
    return weigh(text, landmarks, view.own, past, view.piece_block), past


class _Scored(NamedTuple):
    """Weights of gathered blocks, and whether each is a query's own or a past block."""

    weights: Weights
    own: Tensor
    past: Tensor


class _Gathered:
    """Selected blocks and own block of each query, gathered.

    Attributes:
        keys: (B, G, H/G, T, K + 1, W, D), the own block last.
        values: (B, G, H/G, T, K + 1, W, D).
    """

    def __init__(self, operands: Operands, view: TileView) -> None:
        assert view.selected is not None and view.piece_block is None
        self.operands = operands
        self.view = view
        own = view.own_block.expand(*view.selected.shape[:-1], 1)
        self.number = torch.cat([view.selected, own], dim=-1)
        self.index = self.number.clamp(min=0)
        rows, groups, blocks = operands.keys.shape[:3]
        base = torch.arange(rows * groups, device=own.device).view(rows, groups, 1, 1, 1) * blocks
        self.flat_index = (base + self.index).flatten()
        self.keys = self._gather(operands.keys)
        self.values = self._gather(operands.values)

    def _gather(self, pieces: Tensor) -> Tensor:
        rows = pieces.flatten(0, 2).flatten(1).index_select(0, self.flat_index)
        return rows.view(*self.index.shape, *pieces.shape[3:])

    def _scatter(self, grads: Tensor, like: Tensor) -> Tensor:
        """Inverts ``_gather``, summing over the queries that gathered the same block."""
        sums = like.new_zeros(like.shape[:3].numel(), like.shape[3:].numel())
        rows = grads.reshape(len(self.flat_index), -1)
        return sums.index_add_(0, self.flat_index, rows).view(like.shape)

    def weigh(self, query: Tensor) -> _Scored:
        """Returns the weights of the gathered blocks."""
        view = self.view
        row = torch.arange(view.reach.shape[0], device=query.device).view(-1, 1, 1, 1, 1)
        visible = view.reach[row, self.index] <= view.slots[:, None, None]
        text = _dots_each(query, self.keys) * view.scale
        landmarks = _dots(query, self.operands.landmark_keys[:, :, :, None]) * view.scale
        landmarks = landmarks.squeeze(-1).gather(-1, self.index)
        is_last = torch.zeros_like(self.number, dtype=torch.bool)
        is_last[..., -1] = True
        own = is_last & (self.number >= 0)
        past = ~is_last & (self.number >= 0)
        weights = weigh(torch.where(visible, text, HIDDEN), landmarks, own, past, None)
        return _Scored(weights, own, past)

    def backward(self, query: Tensor, grad: Tensor, delta: Tensor) -> tuple[Tensor, Operands]:
        """Computes gradients, as ``tile_backward``."""
        operands = self.operands
        scale = self.view.scale
        weights, own, past = self.weigh(query)
        dots = _dots_each(grad, self.values)
        text, landmarks = weigh_backward(weights, dots, delta, own, past, None)
        text = text * scale
        spread = landmarks.new_zeros(*landmarks.shape[:-1], operands.landmark_keys.shape[2])
        landmarks = spread.scatter_add_(-1, self.index, landmarks * scale)[..., None]
        text_weights = weights.of_text(None)
        grads = Operands(
            keys=self._scatter(text[..., None] * query[..., None, None, :], operands.keys),
            values=self._scatter(
                text_weights[..., None] * grad[..., None, None, :], operands.values
            ),
            landmark_keys=_outer(landmarks, query)[:, :, :, 0],
        )
        landmark_keys = operands.landmark_keys[:, :, :, None]
        return _mix_each(text, self.keys) + _mix(landmarks, landmark_keys), grads


def _dots(query: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, H/G, T, D) with (B, G, P, W, D): (B, G, H/G, T, P, W)."""
    products = query.flatten(2, 3) @ pieces.flatten(2, 3).transpose(-1, -2)
    return torch.unflatten(torch.unflatten(products, -1, pieces.shape[2:4]), 2, query.shape[2:4])


def _mix(weights: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, H/G, T, P, W) with (B, G, P, W, D): (B, G, H/G, T, D)."""
    return torch.unflatten(
        weights.flatten(-2).flatten(2, 3) @ pieces.flatten(2, 3), 2, weights.shape[2:4]
    )


def _outer(weights: Tensor, query: Tensor) -> Tensor:
    """(B, G, H/G, T, P, W) with (B, G, H/G, T, D), summed over queries: (B, G, P, W, D)."""
    products = weights.flatten(-2).flatten(2, 3).transpose(-1, -2) @ query.flatten(2, 3)
    return torch.unflatten(products, 2, weights.shape[-2:])


def _dots_each(query: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, H/G, T, D) with (B, G, H/G, T, P, W, D): (B, G, H/G, T, P, W)."""
    return torch.unflatten(
        (pieces.flatten(-3, -2) @ query[..., None]).squeeze(-1), -1, pieces.shape[-3:-1]
    )


def _mix_each(weights: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, H/G, T, P, W) with (B, G, H/G, T, P, W, D): (B, G, H/G, T, D)."""
    return (weights.flatten(-2)[..., None, :] @ pieces.flatten(-3, -2)).squeeze(-2)
