"""With ``top_k`` below the number of older blocks, every policy equals the oracle's loop, whatever
the chunks.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch

import models
import oracle
from landmark import LandmarkCache
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from landmark.memory import eager, retrieval

pytestmark = pytest.mark.usefixtures("wide_norms")

CASES = 336
ALWAYS = 56
LAYERS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One draw: a policy, rows of text with more blocks than it retrieves, and several ways to cut
    them.
    """

    family: str
    kv_heads: int
    settings: LandmarkConfig
    rows: tuple[torch.Tensor, ...]
    side: str
    cuts: tuple[int, ...]

    @property
    def model(self) -> Any:
        return models.landmark_model(
            self.family, self.settings, kv_heads=self.kv_heads, layers=LAYERS
        )

    @property
    def older(self) -> int:
        """Finished blocks of the longest row that are not local to its last token."""
        return (
            max(len(row) for row in self.rows) // self.settings.text_per_block
            - self.settings.local_blocks
        )


def draw(seed: int) -> Case:
    chance = random.Random(seed)
    granularity, positions = list(itertools.product(GRANULARITIES, POSITIONS))[seed % 8]
    local = "chunk" if seed // 8 % 4 == 3 else "blocks"
    block_size = chance.randint(3, 7)
    top_k = chance.randint(1, 3)
    local_blocks = chance.randint(0, 2)
    text = block_size - 1
    longest = text * (top_k + local_blocks + chance.randint(3, 5)) + chance.randint(0, text)
    settings = LandmarkConfig(
        block_size=block_size,
        top_k=top_k,
        granularity=granularity,
        positions=positions,
        local_blocks=local_blocks,
        max_blocks=chance.choice((None, None, None, top_k + 1, 2, 0)),
        layers=chance.choice((None, None, (1,), (0, 2), ())),
        local=local,
    )
    lengths = [longest, chance.randint(1, longest)][: chance.randint(1, 2)]
    chance.shuffle(lengths)
    return Case(
        family=models.FAMILIES[(seed // 8 + seed) % len(models.FAMILIES)],
        kv_heads=chance.choice((1, 2, 4)),
        settings=settings,
        rows=tuple(
            models.text(length, seed=1000 * seed + row) for row, length in enumerate(lengths)
        ),
        side=chance.choice(("left", "right")),
        cuts=(1, text, chance.randint(2, longest), longest + 1),
    )


def pieces(case: Case, row: int, cut: int, mask: torch.Tensor) -> list[int]:
    """How many of a row's tokens fall in each chunk of ``cut`` columns."""
    return [int(part.sum()) for part in mask[row].split(cut)]


def expected(
    case: Case, row: int, chunks: list[int], trace: oracle.Trace | None = None
) -> torch.Tensor:
    stock = models.oracle_model(case.family, case.kv_heads, LAYERS)
    return oracle.logits(
        stock, models.landmark_vector(), case.rows[row], case.settings, chunks=chunks, trace=trace
    )


@torch.no_grad()
def in_one_call(case: Case, ids: torch.Tensor, mask: torch.Tensor, cut: int) -> torch.Tensor:
    model = case.model
    model.configure_landmark(chunk_tokens=cut)
    return model(ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def in_many_calls(case: Case, ids: torch.Tensor, mask: torch.Tensor, cut: int) -> torch.Tensor:
    model = case.model
    cache = None
    parts = []
    for start in range(0, ids.shape[1], cut):
        end = min(start + cut, ids.shape[1])
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def worst(case: Case) -> float:
    """The largest difference between the model and the oracle over all rows and ways to cut."""
    ids, mask = models.padded(list(case.rows), case.side)
    errors = []
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for cut, feed in zip(case.cuts, itertools.cycle((in_one_call, in_many_calls)), strict=False):
        logits = feed(case, ids, mask, cut)
        assert logits.shape[:2] == ids.shape
        for row in range(len(ids)):
            chunks = pieces(case, row, cut, mask)
            key = (row, *chunks) if case.settings.local == "chunk" else (row,)
            if key not in known:
                known[key] = expected(case, row, chunks)
            errors.append(float((logits[row][mask[row] == 1] - known[key]).abs().max()))
    return max(errors)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=() if seed < ALWAYS else pytest.mark.full) for seed in range(CASES)],
)
def test_equals_the_oracle(seed: int) -> None:
    assert worst(draw(seed)) < 1e-8


