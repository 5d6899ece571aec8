"""Gate and in-block softmax of one tile of queries, and their derivatives.

No key or value is touched here. Scores of text are (..., P, W), by piece; scores of landmarks are
(..., N), by block. The own block counts as a block whose logit in the gate is the log-sum-exp of
its text, which makes one formula of the two kinds of weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -1e30  # score of what a query cannot see


class Weights(NamedTuple):
    """Weights of the blocks and texts that the queries of a tile see.

    Attributes:
        inner: (..., P, W) in-block weights; they sum to 1 over the text of a block.
        gate: (..., N) gate weights; 0 for a block that is not seen.
        lse: (...) log-sum-exp of the gate, ``-inf`` where nothing is seen.
    """

    inner: Tensor
    gate: Tensor
    lse: Tensor

    def of_text(self, piece_block: Tensor | None) -> Tensor:
        """Returns the weights of the values, (..., P, W)."""
        return self.inner * to_pieces(self.gate, piece_block)[..., None]


def weigh(
    text: Tensor, landmarks: Tensor, own: Tensor, past: Tensor, piece_block: Tensor | None
) -> Weights:
    """Computes the weights of a tile from its scores.

    Args:
        text: (..., P, W) scaled scores of text, ``HIDDEN`` where a query cannot see text of its own
            block.
        landmarks: (..., N) scaled scores of landmarks.
        own: (..., N) whether a block is the query's own.
        past: (..., N) whether the query reaches a block through its landmark.
        piece_block: (..., P) block of each piece, ``None`` where pieces are blocks.
    """
    peak = text.amax(dim=-1)
    inner = (text - peak[..., None]).exp()
    sums = peak + inner.sum(dim=-1).log()
    sums = _lse_by_block(sums, piece_block, landmarks.shape[-1])
    inner = inner * (peak - to_pieces(sums, piece_block)).exp()[..., None]
    logits = torch.where(own, sums, torch.where(past, landmarks, HIDDEN))
    lse = logits.logsumexp(dim=-1)
    seen = lse > HIDDEN / 2
    gate = (logits - torch.where(seen, lse, 0.0)[..., None]).exp()
    return Weights(inner, gate, torch.where(seen, lse, -torch.inf))


def weigh_backward(
    weights: Weights,
    dots: Tensor,
    delta: Tensor,
    own: Tensor,
    past: Tensor,
    piece_block: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes the derivatives of the scaled scores of text (..., P, W) and landmarks (..., N).

    Args:
        weights: the result of ``weigh``.
        dots: (..., P, W) products of the output's gradient with each value.
        delta: (...) product of the output's gradient with the output, less the gradient of ``lse``.
        own: as for ``weigh``.
        past: as for ``weigh``.
        piece_block: as for ``weigh``.
    """
    mean = _sum_by_block((weights.inner * dots).sum(dim=-1), piece_block, past.shape[-1])
    delta = delta[..., None]
    base = torch.where(own, delta, mean)
    text = weights.of_text(piece_block) * (dots - to_pieces(base, piece_block)[..., None])
    return text, torch.where(past, weights.gate * (mean - delta), 0.0)


def to_pieces(blocks: Tensor, piece_block: Tensor | None) -> Tensor:
    """Returns numbers of blocks (..., N) as numbers of their pieces (..., P)."""
    if piece_block is None:
        return blocks
    return blocks.gather(-1, piece_block.expand(*blocks.shape[:-1], -1))


def _sum_by_block(pieces: Tensor, piece_block: Tensor | None, blocks: int) -> Tensor:
    if piece_block is None:
        return pieces
    zeros = pieces.new_zeros(*pieces.shape[:-1], blocks)
    return zeros.scatter_add_(-1, piece_block.expand_as(pieces), pieces)


def _lse_by_block(pieces: Tensor, piece_block: Tensor | None, blocks: int) -> Tensor:
    if piece_block is None:
        return pieces
    index = piece_block.expand_as(pieces)
    peak = pieces.new_full((*pieces.shape[:-1], blocks), HIDDEN).scatter_reduce(
        -1, index, pieces, "amax"
    )
    sums = _sum_by_block((pieces - to_pieces(peak, piece_block)).exp(), piece_block, blocks)
    return peak + torch.where(sums > 0, sums, 1.0).log()
