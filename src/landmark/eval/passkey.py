"""Measure whether a fact is found wherever it lies in a document of any length.

A greedy exact match is read off one forward: the answer is teacher-forced, and it equals the greedy
continuation when each of its tokens was the most probable one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.eval.episodes import BUCKETS, Episode, bucket_of, build_episode, named_codes, pass_key
from landmark.eval.fillers import Filler, filler_text, made_filler
from landmark.eval.measure import measured
from landmark.eval.results import PasskeyRow
from landmark.eval.variants import Variant
from landmark.eval.yardsticks import register
from landmark.hf.recall import EvidenceQuery, EvidenceRecall
from landmark.texts.reading import READS, read_into_memory

BATCH_TOKENS = 1 << 18  # of rows that a GPU computes at once
CPU_BATCH_TOKENS = 1 << 13


@dataclass(frozen=True)
class PasskeyTask:
    """Settings of a measurement of pass keys or named facts.

    Attributes:
        lengths: text tokens of the documents.
        trials: documents of each length.
        fillers: ``paper``, ``pydoc`` or paths.
        facts: numbers of named facts, each all asked; none for the pass key.
        distractors: named codes beside what is asked for.
        read: ``local`` reads the document without retrieval, ``retrieve`` with; questions always
            retrieve.
        top_k: settings of landmark models, each tried; ``None`` keeps the model's own.
        granularity: as ``top_k``; those of ``landmark.eval.yardsticks`` are among them.
        seed: of the documents.
        plain_limit: plain models are asked up to this length only.

    Raises:
        ValueError: a value outside its range.
    """

    lengths: tuple[int, ...]
    trials: int = 50
    fillers: tuple[str, ...] = ("paper",)
    facts: tuple[int, ...] = ()
    distractors: int = 0
    read: str = "local"
    top_k: tuple[int, ...] | None = None
    granularity: tuple[str, ...] | None = None
    seed: int = 0
    plain_limit: int = 32768

    def __post_init__(self) -> None:
        counts = {"lengths": self.lengths, "facts": self.facts, "trials": (self.trials,)}
        for name, values in counts.items():
            if any(value < 1 for value in values):
                raise ValueError(
                    f"{name}: expected integers of at least 1, got {list(values)}; pass for "
                    "example 8"
                )
        several = {
            "lengths": self.lengths,
            "fillers": self.fillers,
            "granularity": self.granularity,
        }
        for name, chosen in several.items():
            if chosen == ():
                raise ValueError(
                    f"{name}: expected some, with commas, got none; leave it out for the default"
                )
        if self.distractors < 0:
            raise ValueError(
                f"distractors: expected at least 0, got {self.distractors}; pass distractors=0"
            )
        if self.read not in READS:
            raise ValueError(
                f"read: expected one of {', '.join(READS)}, got {self.read!r}; pass read=local"
            )


def run(
    variants: Sequence[Variant],
    task: PasskeyTask,
    report: Callable[[PasskeyRow], None],
    progress: Progress | None = None,
) -> list[PasskeyRow]:
    """Evaluates every model at every length and filler with all asked settings.

    Args:
        variants: models; all answer the same documents as far as their tokenizers agree.
        task: what is asked.
        report: called with each row as soon as it is there.
        progress: called while texts are tokenised and read.

    Returns:
        The rows. Models beyond ``task.plain_limit`` have none.

    Raises:
        ValueError: settings that the model refuses, or facts that do not fit a document.
        FileNotFoundError: a filler that does not exist.
    """
    register()
    rows = []
    texts = [(name, filler_text(name)) for name in task.fillers]  # once: a pipe is not read again
    for variant in variants:
        fillers = [made_filler(name, text, variant.tokenizer, progress) for name, text in texts]
        for settings in settings_of(variant, task):
            with variant.configured(**settings):
                for filler, length, facts in itertools.product(
                    fillers, task.lengths, task.facts or (None,)
                ):
                    if not variant.is_landmark and length > task.plain_limit:
                        continue
                    row = _row(variant, task, filler, length=length, facts=facts, progress=progress)
                    rows.append(row)
                    report(row)
    return rows


class SettingsTask(Protocol):
    """A task that tries several settings of landmark models; ``None`` keeps the model's own."""

    @property
    def top_k(self) -> tuple[int, ...] | None:
        """Blocks that a query retrieves."""

    @property
    def granularity(self) -> tuple[str, ...] | None:
        """Who shares a selection."""


def settings_of(variant: Variant, task: SettingsTask) -> Iterator[dict[str, Any]]:
    """Yields the settings that a model is measured with, none for a plain one."""
    if not variant.is_landmark:
        yield {}
        return
    for top_k in task.top_k or (variant.model.landmark.top_k,):
        for granularity in task.granularity or (variant.model.landmark.granularity,):
            yield {"top_k": top_k, "granularity": granularity}


