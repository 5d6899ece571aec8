"""Typed result rows and the file they are kept in: ``{"versions": ..., "rows": [...]}``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from landmark.data import outputs
from landmark.data.text import read_json
from landmark.versions import made_with, sources

FIGURES = "figures.json"  # recorded results in a bundled model's folder


@dataclasses.dataclass(frozen=True)
class PasskeyRow:
    """Accuracy of one model, with one choice of settings, at one document length.

    Attributes:
        task: ``passkey`` (one five-digit key a document) or ``facts`` (several named codes, all
            asked).
        model: name or path of the model.
        attention: ``landmark``, or for a plain model ``full``, ``window`` or ``dynamic``.
        length: text tokens of the document; the question comes on top.
        filler: what the document is made of.
        facts: facts in a document that are asked for.
        distractors: named codes in a document that are not asked for.
        trials: documents.
        asked: answers wanted in all, ``trials * facts``.
        correct: answers whose every token was the most probable one (equal to a greedy exact
            match).
        accuracy: ``correct / asked``.
        depths: for each tenth of the document, ``{"from", "to", "asked", "correct"}`` of the facts
            placed there.
        read: ``local`` (document read without retrieval), ``retrieve``, or ``full`` for plain
            models.
        top_k: retrieved blocks; ``None`` for plain models.
        granularity: of the retrieval; ``None`` for plain models.
        settings: all settings of the attention.
        beyond_trained: whether attention used positions beyond the trained length; ``None`` when
            that is unknown.
        seed: of the documents.
        dtype: of the weights.
        seconds: wall time of all trials.
        peak_bytes: peak device memory, weights included; ``None`` where the device does not tell.
    """

    task: str
    model: str
    attention: str
    length: int
    filler: str
    facts: int
    distractors: int
    trials: int
    asked: int
    correct: int
    accuracy: float
    depths: tuple[dict[str, float], ...]
    read: str
    top_k: int | None
    granularity: str | None
    settings: dict[str, Any]
    beyond_trained: bool | None
    seed: int
    dtype: str
    seconds: float
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class PerplexityRow:
    """Perplexity of one model with one choice of settings, in the columns of the paper's Table 1.

    Attributes:
        model: name or path of the model.
        attention: ``landmark``, or for a plain model ``full``, ``window`` or ``dynamic``.
        length: evaluation length, text tokens of a segment.
        scheme: ``paper`` (the whole chunk is local), ``blocks`` (local by block index) or
            ``plain``.
        local: text tokens of local context: of a chunk, or of the own and the local blocks.
        blocks: memory blocks kept; ``None`` for all.
        top_k: retrieved blocks, 0 for local context and block 0 alone; ``None`` for plain models.
        attention_size: the most text tokens that one query attends to.
        granularity: of the retrieval; ``None`` without one.
        perplexity: exp of the mean loss over all tokens with a predecessor in their segment.
        loss: that mean, in nats a token.
        tokens: predicted tokens.
        segments: segments of ``length`` tokens.
        settings: all settings of the attention.
        beyond_trained: whether attention used positions beyond the trained length; ``None`` when
            that is unknown.
        seed: of the choice of segments.
        dtype: of the weights.
        seconds: wall time.
        peak_bytes: peak device memory, weights included; ``None`` where the device does not tell.
        data: where the text came from.
    """

    model: str
    attention: str
    length: int
    scheme: str
    local: int
    blocks: int | None
    top_k: int | None
    attention_size: int
    granularity: str | None
    perplexity: float
    loss: float
    tokens: int
    segments: int
    settings: dict[str, Any]
    beyond_trained: bool | None
    seed: int
    dtype: str
    seconds: float
    peak_bytes: int | None
    data: str


@dataclasses.dataclass(frozen=True)
class RankRow:
    """How often a passage led to its document, by one way of ranking.

    Attributes:
        ranker: ``landmark`` or ``bm25``.
        model: name or path of the model; ``None`` for BM25.
        text: ``cut`` (all passages are cut out of the documents that are searched) or ``whole``.
        documents: how many are searched.
        tokens: their text tokens, after cutting.
        max_tokens: each document's first so many tokens are used; ``None`` for all.
        passages: how many were asked for.
        passage_tokens: text tokens of each.
        recall_at_1: share of passages whose document came first; equal scores count against it.
        ndcg_at_10: mean of ``1 / log2(1 + rank)`` of the passage's document, 0 beyond rank 10.
        settings: of the attention while documents are read, or of BM25.
        seed: of the choice of passages.
        dtype: of the weights; ``None`` for BM25.
        library_bytes: what is kept of the documents; ``None`` for BM25.
        seconds: wall time of reading or indexing the documents and of all passages.
        data: where the text came from.
        chat: whether the tokenizer's chat template was used.
    """

    ranker: str
    model: str | None
    text: str
    documents: int
    tokens: int
    max_tokens: int | None
    passages: int
    passage_tokens: int
    recall_at_1: float
    ndcg_at_10: float
    settings: dict[str, Any]
    seed: int
    dtype: str | None
    library_bytes: int | None
    seconds: float
    data: str
    chat: bool = False


@dataclasses.dataclass(frozen=True)
class IndexRow:
    """What one kind of index finds, and how fast, among the landmarks of one layer.

    Attributes:
        index: one of ``landmark.memory.faiss_index.KINDS``; ``exact`` is what it is compared with.
        model: name or path of the model.
        layer: whose landmarks and queries they are.
        heads: key/value heads that were measured.
        landmarks: of each head.
        recorded: so many of them were recorded while text was read; the others are copies of these
            with noise.
        noise: its standard deviation, in those of the recorded landmarks; 0 without copies.
        top_k: blocks that a query looks for.
        queries: positions of text whose queries look, in one chunk.
        recall: share of the ``top_k`` best landmarks of each query that were found; ``None`` among
            copies.
        step_ms: milliseconds of one decode step: the queries of one position in these heads;
            median.
        chunk_ms: the same of all ``queries`` positions at once.
        build_seconds: time to build it as blocks arrive.
        nbytes: what it holds; for ``exact`` the landmarks.
        settings: of the index.
        threads: of the CPU, which it computes on.
        seed: of the noise.
        dtype: of the weights; the index is in float32.
        data: where the text came from.
    """

    index: str
    model: str
    layer: int
    heads: int
    landmarks: int
    recorded: int
    noise: float
    top_k: int
    queries: int
    recall: float | None
    step_ms: float
    chunk_ms: float
    build_seconds: float
    nbytes: int
    settings: dict[str, Any]
    threads: int
    seed: int
    dtype: str
    data: str


@dataclasses.dataclass(frozen=True)
class RecallRow:
    """How often the blocks that hold an answer are retrieved, by layer and head.

    Attributes:
        task: ``passkey`` or ``facts``, as for ``PasskeyRow``.
        model: name or path of the model.
        length: text tokens of the document; the question comes on top.
        filler: what the document is made of.
        facts: facts in a document that are asked for.
        distractors: named codes in a document that are not asked for.
        trials: documents.
        asked: answers wanted in all.
        correct: answers whose every token was the most probable one.
        queries: tokens that predict a part of an answer which is not local, over all questions.
        layers: of each layer ``{"layer", "heads", "any_head"}``, as ``LayerRecall`` says: shares of
            ``queries`` that retrieved a block with a mention of the answer.
        read: ``local`` (document read without retrieval) or ``retrieve``.
        top_k: retrieved blocks.
        granularity: of the retrieval.
        settings: all settings of the attention.
        seed: of the documents.
        dtype: of the weights.
        seconds: wall time of all trials.
    """

    task: str
    model: str
    length: int
    filler: str
    facts: int
    distractors: int
    trials: int
    asked: int
    correct: int
    queries: int
    layers: tuple[dict[str, Any], ...]
    read: str
    top_k: int
    granularity: str
    settings: dict[str, Any]
    seed: int
    dtype: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class QuestionsRow:
    """How right a model answers questions about documents, in one context.

    Attributes:
        model: name or path of the model.
        attention: ``landmark``, or for a plain model ``full``, ``window`` or ``dynamic``.
        context: what is given with a question: ``evidence`` (the documents that answer it),
            ``nothing``, ``bm25`` (the best documents by BM25), or ``haystack`` (the documents that
            answer it stand among others).
        length: text tokens of a haystack or of the documents by BM25; ``None`` in other contexts.
        filler: what haystacks are filled up with; ``None`` in other contexts.
        texts: texts that were read.
        asked: questions.
        contains: share of answers that contain a right one.
        right: numbers of the questions, in the order of the data, whose answers contain a right
            one: rows of two models are compared question by question.
        other_words: numbers of the questions that are asked in other words than the text's.
        exact: share of answers that are a right one.
        f1: mean overlap of words with the nearest right answer.
        queries: questions whose evidence is not local.
        layers: of each layer ``{"layer", "heads", "any_head"}``, as ``LayerRecall`` says: shares of
            ``queries`` that retrieved a block with evidence at the last token of the question.
        read: ``local`` (texts read without retrieval), ``retrieve``, or ``full`` for plain models.
        top_k: retrieved blocks; ``None`` for plain models.
        granularity: of the retrieval; ``None`` for plain models.
        settings: all settings of the attention.
        max_new_tokens: tokens of an answer, at most.
        seed: of the order of documents.
        dtype: of the weights.
        seconds: wall time.
        data: where the questions came from.
    """

    model: str
    attention: str
    context: str
    length: int | None
    filler: str | None
    texts: int
    asked: int
    contains: float
    right: tuple[int, ...]
    other_words: tuple[int, ...]
    exact: float
    f1: float
    queries: int
    layers: tuple[dict[str, Any], ...]
    read: str
    top_k: int | None
    granularity: str | None
    settings: dict[str, Any]
    max_new_tokens: int
    seed: int
    dtype: str
    seconds: float
    data: str


@dataclasses.dataclass(frozen=True)
class AgreementRow:
    """How far a model says what a reference says, and how probable it finds conversations.

    Attributes:
        model: name or path of the model.
        attention: ``landmark``, or for a plain model ``full``.
        reference: name or path of the model whose greedy answers are compared.
        reference_dtype: of its weights.
        prompts: conversations that the reference answered.
        answer_tokens: tokens of the answers.
        agreed: those of them that are the model's most probable ones, given all before.
        agreement: ``agreed / answer_tokens``; ``None`` without prompts.
        conversations: conversations that hold the assistant's answers.
        tokens: tokens of these answers.
        loss: mean loss over ``tokens``, in nats; ``None`` without any.
        perplexity: exp of ``loss``.
        max_new_tokens: tokens of an answer, at most.
        settings: all settings of the attention.
        dtype: of the weights.
        seconds: wall time, without the reference's answers.
        data: where the conversations came from.
    """

    model: str
    attention: str
    reference: str
    reference_dtype: str
    prompts: int
    answer_tokens: int
    agreed: int
    agreement: float | None
    conversations: int
    tokens: int
    loss: float | None
    perplexity: float | None
    max_new_tokens: int
    settings: dict[str, Any]
    dtype: str
    seconds: float
    data: str


Row = PasskeyRow | PerplexityRow | RankRow | IndexRow | RecallRow | QuestionsRow | AgreementRow
Some = TypeVar(
    "Some",
    PasskeyRow,
    PerplexityRow,
    RankRow,
    IndexRow,
    RecallRow,
    QuestionsRow,
    AgreementRow,
)


def write(path: str | Path, rows: Sequence[Row], device: str) -> None:
    """Writes ``rows`` and what they were made with to the JSON file ``path``; makes its folder."""
    content = {
        "versions": made_with(device, "torch", "transformers"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    outputs.write(path, (json.dumps(content, indent=1) + "\n").encode())


class Recorder(Generic[Some]):
    """Writes results to a file after every row, so that an interrupted run keeps them.

    Args:
        out: the file, ``None`` for none; what is there stays until the first row.
        device: what is measured on.
        tell: called with each row.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, out: str | Path | None, device: str, tell: Callable[[Some], None]) -> None:
        self.out = out
        self.device = device
        self.tell: Callable[[Some], None] = tell
        self.rows: list[Some] = []
        if out is not None:
            outputs.require_writable(out, "out")
            sources()  # now, and not after the first row: the hash is that of the code that runs

    def __call__(self, row: Some) -> None:
        """Keeps a row."""
        self.rows.append(row)
        if self.out is not None:
            write(self.out, self.rows, self.device)
        self.tell(row)


def read(path: str | Path) -> list[Row]:
    """Returns the rows of a file made by ``write``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not one of results.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"results: expected a file made by `landmark eval`, got {path}, which does not exist"
        )
    try:
        return [_row(fields) for fields in read_json(path)["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"results: expected JSON with versions and rows in {path}, got {error}; run `landmark "
            "eval`"
        ) from None


def _row(fields: dict[str, Any]) -> Row:
    if "agreement" in fields:
        return AgreementRow(**fields)
    if "perplexity" in fields:
        return PerplexityRow(**fields)
    if "recall_at_1" in fields:
        return RankRow(**fields)
    if "index" in fields:
        return IndexRow(**fields)
    if "layers" in fields:
        layers = ({**layer, "heads": tuple(layer["heads"])} for layer in fields["layers"])
        fields = {**fields, "layers": tuple(layers)}
        if "contains" not in fields:
            return RecallRow(**fields)
        numbers = {name: tuple(fields[name]) for name in ("right", "other_words")}
        return QuestionsRow(**{**fields, **numbers})
    return PasskeyRow(**{**fields, "depths": tuple(fields["depths"])})
