"""Finds the heads of a model that choose best among old blocks by their text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.data.episodes import Row
from landmark.hf.cache import LandmarkCache
from landmark.hf.gate_loss import QuestionSpan
from landmark.hf.old_queries import old_queries
from landmark.hf.recall import blocks_of, far_queries
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.train.gate import question_spans

Head = tuple[int, int]


class RowScores:
    """The scores of one row's old blocks for each of its questions, by every head.

    Attributes:
        heads: layer and head of each score.
        scores: for each question ``(heads, blocks)`` on the CPU, as
            ``landmark.hf.prompt_retrieval`` scores the text of blocks.
        evidence: for each question the blocks that hold its evidence.
    """

    def __init__(self, model: Any, row: Row) -> None:
        settings = model.landmark
        spans = [
            span for span in question_spans([row.questions]) if far_queries([span.query], settings)
        ]
        self.heads: list[Head] = []
        self.evidence = [blocks_of(span.query, settings.block_size) for span in spans]
        self.scores: list[Tensor] = []
        if not spans:
            return
        cache = LandmarkCache(model.config)
        seen = _Queries()
        cache.observer = seen
        model.read(torch.tensor(row.input_ids)[None].to(model.device), cache=cache)
        by_layer = []
        for layer, memory in seen.memories.items():
            if memory.retrieves:
                by_layer.append(self._of_layer(memory, torch.cat(seen.queries[layer], 1), spans))
                self.heads += [(layer, head) for head in range(len(by_layer[-1][0]))]
        self.scores = [torch.cat(parts) for parts in zip(*by_layer, strict=True)]

    def _of_layer(
        self, memory: LayerMemory, queries: Tensor, spans: Sequence[QuestionSpan]
    ) -> list[Tensor]:
        """Returns the scores ``(H, blocks)`` of each question; ``queries`` are ``(H, T, D)``."""
        size = memory.config.block_size
        groups = memory.store.landmark_keys.shape[1]
        count = queries.shape[1] // size
        blocks = torch.arange(count, device=queries.device).repeat(groups)
        row_head = torch.arange(groups, device=queries.device).repeat_interleave(count)
        keys, _ = memory.store.pool.gather(row_head, blocks)
        text = torch.unflatten(keys[:, :-1].to(queries.dtype), 0, (groups, count))
        grouped = torch.unflatten(queries, 0, (groups, -1))
        found = []
        for span in spans:
            slots = slot_of(torch.tensor(span.tokens), size).to(queries.device)
            old = slot_of(span.query.token, size) // size - memory.config.local_blocks
            scores = torch.einsum("grnd,gpld->grnpl", grouped[:, :, slots], text[:, :old])
            found.append(scores.logsumexp(-1).sum(2).flatten(0, 1).float().cpu())
        return found


class _Queries:
    """An observer that keeps all queries of one row, ``(H, T, D)`` of each call of each layer."""

    def __init__(self) -> None:
        self.queries: dict[int, list[Tensor]] = {}
        self.memories: dict[int, LayerMemory] = {}

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        queries = old_queries(memory, query, geometry.offsets, scale)[0]
        self.queries.setdefault(memory.layer, []).append(queries)
        self.memories[memory.layer] = memory


@torch.no_grad()
def best_heads(model: Any, rows: Iterable[Row], count: int) -> tuple[Head, ...] | None:
    """Returns the heads whose summed scores find the evidence for the questions of some rows.

    The first is the one with the highest mean reciprocal rank of the evidence; each further one is
    that which raises the rank of the sum most. There are fewer where none raises it.

    Args:
        model: a landmark model in eval mode that retrieves.
        rows: rows with questions.
        count: how many heads at most.

    Returns:
        layer and head of each; ``None`` where no question has evidence that is old.
    """
    scores: list[Tensor] = []
    evidence: list[list[int]] = []
    heads: list[Head] = []
    for row in rows:
        found = RowScores(model, row)
        scores += found.scores
        evidence += found.evidence
        heads = found.heads or heads
    if not scores:
        return None
    chosen: list[int] = []
    best = 0.0
    for _ in range(count):
        ranks = torch.zeros(len(heads))
        for asked, wanted in zip(scores, evidence, strict=True):
            ranks += _reciprocal_ranks(asked + asked[chosen].sum(0), wanted)
        ranks[chosen] = 0
        head = int(ranks.argmax())
        if float(ranks[head]) <= best:
            break
        best = float(ranks[head])
        chosen.append(head)
    return tuple(heads[number] for number in chosen)


def _reciprocal_ranks(scores: Tensor, wanted: Sequence[int]) -> Tensor:
    """Returns one by the rank ``(heads,)`` of the best of some blocks in ``(heads, blocks)``."""
    best = scores[:, wanted].amax(1, keepdim=True)
    return 1 / (scores > best).sum(1).add(1)
