"""What a memory is made in and used in: autocast, inference mode, both or neither, on every tier,
and training.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import landmark
import models
from landmark import LandmarkCache
from numerics import low_precision_budget

BLOCK = 5
READ = 29
TIERS = ("device", "host", "disk")


@contextlib.contextmanager
def autocast() -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextlib.contextmanager
def both() -> Any:
    with torch.inference_mode(), autocast():
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "autocast": autocast,
    "inference mode": torch.inference_mode,
    "both": both,
}
EXACT = ("plain", "inference mode")


def family(name: str = "llama", block_size: int = BLOCK) -> Any:
    return models.converted_family(name, block_size, torch.float32)


def prompt() -> torch.Tensor:
    return models.text(43, seed=3)[None]


def greedy(model: Any, memory: LandmarkCache) -> torch.Tensor:
    return model.generate(prompt(), past_key_values=memory, max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize("used", CONTEXTS)
@pytest.mark.parametrize("made", CONTEXTS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_memory_made_in_one_is_used_in_another(tier: str, made: str, used: str) -> None:
    model = family()
    ids = prompt()
    with CONTEXTS[made]():
        memory = model.read(ids[:, :20], cache=LandmarkCache(model.config, tier))
    with CONTEXTS[used]():
        fork = memory.fork()
        found = model.read(ids[:, 20:READ], cache=memory)
        written = greedy(model, found)
        fork.batch_repeat_interleave(2)
        fork.crop(-3)
    assert memory.layers_in_use()[0].store.dtype == torch.float32
    again = fork.fork()
    again.batch_select_indices(torch.tensor([1]))
    model.read(ids[:, 17:READ], cache=again)
    assert memory.tokens == [51] and again.tokens == [READ]
    if made in EXACT and used in EXACT:
        expected = greedy(model, model.read(ids[:, :READ]))
        assert torch.equal(written, expected)
    if made in EXACT:  # what was read and forked in `used` was computed outside
        assert torch.equal(greedy(model, again), greedy(model, model.read(ids[:, :READ])))


@pytest.mark.parametrize("opened", CONTEXTS)
@pytest.mark.parametrize("tier", TIERS)
def test_an_archive_opened_in_one_goes_on_outside(tier: str, opened: str, tmp_path: Path) -> None:
    model = family()
    ids = prompt()
    with CONTEXTS[opened]():
        model.read(ids[:, :READ]).save(tmp_path / "memory")
        memory = LandmarkCache.open(tmp_path / "memory", model, tier)
        inside = greedy(model, memory.fork())
    outside = greedy(model, memory)
    memory.save(tmp_path / "memory")
    assert memory.tokens == [51]
    if opened in EXACT:
        assert torch.equal(inside, outside)
        assert torch.equal(outside, greedy(model, model.read(ids[:, :READ])))


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_under_autocast_a_memory_is_as_right_as_the_stock_model(name: str) -> None:
    """In one block both are the same function; the stock model's own error under autocast is the
    measure.
    """
    model = family(name, 64)
    ids = prompt()
    stock = models.family_model(name, dtype=torch.float32)
    with torch.no_grad():
        exact = stock(ids).logits
        with autocast():
            plain = stock(ids).logits
            memory = model.read(ids[:, :READ])
            found = model(ids[:, READ:], past_key_values=memory).logits
            written = model.generate(
                ids, past_key_values=model.read(ids[:, :READ]), max_new_tokens=3
            )
    budget = low_precision_budget(plain, exact)
    assert (found.float() - exact[:, READ:]).abs().max() <= budget
    assert written.shape == (1, 46)


HALVES = [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("own", "other"), HALVES)
@pytest.mark.parametrize("name", models.ALL_FAMILIES)
@torch.no_grad()
def test_a_half_precision_model_under_autocast_of_the_other_half(
    name: str, own: torch.dtype, other: torch.dtype
) -> None:
    """In one block it is as right as the stock model. Where torch refuses that one on the CPU, it
    refuses this one.
    """
    ids = prompt()
    stock = models.family_model(name, dtype=own)
    exact = models.family_model(name, dtype=torch.float32)(ids).logits
    with torch.autocast("cpu", dtype=other):
        try:
            plain = stock(ids).logits
        except RuntimeError as error:
            with pytest.raises((RuntimeError, ValueError), match=re.escape(str(error))):
                landmark.convert(stock, block_size=64)(ids)
            pytest.skip(f"torch on the CPU: {error}")
        model = landmark.convert(stock, block_size=64, chunk_tokens=13)
        rows, mask = models.padded([ids[0], ids[0, :20]], "left")
        whole = model(ids).logits
        later = model(ids[:, READ:], past_key_values=model.read(ids[:, :READ])).logits
        beside = model(rows, attention_mask=mask).logits
        packed = model(ids.repeat(1, 2), position_ids=torch.arange(43).repeat(2)[None]).logits
        written = model.generate(ids, past_key_values=model.read(ids[:, :READ]), max_new_tokens=3)
        states = model(ids, output_hidden_states=True).hidden_states
        expected = stock(ids, output_hidden_states=True).hidden_states
    budget = low_precision_budget(plain, exact)
    assert [each.shape for each in states] == [each.shape for each in expected]
    for found in (whole, beside[:1], packed[:, :43], packed[:, 43:]):
        assert (found.float() - exact).abs().max() <= budget
    assert (later.float() - exact[:, READ:]).abs().max() <= budget
    assert written.shape == (1, 46)


@pytest.mark.parametrize(("own", "other"), HALVES)
@pytest.mark.parametrize("mode", ["retrieval", "all"])
@torch.no_grad()
def test_landmarks_of_a_half_precision_model_under_autocast_of_the_other_half(
    mode: str, own: torch.dtype, other: torch.dtype
) -> None:
    """On every tier the same; the model's own error in float32 under autocast is the measure."""
    ids = prompt()
    given = models.family_model("llama", dtype=torch.float32)
    single, half = (
        landmark.convert(copy.deepcopy(given).to(dtype), block_size=BLOCK)
        for dtype in (torch.float32, own)
    )
    for model in (single, half):
        model.base_model.landmark_embedding.weight.fill_(0.1)
        model.configure_landmark(mode=mode, landmark_trained=True, top_k=99, chunk_tokens=13)
    exact = single(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = single(ids).logits
    with torch.autocast("cpu", dtype=other):
        found = [half(ids).logits]
        if mode == "retrieval":
            for tier in TIERS:
                cache = half.read(ids[:, :READ], cache=LandmarkCache(half.config, tier))
                found.append(half(ids[:, READ:], past_key_values=cache).logits)
    assert all(torch.equal(each, found[1]) for each in found[1:])
    for each in found:
        assert (each.float() - exact[:, -each.shape[1] :]).abs().max() <= low_precision_budget(
            plain, exact
        )


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_inference_mode_computes_the_same(name: str) -> None:
    model = family(name)
    with torch.inference_mode():
        inside = greedy(model, model.read(prompt()[:, :READ]))
    assert torch.equal(inside, greedy(model, model.read(prompt()[:, :READ])))


class Asks(TrainerCallback):
    """Reads and asks after every step, as people do to see how training goes."""

    def __init__(self) -> None:
        self.written: list[torch.Tensor] = []
        self.refused: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.configure_landmark(mode="retrieval")
        try:
            model.read(prompt()[:, :READ])
        except ValueError as error:
            self.refused.append(str(error))
        model.eval()
        self.written.append(greedy(model, model.read(prompt()[:, :READ])))
        model.train()
        model.configure_landmark(mode="all")


def test_a_trainer_in_bfloat16_leaves_a_model_that_reads(tmp_path: Path) -> None:
    model = landmark.convert(
        models.family_model("llama", dtype=torch.float32), block_size=BLOCK, mode="all"
    )
    model.configure_landmark(landmark_trained=True, top_k=2, trained_length=4096)
    rows = [{"input_ids": row, "labels": row} for row in models.text(4 * 24).view(4, 24)]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        max_steps=2,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    asks = Asks()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[asks]).train()
    assert len(asks.written) == len(asks.refused) == 2
    assert all("model.eval()" in line for line in asks.refused)
    model.configure_landmark(mode="retrieval")
    model.eval()
    for tier in TIERS:
        memory = model.read(prompt()[:, :READ], cache=LandmarkCache(model.config, tier))
        assert greedy(model, memory).shape == (1, 52)
        assert memory.tokens == [51]
