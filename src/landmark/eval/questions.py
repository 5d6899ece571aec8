"""Measure answers to questions about documents, alone and hidden among others.

A question is asked with its evidence alone, with nothing, with what a search by words finds, and
with the documents of many questions in one text of a given length, which is read once and asked
again and again.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.data.asking import Frame, prompt_frame
from landmark.data.chat import chat_ends
from landmark.data.encoding import Progress
from landmark.data.questions import QuestionSet
from landmark.eval.asked_texts import (
    AskedText,
    EncodedDocument,
    Unit,
    evidence_alone,
    found_by_bm25,
    haystacks,
    is_in_other_words,
    units_of,
)
from landmark.eval.fillers import load_filler
from landmark.eval.measure import measured
from landmark.eval.passkey import batch_size, settings_of
from landmark.eval.results import QuestionsRow
from landmark.eval.scoring import Score, score
from landmark.eval.variants import Variant
from landmark.eval.yardsticks import EvidenceBlocks, evidence, register
from landmark.hf.compat import CACHE
from landmark.hf.recall import EvidenceQuery, EvidenceRecall, blocks_of
from landmark.texts.reading import READS, read_into_memory

CONTEXTS = ("evidence", "nothing", "bm25", "haystack")
CPU_BATCH_TOKENS = 1 << 15  # of rows whose answers a CPU writes at once: weights are read once


@dataclass(frozen=True)
class QuestionsTask:
    """Settings of a measurement of questions.

    Attributes:
        lengths: text tokens of the haystacks; none for no haystack.
        contexts: what is given with a question: ``evidence`` (the documents that answer it),
            ``nothing``, ``bm25`` (the documents that BM25 finds best, up to ``bm25_tokens``),
            ``haystack``.
        bm25_tokens: text tokens of documents by BM25; the last one is cut.
        filler: what a haystack is filled up with, as for ``load_filler``.
        read: ``local`` reads without retrieval, ``retrieve`` with; questions always retrieve.
        top_k: settings of landmark models, each tried; ``None`` keeps the model's own.
        granularity: as ``top_k``; those of ``landmark.eval.yardsticks`` are among them.
        max_new_tokens: tokens of an answer, at most.
        plain_limit: plain models are asked up to this length only.
        seed: of the order of documents.

    Raises:
        ValueError: a value outside its range.
    """

    lengths: tuple[int, ...] = ()
    contexts: tuple[str, ...] = ("evidence", "nothing", "haystack")
    bm25_tokens: int = 512
    filler: str = "paper"
    read: str = "local"
    top_k: tuple[int, ...] | None = None
    granularity: tuple[str, ...] | None = None
    max_new_tokens: int = 32
    plain_limit: int = 32768
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            "lengths": self.lengths,
            "max_new_tokens": (self.max_new_tokens,),
            "bm25_tokens": (self.bm25_tokens,),
        }
        for name, values in counts.items():
            if any(value < 1 for value in values):
                raise ValueError(
                    f"{name}: expected integers of at least 1, got {list(values)}; pass for "
                    "example 32"
                )
        unknown = [context for context in self.contexts if context not in CONTEXTS]
        if unknown or not self.contexts:
            raise ValueError(
                f"contexts: expected some of {', '.join(CONTEXTS)}, got "
                f"{', '.join(unknown) or 'none'}; pass evidence,haystack"
            )
        if self.read not in READS:
            raise ValueError(
                f"read: expected one of {', '.join(READS)}, got {self.read!r}; pass read=local"
            )


def run(
    variants: Sequence[Variant],
    sets: Sequence[QuestionSet],
    task: QuestionsTask,
    report: Callable[[QuestionsRow], None],
    *,
    data: str,
    progress: Progress | None = None,
) -> list[QuestionsRow]:
    """Asks every model every question in every context.

    Args:
        variants: the models.
        sets: documents with questions.
        task: what is asked.
        report: called with each row as soon as it is there.
        data: name of the questions, for the rows.
        progress: called while documents are tokenised and read.

    Returns:
        The rows. Plain models have none beyond ``task.plain_limit``.

    Raises:
        ValueError: documents that answer a question do not fit a haystack, or a template that
            fails.
        FileNotFoundError: a filler that does not exist.
        ModuleNotFoundError: bm25s is missing for context ``bm25``.
    """
    register(EvidenceBlocks)
    asked = [(each, question) for each in sets for question in each.questions]
    numbers = {id(question): number for number, (_, question) in enumerate(asked)}
    other_words = tuple(
        number
        for number, (each, question) in enumerate(asked)
        if is_in_other_words(question, each.documents)
    )
    rows = []
    for variant in variants:
        found = [unit for each in sets for unit in units_of(each, variant.tokenizer)]
        units = [unit for unit in found if unit.questions]
        others = [document for unit in found if not unit.questions for document in unit.documents]
        for settings in settings_of(variant, task):
            for context, length in _contexts(task):
                if length is not None and not variant.is_landmark and length > task.plain_limit:
                    continue
                texts = _texts(variant, units, others, task, context, length, progress)
                with variant.configured(**settings):
                    row = _row(
                        variant,
                        texts,
                        task,
                        context,
                        length,
                        numbers=numbers,
                        other_words=other_words,
                        data=data,
                        progress=progress,
                    )
                rows.append(row)
                report(row)
    return rows


def _contexts(task: QuestionsTask) -> Iterator[tuple[str, int | None]]:
    """Yields the contexts of a task, a haystack with each length."""
    for context in task.contexts:
        if context == "haystack":
            yield from ((context, length) for length in task.lengths)
        else:
            yield context, None


def _texts(
    variant: Variant,
    units: Sequence[Unit],
    others: Sequence[EncodedDocument],
    task: QuestionsTask,
    context: str,
    length: int | None,
    progress: Progress | None,
) -> list[AskedText]:
    """Returns the texts of a context with their questions."""
    if context == "nothing":
        questions = [question for unit in units for question in unit.questions]
        return [AskedText([], questions, [()] * len(questions))]
    if context == "evidence":
        return list(evidence_alone(units))
    if length is None:
        return list(found_by_bm25(units, others, variant.tokenizer, task.bm25_tokens))
    filler = load_filler(task.filler, variant.tokenizer, progress)
    return haystacks(units, others, filler, length, random.Random(f"{task.seed} {length}"))


def _row(
    variant: Variant,
    texts: Sequence[AskedText],
    task: QuestionsTask,
    context: str,
    length: int | None,
    *,
    numbers: dict[int, int],
    other_words: tuple[int, ...],
    data: str,
    progress: Progress | None,
) -> QuestionsRow:
    """Asks all questions of some texts, and counts.

    Args:
        variant: the model.
        texts: the texts, with the questions.
        task: what is asked.
        context: as for ``QuestionsTask``.
        length: of a haystack.
        numbers: of the questions in the data, by their ``id``.
        other_words: numbers of those that are asked in other words.
        data: name of the questions.
        progress: called for each text.
    """
    settings = variant.settings()
    recall = EvidenceRecall(variant.model.landmark) if variant.is_landmark else None
    scores: dict[int, Score] = {}
    done = 0
    with measured(variant.device) as measure:
        for some in _together(variant, texts, task):
            if progress is not None:
                progress("texts asked", done, len(texts))
            answers = _answers(variant, some, task, recall, progress)
            questions = [question for text in some for question in text.questions]
            for question, answer in zip(questions, answers, strict=True):
                scores[numbers[id(question)]] = score(answer, (question.answer, *question.others))
            done += len(some)
    layers = () if recall is None else recall.layers()
    return QuestionsRow(
        model=variant.name,
        attention=variant.attention,
        context=context,
        length=task.bm25_tokens if context == "bm25" else length,
        filler=task.filler if context == "haystack" else None,
        texts=len(texts),
        asked=len(scores),
        contains=sum(each.contains for each in scores.values()) / len(scores),
        right=tuple(number for number, each in sorted(scores.items()) if each.contains),
        other_words=other_words,
        exact=sum(each.exact for each in scores.values()) / len(scores),
        f1=sum(each.f1 for each in scores.values()) / len(scores),
        queries=0 if recall is None else recall.queries,
        layers=tuple(dataclasses.asdict(layer) for layer in layers),
        read=task.read if variant.is_landmark else "full",
        top_k=settings.get("top_k"),
        granularity=settings.get("granularity"),
        settings=settings,
        max_new_tokens=task.max_new_tokens,
        seed=task.seed,
        dtype=variant.dtype,
        seconds=round(measure.seconds, 3),
        data=data,
    )


def _together(
    variant: Variant, texts: Sequence[AskedText], task: QuestionsTask
) -> Iterator[list[AskedText]]:
    """Yields the texts that are read at once: of those that ask one question, as many as fit."""
    some: list[AskedText] = []
    longest = 0
    for text in texts:
        length = max(longest, len(text.ids))
        size = batch_size(variant, length + task.max_new_tokens, CPU_BATCH_TOKENS)
        if some and (len(some) == size or len(text.questions) > 1 or len(some[0].questions) > 1):
            yield some
            some = []
            length = len(text.ids)
        some.append(text)
        longest = length
    if some:
        yield some


@torch.no_grad()
def _answers(
    variant: Variant,
    texts: Sequence[AskedText],
    task: QuestionsTask,
    recall: EvidenceRecall | None,
    progress: Progress | None,
) -> Iterator[str]:
    """Yields the answer to each question about some texts: one with any questions, or one of each.

    A text is read once. Several answers are written at once, as many as fit.
    """
    spans = [found for text in texts for found in text.evidence]
    prompts = [
        prompt_frame(variant.tokenizer, question.question, has_texts=bool(text.ids))
        for text in texts
        for question in text.questions
    ]
    prefixes = [[*prompts[0].before, *text.ids] for text in texts]
    memory: Any = None
    if any(prefixes):
        memory = _read(variant, prefixes, retrieve=task.read == "retrieve", progress=progress)
    if len(texts) > 1:
        yield from _batch_answers(variant, prefixes, memory, prompts, spans, task, recall)
        return
    size = batch_size(variant, len(prefixes[0]) + task.max_new_tokens, CPU_BATCH_TOKENS)
    for start in range(0, len(prompts), size):
        if progress is not None and start:
            progress("questions asked", start, len(prompts))
        part = slice(start, start + size)
        rows = len(prompts[part])
        cache = None
        if memory is not None:
            cache = memory.fork() if variant.is_landmark else copy.deepcopy(memory)
            if rows > 1:
                cache.batch_repeat_interleave(rows)
        yield from _batch_answers(
            variant, prefixes * rows, cache, prompts[part], spans[part], task, recall
        )


def _batch_answers(
    variant: Variant,
    prefixes: Sequence[Sequence[int]],
    cache: Any,
    prompts: Sequence[Frame],
    spans: Sequence[tuple[range, ...]],
    task: QuestionsTask,
    recall: EvidenceRecall | None,
) -> list[str]:
    """Returns the answers to questions, each of which is a row of one batch.

    Padding stands between the text and the question of a row.

    Args:
        variant: the model.
        prefixes: what stands before each question.
        cache: has read it, ``None`` where it is empty.
        prompts: the questions, behind the texts.
        spans: for each of them, tokens of its text that answer it.
        task: what is asked.
        recall: counts the blocks that are retrieved for the first token of each answer.
    """
    tokenizer = variant.tokenizer
    ends = chat_ends(tokenizer, variant.model.generation_config.eos_token_id)
    read, read_mask = _padded(prefixes, ends[0])
    longest = max(len(prompt.after) for prompt in prompts)
    ids = torch.cat((read, torch.full((len(prompts), longest), ends[0])), dim=1)
    mask = torch.cat((read_mask, torch.zeros((len(prompts), longest), dtype=torch.long)), dim=1)
    width = ids.shape[1]
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.after) :] = torch.tensor(prompt.after)
        mask[row, width - len(prompt.after) :] = 1
    if cache is not None and recall is not None:
        cache.record = True
    queries = []
    for row, (prefix, prompt, found) in enumerate(zip(prefixes, prompts, spans, strict=True)):
        shift = len(prompt.before)
        moved = tuple(range(shift + span.start, shift + span.stop) for span in found)
        queries.append(EvidenceQuery(row, len(prefix) + len(prompt.after) - 1, moved))
    named: list[list[int]] = [[] for _ in queries]
    if variant.is_landmark:
        named = [blocks_of(query, variant.model.landmark.block_size) for query in queries]
    with evidence(named):
        written = variant.model.generate(
            ids.to(variant.device),
            attention_mask=mask.to(variant.device),
            **{CACHE: cache},
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    if cache is not None and recall is not None:
        recall.add(cache.retrievals, [query for query in queries if query.evidence])
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in written]


def _read(
    variant: Variant,
    prefixes: Sequence[Sequence[int]],
    *,
    retrieve: bool,
    progress: Progress | None,
) -> Any:
    """Returns a cache that has read some tokens in each row."""
    ids, mask = (each.to(variant.device) for each in _padded(prefixes, 0))
    if variant.is_landmark and len(prefixes) > 1:
        return variant.model.read(ids, mask, retrieve=retrieve)
    if variant.is_landmark:
        return read_into_memory(variant, ids, retrieve=retrieve, progress=progress)
    return variant.model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask ``(B, T)`` of rows, with padding behind the shorter ones."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=ids.dtype)
        mask[number, : len(row)] = 1
    return ids, mask
