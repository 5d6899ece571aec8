"""Measure which layers and heads retrieve the blocks that hold an answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from landmark.data.encoding import Progress
from landmark.eval.fillers import Filler, filler_text, made_filler
from landmark.eval.measure import measured
from landmark.eval.passkey import PasskeyTask, answers_right, batch_size, episode_of, settings_of
from landmark.eval.results import RecallRow
from landmark.eval.variants import Variant
from landmark.eval.yardsticks import register
from landmark.hf.recall import EvidenceRecall


def run(
    variant: Variant,
    task: PasskeyTask,
    report: Callable[[RecallRow], None],
    progress: Progress | None = None,
) -> list[RecallRow]:
    """Asks a landmark model every question of a task and notes what it retrieves.

    The documents and answers are those of ``landmark.eval.passkey.run``. At each token that
    predicts a part of an answer, a head has retrieved the evidence when one of its blocks holds a
    mention of the answer.

    Args:
        variant: a landmark model.
        task: what is asked.
        report: called with each row as soon as it is there.
        progress: called while texts are tokenised and read.

    Raises:
        ValueError: a plain model, settings that it refuses, or facts that do not fit a document.
        FileNotFoundError: a filler that does not exist.
    """
    if not variant.is_landmark:
        raise ValueError(
            f"model: expected a landmark model, got {variant.name}, which retrieves nothing; "
            "convert and train it first"
        )
    register()
    fillers = [
        made_filler(name, filler_text(name), variant.tokenizer, progress) for name in task.fillers
    ]
    rows = []
    for settings in settings_of(variant, task):
        with variant.configured(**settings):
            for filler, length, facts in itertools.product(
                fillers, task.lengths, task.facts or (None,)
            ):
                row = _row(variant, task, filler, length=length, facts=facts, progress=progress)
                rows.append(row)
                report(row)
    return rows


def _row(
    variant: Variant,
    task: PasskeyTask,
    filler: Filler,
    *,
    length: int,
    facts: int | None,
    progress: Progress | None,
) -> RecallRow:
    episodes = [
        episode_of(variant, task, filler, length=length, facts=facts, trial=trial)
        for trial in range(task.trials)
    ]
    size = batch_size(variant, length)
    landmark = variant.model.landmark
    recall = EvidenceRecall(landmark)
    right: list[bool] = []
    with measured(variant.device) as measure:
        for start in range(0, len(episodes), size):
            if progress is not None:
                progress(f"documents of {length:,} tokens asked", start, len(episodes))
            batch = episodes[start : start + size]
            for answers in answers_right(variant, batch, task.read, progress, recall):
                right += answers
    return RecallRow(
        task="passkey" if facts is None else "facts",
        model=variant.name,
        length=length,
        filler=filler.name,
        facts=facts or 1,
        distractors=task.distractors,
        trials=task.trials,
        asked=len(right),
        correct=sum(right),
        queries=recall.queries,
        layers=tuple(dataclasses.asdict(layer) for layer in recall.layers()),
        read=task.read,
        top_k=landmark.top_k,
        granularity=landmark.granularity,
        settings=variant.settings(),
        seed=task.seed,
        dtype=variant.dtype,
        seconds=round(measure.seconds, 3),
    )
