"""Rules of the machine that generate: greedily, by sampling, by beams, assisted."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from memory_state import BOUNDS, CACHE_NAMES, MOST_ROWS, Memory

import machine
import models
from machine import Column, Row, as_tensors

PAD = 0
TOKENS = st.integers(0, 4)
SEEDS = st.integers(0, 3)
NEW = st.integers(1, 5)
ASSISTED = (
    ("stock", "landmarks")
    if models.OLD_ASSISTED
    else ("lookup", "stock", "landmarks", "early exit")
)


@functools.cache
def assistant() -> Any:
    """A stock model that guesses."""
    return models.stock_model("llama", layers=1, seed=5)


def helper(how: str, model: Any) -> dict[str, Any]:
    """Arguments of assisted decoding."""
    helpers: dict[str, dict[str, Any]] = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "stock": {"assistant_model": assistant()},
        "landmarks": {"assistant_model": model},
        "early exit": {"assistant_early_exit": 1},
    }
    return helpers[how]


class Generating(Memory):
    """A memory that is given to generate."""

    def asked(self, tokens: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Rows and new columns of a call of generate, which goes on from text: the last column of
        every row is.

        Without new columns, the last token of every row is computed again.
        """
        rows = self.unpadded()
        new = self.columns(tokens, seed)
        if not all(
            (row + more)[-1:] and (row + more)[-1].text for row, more in zip(rows, new, strict=True)
        ):
            new = self.columns(tokens + 1, seed)
        if not new[0]:
            again = {"silent": False, "rough": self.around == "autocast", "unknown": False}
            rows = [[*row[:-1], dataclasses.replace(row[-1], **again)] for row in rows]
        return rows, new

    def generate(
        self, rows: list[Row], new: list[Row], count: int, *, alone: bool = False, **options: Any
    ) -> list[list[int]] | None:
        """Returns what is said behind the columns, ``None`` where the memory cannot go back;
        ``alone``: of new ids.
        """
        ids, mask = as_tensors(rows, new, whole=True)
        name = options.pop("name", "past_key_values")
        if alone and new[0]:
            ids = ids[:, -len(new[0]) :]
        options = {
            "max_new_tokens": count,
            "do_sample": False,
            "attention_mask": mask,
            name: self.cache,
            **options,
        }
        told = self.going_back(rows if new[0] else [], lambda: self.model.generate(ids, **options))
        if told is None:
            return None
        assert torch.equal(told[:, : ids.shape[1]], ids.repeat_interleave(len(told) // len(ids), 0))
        return told[:, ids.shape[1] :].tolist()

    def have_read(
        self, rows: list[Row], new: list[Row], told: list[list[int]], end: int | None = None
    ) -> None:
        """Each row of the memory has read all but the last token of what was said behind its
        columns.
        """
        rough = self.around == "autocast"
        times = len(told) // len(rows)
        whole = [row + more for row, more in zip(rows, new, strict=True) for _ in range(times)]
        said = [
            [
                Column(token, rough=rough, pad=end in tokens[:place])
                for place, token in enumerate(tokens)
            ]
            for tokens in told
        ]
        self.rows = [row + more[:-1] for row, more in zip(whole, said, strict=True)]
        self.pending = [more[-1] for more in said]

    def most_likely(self, rows: list[Row], told: list[list[int]], end: int | None = None) -> None:
        """Each token is the one with the greatest logit, up to the end of its row; in float32 near
        ties may be.
        """
        assert len(rows) == len(told)
        slack = 0.0 if self.dtype == torch.float64 else BOUNDS[self.dtype]
        for row, tokens in zip(rows, told, strict=True):
            said = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            assert tokens[len(said) :] == [PAD] * (len(tokens) - len(said))
            if self.is_certain([*row, *map(Column, said)]):
                logits = self.truth.steps(row, said).float()
                chosen = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
                assert (chosen >= logits.max(dim=1).values - slack).all(), (
                    "generate says something else"
                )

    def end_of_first(self, row: Row, after: int) -> int | None:
        """A token for the end, with which a row ends after so many tokens."""
        said: list[int] = []
        while len(said) < after:
            said.append(int(self.truth.logits([*row, *map(Column, said)], 1)[0].float().argmax()))
        return said[-1] if said and said[-1] != PAD else None

    @precondition(Memory.has_room)
    @rule(
        tokens=TOKENS,
        seed=SEEDS,
        count=NEW,
        ends=st.integers(0, 3),
        alone=st.booleans(),
        use_cache=st.sampled_from((True, True, False)),
        name=CACHE_NAMES,
    )
    def greedy(
        self, tokens: int, seed: int, count: int, ends: int, alone: bool, use_cache: bool, name: str
    ) -> None:
        """Greedy; with an end, rows that reached it are filled with pads, which the next turn
        masks.
        """
        rows, new = self.asked(tokens, seed)
        whole = [row + more for row, more in zip(rows, new, strict=True)]
        end = self.end_of_first(whole[0], ends)
        told = self.generate(
            rows, new, count, alone=alone, eos_token_id=end, use_cache=use_cache, name=name
        )
        if told is not None:
            self.most_likely(whole, told, end)
            assert len(told[0]) == count or all(end in tokens for tokens in told)
            self.have_read(rows, new, told, end)

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, seed=SEEDS, count=NEW, answers=st.integers(1, 2))
    def sample(self, tokens: int, seed: int, count: int, answers: int) -> None:
        """Sampling with a seed, one answer or several of each row, draws from the oracle's
        logits.
        """
        if len(self.rows) * answers > MOST_ROWS:
            return
        rows, new = self.asked(tokens, seed)
        torch.manual_seed(seed)
        warped = {"temperature": machine.TEMPERATURE, "top_k": machine.OF_BEST}
        told = self.generate(
            rows, new, count, do_sample=True, num_return_sequences=answers, **warped
        )
        if told is None:
            return
        whole = [row + more for row, more in zip(rows, new, strict=True) for _ in range(answers)]
        said = [[*row, *map(Column, tokens)] for row, tokens in zip(whole, told, strict=True)]
        if self.dtype == torch.float64 and all(map(self.is_certain, said)):
            logits = [
                self.truth.steps(row, tokens) for row, tokens in zip(whole, told, strict=True)
            ]
            assert machine.sampled(torch.stack(logits), seed).tolist() == told
        self.have_read(rows, new, told)

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, seed=SEEDS, count=st.integers(1, 3), answers=st.integers(1, 2))
    def beams(self, tokens: int, seed: int, count: int, answers: int) -> None:
        """Two beams of each row: the best, or both, are the oracle's; the memory holds beams of the
        step before.
        """
        if len(self.rows) * 2 > MOST_ROWS:
            return
        rows, new = self.asked(tokens, seed)
        told = self.generate(rows, new, count, num_beams=2, num_return_sequences=answers)
        if told is None:
            return
        held = [self.cache.ids(row).tolist() for row in range(2 * len(rows))]
        held = [ids[len(ids) - (count - 1) :] for ids in held]
        for index, row in enumerate(row + more for row, more in zip(rows, new, strict=True)):
            if self.dtype == torch.float64 and self.is_certain(row):
                best = self.truth.beams(row, count, 2)
                assert told[index * answers : (index + 1) * answers] == best[-1][:answers]
                assert all(ids in best[-2] for ids in held[2 * index : 2 * index + 2])
        self.have_read(rows, new, [[*ids, PAD] for ids in held])
        self.pending = None

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, seed=SEEDS, count=NEW, how=st.sampled_from(ASSISTED))
    def assisted(self, tokens: int, seed: int, count: int, how: str) -> None:
        """Assisted decoding of several rows is refused; of one row it says what greedy decoding
        says.
        """
        if len(self.rows) > 1:
            ids, mask = as_tensors(*self.asked(tokens, seed), whole=True)
            options = {
                "attention_mask": mask,
                "past_key_values": self.cache,
                "max_new_tokens": count,
            }
            self.refused(lambda: self.model.generate(ids, **options, **helper(how, self.other)))
            self.select([0])
        rows, new = self.asked(tokens, seed)
        told = self.generate(rows, new, count, **helper(how, self.other))
        if told is not None:
            assert len(told[0]) == count
            self.most_likely([rows[0] + new[0]], told)
            self.have_read(rows, new, told)
