"""Texts longer than the trained length are nothing special to ``generate``."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers.generation import stopping_criteria

import landmark
import models
from landmark import LandmarkCache
from landmark.config import LandmarkConfig
from landmark.hf.compat import CACHE

TRAINED = 64
LONGROPE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "phi3",
    "gpt_neox",
    "olmo2",
    "granite",
    "starcoder2",
)


@pytest.fixture
def model(monkeypatch):
    found = models.landmark_model("llama", LandmarkConfig(block_size=8, top_k=2))
    monkeypatch.setattr(found.config, "max_position_embeddings", TRAINED)
    return found


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_the_default_length_counts_new_tokens(model, options) -> None:
    ids = models.text(3 * TRAINED)[None]
    assert model.generate(ids, do_sample=False, **options).shape[1] == 3 * TRAINED + 20


@pytest.mark.parametrize(
    ("asked", "given"), [({"max_length": 200}, 200), ({"max_new_tokens": 7}, 3 * TRAINED + 7)]
)
def test_a_length_that_was_asked_for_is_kept(model, asked, given) -> None:
    ids = models.text(3 * TRAINED)[None]
    assert model.generate(ids, do_sample=False, **asked).shape[1] == given


def test_no_reminder_of_the_trained_length(model) -> None:
    with mock.patch.object(stopping_criteria.logger, "warning_once") as said:
        model.generate(
            torch.ones(1, TRAINED + 5, dtype=torch.long), max_new_tokens=3, do_sample=False
        )
    said.assert_not_called()


# Lengths at which stock code drops or replaces a cache (Phi3 does, for the longer frequencies of
# longrope).


SHORT = [
    (name, longrope)
    for name in models.ALL_FAMILIES
    for longrope in (False, True)
    if name in LONGROPE or not longrope
]
LIMIT = 128  # more than conversion probes a rotary embedding with
TEXT = LIMIT + 9
TIERS = ("device", "host", "disk")


def short_stock(name: str, longrope: bool) -> Any:
    """A stock model whose constants of length all lie inside the texts here."""
    fields: dict[str, Any] = {"max_position_embeddings": LIMIT}
    if name == "phi3":
        fields["original_max_position_embeddings"] = LIMIT
    if longrope:
        rope = models.family_config(name).rope_parameters
        width = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
        rope = {
            **rope,
            "rope_type": "longrope",
            "original_max_position_embeddings": LIMIT,
            "factor": 4.0,
        }
        rope |= {"short_factor": [1.0] * width, "long_factor": [3.0] * width}
        fields |= {"max_position_embeddings": 4 * LIMIT, "rope_parameters": rope}
    return models.family_model(name, **fields)


def short(name: str, longrope: bool) -> Any:
    """The landmark model of it."""
    model = landmark.convert(short_stock(name, longrope), block_size=9, trained_length=4096)
    model.configure_landmark(landmark_trained=True, top_k=2, local_blocks=1)
    return model


def by_hand(model: Any, ids: torch.Tensor, memory: LandmarkCache, count: int) -> list[int]:
    """Greedy text through ``forward``, which has no hooks."""
    written: list[int] = []
    while len(written) < count:
        with torch.no_grad():
            logits = model(ids, past_key_values=memory).logits
        written.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([written[-1:]])
    return written


@pytest.mark.parametrize("read", [LIMIT - 3, LIMIT, 0])
@pytest.mark.parametrize(("name", "longrope"), SHORT)
def test_a_memory_is_kept_where_a_text_passes_a_length(
    name: str, longrope: bool, read: int
) -> None:
    model = short(name, longrope)
    ids = models.text(TEXT)[None]
    expected = by_hand(model, ids, LandmarkCache(model.config), 6)
    memory = LandmarkCache(model.config)
    if read:
        model.read(ids[:, :read], cache=memory)
    memory.record = True
    found = model.generate(ids, past_key_values=memory, max_new_tokens=6, do_sample=False)
    assert found[0, TEXT:].tolist() == expected
    assert memory.tokens == [TEXT + 5]
    assert memory.retrievals


@pytest.mark.parametrize("name", [name for name in models.ALL_FAMILIES if name in LONGROPE])
def test_longrope_was_trained_up_to_its_switch(name: str) -> None:
    """Landmark models keep the frequencies of short texts, so that further positions were never
    trained.
    """
    assert (
        landmark.convert(short_stock(name, longrope=True), block_size=9).landmark.trained_length
        == LIMIT
    )


@pytest.mark.parametrize("tier", TIERS)
def test_a_memory_stays_on_its_tier_where_a_text_passes_a_length(tier: str) -> None:
    model = short("phi3", longrope=True)
    ids = models.text(TEXT)[None]
    memory = model.read(ids[:, : LIMIT - 3], cache=LandmarkCache(model.config, tier))
    out = model.generate(
        ids, past_key_values=memory, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    assert out[CACHE] is memory
    assert memory.offload_config.tier == tier
    assert memory.tokens == [TEXT + 5]
