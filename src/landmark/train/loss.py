"""The loss: the mean over all text, and beside it the mean over the answers that were asked for."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from landmark.data.episodes import IGNORED


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each token given those before it, float32 ``(B, T)``, 0 where
    there is no label.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``, the ids themselves, -100 for no loss; place ``t`` of the result is the
            loss of ``labels[t]`` (the first has none).
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return functional.pad(losses[:, :-1], (1, 0))


def text_loss(losses: Tensor, labels: Tensor, items: Tensor | None = None) -> Tensor:
    """Returns the mean of ``token_losses`` over the labels, or their sum divided by ``items``; a
    scalar.
    """
    return losses.sum() / (labels[:, 1:].ne(IGNORED).sum().clamp(min=1) if items is None else items)


def answer_weighted_loss(
    logits: Tensor,
    labels: Tensor,
    answers: Tensor,
    weight: float,
    items: Tensor | None = None,
    asked: Tensor | None = None,
) -> Tensor:
    """Returns mean over text tokens + ``weight`` x mean over answer tokens, a scalar.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``, -100 for no loss.
        answers: bool ``(B, T)``, true at the tokens of answers.
        weight: of the answers' mean.
        items: labels to divide by, where this batch is a part of a step; ``None`` for those of this
            batch.
        asked: answer tokens to divide by, likewise.
    """
    losses = token_losses(logits, labels)
    asked = answers.sum() if asked is None else asked
    return text_loss(losses, labels, items) + weight * (losses * answers).sum() / asked.clamp(min=1)


def answers_right(logits: Tensor, labels: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, per row, answer tokens that are the most likely ones, and answer tokens: two int64
    ``(B,)``.
    """
    right = logits[:, :-1].argmax(dim=-1).eq(labels[:, 1:]) & answers[:, 1:]
    return right.sum(dim=-1), answers[:, 1:].sum(dim=-1)
