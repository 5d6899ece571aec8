"""Mixtures of experts: router logits and the balancing loss count text tokens, landmarks and
padding taken out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import landmark
import models
from landmark import LandmarkCache

FAMILIES = ("mixtral", "qwen3_moe")
EXPERTS = 4
TOP = 2
LAYERS = 2
BLOCK = 5
LENGTHS = (23, 9, 16)
MODES = ("all", "retrieval")
CHUNKS = (1000, 11, 4)
ROUNDING = 1e-6  # of a loss near 2: a few units of rounding in float32


def stock_moe(name: str, **fields: Any) -> Any:
    config = CONFIG_MAPPING[name](
        vocab_size=models.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=EXPERTS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        sliding_window=None,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **fields,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def landmark_moe(
    name: str, mode: str, block_size: int = BLOCK, chunk_tokens: int = 1000, **fields: Any
) -> Any:
    settings = {"block_size": block_size, "mode": mode, "chunk_tokens": chunk_tokens, "top_k": 30}
    model = landmark.convert(stock_moe(name, **fields), trained_length=10**6, **settings)
    model.configure_landmark(landmark_trained=True)
    return model


def batch(side: str | None) -> dict[str, torch.Tensor]:
    """Returns ids, and a mask and labels where rows are padded."""
    if side is None:
        ids = models.text(46).view(2, 23)
        return {"input_ids": ids, "labels": ids}
    ids, mask = models.padded([models.text(length, seed=length) for length in LENGTHS], side)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@contextlib.contextmanager
def overheard(model: Any) -> Iterator[list[torch.Tensor]]:
    """What each router gives in each call: ``(rows * slots, experts)``, layer by layer, call by
    call.
    """
    heard: list[torch.Tensor] = []
    routers = [module for name, module in model.named_modules() if name.endswith(".gate")]
    assert len(routers) == LAYERS
    hooks = [
        router.register_forward_hook(lambda _, __, out: heard.append(out[0].detach()))
        for router in routers
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def of_text(heard: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Takes router logits ``(rows * slots, experts)`` of one whole pass for ``(B, T)`` columns,
    zeros at padding.
    """
    slots = heard.view(len(mask), -1, EXPERTS)
    found = torch.zeros(*mask.shape, EXPERTS)
    for row in range(len(mask)):
        token = 0
        for column in range(mask.shape[1]):
            if mask[row, column]:
                found[row, column] = slots[row, token + token // (BLOCK - 1)]
                token += 1
    return found


def balancing_loss(layers: list[torch.Tensor], mask: torch.Tensor) -> float:
    """Equations 4 to 6 of the Switch Transformer over the tokens (B, T) of ``mask``, one after the
    other.
    """
    chosen = torch.zeros(EXPERTS)
    probability = torch.zeros(EXPERTS)
    tokens = 0
    for logits in layers:
        for token in logits[mask == 1]:
            weights = token.softmax(dim=0)
            chosen[weights.topk(TOP).indices] += 1
            probability += weights
            tokens += 1
    return float(EXPERTS * (chosen / tokens * probability / tokens).sum())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("asked", ["config", "call"])
def test_without_landmarks_it_is_the_stock_models_loss(
    name: str, mode: str, side: str | None, asked: str
) -> None:
    fields, call = (
        ({"output_router_logits": True}, {})
        if asked == "config"
        else ({}, {"output_router_logits": True})
    )
    model = landmark_moe(name, mode, block_size=64, **fields)
    stock = stock_moe(name, **fields)
    given = batch(side)
    with torch.no_grad():
        found = model(**given, **call)
        expected = stock(**given, **call)
    assert [each.shape for each in found.router_logits] == [
        each.shape for each in expected.router_logits
    ]
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    ("mode", "chunk_tokens"), [("all", 1000), *(("retrieval", size) for size in CHUNKS)]
)
def test_the_loss_counts_text_alone(
    name: str, side: str | None, mode: str, chunk_tokens: int
) -> None:
    given = batch(side)
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    model = landmark_moe(name, "all")
    with torch.no_grad(), overheard(model) as heard:
        model(**given)
    expected = [of_text(layer, mask) for layer in heard]
    model.configure_landmark(mode=mode, chunk_tokens=chunk_tokens)
    with torch.no_grad():
        found = model(**given, output_router_logits=True, output_hidden_states=True)
        without = model(**given)
    for logits, layer in zip(found.router_logits, expected, strict=True):
        torch.testing.assert_close(logits, layer.flatten(0, 1), rtol=0, atol=1e-4)
    assert float(found.aux_loss) == pytest.approx(balancing_loss(expected, mask), abs=1e-4)
    assert [states.shape for states in found.hidden_states] == [(*mask.shape, 32)] * (LAYERS + 1)
    assert without.router_logits is None and torch.equal(without.logits, found.logits)
    coefficient = model.config.router_aux_loss_coef
    torch.testing.assert_close(found.loss, without.loss + coefficient * found.aux_loss)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_rows_equal_separate_rows(name: str, mode: str, by: str) -> None:
    model = landmark_moe(name, mode, chunk_tokens=8)
    rows = [models.text(length, seed=length) for length in LENGTHS]
    extra = {
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "seq_idx": torch.cat([torch.full((length,), n) for n, length in enumerate(LENGTHS)])[None],
        "cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
    }[by]
    asked = {"output_router_logits": True, "output_hidden_states": True}
    with torch.no_grad():
        packed = model(torch.cat(rows)[None], **{by: extra}, **asked)
        apart = [model(row[None], **asked) for row in rows]
    torch.testing.assert_close(
        packed.logits, torch.cat([each.logits for each in apart], 1), rtol=0, atol=1e-4
    )
    for layer in range(LAYERS):
        joined = torch.cat([each.router_logits[layer] for each in apart])
        torch.testing.assert_close(packed.router_logits[layer], joined, rtol=0, atol=1e-4)
        states = torch.cat([each.hidden_states[layer] for each in apart], dim=1)
        torch.testing.assert_close(packed.hidden_states[layer], states, rtol=0, atol=1e-4)
    everywhere = torch.ones(1, sum(LENGTHS))
    layers = [logits[None] for logits in packed.router_logits]
    assert float(packed.aux_loss) == pytest.approx(balancing_loss(layers, everywhere), abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_several_packed_rows(name: str, mode: str) -> None:
    model = landmark_moe(name, mode)
    ids = models.text(40).view(2, 20)
    borders = torch.tensor([[0] * 7 + [1] * 13, [0] * 12 + [1] * 8])
    with torch.no_grad():
        together = model(ids, seq_idx=borders, output_router_logits=True)
        apart = [
            model(ids[n : n + 1], seq_idx=borders[n : n + 1], output_router_logits=True)
            for n in range(2)
        ]
    for layer in range(LAYERS):
        joined = torch.cat([each.router_logits[layer] for each in apart])
        torch.testing.assert_close(together.router_logits[layer], joined, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_routers_as_the_stock_loss_does(
    name: str, side: str, checkpointing: bool
) -> None:
    given = batch(side)
    found = []
    fields = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    for model in (landmark_moe(name, "all", block_size=64, **fields), stock_moe(name, **fields)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**given, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if n.endswith(".gate.weight")})
    assert found[0].keys() == found[1].keys() and len(found[0]) == LAYERS
    for key, gradient in found[0].items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, found[1][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_with_landmarks_has_the_loss_of_text(name: str) -> None:
    model = landmark_moe(name, "all", output_router_logits=True).train()
    given = batch("right")
    with overheard(model) as heard:
        output = model(**given, use_cache=False)
    layers = [of_text(layer, given["attention_mask"]) for layer in heard]
    assert float(output.aux_loss.detach()) == pytest.approx(
        balancing_loss(layers, given["attention_mask"]), abs=1e-5
    )
    output.aux_loss.backward()
    assert model.base_model.layers[0].mlp.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_on_a_memory_give_the_logits_of_their_own_tokens(name: str) -> None:
    model = landmark_moe(name, "retrieval")
    given = batch("left")
    cache = LandmarkCache(model.config)
    parts = []
    ids = given["input_ids"]
    mask = given["attention_mask"]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, output_router_logits=True)
        for begin, end in ((0, 10), (10, 11), (11, 23)):
            call = {
                "attention_mask": mask[:, begin:end],
                "past_key_values": cache,
                "output_router_logits": True,
            }
            parts.append(model(ids[:, begin:end], **call))
            assert parts[-1].aux_loss.isfinite()
    for layer in range(LAYERS):
        logits = [part.router_logits[layer].view(len(ids), -1, EXPERTS) for part in parts]
        torch.testing.assert_close(
            torch.cat(logits, 1).flatten(0, 1), whole.router_logits[layer], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_leaves_the_loss_out(name: str, beams: int) -> None:
    model = landmark_moe(name, "retrieval", chunk_tokens=8)
    given = batch("left")
    prompt = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    expected = model.generate(**prompt, **options)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(**prompt, **options), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_assisted_generation_leaves_the_loss_out(name: str) -> None:
    model = landmark_moe(name, "retrieval", output_router_logits=True)
    assistant = models.stock_model("llama")
    prompt = models.text(17)[None]
    options = {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert torch.equal(
        model.generate(prompt, assistant_model=assistant.float(), **options), expected
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_alone_and_a_tuple(name: str) -> None:
    model = landmark_moe(name, "retrieval", chunk_tokens=8)
    given = batch(None)
    with torch.no_grad():
        decoder = model.base_model(given["input_ids"], output_router_logits=True)
        fields = model(**given, output_router_logits=True)
        plain = model(**given, output_router_logits=True, return_dict=False)
    assert all(map(torch.equal, decoder.router_logits, fields.router_logits))
    assert torch.equal(plain[0], fields.loss) and torch.equal(plain[1], fields.aux_loss)