def test_the_cases_leave_blocks_out_under_every_policy() -> None:
    for count in (ALWAYS, CASES):
        cases = [draw(seed) for seed in range(count)]
        assert all(case.older > case.settings.top_k for case in cases)
        policies = {(c.settings.granularity, c.settings.positions, c.settings.local) for c in cases}
        assert len(policies) == 16
        assert {case.settings.local_blocks for case in cases} == {0, 1, 2}
        assert {case.settings.max_blocks is None for case in cases} == {True, False}
        assert {case.settings.layers is None for case in cases} == {True, False}
        assert {case.family for case in cases} == set(models.FAMILIES)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_block_equals_the_oracle(family: str) -> None:
    settings = LandmarkConfig(block_size=5, mode="all")
    row = models.text(27, seed=3)
    with torch.no_grad():
        logits = models.landmark_model(family, settings)(row[None]).logits[0]
    wanted = oracle.logits(models.oracle_model(family), models.landmark_vector(), row, settings)
    assert (logits - wanted).abs().max() < 1e-8


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_chunk_size_gives_the_same_logits(granularity: str, positions: str) -> None:
    settings = LandmarkConfig(
        block_size=5, top_k=2, granularity=granularity, positions=positions, local_blocks=1
    )
    row = models.text(43, seed=4)
    model = models.landmark_model("qwen3", settings)
    results = []
    for cut in range(1, 44, 3):
        model.configure_landmark(chunk_tokens=cut)
        with torch.no_grad():
            results.append(model(row[None]).logits)
    assert max(float((result - results[0]).abs().max()) for result in results) < 1e-11


