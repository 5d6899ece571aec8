"""Decode steps that are replayed from a CUDA graph compute what steps called one by one compute.

Without a GPU a stand-in for a CUDA graph calls the stock decoder again on the tensors that were
captured.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import landmark
from landmark import LandmarkCache
from landmark.hf import decode_graph

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
BLOCK = 16
VOCAB = 61
GRAPH = decode_graph.DecodeGraph


class Again:
    """What a graph does: the same call on the same tensors."""

    def __init__(self, call: Any) -> None:
        self.replay = call


def call_again(context: Any, decoder: Any, embeds: Any) -> decode_graph.Captured:
    fixed = context.for_capture(embeds.device)
    embeds = embeds.clone()
    output = decoder.stock(embeds, fixed)
    states = output.last_hidden_state
    again = Again(lambda: states.copy_(decoder.stock(embeds, fixed).last_hidden_state))
    return decode_graph.Captured(again, embeds, fixed.geometry, output)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[decode_graph.DecodeGraph]:
    """The graph of each ``generate``."""
    made: list[decode_graph.DecodeGraph] = []

    class Seen(decode_graph.DecodeGraph):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(decode_graph, "DecodeGraph", Seen)
    if not ON_GPU:
        monkeypatch.setattr(decode_graph, "can_capture", lambda _: True)
        monkeypatch.setattr(decode_graph, "capture", call_again)
    return made


def model(**settings: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = LlamaConfig(
        vocab_size=VOCAB, intermediate_size=96, num_hidden_layers=2, initializer_range=0.2, **shape
    )
    with mock.patch.object(decode_graph, "DecodeGraph", GRAPH):  # conversion generates, too
        made = landmark.convert(
            LlamaForCausalLM(config), block_size=BLOCK, top_k=2, local_blocks=1, **settings
        )
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    made.config.landmark["landmark_trained"] = True
    return made.to(DEVICE).eval()


def generated(
    made: Any, rows: int, cache: LandmarkCache | None = None, tokens: int = 2 * BLOCK, **how: Any
) -> Any:
    ids = torch.arange(rows * 100, device=DEVICE).view(rows, 100) * 7 % VOCAB
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **how}
    found = made.generate(ids, past_key_values=cache, max_new_tokens=tokens, **settings)
    return found.sequences, torch.stack(found.logits)


SETTINGS = {
    "plain": {},
    "exact": {"positions": "exact"},
    "evicting": {"max_blocks": 3},
    "block 0 alone": {"max_blocks": 0},
}


CASES = [
    ("plain", "device", 1),
    ("plain", "host", 2),
    ("exact", "host", 1),
    ("evicting", "device", 2),
]
CASES += [("block 0 alone", "device", 1), ("block 0 alone", "host", 2)]


@pytest.mark.parametrize(
    ("name", "tier", "rows"),
    list(itertools.product(SETTINGS, ("device", "host"), (1, 2))) if ON_GPU else CASES,
)
def test_replayed_steps_are_those_called(
    name: str,
    tier: str,
    rows: int,
    replays: list[decode_graph.DecodeGraph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = model(**SETTINGS[name])
    with monkeypatch.context() as patch:
        patch.setattr(decode_graph, "WARM_UP", 10**9)
        expected = generated(made, rows, LandmarkCache(made, tier))
    found = generated(made, rows, LandmarkCache(made, tier))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert replays[0].replayed == 0 and replays[1].replayed > BLOCK // 2


def test_a_disk_is_asked_by_calls(replays: list[decode_graph.DecodeGraph]) -> None:
    made = model()
    expected = generated(made, 1)
    found = generated(made, 1, LandmarkCache(made, "disk"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert replays[0].replayed and not replays[1].replayed


def test_what_is_called_between_layers_is_not_left_out(
    replays: list[decode_graph.DecodeGraph],
) -> None:
    made = model()
    seen = []
    made.base_model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    generated(made, 1)
    assert not replays[0].replayed and len(seen) >= 2 * BLOCK


def test_records_are_complete(replays: list[decode_graph.DecodeGraph]) -> None:
    made = model()
    cache = LandmarkCache(made)
    cache.record = True
    generated(made, 1, cache, tokens=20)
    assert not replays[0].replayed
    assert sum(each.positions.shape[1] == 1 for each in cache.retrievals) >= 2 * 17


def test_states_of_all_layers_are_returned(replays: list[decode_graph.DecodeGraph]) -> None:
    made = model()
    cache = made.read(torch.arange(100, device=DEVICE)[None] * 7 % VOCAB)
    made.config.output_hidden_states = True
    with decode_graph.capture_scope():
        for token in range(6):
            found = made(torch.full((1, 1), token, device=DEVICE), past_key_values=cache)
            assert len(found.hidden_states) == 3
    assert not replays[0].replayed


def test_nothing_is_captured_for_beams_that_move(replays: list[decode_graph.DecodeGraph]) -> None:
    made = model()
    generated(made, 1, tokens=12, num_beams=2)
    assert not replays[0].replayed


def test_weights_may_change_between_two_calls(replays: list[decode_graph.DecodeGraph]) -> None:
    made = model()
    other = model()
    caches = [LandmarkCache(each) for each in (made, other)]
    generated(made, 1, caches[0])
    assert replays[0].replayed
    with torch.no_grad():
        other.read(torch.arange(100, device=DEVICE)[None] * 7 % VOCAB, cache=caches[1])
        for each in (made, other):
            each.base_model.layers[0].mlp.down_proj.weight.mul_(0.5)
    changed, expected = (generated(each, 1) for each in (made, other))
    assert all(torch.equal(one, further) for one, further in zip(changed, expected, strict=True))


def test_a_stock_layer_that_asks_the_device_is_called(
    replays: list[decode_graph.DecodeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mixtures of experts do; a capture raises then."""
    made = model()
    expected = generated(made, 1)
    forward = type(made.base_model.layers[0].mlp).forward

    def asking(self: Any, states: torch.Tensor) -> torch.Tensor:
        bool(states.sum() > 0)
        return forward(self, states)

    monkeypatch.setattr(type(made.base_model.layers[0].mlp), "forward", asking)
    if not ON_GPU:
        monkeypatch.setattr(decode_graph, "capture", raising)
    found = generated(made, 1)
    assert replays[0].replayed and not replays[1].replayed
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # The random generator is not left in a capture that failed.
    assert torch.rand(3, device=DEVICE).shape == (3,)


def raising(*_: Any) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")
