"""A machine that does to memories whatever a user may do, and compares all that they answer with the oracle.

One history: a model of random settings, a memory, and steps drawn from the rules below. ``machine.py`` keeps in plain
lists what each row ought to have read. After any history each row answers as the oracle does for that row's own text
alone, and the memory's counters are those of the lists. A step that is refused leaves the memory as it was: the next
steps show it. What histories found is kept, shrunk, in ``test_found_histories.py``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from packaging.version import Version
from transformers import DynamicCache

import machine
import models
from landmark import LandmarkCache
from landmark.blocks import slots_for
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from machine import Column, Row, as_tensors

pytestmark = pytest.mark.usefixtures("wide_norms")

GROUPS, HISTORIES, FULL_GROUPS, FULL_HISTORIES, STEPS = 15, 10, 60, 50, 8
MOST_COLUMNS, MOST_ROWS = 50, 4
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
SHORT = 24  # lengths that a stock family may act upon, such as Phi3's original_max_position_embeddings
PAD, WIDE = 0, 64

AROUND: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
TIERS: tuple[dict[str, Any], ...] = (
    {},
    {"tier": "host"},
    {"tier": "host", "device_bytes": 50_000},
    {"tier": "disk"},
    {"tier": "disk", "device_bytes": 50_000, "host_bytes": 5_000},
)
POLICIES = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from((2, 1, WIDE)),
        "granularity": st.sampled_from(GRANULARITIES),
        "positions": st.sampled_from(POSITIONS),
        "local_blocks": st.integers(0, 2),
        "max_blocks": st.sampled_from((None, None, 0, 1, 3)),
        "layers": st.sampled_from((None, None, (1,), (0,))),
        "mode": st.sampled_from(("retrieval",) * 5 + ("all",)),
    }
)
CHUNKS = st.sampled_from((1000, 1, 3, 5, 11))
TOKENS, SEEDS, SMALL = st.sampled_from((1, 2, 5, 3, 9, 14)), st.integers(0, 3), st.integers(0, 3)
NEW = st.integers(1, 5)


@functools.cache
def pristine(family: str, kv_heads: int, block_size: int, dtype: torch.dtype, other: bool = False) -> Any:
    """A landmark model that no history touches; ``other`` has other weights."""
    model = copy.deepcopy(
        models.landmark_model(family, LandmarkConfig(block_size=block_size), kv_heads=kv_heads, dtype=dtype)
    )
    for length in ("max_position_embeddings", "original_max_position_embeddings"):
        if hasattr(model.config, length):
            setattr(model.config, length, SHORT)
    with torch.no_grad():
        for parameter in model.parameters() if other else ():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def other_text(m: Any) -> Any:
    """Ids that do not begin with the memory's."""
    places = [place for place, column in enumerate(m.rows[0]) if column.text and not column.unknown]
    ids, mask = as_tensors(m.rows, m.columns(1, 0), whole=True)
    if not places:
        return None
    ids[0, places[-1]] = 1 + ids[0, places[-1]] % (models.VOCAB - 1)
    return lambda: m.model.generate(ids, attention_mask=mask, past_key_values=m.cache, max_new_tokens=2)


def with_mask(m: Any, row: int, place: int) -> Any:
    """A mask whose value over one remembered column is turned round."""
    new = m.columns(1, 0)
    ids, mask = as_tensors(m.rows, new, whole=True)
    mask[row, place] = 1 - mask[row, place]
    return lambda: m.model(ids[:, m.past() :], attention_mask=mask, past_key_values=m.cache)


def hole(m: Any) -> Any:
    """A mask that hides a token in the middle."""
    places = [place for place, column in enumerate(m.rows[0]) if column.text]
    return with_mask(m, 0, places[0]) if len(places) > 1 else None


def shown(m: Any) -> Any:
    """A mask that shows padding."""
    places = [place for place, column in enumerate(m.rows[-1]) if not column.text]
    return with_mask(m, -1, places[0]) if places else None


