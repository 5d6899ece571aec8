"""The training loss: the mean over all text, and the mean over answers that are asked for."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from landmark.data.episodes import IGNORED


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each token given those before it.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)`` the ids themselves, not shifted; -100 for no loss.

    Returns:
        float32 ``(B, T)``; entry ``t`` is the loss of ``labels[:, t]``, 0 for the first token and
        where there is no label.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return functional.pad(losses[:, :-1], (1, 0))


def text_loss(losses: Tensor, labels: Tensor, items: Tensor | None = None) -> Tensor:
    """Returns the mean loss over text, a scalar.

    Args:
        losses: ``(B, T)``, as ``token_losses`` returns them.
        labels: ``(B, T)``, -100 for no loss.
        items: the number of labels to divide by; by default those of this batch.
    """
    if items is None:
        items = labels[:, 1:].ne(IGNORED).sum().clamp(min=1)
    return losses.sum() / items


def answer_weighted_loss(
    logits: Tensor,
    labels: Tensor,
    answers: Tensor,
    weight: float,
    items: Tensor | None = None,
    asked: Tensor | None = None,
) -> Tensor:
    """Returns the mean loss over text plus ``weight`` times the mean over answers, a scalar.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``, -100 for no loss.
        answers: bool ``(B, T)``, true at the tokens of answers.
        weight: weight of the mean over answers.
        items: the number of labels to divide by, where this batch is a part of a step; by default
            those of this batch.
        asked: the number of answer tokens to divide by, likewise.
    """
    losses = token_losses(logits, labels)
    if asked is None:
        asked = answers.sum()
    answer_loss = (losses * answers).sum() / asked.clamp(min=1)
    return text_loss(losses, labels, items) + weight * answer_loss


def divergence(logits: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Returns the mean Kullback-Leibler divergence from a teacher's distribution, a scalar.

    Args:
        logits: ``(B, P, V)`` of the trained model.
        teacher: ``(B, P, W)`` of the teacher; further columns of either are left out.
        kept: bool ``(B, P)``, the positions to take.
    """
    width = min(logits.shape[-1], teacher.shape[-1])
    ours = logits[..., :width].float().log_softmax(-1)
    theirs = teacher[..., :width].float().log_softmax(-1)
    found = (theirs.exp() * (theirs - ours)).sum(-1)
    return (found * kept).sum() / kept.sum().clamp(min=1)


def answers_right(logits: Tensor, labels: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row how many answer tokens are predicted as most likely, and how many are.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``.
        answers: bool ``(B, T)``, true at the tokens of answers.

    Returns:
        two int64 ``(B,)``: the right answer tokens, and all answer tokens.
    """
    right = logits[:, :-1].argmax(dim=-1).eq(labels[:, 1:]) & answers[:, 1:]
    return right.sum(dim=-1), answers[:, 1:].sum(dim=-1)
