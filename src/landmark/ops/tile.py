"""One tile of queries against the keys laid out as blocks: the products around ``gate``'s
arithmetic.

Shapes: queries (B, G, R, T, D), pieces (B, G, P, W, D), landmark keys (B, G, N, D); see ``layout``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark.ops.gate import HIDDEN, Weights, weigh, weigh_backward
from landmark.ops.layout import Layout
from landmark.ops.select import select_top


class Operands(NamedTuple):
    """What a tile reads, or the sums of gradients that it adds to.

    Attributes:
        keys: (B, G, P, W, D) text keys.
        values: (B, G, P, W, D) their values.
        marks: (B, G, N, D) landmark keys.
    """

    keys: Tensor
    values: Tensor
    marks: Tensor


class View(NamedTuple):
    """What the queries of a tile may see.

    Attributes:
        slots: (T,) slots of the queries.
        reach: (R, P, W) slot of the text at each place, ``FAR`` for none.
        own: (R, 1, 1, T, N) which block is a query's own.
        past: (R, 1, 1, T, N) which blocks a query could reach through a landmark.
        own_block: (R, 1, 1, T, 1) number of a query's own block, -1 for none among these.
        owner: (R, 1, 1, 1, P) block of each piece, ``None`` where pieces are blocks.
        chosen: (B, G, R, T, K) numbers of the retrieved blocks, -1 for none; ``None`` without
            ``top_k``.
        gather: whether the chosen blocks are gathered; otherwise the others are masked.
        scale: factor of the scores.
    """

    slots: Tensor
    reach: Tensor
    own: Tensor
    past: Tensor
    own_block: Tensor
    owner: Tensor | None
    chosen: Tensor | None
    gather: bool
    scale: float


def view_of(
    layout: Layout,
    slots: Tensor,
    queries: slice,
    blocks: slice,
    chosen: Tensor | None,
    gather: bool,
    scale: float,
) -> View:
    """The view of queries ``queries`` at slots (T,) on the blocks ``blocks``."""
    number = torch.arange(layout.mark.shape[1], device=slots.device)[blocks]
    own_block = layout.own[:, None, None, queries, None]
    first = layout.first[:, None, None, queries, None]
    past = layout.opens[:, None, None, None, blocks] & (number < own_block) & (number >= first)
    owner = None if layout.owner is None else layout.owner[:, None, None, None, :]
    reach = layout.slot if layout.owner is not None else layout.slot[:, blocks]
    count = number.shape[0]
    relative = own_block - (blocks.start or 0)
    relative = torch.where((relative >= 0) & (relative < count), relative, -1)
    return View(
        slots[queries], reach, number == own_block, past, relative, owner, chosen, gather, scale
    )


def choose(query: Tensor, marks: Tensor, view: View, top_k: int) -> Tensor:
    """Numbers of the retrieved blocks, -1 for none: (B, G, R, T, min(top_k, N))."""
    scores = (_dots(query, marks[:, :, :, None]) * view.scale).squeeze(-1)
    indices, valid = select_top(scores.masked_fill(~view.past, -torch.inf), top_k)
    return torch.where(valid, indices, -1)


def tile_forward(query: Tensor, operands: Operands, view: View) -> tuple[Tensor, Tensor]:
    """Output (B, G, R, T, D) and log-sum-exp (B, G, R, T)."""
    if view.gather:
        picked = _Picked(operands, view)
        weights, _, _ = picked.weigh(query)
        return _mix_each(weights.of_text(None), picked.values), weights.lse
    weights, _ = _weigh_all(query, operands, view)
    return _mix(weights.of_text(view.owner).to(query.dtype), operands.values), weights.lse


def tile_backward(
    query: Tensor, grad: Tensor, delta: Tensor, operands: Operands, view: View
) -> tuple[Tensor, Operands]:
    """Gradient of the queries, and of the operands.

    Args:
        query: (B, G, R, T, D).
        grad: (B, G, R, T, D) gradient of the output.
        delta: (B, G, R, T) product of that and the output, less the gradient of the log-sum-exp.
        operands: as in the forward pass.
        view: as in the forward pass.
    """
    if view.gather:
        return _Picked(operands, view).backward(query, grad, delta)
    weights, past = _weigh_all(query, operands, view)
    dots = _dots(grad, operands.values).to(delta.dtype)
    text, marks = weigh_backward(weights, dots, delta, view.own, past, view.owner)
    text = (text * view.scale).to(query.dtype)
    marks = (marks * view.scale).to(query.dtype)[..., None]
    mark_keys = operands.marks[:, :, :, None]
    values = _outer(weights.of_text(view.owner).to(query.dtype), grad)
    grads = Operands(_outer(text, query), values, _outer(marks, query)[:, :, :, 0])
    return _mix(text, operands.keys) + _mix(marks, mark_keys), grads


def _weigh_all(query: Tensor, operands: Operands, view: View) -> tuple[Weights, Tensor]:
    exact = torch.promote_types(query.dtype, torch.float32)
    text = _dots(query, operands.keys).to(exact) * view.scale
    marks = (_dots(query, operands.marks[:, :, :, None]).to(exact) * view.scale).squeeze(-1)
    visible = view.reach[:, None, None, None] <= view.slots[:, None, None]
    past = view.past
    if view.chosen is not None:
        hits = torch.zeros_like(marks).scatter_add_(
            -1, view.chosen.clamp(min=0), (view.chosen >= 0).to(exact)
        )
        past = hits > 0
    return weigh(torch.where(visible, text, HIDDEN), marks, view.own, past, view.owner), past


class _Picked:
    """The chosen blocks and the own block of each query, gathered: keys and values (B, G, R, T, K +
    1, W, D).
    """

    def __init__(self, operands: Operands, view: View) -> None:
        assert view.chosen is not None and view.owner is None
        self.operands = operands
        self.view = view
        shape = view.chosen.shape[:-1]
        own = view.own_block.expand(*shape, 1)
        self.number = torch.cat([view.chosen, own], dim=-1)
        self.place = self.number.clamp(min=0)
        rows, groups, blocks = operands.keys.shape[:3]
        base = torch.arange(rows * groups, device=own.device).view(rows, groups, 1, 1, 1) * blocks
        self.flat = (base + self.place).flatten()
        self.keys, self.values = self._pick(operands.keys), self._pick(operands.values)

    def _pick(self, pieces: Tensor) -> Tensor:
        return (
            pieces.flatten(0, 2)
            .flatten(1)
            .index_select(0, self.flat)
            .view(*self.place.shape, *pieces.shape[3:])
        )

    def _put(self, grads: Tensor, like: Tensor) -> Tensor:
        sums = like.new_zeros(like.shape[:3].numel(), like.shape[3:].numel())
        return sums.index_add_(0, self.flat, grads.reshape(len(self.flat), -1)).view(like.shape)

    def weigh(self, query: Tensor) -> tuple[Weights, Tensor, Tensor]:
        """The weights, and which of the gathered blocks are own and past."""
        view = self.view
        row = torch.arange(view.reach.shape[0], device=query.device).view(-1, 1, 1, 1, 1)
        visible = view.reach[row, self.place] <= view.slots[:, None, None]
        text = _dots_each(query, self.keys) * view.scale
        marks = (
            (_dots(query, self.operands.marks[:, :, :, None]) * view.scale)
            .squeeze(-1)
            .gather(-1, self.place)
        )
        is_own = torch.zeros_like(self.number, dtype=torch.bool)
        is_own[..., -1] = True
        own = is_own & (self.number >= 0)
        past = ~is_own & (self.number >= 0)
        return weigh(torch.where(visible, text, HIDDEN), marks, own, past, None), own, past

    def backward(self, query: Tensor, grad: Tensor, delta: Tensor) -> tuple[Tensor, Operands]:
        """As ``tile_backward``."""
        operands = self.operands
        scale = self.view.scale
        weights, own, past = self.weigh(query)
        text, marks = weigh_backward(weights, _dots_each(grad, self.values), delta, own, past, None)
        text = text * scale
        spread = marks.new_zeros(*marks.shape[:-1], operands.marks.shape[2])
        marks = spread.scatter_add_(-1, self.place, marks * scale)[..., None]
        grads = Operands(
            self._put(text[..., None] * query[..., None, None, :], operands.keys),
            self._put(weights.of_text(None)[..., None] * grad[..., None, None, :], operands.values),
            _outer(marks, query)[:, :, :, 0],
        )
        return _mix_each(text, self.keys) + _mix(marks, operands.marks[:, :, :, None]), grads


def _dots(query: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, R, T, D) with (B, G, P, W, D): (B, G, R, T, P, W)."""
    products = query.flatten(2, 3) @ pieces.flatten(2, 3).transpose(-1, -2)
    return torch.unflatten(torch.unflatten(products, -1, pieces.shape[2:4]), 2, query.shape[2:4])


def _mix(weights: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, R, T, P, W) with (B, G, P, W, D): (B, G, R, T, D)."""
    return torch.unflatten(
        weights.flatten(-2).flatten(2, 3) @ pieces.flatten(2, 3), 2, weights.shape[2:4]
    )


def _outer(weights: Tensor, query: Tensor) -> Tensor:
    """(B, G, R, T, P, W) with (B, G, R, T, D), summed over queries: (B, G, P, W, D)."""
    products = weights.flatten(-2).flatten(2, 3).transpose(-1, -2) @ query.flatten(2, 3)
    return torch.unflatten(products, 2, weights.shape[-2:])


def _dots_each(query: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, R, T, D) with (B, G, R, T, P, W, D): (B, G, R, T, P, W)."""
    return torch.unflatten(
        (pieces.flatten(-3, -2) @ query[..., None]).squeeze(-1), -1, pieces.shape[-3:-1]
    )


def _mix_each(weights: Tensor, pieces: Tensor) -> Tensor:
    """(B, G, R, T, P, W) with (B, G, R, T, P, W, D): (B, G, R, T, D)."""
    return (weights.flatten(-2)[..., None, :] @ pieces.flatten(-3, -2)).squeeze(-2)