def other_setting(m: Any) -> Any:
    """A model whose settings have changed since."""
    m.other.configure_landmark(top_k=m.model.landmark.top_k + 1)
    return lambda: m.other(m.ids(2), past_key_values=m.cache)


def of_the_whole(m: Any, model: Any) -> Any:
    """Generates with another model, or in another way, behind the memory."""
    ids, mask = as_tensors(m.rows, m.columns(1, 0), whole=True)
    return lambda: model.generate(ids, attention_mask=mask, past_key_values=m.cache, max_new_tokens=2)


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "too many rows": lambda m: lambda: m.model(torch.ones(len(m.rows) + 1, 2).long(), past_key_values=m.cache),
    "too many rows to read": lambda m: lambda: m.model.read(torch.ones(len(m.rows) + 1, 2).long(), cache=m.cache),
    "no text": lambda m: lambda: m.model(m.ids(0), past_key_values=m.cache),
    "no text to read": lambda m: lambda: m.model.read(m.ids(0), cache=m.cache),
    "a mask too long": lambda m: (
        lambda: m.model(m.ids(2), attention_mask=torch.ones(len(m.rows), m.past() + 3), past_key_values=m.cache)
    ),
    "a crop too far": lambda m: lambda: m.cache.crop(-m.past() - 1),
    "a row that is not there": lambda m: lambda: m.cache.batch_select_indices(torch.tensor([0, len(m.rows)])),
    "several rows saved": lambda m: (lambda: m.cache.save(m.new_folder())) if len(m.rows) > 1 else None,
    "another text": other_text,
    "the question alone": lambda m: lambda: m.model.generate(m.ids(2), past_key_values=m.cache, max_new_tokens=2),
    "a beginning": lambda m: (
        (
            lambda: m.model.generate(
                as_tensors(m.rows, m.rows, whole=False)[0][:, :-1], past_key_values=m.cache, max_new_tokens=2
            )
        )
        if m.past() > 1
        else None
    ),
    "a hidden token in the middle": hole,
    "shown padding": shown,
    "a stock cache": lambda m: lambda: m.model(m.ids(2), past_key_values=DynamicCache(config=m.model.config)),
    "a stock cache to generate": lambda m: (
        lambda: m.model.generate(m.ids(2), past_key_values=DynamicCache(config=m.model.config), max_new_tokens=2)
    ),
    "another model": lambda m: of_the_whole(m, m.other),
    "another setting": other_setting,
}


@functools.cache
def assistant() -> Any:
    """A stock model that guesses."""
    return models.stock_model("llama", layers=1, seed=5)


# Lookup without an end and early exit raise in the stock code of 5.0.
OLD = Version(transformers.__version__) < Version("5.1")
ASSISTED = ("stock", "landmarks") if OLD else ("lookup", "stock", "landmarks", "early exit")


