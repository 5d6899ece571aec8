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
    GateBlockMass,
    GateContrast,
    LayerInputs,
    contrast_queries,
)
from landmark.hf.recall import EvidenceQuery, blocks_of
from landmark.rotary import Rotary
from landmark.train.settings import RetrievalSettings

MASS_QUERIES = 32  # of each row of a batch
FORCED_BLOCKS = 4  # of a question at most
HEADS_RATE = 0.05  # weight of the last batch in the average of a head's contrast


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
        contrast: the contrast, ``None`` for none.
        block_mass: the fit to dense attention, ``None`` for none.
    """

    def __init__(self, retrieval: RetrievalSettings) -> None:
        self.retrieval = retrieval
        self.contrast: GateContrast | None = None
        self.block_mass: GateBlockMass | None = None

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[str | None, Rotary], like: Tensor
    ) -> None:
        """See ``GateLoss.prepare``."""
        if self.contrast is not None:
            self.contrast.prepare(settings, rotaries, like)
        if self.block_mass is not None:
            self.block_mass.prepare(settings, rotaries, like)

    def add(self, layer: LayerInputs) -> None:
        """See ``GateLoss.add``."""
        if self.contrast is not None:
            self.contrast.add(layer)
        if self.block_mass is not None:
            self.block_mass.add(layer)

    def totals(self) -> list[WeightedLoss]:
        """Returns each loss over all layers, after the pass."""
        found = []
        if self.contrast is not None:
            contrast = self.contrast.loss(self.retrieval.contrast_heads)
            found.append(WeightedLoss("contrast_loss", contrast, self.retrieval.contrast))
        if self.block_mass is not None:
            mass = self.block_mass.loss()
            found.append(WeightedLoss("block_mass_loss", mass, self.retrieval.block_mass))
        return found


class HeadAverages:
    """The contrast of each head, averaged over the last steps.

    Args:
        layers: layers of the model.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._average: Tensor | None = None  # (layers * H,)

    def follow(self, by_head: Tensor) -> None:
        """Counts one batch.

        Args:
            by_head: ``(layers * H,)``, layer by layer.
        """
        before = by_head if self._average is None else self._average
        self._average = before.lerp(by_head, HEADS_RATE)

    def best(self, count: int) -> tuple[tuple[int, int], ...] | None:
        """Returns layer and head of those whose contrast is lowest; ``None`` without a batch."""
        if self._average is None:
            return None
        heads = len(self._average) // self.layers
        order = self._average.argsort(stable=True)[:count].tolist()
        return tuple((number // heads, number % heads) for number in order)


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
    if retrieval.contrast and "questions" in batch:
        count = retrieval.contrast_queries * len(batch["questions"])
        wanted = evidence_queries(batch["questions"], before=CONTRAST_TOKENS)
        queries = contrast_queries(wanted, settings, count, batch["input_ids"].device)
        finished = batch["input_ids"].shape[1] // settings.text_per_block
        blocks = [0 if packed else finished for packed in batch["packed"]]
        losses.contrast = None if queries is None else GateContrast(queries, blocks)
    is_packed = "position_ids" in batch
    if retrieval.block_mass and not is_packed:
        columns = range(batch["input_ids"].shape[1])
        tokens = sorted(random.Random(draw).choices(columns, k=MASS_QUERIES))
        losses.block_mass = GateBlockMass([slot_of(token, settings.block_size) for token in tokens])
    return None if losses.contrast is None and losses.block_mass is None else losses


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
    for query in evidence_queries(questions, before=CONTRAST_TOKENS):
        blocks = blocks_of(query, settings.block_size)[:FORCED_BLOCKS]
        found[query.row, query.token, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
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
