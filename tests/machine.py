"""What a memory ought to hold, in plain lists, and what it ought to answer by ``oracle.py``: the
other half of the machine in ``tests/hf/test_machine.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

import models
import oracle
from landmark.config import LandmarkConfig


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a row.

    Attributes:
        id: the token.
        text: False for padding, and for a token that was hidden later.
        silent: it was read without retrieval.
        rough: it was computed in bfloat16, by autocast.
        pad: generate wrote it behind the end of a row that ended early.
        unknown: it was read as an embedding.
    """

    id: int
    text: bool = True
    silent: bool = False
    rough: bool = False
    pad: bool = False
    unknown: bool = False


Row = list[Column]


def visible(row: Row) -> Row:
    """The columns that count."""
    return [column for column in row if column.text]


def ids_of(row: Row) -> list[int]:
    return [column.id for column in row]


def known_ids(row: Row) -> list[int]:
    """The ids that a memory tells."""
    return [-1 if column.unknown else column.id for column in row]


def mask_of(row: Row) -> list[int]:
    return [int(column.text) for column in row]


def rough(row: Row) -> bool:
    """Whether something visible was computed in bfloat16, so that the oracle's logits are not to be
    expected.
    """
    return any(column.rough for column in visible(row))


def hidden(row: Row, count: int) -> Row:
    """The row with its last ``count`` visible tokens made padding."""
    last = [index for index, column in enumerate(row) if column.text][len(visible(row)) - count :]
    return [
        dataclasses.replace(each, text=False) if index in last else each
        for index, each in enumerate(row)
    ]


def written_pads(row: Row) -> int:
    """How many of the last visible tokens are pads that generate wrote."""
    count = 0
    for column in reversed(visible(row)):
        if not column.pad:
            break
        count += 1
    return count


# New columns.

PADDINGS = ("none", "left", "right", "between", "one row")


def padding(kind: str, rows: int, tokens: int) -> list[list[int]]:
    """The mask of new columns, 0 for padding; every row has another amount of it, the first has the
    most.
    """
    mask = [[1] * tokens for _ in range(rows)]
    for index, row in enumerate(mask):
        amount = max(0, min(tokens - 1, rows - index))
        if kind == "left":
            row[:amount] = [0] * amount
        if kind == "right":
            row[tokens - amount :] = [0] * amount
        if kind == "between" and tokens > 2:
            row[1 + index % (tokens - 2)] = 0
    if kind == "one row" and rows > 1:
        mask[0] = [0] * tokens
    return mask


def some_text(rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Ids of ``tokens`` new columns; an odd seed repeats a few words, so that they can be looked
    up.
    """
    return [
        [
            1 + each % 3 if seed % 2 else each
            for each in models.text(tokens, seed=3 * seed + row).tolist()
        ]
        for row in range(rows)
    ]


def as_tensors(
    rows: list[Row], new: list[Row], *, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T) of new columns, or of all columns."""
    columns = [row + more for row, more in zip(rows, new, strict=True)] if whole else new
    return torch.tensor([*map(ids_of, columns)]), torch.tensor([*map(mask_of, columns)])


# What the definition says.

CLOSE = 1e-3  # a choice decided by less may fall otherwise in float32


class Truth:
    """The oracle's logits under one setting, computed once for each text that begins alike."""

    def __init__(self, family: str, kv_heads: int, settings: LandmarkConfig) -> None:
        self.model = models.oracle_model(family, kv_heads)
        self.settings = settings
        self.computed: dict[
            tuple[tuple[int, bool], ...], tuple[torch.Tensor, oracle.Known, float]
        ] = {}

    def logits(self, row: Row, last: int) -> torch.Tensor:
        """Logits (last, vocabulary) of the last so many visible tokens of a row, which stands
        alone.
        """
        text = tuple((column.id, column.silent) for column in visible(row))
        seen = next(n for n in range(len(text), -1, -1) if n == 0 or text[:n] in self.computed)
        if seen < len(text):
            self._compute(text, seen)
        return torch.stack(
            [self.computed[text[: n + 1]][0] for n in range(len(text) - last, len(text))]
        )

    def _compute(self, text: tuple[tuple[int, bool], ...], seen: int) -> None:
        _, known, closest = self.computed[text[:seen]] if seen else (None, {}, math.inf)
        known = dict(known)
        found = [closest]
        logits = oracle.logits(
            self.model,
            models.landmark_vector(),
            torch.tensor([token for token, _ in text]),
            self.settings,
            silent={index for index, (_, silent) in enumerate(text) if silent},
            known=known,
            seen=seen,
            closest=found,
        )
        self.computed.update(
            {text[: seen + n + 1]: (each, known, min(found)) for n, each in enumerate(logits)}
        )

    def is_close(self, row: Row) -> bool:
        """Whether rounding to float32 might choose other blocks somewhere in a row."""
        if not visible(row):
            return False
        self.logits(row, 1)
        return (
            self.computed[tuple((column.id, column.silent) for column in visible(row))][2] < CLOSE
        )

    def steps(self, row: Row, said: list[int]) -> torch.Tensor:
        """Logits (len(said), vocabulary) from which each of the tokens said after a row was
        chosen.
        """
        return self.logits([*row, *map(Column, said[:-1])], len(said))

    def beams(self, row: Row, new: int, beams: int) -> list[list[list[int]]]:
        """The best continuations after 0, 1, ... ``new`` steps of a beam search without ends, best
        first.
        """
        best: list[tuple[list[int], torch.Tensor]] = [([], torch.zeros(()))]
        found = [[[]]]
        for _ in range(new):
            scores = torch.stack(
                [
                    score + self.logits([*row, *map(Column, said)], 1)[0].float().log_softmax(0)
                    for said, score in best
                ]
            )
            order = scores.flatten().topk(beams).indices.tolist()
            size = scores.shape[1]
            best = [([*best[n // size][0], n % size], scores.flatten()[n]) for n in order]
            found.append([said for said, _ in best])
        return found


@functools.lru_cache(maxsize=64)
def truth(family: str, kv_heads: int, settings: LandmarkConfig) -> Truth:
    """The one ``Truth`` of these settings, so that histories that begin alike share what is
    computed.
    """
    return Truth(family, kv_heads, settings)


TEMPERATURE = 0.7
OF_BEST = 5


def sampled(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Draws from logits (B, new, vocabulary) step by step as generate does with this seed; (B,
    new).
    """
    torch.manual_seed(seed)
    draws = []
    for step in logits.float().unbind(1):
        scores = step / TEMPERATURE
        scores = scores.masked_fill(scores < scores.topk(OF_BEST).values[:, -1:], -torch.inf)
        draws.append(torch.multinomial(scores.softmax(dim=-1), 1)[:, 0])
    return torch.stack(draws, dim=1)