class Machine(RuleBasedStateMachine):
    """A memory and what it ought to hold; a second one, a fork of it, is kept aside."""

    group = 0

    def __init__(self) -> None:
        super().__init__()
        self.folders = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.sound = False

    @initialize(
        policy=POLICIES, chunk=CHUNKS, rows=st.integers(1, 3), tier=st.sampled_from(TIERS), narrow=st.integers(0, 3)
    )
    def begin(self, policy: dict[str, Any], chunk: int, rows: int, tier: dict[str, Any], narrow: int) -> None:
        """Makes a model and an empty memory; in float32 every block is retrieved, so that rounding chooses nothing."""
        self.dtype = torch.float32 if narrow == 3 else torch.float64
        family, kv_heads = models.FAMILIES[self.group % len(models.FAMILIES)], (2, 1, 4)[self.group % 3]
        kv_heads = 4 if family == "gpt_neox" else kv_heads
        settings = LandmarkConfig(block_size=3 + self.group % 4, chunk_tokens=chunk, **policy)
        if self.dtype == torch.float32:
            settings = settings.replace(top_k=WIDE, max_blocks=None)
        make = functools.partial(pristine, family, kv_heads, settings.block_size, self.dtype)
        self.model, self.other = copy.deepcopy(make()), make(other=True)
        for each in (self.model, self.other):
            each.configure_landmark(**{**settings.to_dict(), "landmark_trained": True, "trained_length": 4096})
        self.truth = machine.truth(family, kv_heads, settings.replace(chunk_tokens=1))
        self.around, self.count = "nothing", rows
        self.cache = LandmarkCache(self.model, **tier)
        self.rows: list[Row] = [[] for _ in range(rows)]
        self.pending: list[Column] | None = None
        self.aside: tuple[Any, ...] | None = None
        self.saved: tuple[Path, Row] | None = None
        self.sound = True

    # What all rules share.

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what the library does in one step."""
        self.sound = False
        with torch.no_grad(), AROUND[self.around]():
            yield
        self.sound = True

    def ids(self, tokens: int) -> torch.Tensor:
        """Ids (B, tokens) of anything."""
        return torch.ones(len(self.rows), tokens, dtype=torch.long)

    def past(self) -> int:
        return len(self.rows[0])

    def has_room(self) -> bool:
        return self.past() < MOST_COLUMNS

    def is_rough(self) -> bool:
        return self.around == "autocast" or any(map(machine.rough, self.rows))

    def columns(self, tokens: int, seed: int, padding: str = "none", **marks: bool) -> list[Row]:
        """New columns of every row: what generate said last, and some text, padded."""
        rows = len(self.rows)
        marks = {**marks, "rough": self.around == "autocast"}
        text, mask = machine.some_text(rows, tokens, seed), machine.padding(padding, rows, tokens)
        last = [[] if self.pending is None else [self.pending[row]] for row in range(rows)]
        said = [[Column(each.id, text=not each.pad, **marks) for each in each_row] for each_row in last]
        more = [
            [Column(a, text=bool(b), **marks) for a, b in zip(*pair, strict=True)]
            for pair in zip(text, mask, strict=True)
        ]
        return [one + two for one, two in zip(said, more, strict=True)]

    def compare(self, logits: torch.Tensor, rows: list[Row], new: list[Row]) -> None:
        """Logits (B, T, vocabulary) of new columns are the oracle's."""
        assert logits.shape[:2] == (len(rows), len(new[0]))
        for found, row, more in zip(logits, rows, new, strict=True):
            text = torch.tensor(machine.mask_of(more)).bool()
            found, whole = found[text], row + more
            assert found.isfinite().all()
            if not machine.rough(whole) and len(found):
                wrong = (found - self.truth.logits(whole, len(found))).abs().max()
                assert wrong < BOUNDS[self.dtype], f"logits differ by {wrong:.1e}"

    def honest(self) -> list[Row]:
        """The rows of who masks the pads that generate wrote behind the end of a row."""
        return [machine.hidden(row, machine.written_pads(row)) for row in self.rows]

    def may_refuse_to_go_back(self, refusal: ValueError) -> bool:
        return any(word in str(refusal) for word in ("evicted", "granularity head"))

    def refused(self, call: Callable[[], Any]) -> str:
        """A mistake is told in one line."""
        with pytest.raises(ValueError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # Reading.

    @precondition(has_room)
    @rule(
        tokens=TOKENS,
        seed=SEEDS,
        retrieve=st.booleans(),
        padding=st.sampled_from(machine.PADDINGS),
        mask=st.sampled_from(("none", "new", "whole")),
    )
    def read(self, tokens: int, seed: int, retrieve: bool, padding: str, mask: str) -> None:
        """model.read: with or without retrieval and padding; the mask may cover new columns only, or be left out."""
        new = self.columns(tokens, seed, padding, silent=not retrieve)
        self.call(new, mask, lambda ids, given: self.model.read(ids, given, cache=self.cache, retrieve=retrieve))

    @precondition(has_room)
    @rule(
        tokens=TOKENS,
        seed=SEEDS,
        embeds=st.booleans(),
        padding=st.sampled_from(machine.PADDINGS),
        mask=st.sampled_from(("none", "new", "whole")),
    )
    def forward(self, tokens: int, seed: int, embeds: bool, padding: str, mask: str) -> None:
        """model(ids or embeddings, past_key_values=memory) gives the oracle's logits."""
        new = self.columns(tokens, seed, padding, unknown=embeds)
        self.call(new, mask, self.forwarded if not embeds else self.embedded)

    def forwarded(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, past_key_values=self.cache).logits

    def embedded(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        embeds = self.model.get_input_embeddings()(ids)
        return self.model(inputs_embeds=embeds, attention_mask=mask, past_key_values=self.cache).logits

    def call(self, new: list[Row], mask: str, function: Callable[..., Any], rows: list[Row] | None = None) -> None:
        """Calls a function of ids and mask; a mask over everything hides the pads that generate wrote."""
        if rows is None:
            rows = self.honest() if mask == "whole" else self.rows
        ids, given = as_tensors(self.rows, new, whole=False)
        if mask == "whole":
            given = as_tensors(rows, new, whole=True)[1]
        told = self.going_back(rows, lambda: function(ids, None if mask == "none" and given.all() else given))
        if isinstance(told, torch.Tensor):
            self.compare(told, rows, new)
        if told is not None:
            self.rows = [row + more for row, more in zip(rows, new, strict=True)]
            self.pending = None

    def going_back(self, rows: list[Row], call: Callable[[], Any]) -> Any:
        """Calls; ``None`` where ``rows`` hide tokens of the memory that it cannot go back behind."""
        with self.step():
            try:
                return call()
            except ValueError as refusal:
                if rows != self.rows and self.may_refuse_to_go_back(refusal):
                    return None
                raise

    @precondition(lambda self: self.has_room() and any(map(machine.visible, self.rows)))
    @rule(row=SMALL, count=st.integers(1, 4), tokens=st.integers(1, 3), seed=SEEDS)
    def hide(self, row: int, count: int, tokens: int, seed: int) -> None:
        """A mask that hides a row's last tokens takes them back."""
        rows, row = list(self.rows), row % len(self.rows)
        rows[row] = machine.hidden(rows[row], min(count, len(machine.visible(rows[row]))))
        self.call(self.columns(tokens, seed), "whole", self.forwarded, rows)

    @precondition(has_room)
    @rule(tokens=TOKENS, layer=st.integers(0, 1))
    def interrupted(self, tokens: int, layer: int) -> None:
        """A call that fails inside the model leaves nothing behind."""
        ids, _ = as_tensors(self.rows, self.columns(tokens, 0), whole=False)

        def fail(*_: Any) -> None:
            raise InterruptedError

        hook = self.model.base_model.layers[layer].register_forward_hook(fail)
        with self.step(), contextlib.suppress(InterruptedError), hook:
            self.model(ids, past_key_values=self.cache)

    # Generating.

    def asked(self, tokens: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Rows and new columns of a call of generate, which goes on from text: the last column of every row is."""
        for more in (tokens, tokens + 1):
            new = self.columns(more, seed)
            if all(
                (row + columns)[-1:] and (row + columns)[-1].text
                for row, columns in zip(self.honest(), new, strict=True)
            ):
                break
        return self.honest(), new

    def generate(self, rows: list[Row], new: list[Row], count: int, **options: Any) -> list[list[int]] | None:
        """Returns what generate says behind these columns, ``None`` where the memory cannot go back so far."""
        ids, mask = as_tensors(rows, new, whole=True)
        options = {"max_new_tokens": count, "do_sample": False, "past_key_values": self.cache, **options}
        with self.step():
            told = self.going_back(
                rows if new[0] else [row[:-1] for row in rows],
                lambda: self.model.generate(ids, attention_mask=mask, **options),
            )
        if told is None:
            return None
        each = ids.repeat_interleave(len(told) // len(ids), 0)
        assert torch.equal(told[:, : ids.shape[1]], each)
        return told[:, ids.shape[1] :].tolist()

    def said(self, rows: list[Row], new: list[Row], told: list[list[int]], end: int | None = None) -> None:
        """Each row of the memory has read all but the last token of what generate said behind its columns."""
        times = len(told) // len(rows)
        if not new[0]:  # the last token was computed again
            again = {"silent": False, "rough": self.around == "autocast", "unknown": False}
            rows, new = [row[:-1] for row in rows], [[dataclasses.replace(row[-1], **again)] for row in rows]
        whole = [row + more for row, more in zip(rows, new, strict=True) for _ in range(times)]
        ends = [tokens.index(end) + 1 if end in tokens else len(tokens) for tokens in told]
        rough = self.around == "autocast"
        columns = [
            [Column(each, rough=rough, pad=place >= stop) for place, each in enumerate(tokens)]
            for tokens, stop in zip(told, ends, strict=True)
        ]
        self.rows = [row + more[:-1] for row, more in zip(whole, columns, strict=True)]
        self.pending = [more[-1] for more in columns]

    def most_likely(self, rows: list[Row], told: list[list[int]], end: int | None = None) -> None:
        """Each token is the one with the greatest logit, up to the end of its row; in float32 near ties may be."""
        assert len(rows) == len(told)
        for row, tokens in zip(rows, told, strict=True):
            stop = tokens.index(end) + 1 if end in tokens else len(tokens)
            assert tokens[stop:] == [PAD] * (len(tokens) - stop)
            if not self.is_rough() and stop:
                logits = self.truth.steps(row, tokens[:stop]).float()
                chosen = logits.gather(1, torch.tensor(tokens[:stop])[:, None])[:, 0]
                slack = 0.0 if self.dtype == torch.float64 else BOUNDS[self.dtype]
                assert (chosen >= logits.max(dim=1).values - slack).all(), "generate says something else"

    def end_of_first(self, rows: list[Row], after: int) -> int | None:
        """A token for eos with which the first row ends after so many tokens."""
        said: list[int] = []
        while len(said) < after:
            logits = self.truth.logits([*rows[0], *map(Column, said)], 1)
            said.append(int(logits.float().argmax()))
        return said[-1] if said and said[-1] != PAD else None

    @precondition(has_room)
    @rule(tokens=st.integers(0, 4), seed=SEEDS, count=NEW, ends=SMALL)
    def greedy(self, tokens: int, seed: int, count: int, ends: int) -> None:
        """Greedy; with an end, rows that reached it are filled with pads, which the next turn masks."""
        rows, new = self.asked(tokens, seed)
        whole = [row + more for row, more in zip(rows, new, strict=True)]
        end = self.end_of_first(whole, ends)
        told = self.generate(rows, new, count, eos_token_id=end)
        if told is not None:
            self.most_likely(whole, told, end)
            assert len(told[0]) == count or all(end in tokens for tokens in told)
            self.said(rows, new, told, end)

    @precondition(has_room)
    @rule(tokens=st.integers(0, 4), seed=SEEDS, count=NEW, answers=st.integers(1, 2))
    def sample(self, tokens: int, seed: int, count: int, answers: int) -> None:
        """Sampling with a seed, one answer or several of each row, draws from the oracle's logits."""
        if len(self.rows) * answers > MOST_ROWS:
            return
        rows, new = self.asked(tokens, seed)
        torch.manual_seed(seed)
        warped = {"temperature": machine.TEMPERATURE, "top_k": machine.OF_BEST}
        told = self.generate(rows, new, count, do_sample=True, num_return_sequences=answers, **warped)
        if told is None:
            return
        whole = [row + more for row, more in zip(rows, new, strict=True) for _ in range(answers)]
        if not self.is_rough() and self.dtype == torch.float64:
            logits = [self.truth.steps(row, tokens) for row, tokens in zip(whole, told, strict=True)]
            assert machine.sampled(torch.stack(logits), seed).tolist() == told
        self.said(rows, new, told)

    @precondition(has_room)
    @rule(tokens=st.integers(0, 4), seed=SEEDS, count=st.integers(1, 3), answers=st.integers(1, 2))
    def beams(self, tokens: int, seed: int, count: int, answers: int) -> None:
        """Two beams of each row: the best, or both, are the oracle's; the memory holds beams of the last step."""
        if len(self.rows) * 2 > MOST_ROWS:
            return
        rows, new = self.asked(tokens, seed)
        told = self.generate(rows, new, count, num_beams=2, num_return_sequences=answers)
        if told is None:
            return
        held = [self.cache.ids(row).tolist() for row in range(2 * len(rows))]
        held = [ids[len(ids) - (count - 1) :] for ids in held]
        if not self.is_rough() and self.dtype == torch.float64:
            for index, (row, more) in enumerate(zip(rows, new, strict=True)):
                best = self.truth.beams(row + more, count, 2)
                assert told[index * answers : (index + 1) * answers] == best[-1][:answers]
                assert all(ids in best[-2] for ids in held[2 * index : 2 * index + 2])
        self.said(rows, new, [[*ids, 1] for ids in held])
        self.pending = None

    @precondition(has_room)
    @rule(tokens=st.integers(0, 4), seed=SEEDS, count=NEW, how=st.sampled_from(ASSISTED))
    def assisted(self, tokens: int, seed: int, count: int, how: str) -> None:
        """Assisted decoding of one row says what greedy decoding says."""
        rows, new = self.asked(tokens, seed)
        helpers = {
            "lookup": {"prompt_lookup_num_tokens": 3},
            "stock": {"assistant_model": assistant()},
            "landmarks": {"assistant_model": self.other},
            "early exit": {"assistant_early_exit": 1},
        }
        if len(rows) > 1:
            self.refused(lambda: self.generate(rows, new, count, **helpers[how]))
            return
        told = self.generate(rows, new, count, **helpers[how])
        if told is not None:
            assert len(told[0]) == count
            self.most_likely([rows[0] + new[0]], told)
            self.said(rows, new, told)

    # What else is done to a memory.

    @precondition(lambda self: self.past() > 0)
    @rule(columns=st.sampled_from((1, 2, 4, 9, 25)), positive=st.booleans())
    def crop(self, columns: int, positive: bool) -> None:
        """crop(-n) takes n columns back; crop(n) keeps n."""
        keep = max(int(positive), self.past() - columns)
        with self.step():
            try:
                self.cache.crop(keep if positive else keep - self.past())
            except ValueError as refusal:
                assert self.may_refuse_to_go_back(refusal)
                return
        self.rows, self.pending = [row[:keep] for row in self.rows], None

    @precondition(lambda self: self.past() > 0)
    @rule(
        how=st.sampled_from(("reorder", "some", "mask", "repeat")), rows=st.lists(SMALL, min_size=1, max_size=MOST_ROWS)
    )
    def choose_rows(self, how: str, rows: list[int]) -> None:
        """Rows are reordered, dropped or repeated."""
        held = len(self.rows)
        if how == "reorder":
            rows = [rows[index % len(rows)] % held for index in range(held)]
            call = functools.partial(self.cache.reorder_cache, torch.tensor(rows))
        elif how == "some":
            rows = [row % held for row in rows]
            call = functools.partial(self.cache.batch_select_indices, torch.tensor(rows))
        elif how == "mask":
            kept = torch.tensor([row % held in [each % held for each in rows] for row in range(held)])
            rows = kept.nonzero()[:, 0].tolist()
            call = functools.partial(self.cache.batch_select_indices, kept)
        else:
            times = max(1, min(len(rows), MOST_ROWS // held))
            rows = [row for row in range(held) for _ in range(times)]
            call = functools.partial(self.cache.batch_repeat_interleave, times)
        with self.step():
            call()
        self.rows = [self.rows[row] for row in rows]
        self.pending = None if self.pending is None else [self.pending[row] for row in rows]

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folders))

    @rule(deep=st.booleans())
    def fork(self, deep: bool) -> None:
        """Goes on with a copy and keeps the memory aside."""
        with self.step():
            fork = copy.deepcopy(self.cache) if deep else self.cache.fork()
        self.aside = self.cache, self.rows, self.pending
        self.cache = fork

    @precondition(lambda self: self.aside is not None)
    @rule()
    def swap(self) -> None:
        """Goes on with the memory that was kept aside."""
        assert self.aside is not None
        now = self.cache, self.rows, self.pending
        (self.cache, self.rows, self.pending), self.aside = self.aside, now

    @rule()
    def reset(self) -> None:
        """The memory forgets everything."""
        with self.step():
            self.cache.reset()
        self.rows, self.pending = [[] for _ in range(self.count)], None

    @rule(around=st.sampled_from(tuple(AROUND)))
    def enter(self, around: str) -> None:
        """The steps that follow run under inference_mode, autocast or neither; float64 knows no autocast."""
        self.around = "nothing" if around == "autocast" and self.dtype == torch.float64 else around

    @rule(chunk=CHUNKS, record=st.booleans())
    def settle(self, chunk: int, record: bool) -> None:
        """What is free to change at any time."""
        self.model.configure_landmark(chunk_tokens=chunk)
        self.cache.record = record

    @precondition(lambda self: len(self.rows) == 1 and machine.visible(self.rows[0]))
    @rule(same=st.booleans())
    def save(self, same: bool) -> None:
        """Saves to the folder of this memory, or to a new one."""
        folder = self.cache.saved.archive.folder if same and self.cache.saved is not None else self.new_folder()
        if self.cache.rewound and self.cache.saved is not None and folder == self.cache.saved.archive.folder:
            assert "cropped" in self.refused(lambda: self.cache.save(folder))
            return
        with self.step():
            self.cache.save(folder)
        self.saved = folder, machine.visible(self.rows[0])

    @precondition(lambda self: self.saved is not None)
    @rule(tier=st.sampled_from(TIERS))
    def open(self, tier: dict[str, Any]) -> None:
        """Goes on with what was saved, on any tier."""
        assert self.saved is not None
        folder, row = self.saved
        with self.step():
            self.cache = LandmarkCache.open(folder, self.model, **tier)
        self.rows, self.pending = [list(row)], None

    # Mistakes.

    @rule(name=st.sampled_from(sorted(MISTAKES)))
    def mistake(self, name: str) -> None:
        """Refused in one line, and the memory is as it was."""
        if self.past() == 0:
            return
        call = MISTAKES[name](self)
        if call is not None:
            self.sound = False
            self.refused(call)
            self.sound = True

    # What always holds.

    @invariant()
    def counters(self) -> None:
        """Everything that can be counted is what was read."""
        cache, rows, past = self.cache, self.rows, self.past()
        assert cache.get_seq_length() == past
        if past == 0:
            return
        text = [machine.visible(row) for row in rows]
        assert cache.tokens == [len(row) for row in text]
        assert cache.slots == [slots_for(len(row), cache.settings.block_size) for row in text]
        assert cache.batch_size == len(rows) and cache.is_initialized
        assert [cache.ids(row).tolist() for row in range(len(rows))] == [machine.known_ids(row) for row in text]

    def teardown(self) -> None:
        """Both memories answer what they ought to, to the last."""
        try:
            if self.sound:
                self.around = "nothing"
                self.call(self.columns(1, 2), "new", self.forwarded)
                if self.aside is not None:
                    self.swap()
                    self.counters()
                    self.call(self.columns(1, 2), "new", self.forwarded)
        finally:
            shutil.rmtree(self.folders)


def settings(histories: int, **changes: Any) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=histories,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **changes,
    )


def machine_of(group: int) -> type[Machine]:
    return type("Machine", (Machine,), {"group": group})


@pytest.mark.parametrize("group", range(GROUPS))
def test_any_history(group: int) -> None:
    run(hypothesis.seed(group)(machine_of(group)), settings=settings(HISTORIES))


@pytest.mark.full
@pytest.mark.parametrize("group", range(FULL_GROUPS))
def test_any_history_of_fresh_seeds(group: int) -> None:
    run(machine_of(group), settings=settings(FULL_HISTORIES, print_blob=True))
