"""The arithmetic of one tile of queries: two softmaxes, and their derivative; no key or value is
touched here.

Scores of text are (..., P, W), by piece; scores of landmarks are (..., N), by block. The own block
is treated as a block whose logit in the gate is the log-sum-exp of its text, which makes the two
kinds of weight one formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -1e30


class Weights(NamedTuple):
    """Weights of a tile.

    Attributes:
        inner: (..., P, W) in-block weights; they sum to 1 over the text of a block.
        gate: (..., N) gate weights; 0 for a block that is not seen.
        lse: (...) log-sum-exp of the gate, ``-inf`` where nothing is seen.
    """

    inner: Tensor
    gate: Tensor
    lse: Tensor

    def of_text(self, owner: Tensor | None) -> Tensor:
        """(..., P, W) the weights of the values."""
        return self.inner * to_pieces(self.gate, owner)[..., None]


def weigh(text: Tensor, marks: Tensor, own: Tensor, past: Tensor, owner: Tensor | None) -> Weights:
    """The weights of a tile.

    Args:
        text: (..., P, W) scaled scores, ``HIDDEN`` where the query cannot see the text of its own
            block.
        marks: (..., N) scaled scores of the landmarks.
        own: (..., N) which block is the query's own.
        past: (..., N) which blocks the query reaches through their landmark.
        owner: (..., P) block of each piece, ``None`` where pieces are blocks.
    """
    peak = text.amax(dim=-1)
    inner = (text - peak[..., None]).exp()
    sums = peak + inner.sum(dim=-1).log()
    sums = _lse_by_block(sums, owner, marks.shape[-1])
    inner = inner * (peak - to_pieces(sums, owner)).exp()[..., None]
    logits = torch.where(own, sums, torch.where(past, marks, HIDDEN))
    lse = logits.logsumexp(dim=-1)
    seen = lse > HIDDEN / 2
    gate = (logits - torch.where(seen, lse, 0.0)[..., None]).exp()
    return Weights(inner, gate, torch.where(seen, lse, -torch.inf))


def weigh_backward(
    weights: Weights, dots: Tensor, delta: Tensor, own: Tensor, past: Tensor, owner: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Derivatives of the scaled scores of text (..., P, W) and of landmarks (..., N).

    Args:
        weights: what ``weigh`` gave.
        dots: (..., P, W) products of the output's gradient with each value.
        delta: (...) product of the output's gradient with the output, less the gradient of ``lse``.
        own: as for ``weigh``.
        past: as for ``weigh``.
        owner: as for ``weigh``.
    """
    mean = _sum_by_block((weights.inner * dots).sum(dim=-1), owner, past.shape[-1])
    delta = delta[..., None]
    base = torch.where(own, delta, mean)
    text = weights.of_text(owner) * (dots - to_pieces(base, owner)[..., None])
    return text, torch.where(past, weights.gate * (mean - delta), 0.0)


def to_pieces(blocks: Tensor, owner: Tensor | None) -> Tensor:
    """What belongs to each block (..., N), for each of its pieces (..., P)."""
    if owner is None:
        return blocks
    return blocks.gather(-1, owner.expand(*blocks.shape[:-1], -1))


def _sum_by_block(pieces: Tensor, owner: Tensor | None, blocks: int) -> Tensor:
    if owner is None:
        return pieces
    zeros = pieces.new_zeros(*pieces.shape[:-1], blocks)
    return zeros.scatter_add_(-1, owner.expand_as(pieces), pieces)


def _lse_by_block(pieces: Tensor, owner: Tensor | None, blocks: int) -> Tensor:
    if owner is None:
        return pieces
    index = owner.expand_as(pieces)
    peak = pieces.new_full((*pieces.shape[:-1], blocks), HIDDEN).scatter_reduce(
        -1, index, pieces, "amax"
    )
    sums = _sum_by_block((pieces - to_pieces(peak, owner)).exp(), owner, blocks)
    return peak + torch.where(sums > 0, sums, 1.0).log()
