"""With ``top_k`` at or above the number of blocks, every way to generate equals the uncached
one-pass forward.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import models
from landmark.config import GRANULARITIES, LandmarkConfig

pytestmark = pytest.mark.usefixtures("wide_norms")

WIDE = 720
NARROW = 100
ALWAYS = 60
ALWAYS_NARROW = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One draw: rows of text, how they are fed, and the settings under which nothing is left
    out.
    """

    kind: str
    family: str
    kv_heads: int
    settings: LandmarkConfig
    prompts: tuple[torch.Tensor, ...]
    new: int
    side: str
    dtype: torch.dtype
    random: random.Random

    @property
    def model(self) -> Any:
        return models.landmark_model(
            self.family, self.settings, kv_heads=self.kv_heads, dtype=self.dtype
        )

    @property
    def crosses(self) -> bool:
        """Whether some row crosses two borders in the prompt and one among the tokens that are fed
        after it.
        """
        text = self.settings.text_per_block
        lengths = [len(prompt) for prompt in self.prompts]
        return any(n // text >= 2 and (n + self.new - 1) // text > n // text for n in lengths)


def draw(seed: int, kinds: tuple[str, ...], dtype: torch.dtype) -> Case:
    chance = random.Random(seed)
    kind = kinds[seed % len(kinds)]
    block_size = chance.randint(4, 9)
    text = block_size - 1
    crossing = chance.random() < 0.75
    new = chance.randint(text + 1, text + 4) if crossing else chance.randint(1, 4)
    rows = 1 if kind in ("lookup", "assisted") else chance.randint(1, 3)
    longest = chance.randint(2 * text, 4 * text) if crossing else chance.randint(1, 3 * text)
    lengths = [longest, *(chance.randint(1, longest) for _ in range(rows - 1))]
    chance.shuffle(lengths)
    blocks = (longest + 3 * new + 9) // text + 1
    settings = LandmarkConfig(
        block_size=block_size,
        top_k=blocks + chance.randint(0, 2),
        granularity=chance.choice(GRANULARITIES),
        positions=chance.choice(("stingy", "exact")),
        local_blocks=chance.randint(0, 3),
        max_blocks=chance.choice((None, blocks)),
        local=chance.choice(("blocks", "blocks", "chunk")),
        chunk_tokens=chance.choice(
            (1, 2, text, text + 1, chance.randint(1, longest), longest + 3 * new)
        ),
    )
    return Case(
        kind=kind,
        family=models.FAMILIES[(seed // len(kinds) + seed) % len(models.FAMILIES)],
        kv_heads=chance.choice((1, 2, 4)),
        settings=settings,
        prompts=tuple(
            models.text(length, seed=1000 * seed + row) for row, length in enumerate(lengths)
        ),
        new=new,
        side=chance.choice(("left", "right")) if kind in ("prefill", "decode") else "left",
        dtype=dtype,
        random=chance,
    )


# The reference: one row alone, every block, one pass, no cache.


@torch.no_grad()
def one_pass(case: Case, row: torch.Tensor) -> torch.Tensor:
    """Returns the logits (T, vocabulary) of one row of text."""
    model = case.model
    model.configure_landmark(mode="all")
    logits = model(row[None], use_cache=False).logits[0]
    model.configure_landmark(mode="retrieval")
    return logits


def same(case: Case, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == case.dtype
    assert (actual - expected).abs().max() < (1e-8 if case.dtype == torch.float64 else 1e-4)


def same_rows(case: Case, actual: list[torch.Tensor], rows: list[torch.Tensor]) -> None:
    for logits, row in zip(actual, rows, strict=True):
        same(case, logits, one_pass(case, row))


def most_likely(case: Case, row: torch.Tensor, prompt: int) -> None:
    """A row's tokens after its prompt are the greedy ones. In float32 near ties may fall either
    way.
    """
    expected = one_pass(case, row)[prompt - 1 : -1]
    chosen = expected.gather(1, row[prompt:, None])[:, 0]
    slack = 0.0 if case.dtype == torch.float64 else 1e-4
    assert (chosen >= expected.max(dim=1).values - slack).all()


# The ways to feed a text.


@torch.no_grad()
def prefill(case: Case) -> None:
    ids, mask = models.padded(list(case.prompts), case.side)
    logits = case.model(ids, attention_mask=mask, use_cache=case.random.random() < 0.5).logits
    assert logits.shape[:2] == ids.shape
    same_rows(case, [logits[row][mask[row] == 1] for row in range(len(ids))], list(case.prompts))


class Feeder:
    """Feeds a batch piece by piece on one cache and keeps what each row has read and the logits it
    got.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = case.model
        self.rows = list(case.prompts)
        ids, self.mask = models.padded(self.rows, case.side)
        out = self.model(ids, attention_mask=self.mask, use_cache=True)
        self.cache = out.past_key_values
        self.logits = [out.logits[row][self.mask[row] == 1] for row in range(len(ids))]

    def feed(self, tokens: int) -> None:
        more = torch.randint(1, models.VOCAB, (len(self.rows), tokens))
        self.mask = torch.cat([self.mask, torch.ones_like(more)], dim=1)
        out = self.model(more, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)
        self.rows = [torch.cat(pair) for pair in zip(self.rows, more, strict=True)]
        self.logits = [torch.cat(pair) for pair in zip(self.logits, out.logits, strict=True)]

    def crop(self, tokens: int) -> None:
        keep = self.cache.get_seq_length() - tokens
        self.cache.crop(keep if keep and self.case.random.random() < 0.5 else -tokens)
        self.mask = self.mask[:, :-tokens]
        self.rows = [row[:-tokens] for row in self.rows]
        self.logits = [logits[:-tokens] for logits in self.logits]

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.mask.shape[1]
        same_rows(self.case, self.logits, self.rows)


@torch.no_grad()
def decode(case: Case) -> None:
    feeder = Feeder(case)
    left = case.new
    while left:
        piece = min(left, case.random.choice((1, 1, 1, 2, left)))
        feeder.feed(piece)
        left -= piece
    feeder.check()


@torch.no_grad()
def crop(case: Case) -> None:
    feeder = Feeder(case)
    for _ in range(3):
        feeder.feed(case.new)
        feeder.crop(case.random.randint(1, min(len(row) for row in feeder.rows)))
        feeder.feed(case.random.randint(1, 3))
    feeder.check()


@contextlib.contextmanager
def heard(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects what the head puts out; ``generate`` itself hands out float32."""
    logits: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda *call: logits.append(call[2])
    )
    try:
        yield logits
    finally:
        handle.remove()


def trimmed(sequences: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Returns the rows of ``sequences`` without their left padding."""
    return [row[int((1 - pads).sum()) :] for row, pads in zip(sequences, mask, strict=True)]


def generated(case: Case, **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns the rows, prompt included, and the logits (new, vocabulary) that chose their new
    tokens.
    """
    ids, mask = models.padded(list(case.prompts), "left")
    with heard(case.model) as logits:
        sequences = case.model.generate(
            ids, attention_mask=mask, max_new_tokens=case.new, **options
        )
    assert sequences.shape[1] == ids.shape[1] + case.new
    return trimmed(sequences, mask), list(torch.stack([step[:, -1] for step in logits], dim=1))


def greedy(case: Case) -> None:
    rows, logits = generated(case, do_sample=False)
    for row, heard_logits, prompt in zip(rows, logits, case.prompts, strict=True):
        same(case, heard_logits, one_pass(case, row)[len(prompt) - 1 : -1])
        most_likely(case, row, len(prompt))


def uncached(case: Case, **options: Any) -> list[torch.Tensor]:
    ids, mask = models.padded(list(case.prompts), "left")
    model = case.model
    model.configure_landmark(mode="all")
    sequences = model.generate(
        ids, attention_mask=mask, max_new_tokens=case.new, use_cache=False, **options
    )
    return trimmed(sequences, mask)


def sample(case: Case) -> None:
    assert case.model is not None  # building it draws random numbers
    torch.manual_seed(case.new)
    expected = uncached(case, do_sample=True, temperature=1.3, top_k=20)
    torch.manual_seed(case.new)
    rows, logits = generated(case, do_sample=True, temperature=1.3, top_k=20)
    for row, other, heard_logits, prompt in zip(rows, expected, logits, case.prompts, strict=True):
        assert row.tolist() == other.tolist()
        same(case, heard_logits, one_pass(case, row)[len(prompt) - 1 : -1])


def beams(case: Case) -> None:
    options = {"num_beams": 3, "do_sample": False, "length_penalty": 1.0}
    expected = uncached(case, **options)
    ids, mask = models.padded(list(case.prompts), "left")
    out = case.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=case.new,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = trimmed(out.sequences, mask)
    for row, other, prompt, score in zip(
        rows, expected, case.prompts, out.sequences_scores, strict=True
    ):
        assert row.tolist() == other.tolist()
        chances = one_pass(case, row)[len(prompt) - 1 : -1].log_softmax(dim=-1)
        # generate keeps the scores of beams in float32
        assert abs(chances.gather(1, row[len(prompt) :, None]).mean() - score) < 1e-5


def repetitive(case: Case) -> torch.Tensor:
    """A prompt that repeats itself, so that what is looked up in it is sometimes right."""
    prompt = case.prompts[0]
    return prompt[: max(2, len(prompt) // 4)].repeat(4)[: max(2, len(prompt))]


def lookup(case: Case) -> None:
    if models.OLD_ASSISTED:
        pytest.skip("prompt lookup without an end of text raises in stock transformers before 5.13")
    prompt = repetitive(case)
    row = case.model.generate(
        prompt[None], max_new_tokens=case.new, do_sample=False, prompt_lookup_num_tokens=3
    )[0]
    assert len(row) == len(prompt) + case.new
    most_likely(case, row, len(prompt))


@functools.cache
def assistant(family: str, block_size: int) -> Any:
    """A model that guesses right sometimes: the same one with its weights a little moved."""
    model = copy.deepcopy(models.landmark_model(family, LandmarkConfig(block_size=block_size)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    model.generation_config.num_assistant_tokens = 4
    return model


def assisted(case: Case) -> None:
    case = dataclasses.replace(case, kv_heads=2)
    prompt = repetitive(case)
    helper = assistant(case.family, case.settings.block_size)
    row = case.model.generate(
        prompt[None], max_new_tokens=case.new, do_sample=False, assistant_model=helper
    )[0]
    assert len(row) == len(prompt) + case.new
    most_likely(case, row, len(prompt))


def turns(case: Case) -> None:
    """A conversation of three turns on one cache."""
    ids, mask = models.padded(list(case.prompts), "left")
    model = case.model
    cache = None
    for turn in range(3):
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=case.new,
            do_sample=False,
            return_dict_in_generate=True,
        )
        cache = out.past_key_values
        said = torch.randint(1, models.VOCAB, (len(ids), 1 + turn))
        before = ids.shape[1]
        ids = torch.cat([out.sequences, said], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        for row, pads in zip(out.sequences, mask, strict=True):
            padding = int((1 - pads).sum())
            most_likely(case, row[padding:], before - padding)


def read(case: Case) -> None:
    """A document read first, then a question about it."""
    ids, mask = models.padded(list(case.prompts), "left")
    model = case.model
    document = case.random.randint(1, ids.shape[1])
    cache = model.read(ids[:, :document], attention_mask=mask[:, :document])
    assert cache.get_seq_length() == document
    if document == ids.shape[1]:
        more = torch.randint(1, models.VOCAB, (len(ids), 1))
        ids = torch.cat([ids, more], dim=1)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    sequences = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=case.new, do_sample=False
    )
    for row, pads in zip(sequences, mask, strict=True):
        padding = int((1 - pads).sum())
        most_likely(case, row[padding:], ids.shape[1] - padding)


KINDS: dict[str, Callable[[Case], None]] = {
    "prefill": prefill,
    "decode": decode,
    "crop": crop,
    "greedy": greedy,
    "sample": sample,
    "beams": beams,
    "lookup": lookup,
    "assisted": assisted,
    "turns": turns,
    "read": read,
}
NARROW_KINDS = ("prefill", "decode", "crop", "greedy", "read")


def seeds(count: int, always: int) -> list[Any]:
    return [
        pytest.param(seed, marks=() if seed < always else pytest.mark.full) for seed in range(count)
    ]


@pytest.mark.parametrize("seed", seeds(WIDE, ALWAYS))
def test_equals_the_one_pass_forward(seed: int) -> None:
    torch.manual_seed(seed)
    case = draw(seed, tuple(KINDS), torch.float64)
    KINDS[case.kind](case)


@pytest.mark.parametrize("seed", seeds(NARROW, ALWAYS_NARROW))
def test_equals_the_one_pass_forward_in_float32(seed: int) -> None:
    torch.manual_seed(seed)
    case = draw(seed, NARROW_KINDS, torch.float32)
    KINDS[case.kind](case)


def test_half_of_the_cases_cross_borders_in_prompt_and_generation() -> None:
    for count in (ALWAYS, WIDE):
        crossing = [draw(seed, tuple(KINDS), torch.float64).crosses for seed in range(count)]
        assert sum(crossing) >= count / 2
