"""The rows that a model is trained on: windows of a corpus, and retrieval episodes.

Each row is decided by the seed and its index.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from landmark.data.episodes import IGNORED, Episodes, Row
from landmark.data.tokens import Ids

Batch = dict[str, torch.Tensor]


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
        start += int(_order(self.seed, epoch, self.per_epoch)[number]) * self.tokens
        return plain_row(self.ids[start : start + self.tokens], self.prefix)


class Rows(Dataset[Row]):
    """A data set of rows, a share of them episodes, the others windows of the text.

    Args:
        windows: makes the plain rows.
        episodes: makes the episodes, ``None`` for none.
        share: the probability of an episode.
        count: rows of the data set.
        seed: decides which rows are episodes.
    """

    def __init__(
        self, windows: Windows, episodes: Episodes | None, *, share: float, count: int, seed: int
    ) -> None:
        self.windows = windows
        self.episodes = episodes
        self.share = share
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        if self.episodes is None:
            return self.windows(index)
        draw = random.Random(f"{self.seed}/{index}").random()
        return self.episodes(index) if draw < self.share else self.windows(index)


class FixedRows(Dataset[Row]):
    """A data set of rows that are made once and kept, for evaluation."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def plain_row(ids: Ids, prefix: Sequence[int] = ()) -> Row:
    """Returns a row whose every token but the first is predicted."""
    input_ids = np.concatenate([np.asarray(prefix, dtype=np.int64), ids.astype(np.int64)])
    labels = input_ids.copy()
    labels[0] = IGNORED
    return Row(input_ids, labels, np.zeros(len(input_ids), dtype=np.bool_))


def stack(rows: Sequence[Row], *, answers: bool) -> Batch:
    """Stacks rows to a batch.

    Args:
        rows: the rows, all of the same length.
        answers: whether the batch has ``answers``.

    Returns:
        ``input_ids`` and ``labels`` (int64), and ``answers`` (bool), each ``(B, tokens)``.
    """
    batch = {
        "input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows])),
        "labels": torch.from_numpy(np.stack([row.labels for row in rows])),
    }
    if answers:
        batch["answers"] = torch.from_numpy(np.stack([row.answers for row in rows]))
    return batch


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Returns the order of the windows of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)
