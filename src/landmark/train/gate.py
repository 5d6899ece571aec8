"""How a batch trains retrieval: losses on the gate, kept blocks, positions that start again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark.blocks import slot_of, slots_for
from landmark.config import LandmarkConfig
from landmark.data.episodes import IGNORED, RowQuestion
from landmark.hf.gate_loss import (
    CONTRAST_TOKENS,
    QUESTION_TOKENS,
    GateBlockMass,
    GateContrast,
    GateLoss,
    JointContrast,
    LayerInputs,
    QuestionSpan,
    TextContrast,
    contrast_queries,
    far_questions,
)
from landmark.hf.recall import EvidenceQuery, blocks_of
from landmark.rotary import Rotary
from landmark.train.settings import RetrievalSettings

MASS_QUERIES = 32  # of each row of a batch
FORCED_BLOCKS = 4  # of a question at most


class WeightedLoss(NamedTuple):
    """A loss, its name in the log and its weight."""

    name: str
    loss: Tensor
    weight: float


class GateLosses:
    """The losses on the gate of one batch; each layer adds to all of them.

    It is no dataclass, as FSDP copies those among the arguments of a model.

    Args:
        retrieval: the weights.

    Attributes:
        contrast: the contrast of each head, ``None`` for none.
        joint: the contrast of the retrieval layers, ``None`` for none.
        text: the contrast of the text of blocks by the retrieval heads, ``None`` for none.
        block_mass: the fit to dense attention, ``None`` for none.
    """

    def __init__(self, retrieval: RetrievalSettings) -> None:
        self.retrieval = retrieval
        self.contrast: GateContrast | None = None
        self.joint: JointContrast | None = None
        self.text: TextContrast | None = None
        self.block_mass: GateBlockMass | None = None

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[str | None, Rotary], like: Tensor
    ) -> None:
        """See ``GateLoss.prepare``."""
        for each in self._there():
            each.prepare(settings, rotaries, like)

    def add(self, layer: LayerInputs) -> None:
        """See ``GateLoss.add``."""
        for each in self._there():
            each.add(layer)

    def _there(self) -> list[GateLoss]:
        losses = (self.contrast, self.joint, self.text, self.block_mass)
        return [each for each in losses if each is not None]

    def __bool__(self) -> bool:
        return bool(self._there())

    def totals(self) -> list[WeightedLoss]:
        """Returns each loss over all layers, after the pass."""
        found = []
        if self.contrast is not None:
            contrast = self.contrast.loss(self.retrieval.contrast_heads)
            found.append(WeightedLoss("contrast_loss", contrast, self.retrieval.contrast))
        if self.joint is not None:
            joint = self.joint.loss()
            found.append(WeightedLoss("joint_contrast_loss", joint, self.retrieval.joint_contrast))
        if self.text is not None:
            text = self.text.loss()
            found.append(WeightedLoss("text_contrast_loss", text, self.retrieval.text_contrast))
        if self.block_mass is not None:
            mass = self.block_mass.loss()
            found.append(WeightedLoss("block_mass_loss", mass, self.retrieval.block_mass))
        return found


def gate_losses(
    batch: Mapping[str, Any], retrieval: RetrievalSettings, settings: LandmarkConfig, *, draw: str
) -> GateLosses | None:
    """Returns the losses on the gate that a batch is trained with, ``None`` for none.

    There is a contrast on all devices or on none of them.

    Args:
        batch: as ``stack`` returns it.
        retrieval: which there are, and their weights.
        settings: the landmark settings.
        draw: decides at which tokens the gate is fitted to dense attention.
    """
    losses = GateLosses(retrieval)
    if "questions" in batch:
        device = batch["input_ids"].device
        finished = batch["input_ids"].shape[1] // settings.text_per_block
        blocks = [0 if packed else finished for packed in batch["packed"]]
    if retrieval.contrast and "questions" in batch:
        count = retrieval.contrast_queries * len(batch["questions"])
        wanted = evidence_queries(batch["questions"], before=CONTRAST_TOKENS)
        queries = contrast_queries(wanted, settings, count, device)
        losses.contrast = None if queries is None else GateContrast(queries, blocks)
    asked = None
    if (retrieval.joint_contrast or retrieval.text_contrast) and "questions" in batch:
        asked = far_questions(question_spans(batch["questions"]), settings, device)
    if retrieval.joint_contrast and asked is not None:
        losses.joint = JointContrast(
            [each.query for each in asked],
            blocks,
            spans=[each.tokens for each in asked],
            layers=settings.retrieval_layers or (),
        )
    if retrieval.text_contrast and asked is not None:
        losses.text = TextContrast(asked, settings.retrieval_heads or ())
    is_packed = "position_ids" in batch
    if retrieval.block_mass and not is_packed:
        columns = range(batch["input_ids"].shape[1])
        tokens = sorted(random.Random(draw).choices(columns, k=MASS_QUERIES))
        losses.block_mass = GateBlockMass([slot_of(token, settings.block_size) for token in tokens])
    return losses or None


def forced_blocks(
    batch: Mapping[str, Any],
    retrieval: RetrievalSettings,
    settings: LandmarkConfig,
    *,
    done: float,
    draw: str,
) -> Tensor | None:
    """Returns the blocks that tokens of a batch keep whatever their score.

    Args:
        batch: as ``stack`` returns it.
        retrieval: the share of the questions whose evidence is kept.
        settings: the landmark settings.
        done: share of the training that is done.
        draw: decides which questions.

    Returns:
        ``(B, T, F)`` blocks, -1 for none, of each question the first ``FORCED_BLOCKS`` that hold
        its evidence; ``None`` where no question has any at this point of the training.
    """
    if not retrieval.forced or done >= retrieval.forced_until or "questions" not in batch:
        return None
    share = retrieval.forced * (1 - done / retrieval.forced_until)
    rng = random.Random(draw)
    questions = [
        [question for question in asked if rng.random() < share] for asked in batch["questions"]
    ]
    ids = batch["input_ids"]
    found = torch.full((*ids.shape, FORCED_BLOCKS), -1, dtype=torch.int32)
    queries = evidence_queries(questions, before=CONTRAST_TOKENS)
    blocks = [blocks_of(query, settings.block_size)[:FORCED_BLOCKS] for query in queries]
    filled = [each + [-1] * (FORCED_BLOCKS - len(each)) for each in blocks]
    rows = torch.tensor([query.row for query in queries], dtype=torch.long)
    tokens = torch.tensor([query.token for query in queries], dtype=torch.long)
    kept = torch.tensor(filled, dtype=torch.int32).view(len(queries), FORCED_BLOCKS)
    found[rows, tokens] = kept
    return found.to(ids.device)


def restart_positions(batch: dict[str, Any], settings: LandmarkConfig, *, draw: str) -> None:
    """Decides where positions of a batch's rows start again, as ``position_span`` says.

    Those of rows that ask something do. The first ``local_blocks`` blocks behind have lost the
    words before them: their text is not learnt, but answers in them are.

    Args:
        batch: as ``stack`` returns it; gets ``restarts``, and labels without that text.
        settings: the landmark settings.
        draw: decides the blocks.
    """
    span = settings.position_span
    tokens = batch["input_ids"].shape[1]
    if span is None or slots_for(tokens, settings.block_size) <= span:
        return
    count = span // settings.block_size
    rng = random.Random(draw)
    questions = batch.get("questions", [()] * len(batch["input_ids"]))
    first = [rng.randrange(count) if asked else -1 for asked in questions]
    device = batch["input_ids"].device
    batch["restarts"] = torch.tensor(first, device=device)
    if "answers" not in batch:  # nothing is asked
        return
    restarts = batch["restarts"][:, None]
    blocks = torch.arange(tokens, device=device) // settings.text_per_block
    since = (blocks - restarts) % count  # blocks since positions started again
    is_behind = (restarts >= 0) & (blocks > since) & (since < settings.local_blocks)
    batch["labels"] = batch["labels"].masked_fill(is_behind & ~batch["answers"], IGNORED)


def evidence_queries(
    questions: Sequence[Sequence[RowQuestion]], before: int = 0
) -> list[EvidenceQuery]:
    """Returns the tokens of some rows that predict an answer, each the one before a token of it.

    Args:
        questions: the questions of each row.
        before: so many tokens of the question before these, too.
    """
    return [
        EvidenceQuery(row, token, question.evidence)
        for row, asked in enumerate(questions)
        for question in asked
        for token in range(
            max(question.tokens.start, question.answer.start - 1 - before),
            question.answer.stop - 1,
        )
    ]


def question_spans(questions: Sequence[Sequence[RowQuestion]]) -> list[QuestionSpan]:
    """Returns the questions of some rows, the last ``QUESTION_TOKENS`` tokens of each.

    Args:
        questions: the questions of each row.
    """
    found = []
    for row, asked in enumerate(questions):
        for question in asked:
            end = question.answer.start
            first = max(question.tokens.start, end - QUESTION_TOKENS)
            query = EvidenceQuery(row, end - 1, question.evidence)
            found.append(QuestionSpan(query, range(min(first, end - 1), end)))
    return found
