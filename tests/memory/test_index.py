"""The index: faiss flat chooses as scoring every landmark does, whatever happened to the cache;
others come close.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import models
import oracle
from hf.test_histories import History
from landmark import LandmarkCache, LandmarkConfig
from landmark.memory import faiss_index, retrieval
from landmark.memory.context import LayerContext
from landmark.memory.faiss_index import VectorIndex
from landmark.memory.geometry import make_geometry
from landmark.memory.layer import LayerMemory
from landmark.memory.retrieval import COPIES, SLAB_BYTES, Selection
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage import store
from landmark.ops.select import select_top
from landmark.rotary import Rotary

CASES = 60
ALWAYS = 10  # of five histories each
APPROXIMATE = ("faiss-ivf", "faiss-hnsw")


class Watched:
    """Compares each choice by an index with all scores in float64; blocks must be candidates,
    ascending.

    A choice is left out where the K-th and the next score lie within what float32 may round.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, exact: bool = True) -> None:
        self.exact = exact
        self.compared = self.left_out = self.held = self.best = self.wanted = 0
        self.select = retrieval.select_with_index
        monkeypatch.setattr(retrieval, "select_with_index", self)

    def __call__(self, query: Any, grid: Any, context: LayerContext) -> Selection:
        selection = self.select(query, grid, context)
        chosen = selection.blocks
        valid = selection.valid
        blocks = context.store
        config = context.config
        found = context.index
        assert found is not None
        landmarks = blocks.landmarks_before(blocks.first + blocks.capacity - 1)
        scores = retrieval.landmark_scores(query.double(), grid, landmarks, context)
        there = grid.valid[:, None, None].expand(valid.shape[:-1])
        index = blocks.kept.index_of(chosen).masked_fill(~valid, 0)
        assert (scores.gather(-1, index)[valid & there[..., None]] > -torch.inf).all(), (
            "only candidates"
        )
        neighbours = valid[..., 1:]
        assert (chosen[..., 1:] > chosen[..., :-1])[neighbours].all() and (
            valid[..., :-1] | ~neighbours
        ).all()
        best, full = select_top(scores, config.top_k)
        kept = min(valid.shape[-1], full.shape[-1])
        assert not valid[..., kept:].any() and not full[..., kept:].any()
        alike = ((index == best) | ~full)[..., :kept].all(-1) & (valid == full)[..., :kept].all(-1)
        close = self.close(query, blocks, scores, config.top_k) & there
        if self.exact:
            assert (alike | close | ~there).all()
        self.compared += int(there.sum())
        self.left_out += int(close.sum())
        self.held += int(there.sum()) * any(end > 0 for end in found.ends)
        hits = (
            (index[..., :, None] == best[..., None, :]) & valid[..., :, None] & full[..., None, :]
        )
        self.best = self.best + int(hits[there].sum())
        self.wanted = self.wanted + int(full[there].sum())
        return selection

    @staticmethod
    def close(query: Any, blocks: Any, scores: Any, top_k: int) -> Any:
        """A sum of D products has D roundings at most, as has the rotation's; there are two
        sums.
        """
        if scores.shape[-1] <= top_k:
            return torch.zeros(scores.shape[:-1], dtype=torch.bool)
        ordered = scores.sort(dim=-1, descending=True).values
        gap = (ordered[..., top_k - 1] - ordered[..., top_k]).nan_to_num(
            nan=torch.inf, posinf=torch.inf
        )
        largest = blocks.landmark_keys.double().norm(dim=-1).amax()
        return gap <= 2 * (query.shape[-1] + 4) * 2**-24 * query.double().norm(dim=-1) * largest


def draw(chance: random.Random) -> LandmarkConfig:
    """Blocks of at least two tokens: those of one tie exactly where layers below see nothing
    else.
    """
    block_size = chance.randint(3, 5)
    return LandmarkConfig(
        block_size=block_size,
        top_k=chance.randint(1, 3),
        local_blocks=chance.randint(0, 2),
        max_blocks=chance.choice((None, None, 0, 1, 3, 8)),
        layers=chance.choice((None, None, (1,))),
        chunk_tokens=chance.choice((1, 2, block_size, 11, 100)),
    )


