"""Whatever happened to a cache (pieces, padding, crops, reordered rows, forks, eviction), it equals
the oracle.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import models
import oracle
from landmark import LandmarkCache
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from landmark.memory import retrieval
from landmark.memory.storage import store

pytestmark = pytest.mark.usefixtures("wide_norms")

CASES = 300
ALWAYS = 20


class History:
    """A batch on one cache, with the columns and logits that are in force."""

    def __init__(self, model: Any, rows: int, chance: random.Random) -> None:
        self.model = model
        self.chance = chance
        self.cache = LandmarkCache(model.config)
        self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        self.logits = torch.zeros(rows, 0, models.VOCAB, dtype=torch.float64)

    def feed(self) -> None:
        text = self.model.landmark.text_per_block
        tokens = self.chance.choice((1, 1, 2, text, self.chance.randint(1, 25)))
        ids = torch.randint(1, models.VOCAB, (len(self.ids), tokens))
        mask = torch.ones_like(ids)
        if self.chance.random() < 0.5:
            mask = (torch.rand(ids.shape) < 0.8).long()
        self.ids, self.mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)
        logits = self.model(ids, attention_mask=self.mask, past_key_values=self.cache).logits
        self.logits = torch.cat([self.logits, logits], dim=1)

    def crop(self) -> None:
        length = self.ids.shape[1]
        if length == 0:
            return
        tokens = self.chance.randint(1, min(length, self.chance.choice((1, 3, 8, 30))))
        try:
            self.cache.crop(-tokens)
        except ValueError as refusal:
            assert "evicted" in str(refusal) or "granularity head" in str(refusal)
            return
        self.ids, self.mask, self.logits = (
            part[:, :-tokens] for part in (self.ids, self.mask, self.logits)
        )

    def reorder(self) -> None:
        if self.ids.shape[1] == 0:
            return
        rows = torch.randint(0, len(self.ids), (len(self.ids),))
        self.cache.reorder_cache(rows)
        self.ids, self.mask, self.logits = (
            part[rows] for part in (self.ids, self.mask, self.logits)
        )

    def fork(self) -> None:
        left_behind = self.cache
        self.cache = self.cache.fork()
        self.model(torch.randint(1, models.VOCAB, (len(self.ids), 3)), past_key_values=left_behind)


def draw(chance: random.Random) -> LandmarkConfig:
    block_size = chance.randint(2, 6)
    return LandmarkConfig(
        block_size=block_size,
        top_k=chance.randint(1, 3),
        granularity=chance.choice(GRANULARITIES),
        positions=chance.choice(POSITIONS),
        local_blocks=chance.randint(0, 2),
        max_blocks=chance.choice((None, None, 0, 1, 3)),
        layers=chance.choice((None, None, (1,), (0,))),
        chunk_tokens=chance.choice((1, 2, block_size - 1, block_size, 5, 11, 100)),
    )


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=() if seed < ALWAYS else pytest.mark.full) for seed in range(CASES)],
)
@torch.no_grad()
def test_any_history_equals_the_oracle(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    settings = draw(chance)
    family = chance.choice(models.FAMILIES)
    kv_heads = chance.choice((1, 2, 4))
    monkeypatch.setitem(retrieval.SLAB_BYTES, "cpu", chance.choice((1, 20_000, 2**26)))
    step, spare = chance.choice(((1, 3), (2, 8), (16, 8)))
    monkeypatch.setattr(store, "EVICTION_STEP", step)
    monkeypatch.setattr(store, "SPARE_BLOCKS", spare)
    model = models.landmark_model(family, settings, kv_heads=kv_heads)
    torch.manual_seed(seed)
    history = History(model, chance.randint(1, 3), chance)
    for _ in range(chance.randint(4, 13)):
        chance.choice(
            (history.feed, history.feed, history.feed, history.crop, history.reorder, history.fork)
        )()
    stock = models.oracle_model(family, kv_heads)
    for ids, mask, logits in zip(history.ids, history.mask, history.logits, strict=True):
        text = ids[mask == 1]
        if len(text):
            wanted = oracle.logits(stock, models.landmark_vector(), text, settings)
            assert (logits[mask == 1] - wanted).abs().max() < 1e-8
