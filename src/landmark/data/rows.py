"""The rows that a model is trained on: windows of a corpus, and retrieval episodes.

Each row is decided by the seed and its index.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from landmark.data.episodes import IGNORED, Row
from landmark.data.tokens import Ids

Batch = dict[str, Any]
Group = tuple[Row, ...]  # rows of one length that are loaded together


class Windows:
    """Cuts a text into rows; every epoch cuts at other tokens and has another order.

    Args:
        ids: the text, ``(tokens,)`` token ids.
        tokens: text tokens of a row, ``prefix`` included.
        seed: decides where to cut, and the order.
        prefix: ids that begin every row.

    Attributes:
        per_epoch: rows of an epoch.

    Raises:
        ValueError: the text is shorter than a row.
    """

    def __init__(self, ids: Ids, *, tokens: int, seed: int, prefix: Sequence[int] = ()) -> None:
        self.ids = ids
        self.seed = seed
        self.prefix = list(prefix)
        self.tokens = tokens - len(self.prefix)
        if len(ids) < self.tokens:
            raise ValueError(
                f"expected a text of at least {tokens} tokens (one row), got {len(ids)}; add text"
            )
        self.per_epoch = max(1, len(ids) // self.tokens - 1)

    def __call__(self, index: int) -> Row:
        """Returns row ``index``, which is in epoch ``index // per_epoch``."""
        epoch, number = divmod(index, self.per_epoch)
        spare = len(self.ids) - self.per_epoch * self.tokens
        start = random.Random(f"{self.seed}:{epoch}").randrange(spare + 1)
        start += int(order_of(self.seed, epoch, self.per_epoch)[number]) * self.tokens
        return plain_row(self.ids[start : start + self.tokens], self.prefix)


class RowMaker(Protocol):
    """Makes rows of one kind."""

    def __call__(self, number: int, /) -> Row:
        """Returns row ``number``, the same each time."""


class Share(NamedTuple):
    """A kind of rows, and the probability that a row is of it."""

    make: RowMaker
    share: float


@dataclass(frozen=True)
class Stage:
    """A part of a training, with rows of one length.

    Attributes:
        kinds: the kinds of rows; their shares sum up to 1.
        groups: groups of rows in this stage.
        rows: rows of a group.
    """

    kinds: Sequence[Share]
    groups: int
    rows: int = 1


class Rows(Dataset[Group]):
    """A data set of groups of rows.

    Stages follow each other. A group has as many rows of a shorter length as have the same number
    of tokens together as one row of the greatest length, so that every batch has equally many.

    Args:
        stages: the stages, in the order of training.
        seed: decides of which kind a row is.
    """

    def __init__(self, stages: Sequence[Stage], *, seed: int) -> None:
        self.stages = list(stages)
        self.seed = seed

    def __len__(self) -> int:
        return sum(stage.groups for stage in self.stages)

    def __getitem__(self, index: int) -> Group:
        first = 0  # number of the stage's first row
        for stage in self.stages:
            if index < stage.groups:
                break
            index -= stage.groups
            first += stage.groups * stage.rows
        else:
            raise IndexError(f"expected an index below {len(self)}, got one greater by {index}")
        numbers = range(first + index * stage.rows, first + (index + 1) * stage.rows)
        return tuple(self._row(stage, number) for number in numbers)

    def _row(self, stage: Stage, number: int) -> Row:
        draw = random.Random(f"{self.seed}/{number}").random()
        for kind in stage.kinds[:-1]:
            if draw < kind.share:
                return kind.make(number)
            draw -= kind.share
        return stage.kinds[-1].make(number)


class FixedRows(Dataset[Group]):
    """A data set of rows that are made once and kept, for evaluation; each is a group."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Group:
        return (self.rows[index],)


def plain_row(ids: Ids, prefix: Sequence[int] = ()) -> Row:
    """Returns a row whose every token but the first is predicted."""
    input_ids = np.concatenate([np.asarray(prefix, dtype=np.int64), ids.astype(np.int64)])
    labels = input_ids.copy()
    labels[0] = IGNORED
    return Row(input_ids, labels, np.zeros(len(input_ids), dtype=np.bool_))


def stack(groups: Sequence[Group], *, answers: bool) -> Batch:
    """Stacks the rows of groups to a batch.

    Args:
        groups: groups of rows, all rows of the same length.
        answers: whether the batch has ``answers``.

    Returns:
        ``input_ids`` and ``labels`` (int64), and ``answers`` (bool), each ``(B, tokens)``, with
        ``questions``, those of each row, and ``packed``, whether documents are packed in it. Where
        they are in any row, also ``position_ids``, which count from each document's first token on.
    """
    rows = [row for group in groups for row in group]
    batch: Batch = {
        "input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows])),
        "labels": torch.from_numpy(np.stack([row.labels for row in rows])),
    }
    if answers:
        batch["answers"] = torch.from_numpy(np.stack([row.answers for row in rows]))
        batch["questions"] = [row.questions for row in rows]
        batch["packed"] = [row.documents is not None for row in rows]
    if any(row.documents is not None for row in rows):
        batch["position_ids"] = torch.from_numpy(np.stack([_positions(row) for row in rows]))
    return batch


def _positions(row: Row) -> npt.NDArray[np.int64]:
    """Returns the position of each token in its document, ``(tokens,)``."""
    columns = np.arange(len(row.input_ids), dtype=np.int64)
    if row.documents is None:
        return columns
    begins = np.diff(row.documents, prepend=-1) != 0
    return columns - np.maximum.accumulate(np.where(begins, columns, 0))


@lru_cache(maxsize=4)
def order_of(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Returns the order of the ``count`` items of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)