@pytest.mark.parametrize("seed", range(0, 48, 3))
def test_own_blocks_computed_one_at_a_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long call is computed in slabs of own blocks; here each is a slab."""
    monkeypatch.setitem(retrieval.SLAB_BYTES, "cpu", 1)
    assert worst(draw(seed)) < 1e-8


@pytest.mark.parametrize("seed", range(1, 48, 3))
@pytest.mark.parametrize("at_once", [1, 2000])
def test_retrieved_blocks_read_in_small_tiles(
    seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More queries chose a block than a tile holds, and there are more tiles than are computed at
    once.
    """
    monkeypatch.setattr(eager, "TILE_ROWS", 3)
    monkeypatch.setattr(eager, "PIECE_BYTES", at_once)
    assert worst(draw(seed)) < 1e-8


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("local", ["blocks", "chunk"])
def test_long_texts_whose_old_blocks_were_dropped(granularity: str, local: str) -> None:
    settings = LandmarkConfig(
        block_size=3,
        top_k=2,
        granularity=granularity,
        local_blocks=1,
        max_blocks=3,
        layers=(0, 2),
        local=local,
    )
    rows = (models.text(110, seed=6), models.text(84, seed=7))
    case = Case(
        "mistral", 2, settings, rows, "left", (7, 5, 40, 1) if local == "blocks" else (7, 1)
    )
    assert worst(case) < 1e-8
    ids, mask = models.padded(list(rows), "left")
    model = case.model
    model.configure_landmark(chunk_tokens=7)
    few = model.read(ids, attention_mask=mask).nbytes()
    model.configure_landmark(max_blocks=None)
    many = model.read(ids, attention_mask=mask).nbytes()
    assert few < 0.8 * many


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_crop_and_fork_leave_no_trace(granularity: str, positions: str) -> None:
    settings = LandmarkConfig(
        block_size=4, top_k=2, granularity=granularity, positions=positions, local_blocks=1
    )
    rows = [models.text(40, seed=8), models.text(31, seed=9)]
    case = Case("phi3", 2, settings, tuple(rows), "left", ())
    ids, mask = models.padded(rows, "left")
    model = case.model
    with torch.no_grad():
        cache = model.read(ids[:, :33], attention_mask=mask[:, :33])
        other = cache.fork()
        for back in (1, 2, 5, 11):
            model(models.text(14, seed=back).view(2, 7), past_key_values=cache)
            cache.crop(-7 - back)
            model(ids[:, 33 - back : 33], past_key_values=cache)
        after = [model(ids[:, 33:], past_key_values=each).logits for each in (cache, other)]
    for row in range(2):
        wanted = expected(case, row, [len(rows[row])])[-7:]
        for logits in after:
            assert (logits[row] - wanted).abs().max() < 1e-8


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_beams_equal_those_without_a_cache(granularity: str) -> None:
    settings = LandmarkConfig(
        block_size=4, top_k=2, granularity=granularity, local_blocks=0, chunk_tokens=5
    )
    model = models.landmark_model("olmo2", settings)
    ids, mask = models.padded([models.text(25, seed=10), models.text(18, seed=11)], "left")
    cached, uncached = (
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            num_beams=4,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert cached.tolist() == uncached.tolist()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_document_read_without_retrieval(granularity: str, positions: str) -> None:
    """While it is read, every layer sees its local context and block 0; what comes after retrieves
    from all of it.
    """
    settings = LandmarkConfig(
        block_size=5,
        top_k=2,
        granularity=granularity,
        positions=positions,
        local_blocks=1,
        chunk_tokens=7,
    )
    model = models.landmark_model("gemma3", settings)
    row = models.text(45, seed=12)
    document = 34
    cache = model.read(row[None, :document], retrieve=False)
    with torch.no_grad():
        logits = model(row[None, document:], past_key_values=cache).logits[0]
    stock = models.oracle_model("gemma3")
    wanted, otherwise = (
        oracle.logits(stock, models.landmark_vector(), row, settings, silent=silent)[document:]
        for silent in (range(document), ())
    )
    assert (logits - wanted).abs().max() < 1e-8 < (wanted - otherwise).abs().max()


@pytest.mark.parametrize("seed", range(8))
def test_retrievals_are_those_of_the_oracle(seed: int) -> None:
    """The record names each query's blocks and their gate weights."""
    case = draw(seed)
    ids, mask = models.padded(list(case.rows), "left")
    model = case.model
    model.configure_landmark(chunk_tokens=6)
    cache = model.read(ids[:, :1], attention_mask=mask[:, :1])
    cache.record = True
    with torch.no_grad():
        model(ids[:, 1:], attention_mask=mask, past_key_values=cache)
    traces: list[oracle.Trace] = [{} for _ in case.rows]
    for row, trace in enumerate(traces):
        expected(case, row, [len(case.rows[row])], trace)
    layers = range(LAYERS) if case.settings.layers is None else case.settings.layers
    seen = set()
    for one in cache.retrievals:
        for row, head in itertools.product(range(len(traces)), range(models.HEADS)):
            for column, slot in enumerate(one.positions[row].tolist()):
                blocks = one.blocks[row, head, column].tolist()
                weights = one.weights[row, head, column].tolist()
                found = {
                    block: weight
                    for block, weight in zip(blocks, weights, strict=True)
                    if block >= 0
                }
                if slot < 0 or one.layer not in layers:
                    assert found == {}
                    continue
                assert found == pytest.approx(traces[row][one.layer, head, slot], abs=1e-6)
                seen.add((row, one.layer, head, slot))
    slots = [oracle.slots_of(len(row), case.settings.block_size) for row in case.rows]
    first = mask[:, :1].sum(dim=1).tolist()
    texts = [(row, slot) for row in range(len(slots)) for slot in slots[row][first[row] :]]
    assert {
        (row, layer, head, slot)
        for row, slot in texts
        for layer in layers
        for head in range(models.HEADS)
    } <= seen


def test_a_cache_keeps_its_own_copy_of_mask_and_ids() -> None:
    """Whoever reuses the tensors of a call changes nothing; a fork and its origin go on apart."""
    model = models.landmark_model("llama", LandmarkConfig(block_size=5, top_k=2, local_blocks=1))
    ids = models.text(17)[None].int()
    mask = torch.ones(1, 17, dtype=torch.bool)
    cache = model.read(ids, mask)
    given = ids[0].tolist()
    ids.zero_(), mask.zero_()
    assert cache.ids().tolist() == given
    fork = cache.fork()
    model.read(models.text(4)[None], cache=fork)
    model.read(ids[:, :2] + 1, cache=cache)
    cache.crop(-1)
    assert cache.ids().tolist() == [*given, 1] and cache.get_seq_length() == 18
    assert fork.ids().tolist() == [*given, *models.text(4).tolist()] and fork.tokens == [21]


def test_many_calls_leave_few_tensors_of_their_text() -> None:
    """Small tensors that stay, between the large ones of calls, would scatter the memory of a
    process.
    """
    model = models.landmark_model("llama", LandmarkConfig(block_size=5, top_k=2, local_blocks=1))
    chance = random.Random(0)
    cache = LandmarkCache(model.config)
    text = []
    for _ in range(300):
        ids = torch.randint(1, models.VOCAB, (2, chance.choice((0, 1, 1, 2, 30))))
        mask = torch.rand(ids.shape) < 0.8
        cache.commit(mask, ids)
        text.append(ids[1, mask[1]])
        assert (
            len(cache._columns._masks)
            == len(cache._columns._ids)
            <= cache.get_seq_length().bit_length() + 1
        )
    assert torch.equal(cache.ids(1), torch.cat(text).int()) and cache.get_seq_length() > 1000
