"""What the machine of ``test_machine.py`` found, shrunk: each was a fault once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from landmark import LandmarkCache
from landmark.config import LandmarkConfig

pytestmark = pytest.mark.usefixtures("wide_norms")

TIERS = ("device", "host", "disk")


def read(
    tier: str = "device", rows: int = 2, tokens: int = 9, **settings: Any
) -> tuple[Any, LandmarkCache]:
    """Returns a model, and a memory of some rows."""
    model = models.landmark_model(
        "llama", LandmarkConfig(block_size=4, top_k=2, local_blocks=1, **settings)
    )
    return model, model.read(ids(rows, tokens), cache=LandmarkCache(model, tier))


def ids(rows: int, tokens: int) -> torch.Tensor:
    return models.text(rows * tokens).view(rows, tokens)


@torch.no_grad()
def answers_like_a_new_one(model: Any, cache: LandmarkCache, rows: int) -> None:
    text = ids(rows, 15)
    assert torch.equal(model(text, past_key_values=cache).logits, model(text).logits)
    assert cache.tokens == [15] * rows


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_memory_cropped_to_nothing_takes_any_number_of_rows(tier: str, rows: int) -> None:
    model, cache = read(tier)
    cache.crop(-9)
    answers_like_a_new_one(model, cache, rows)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_first_call_that_failed_does_not_fix_the_number_of_rows(tier: str, rows: int) -> None:
    model, _ = read()
    cache = LandmarkCache(model, tier)

    def fail(*_: Any) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), model.base_model.layers[1].register_forward_hook(fail):
        model.read(ids(2, 9), cache=cache)
    answers_like_a_new_one(model, cache, rows)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rows", [[0, 2], [-1], []])
def test_rows_that_are_not_there(tier: str, rows: list[int]) -> None:
    model, cache = read(tier)
    with pytest.raises(ValueError, match="expected at least one of the rows 0 to 1"):
        cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))
    assert cache.tokens == [9, 9] and not cache.rewound
    model(ids(2, 3), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_new_text_alone_with_a_mask_over_everything(use_cache: bool) -> None:
    model, cache = read()
    text = ids(2, 3)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    whole = model.generate(torch.cat([ids(2, 9), text], 1), past_key_values=cache.fork(), **options)
    told = model.generate(text, attention_mask=torch.ones(2, 12), past_key_values=cache, **options)
    assert torch.equal(told, whole[:, 9:]) and cache.tokens == [15, 15]


@pytest.mark.parametrize("tier", TIERS)
def test_rows_of_an_opened_memory_whose_index_is_not_built_yet(tier: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    model, cache = read(rows=1, tokens=24, granularity="token_head")
    cache.save(tmp_path)
    opened = LandmarkCache.open(tmp_path, model, tier, index="faiss-flat")
    opened.batch_repeat_interleave(2)
    cache.batch_repeat_interleave(2)
    text = ids(2, 5)
    with torch.no_grad():
        found = model(text, past_key_values=opened).logits
        assert torch.allclose(found, model(text, past_key_values=cache).logits, atol=1e-5)
    assert opened.tokens == [29, 29]