def _row(
    variant: Variant,
    task: PasskeyTask,
    filler: Filler,
    *,
    length: int,
    facts: int | None,
    progress: Progress | None,
) -> PasskeyRow:
    episodes = [
        episode_of(variant, task, filler, length=length, facts=facts, trial=trial)
        for trial in range(task.trials)
    ]
    size = batch_size(variant, length)
    asked = [0] * BUCKETS
    correct = [0] * BUCKETS
    with measured(variant.device) as measure:
        for start in range(0, len(episodes), size):
            batch = episodes[start : start + size]
            if progress is not None:
                progress(f"documents of {length:,} tokens asked", start, len(episodes))
            for episode, answers in zip(
                batch, answers_right(variant, batch, task.read, progress), strict=True
            ):
                for place, right in zip(episode.places, answers, strict=True):
                    asked[bucket_of(place.start, length)] += 1
                    correct[bucket_of(place.start, length)] += right
    longest = length + max(
        len(question.ids) for episode in episodes for question in episode.questions
    )
    settings = variant.settings()
    return PasskeyRow(
        task="passkey" if facts is None else "facts",
        model=variant.name,
        attention=variant.attention,
        length=length,
        filler=filler.name,
        facts=facts or 1,
        distractors=task.distractors,
        trials=task.trials,
        asked=sum(asked),
        correct=sum(correct),
        accuracy=sum(correct) / sum(asked),
        depths=tuple(
            {"from": i / BUCKETS, "to": (i + 1) / BUCKETS, "asked": asked[i], "correct": correct[i]}
            for i in range(BUCKETS)
        ),
        read=task.read if variant.is_landmark else "full",
        top_k=settings.get("top_k"),
        granularity=settings.get("granularity"),
        settings=settings,
        beyond_trained=variant.beyond_trained(longest),
        seed=task.seed,
        dtype=variant.dtype,
        seconds=round(measure.seconds, 3),
        peak_bytes=measure.peak_bytes,
    )


def batch_size(variant: Variant, length: int, cpu_tokens: int = CPU_BATCH_TOKENS) -> int:
    """Returns how many rows of a length are computed at once.

    Args:
        variant: the model, for its device.
        length: text tokens of a row.
        cpu_tokens: of all rows, on a CPU.
    """
    on_gpu = torch.device(variant.device).type == "cuda"
    return max(1, (BATCH_TOKENS if on_gpu else cpu_tokens) // length)


def episode_of(
    variant: Variant,
    task: PasskeyTask,
    filler: Filler,
    *,
    length: int,
    facts: int | None,
    trial: int,
) -> Episode:
    """Returns one document of a task and its questions, which follow from the task's seed.

    Args:
        variant: the model, for its tokenizer.
        task: the task.
        filler: what stands between the facts.
        length: text tokens of the document.
        facts: named facts, ``None`` for a pass key.
        trial: the number of the document.
    """
    rng = random.Random(f"{task.seed} {length} {facts} {trial}")
    if facts is None:
        codes = named_codes(rng, task.distractors, digits=5)
        return build_episode(
            rng, variant.tokenizer, filler, length, [pass_key(rng)], codes, bucket=trial % BUCKETS
        )
    codes = named_codes(rng, facts + task.distractors)
    return build_episode(rng, variant.tokenizer, filler, length, codes[:facts], codes[facts:])


@torch.no_grad()
def answers_right(
    variant: Variant,
    episodes: Sequence[Episode],
    read: str = "local",
    progress: Progress | None = None,
    recall: EvidenceRecall | None = None,
) -> list[list[bool]]:
    """Asks every question of documents of one length.

    Args:
        variant: the model.
        episodes: all with documents of one length and the same number of questions.
        read: see ``PasskeyTask``; plain models read everything with every question.
        progress: called while the documents are read.
        recall: counts the blocks that a landmark model retrieves for the answers, each head for
            itself.

    Returns:
        For each episode, whether each of its questions was answered exactly.
    """
    documents = torch.stack([episode.document for episode in episodes]).to(variant.device)
    cache: Any = None
    if variant.is_landmark:
        cache = read_into_memory(variant, documents, retrieve=read == "retrieve", progress=progress)
    right: list[list[bool]] = [[] for _ in episodes]
    for number in range(len(episodes[0].questions)):
        questions = [episode.questions[number] for episode in episodes]
        ids = _padded([question.ids for question in questions]).to(variant.device)
        if cache is not None:
            cache.record = recall is not None
            if recall is None:
                prompts = [question.ids[: -question.answered] for question in questions]
                prompt, mask = _left_padded(prompts)
                variant.model.pin_for_prompt(
                    cache, prompt.to(variant.device), mask.to(variant.device)
                )
            logits = variant.model(ids, past_key_values=cache).logits
            if recall is not None:
                recall.add(cache.retrievals, _queries(episodes, number))
                cache.retrievals.clear()
            cache.crop(-ids.shape[1])
            cache.pin(None)
        else:
            logits = variant.logits(torch.cat((documents, ids), dim=1), keep=ids.shape[1])
        best = logits.argmax(-1).cpu()
        ids = ids.cpu()
        for row, question in enumerate(questions):
            first = len(question.ids) - question.answered
            last = len(question.ids)
            right[row].append(bool((best[row, first - 1 : last - 1] == ids[row, first:last]).all()))
    return right


def _queries(episodes: Sequence[Episode], number: int) -> list[EvidenceQuery]:
    """Returns the tokens that predict the answer to question ``number`` of each episode."""
    queries = []
    for row, episode in enumerate(episodes):
        question = episode.questions[number]
        end = len(episode.document) + len(question.ids)
        queries += [
            EvidenceQuery(row, token - 1, episode.evidence[number])
            for token in range(end - question.answered, end)
        ]
    return queries


def _left_padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows filled up on the left with their first token, and a mask that is 0 there."""
    width = max(map(len, rows))
    ids = [row[:1] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _padded(rows: Sequence[list[int]]) -> Tensor:
    """Rows filled up on the right with their last token, which causality makes harmless."""
    width = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], dtype=torch.long)