def history(
    seed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[History, LandmarkConfig, str, int]:
    chance = random.Random(seed)
    settings = draw(chance)
    family = chance.choice(models.FAMILIES)
    kv_heads = chance.choice((1, 2, 4))
    monkeypatch.setitem(SLAB_BYTES, "cpu", chance.choice((1, 20_000, 2**26)))
    step, spare = chance.choice(((1, 0), (1, 3), (16, 8)))
    monkeypatch.setattr(store, "EVICTION_STEP", step)
    monkeypatch.setattr(store, "SPARE_BLOCKS", spare)
    monkeypatch.setattr(faiss_index, "MADE_FROM", chance.choice((2, 9)))
    model = models.landmark_model(family, settings, kv_heads=kv_heads)
    torch.manual_seed(seed)
    found = History(model, chance.randint(1, 3), chance)
    found.cache = LandmarkCache(model.config, index=kind)
    for _ in range(chance.randint(10, 18)):
        chance.choice((found.feed, found.feed, found.feed, found.crop, found.reorder, found.fork))()
    found.feed()
    return found, settings, family, kv_heads


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case < ALWAYS else pytest.mark.full) for case in range(CASES)],
)
@models.wide_norms()
@torch.no_grad()
def test_flat_chooses_as_exact_does(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice, and the logits against the definition in plain loops, over histories of every
    kind.
    """
    watched = Watched(monkeypatch)
    read = 0
    for seed in range(5 * case, 5 * case + 5):
        before = watched.left_out
        found, settings, family, kv_heads = history(seed, "faiss-flat", monkeypatch)
        stock = models.oracle_model(family, kv_heads)
        if watched.left_out > before:
            continue  # one choice within rounding changes all logits after it
        for ids, mask, logits in zip(found.ids, found.mask, found.logits, strict=True):
            if mask.any():
                wanted = oracle.logits(stock, models.landmark_vector(), ids[mask == 1], settings)
                assert (logits[mask == 1] - wanted).abs().max() < 1e-8
                read += 1
    assert read > 0 and watched.held > 50 and watched.left_out <= watched.compared // 100


@pytest.mark.parametrize("kind", APPROXIMATE)
@torch.no_grad()
def test_approximate_indexes_find_candidates_only(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the same histories: nothing that was cropped, evicted or is of another row; and most
    of the best.
    """
    watched = Watched(monkeypatch, exact=False)
    for seed in range(12):
        history(seed, kind, monkeypatch)
    assert watched.held > 200 and watched.best > 0.8 * watched.wanted


@torch.no_grad()
def test_logits_of_a_padded_batch_as_without_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.landmark_model(
        "llama", LandmarkConfig(block_size=4, top_k=2, local_blocks=1, chunk_tokens=50)
    )
    ids, mask = models.padded(
        [models.text(300), models.text(170, seed=1), models.text(7, seed=2)], "left"
    )
    watched = Watched(monkeypatch)
    cache = LandmarkCache(model, index="faiss-flat")
    indexed = model(ids, attention_mask=mask, past_key_values=cache).logits
    expected = model(ids, attention_mask=mask, past_key_values=LandmarkCache(model)).logits
    assert watched.left_out == 0 and watched.held > 100
    torch.testing.assert_close(indexed, expected, rtol=0, atol=1e-9)
    ends = [len(text) // 3 - 1 - 2 for text in (ids[0], models.text(170))]
    assert cache.memories[0].index is None and cache.memories[1].index.ends[:2] == pytest.approx(
        ends, abs=20
    )
    assert (
        cache.nbytes("host")
        == cache.memories[1].index.nbytes
        == sum(cache.memories[1].index.ends) * 2 * 8 * 4
    )


def structured(count: int, noise: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (count, 16) about 60 middles, all far from zero, as landmarks are; queries (50, 16) near
    some middles.
    """
    random = torch.Generator().manual_seed(0)
    middles = torch.randn(60, 16, generator=random)
    keys = middles[torch.arange(count) % 60] + noise * torch.randn(count, 16, generator=random)
    return keys + 20 * torch.randn(16, generator=random), middles[:50] + noise * torch.randn(
        50, 16, generator=random
    )


def recall(kind: str, pieces: int = 7, *, products: bool = True) -> float:
    keys, query = structured(3000)
    made = VectorIndex(kind, 16)
    for part in keys.split(len(keys) // pieces):
        made.add(part)
    found, numbers = made.search(query, 10)
    right = (query @ keys.T).topk(10).indices
    there = numbers >= 0
    wanted = (query[:, None] * keys[numbers.clamp(min=0)]).sum(-1)
    if products:
        torch.testing.assert_close(found[there], wanted[there], rtol=1e-5, atol=1e-3)
    return int((right[:, :, None] == numbers[:, None]).any(-1).sum()) / right.numel()


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_recall_on_structured_landmarks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound can fail: it does where inner products are searched as they are, and where one list
    is read.
    """
    assert recall("faiss-flat") == 1
    assert recall(kind) >= 0.9
    monkeypatch.setattr(
        VectorIndex, "_norms", lambda self, vectors: torch.ones(len(vectors))
    )  # no lengths
    monkeypatch.setattr(faiss_index, "IVF_PROBED", 10**6)
    monkeypatch.setattr(faiss_index, "HNSW_SEARCH", 1)
    assert recall(kind, products=False) < 0.9


@pytest.mark.parametrize("kind", ["faiss-flat", *APPROXIMATE])
def test_what_is_not_allowed_is_not_found(kind: str) -> None:
    keys, query = structured(3000)
    made = VectorIndex(kind, 16)
    allowed = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.6
    made.add(keys)
    products, numbers = made.search(query, 10, allowed)
    assert allowed[numbers[numbers >= 0]].all() and (products == -torch.inf).equal(numbers < 0)
    right = (query @ keys.T).masked_fill(~allowed, -torch.inf).topk(10).indices
    found = float((right[:, :, None] == numbers[:, None]).any(-1).float().mean())
    assert found == 1 if kind == "faiss-flat" else found >= 0.8


def test_lists_are_made_anew_as_landmarks_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "MADE_FROM", 100)
    made = VectorIndex("faiss-ivf", 16)
    lists = []
    for part in structured(3000)[0].split(50):
        made.add(part)
        lists.append(made.settings.get("lists"))
    assert lists[:2] == [None, 10] and lists[1:] == sorted(lists[1:]) and 27 <= lists[-1] <= 54


def unrotated(top_k: int) -> tuple[LandmarkConfig, RotaryTables]:
    config = LandmarkConfig(block_size=2, top_k=top_k, local_blocks=0)
    return config, RotaryTables(Rotary(torch.zeros(2).double(), torch.ones(2).double(), False), 2)


@pytest.mark.parametrize("kind", ["exact", "faiss-flat"])
@pytest.mark.parametrize("budget", [1, 2**26])
def test_ties_go_to_the_lower_block(
    kind: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Landmarks without positions: the best score is that of one block that is old and of all that
    are recent.
    """
    monkeypatch.setitem(SLAB_BYTES, "cpu", budget)
    config, tables = unrotated(top_k=2)
    memory = LayerMemory(config, tables, layer=1, index=kind)
    key = torch.zeros(1, 1, 40, 2)
    key[0, 0, 11::2] = torch.tensor([1.0, 0.0])  # blocks from 5 on
    key[0, 0, 13:31:2] = 0  # but for 6 to 14
    memory.attend(
        key, key, key, make_geometry([0], [40], config), scale=1.0, retrieve=False, record=False
    )
    query = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
    _, found = memory.attend(
        query, query, query, make_geometry([40], [1], config), scale=1.0, retrieve=True, record=True
    )
    assert found.blocks[0, 0, 0].tolist() == [5, 15]


def test_exact_scores_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 2**18
    taken = []
    model = models.landmark_model(
        "llama", LandmarkConfig(block_size=3, top_k=2, local_blocks=1, chunk_tokens=100)
    )
    ids = models.text(2000)[None]
    model.read(ids, cache=(cache := LandmarkCache(model)), retrieve=False)
    with torch.no_grad():
        expected = model(models.text(20)[None], past_key_values=cache.fork()).logits
    scores_of = retrieval.landmark_scores
    monkeypatch.setitem(SLAB_BYTES, "cpu", budget)
    monkeypatch.setattr(
        retrieval,
        "landmark_scores",
        lambda *args: taken.append((out := scores_of(*args)).nbytes) or out,
    )
    with torch.no_grad():
        found = model(models.text(20)[None], past_key_values=cache).logits
    assert len(taken) > 20 and max(taken) * COPIES <= budget
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_what_was_dropped_is_not_found_where_every_block_may_be_read() -> None:
    """``max_blocks`` may reach farther back than the first block."""
    held = store.BlockStore(4)
    held._reserve(6, torch.zeros(1, 1, 1, 8))
    held.landmark_keys[:] = torch.arange(6.0)[None, None, :6, None]
    row = faiss_index.RowIndex("faiss-flat", 1, 8)
    row.follow(held, 0, 6)
    row.follow(held, 0, 4)  # cropped
    _, blocks = row.search(torch.ones(1, 1, 8), 2, lowest=-3, keep_first=True)
    assert blocks.tolist() == [[[3, 2]]]


def test_what_was_evicted_leaves_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of what it holds is always there to be found, so that it grows no further."""
    monkeypatch.setattr(store, "EVICTION_STEP", 1)
    model = models.landmark_model(
        "llama", LandmarkConfig(block_size=4, top_k=2, local_blocks=1, max_blocks=20)
    )
    cache = LandmarkCache(model, index="faiss-flat")
    held = []
    for _ in range(8):
        model.read(models.text(150)[None], cache=cache)
        held.append(cache.nbytes("host") // (2 * 8 * 4))
    assert max(held) <= 2 * (20 + store.SPARE_BLOCKS + 2) + 50


@torch.no_grad()
def test_a_memory_opened_with_an_index_answers_alike(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.landmark_model(
        "llama", LandmarkConfig(block_size=4, top_k=2, local_blocks=1, max_blocks=30)
    )
    model.read(models.text(400)[None], cache=(cache := LandmarkCache(model)))
    cache.save(tmp_path / "memory")
    watched = Watched(monkeypatch)
    logits = [
        model(
            models.text(30, seed=3)[None],
            past_key_values=LandmarkCache.open(tmp_path / "memory", model, index=kind),
        ).logits
        for kind in ("exact", "faiss-flat")
    ]
    assert watched.left_out == 0 and watched.held > 0
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)
