"""Measure ranking by landmarks beside BM25: find the document that a passage comes from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.data.text import Document
from landmark.eval.bm25 import Bm25, require_bm25s
from landmark.eval.measure import measured
from landmark.eval.results import RankRow
from landmark.texts.explain import uses_template
from landmark.texts.loading import LoadedModel, require_landmark
from landmark.texts.rank import (
    SETTINGS,
    TextLandmarks,
    build_index,
    read_document,
    read_question,
    read_text,
    search,
    tokenize_document,
)
from landmark.texts.reading import counted

TEXTS = ("cut", "whole")
CUTOFF = 10  # of nDCG


@dataclass(frozen=True)
class PassageTask:
    """Settings of a measurement of ranking.

    Attributes:
        passages: how many, drawn evenly from the documents, without overlap.
        passage_tokens: text tokens of a passage.
        max_tokens: text tokens of a document that are searched and drawn from, its first; ``None``
            for all.
        seed: of the choice of passages.
        chat: whether to use the chat template, as for ``rank_files``.

    Raises:
        ValueError: a value outside its range.
    """

    passages: int = 200
    passage_tokens: int = 126
    max_tokens: int | None = None
    seed: int = 0
    chat: bool | None = None

    def __post_init__(self) -> None:
        for name, value in (("passages", self.passages), ("passage_tokens", self.passage_tokens)):
            if value < 1:
                raise ValueError(
                    f"{name}: expected at least 1, got {value}; leave it out for the default"
                )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens: expected at least 1, got {self.max_tokens}; leave it out for all"
            )


@dataclass(frozen=True)
class PassageQuery:
    """A passage whose document is looked for.

    Attributes:
        document: index of the document that it was drawn from.
        start: its first token there.
        ids: ``(n,)`` its tokens.
    """

    document: int
    start: int
    ids: Tensor


@dataclass(frozen=True)
class _Ranker:
    """A way to rank documents.

    Attributes:
        scores: returns the scores of all searched documents for a passage's tokens.
        fields: of a row, which say what ranks.
    """

    scores: Callable[[Tensor], Sequence[float]]
    fields: dict[str, Any]


def run(
    loaded: LoadedModel,
    task: PassageTask,
    documents: Sequence[Document],
    others: Sequence[Document],
    data: str,
    report: Callable[[RankRow], None],
    progress: Progress | None = None,
) -> list[RankRow]:
    """Ranks the documents for every passage, by landmarks and by BM25.

    Once all passages are cut out of their documents, then the documents are whole. Where the
    tokenizer has a chat template, landmarks rank as ``rank_files`` does with it.

    Args:
        loaded: a landmark model.
        task: what is asked.
        documents: texts that passages are drawn from.
        others: further texts that are searched.
        data: their name, for the rows.
        report: called with each row as soon as it is there.
        progress: called while texts are tokenised and read.

    Raises:
        ValueError: no landmark model, documents that are too few or too short, or a chat template
            that is missing or fails.
        ModuleNotFoundError: bm25s is missing.
    """
    require_landmark(loaded)
    require_bm25s()
    chat = uses_template(loaded.tokenizer, task.chat)
    ids = [_head(loaded, document, task, progress, chat=chat) for document in documents]
    more = [_head(loaded, document, task, progress, chat=chat) for document in others]
    passages = draw_passages(ids, task)
    with measured(loaded.device) as reading:
        known = [
            read_document(loaded, other, progress, chat=chat)
            for other in counted("documents read", more, progress)
        ]
    rows = []
    for text in TEXTS:
        drawn_from = ids if text == "whole" else cut_out(ids, passages)
        searched = [*drawn_from, *more]
        for make in (_landmarks, _bm25):
            with measured(loaded.device) as measure:
                ranker = make(loaded, searched, known, progress, chat=chat)
                ranks = [
                    rank_of(ranker.scores(passage.ids), passage.document)
                    for passage in counted("passages looked for", passages, progress)
                ]
            seconds = measure.seconds
            if make is _landmarks:
                seconds += reading.seconds
            row = RankRow(
                text=text,
                documents=len(searched),
                tokens=sum(len(document) for document in searched),
                max_tokens=task.max_tokens,
                passages=len(ranks),
                passage_tokens=task.passage_tokens,
                recall_at_1=recall(ranks),
                ndcg_at_10=ndcg(ranks),
                seed=task.seed,
                seconds=round(seconds, 3),
                data=data,
                **ranker.fields,
            )
            rows.append(row)
            report(row)
    return rows


def _head(
    loaded: LoadedModel,
    document: Document,
    task: PassageTask,
    progress: Progress | None,
    *,
    chat: bool,
) -> Tensor:
    """Returns the first tokens of a document, as many as are used."""
    return tokenize_document(loaded, document.text, progress, chat=chat)[: task.max_tokens]


def _landmarks(
    loaded: LoadedModel,
    searched: Sequence[Tensor],
    known: Sequence[TextLandmarks],
    progress: Progress | None,
    *,
    chat: bool,
) -> _Ranker:
    """Returns the ranker by landmarks; the last of the documents are ``known`` already."""
    new = searched[: len(searched) - len(known)]
    index = build_index(
        [
            *(
                read_document(loaded, document, progress, chat=chat)
                for document in counted("documents read", new, progress)
            ),
            *known,
        ]
    )
    with loaded.configured(**SETTINGS):
        settings = loaded.model.landmark.to_dict()
    fields = {
        "ranker": "landmark",
        "model": loaded.name,
        "settings": settings,
        "dtype": loaded.dtype,
        "library_bytes": index.nbytes(),
        "chat": chat,
    }

    def scores(passage: Tensor) -> list[float]:
        if chat:
            query = read_question(loaded, loaded.tokenizer.decode(passage.tolist()))
        else:
            query = read_text(loaded, passage)
        return [found.score for found in search(index, query)]

    return _Ranker(scores, fields)


def _bm25(
    loaded: LoadedModel,
    searched: Sequence[Tensor],
    known: Sequence[TextLandmarks],
    progress: Progress | None,
    *,
    chat: bool,
) -> _Ranker:
    """Returns the ranker by BM25 on the text of the same tokens."""
    index = Bm25([loaded.tokenizer.decode(document.tolist()) for document in searched])
    fields = {
        "ranker": "bm25",
        "model": None,
        "settings": index.settings(),
        "dtype": None,
        "library_bytes": None,
        "chat": False,
    }
    return _Ranker(lambda passage: index.scores(loaded.tokenizer.decode(passage.tolist())), fields)


def draw_passages(ids: Sequence[Tensor], task: PassageTask) -> list[PassageQuery]:
    """Draws passages evenly from documents ``(T,)`` each, at any place, without overlap.

    Raises:
        ValueError: no document, or one of which the passages would take more than half.
    """
    if not ids:
        raise ValueError(
            "documents: expected texts to draw passages from, got none; pass a folder of texts"
        )
    rng = random.Random(task.seed)
    size = task.passage_tokens
    found = []
    for index, document in enumerate(ids):
        count = task.passages // len(ids) + (index < task.passages % len(ids))
        if len(document) < 2 * count * size:
            raise ValueError(
                f"passages: expected documents of at least {2 * count * size} tokens for "
                f"{count} passages of {size} from each, got one of {len(document)}; pass fewer or "
                "shorter passages"
            )
        gaps = sorted(rng.choices(range(len(document) - count * size + 1), k=count))
        starts = [gap + number * size for number, gap in enumerate(gaps)]
        found += [PassageQuery(index, start, document[start : start + size]) for start in starts]
    return found


def cut_out(ids: Sequence[Tensor], passages: Sequence[PassageQuery]) -> list[Tensor]:
    """Returns the documents without their passages."""
    kept = [torch.ones(len(document), dtype=torch.bool) for document in ids]
    for passage in passages:
        kept[passage.document][passage.start : passage.start + len(passage.ids)] = False
    return [document[keep] for document, keep in zip(ids, kept, strict=True)]


def rank_of(scores: Sequence[float], wanted: int) -> int:
    """Returns the rank of document ``wanted`` by falling score, from 1.

    Equal scores count against it.
    """
    return sum(score >= scores[wanted] for score in scores)


def recall(ranks: Sequence[int]) -> float:
    """Returns the share of ranks that are 1."""
    return sum(rank == 1 for rank in ranks) / len(ranks)


def ndcg(ranks: Sequence[int]) -> float:
    """Returns nDCG@10 where one document is relevant.

    It is the mean of ``1 / log2(1 + rank)``, 0 beyond rank 10.
    """
    return sum(1 / math.log2(1 + rank) for rank in ranks if rank <= CUTOFF) / len(ranks)
