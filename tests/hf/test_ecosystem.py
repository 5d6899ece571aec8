"""What stands around generation: streaming, packing, gradient checkpointing, adapters, and where
the logits lie.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from landmark import LandmarkCache, LandmarkConfig

pytestmark = pytest.mark.usefixtures("wide_norms")

RETRIEVE = LandmarkConfig(block_size=5, top_k=2, local_blocks=1)
EVERYTHING = LandmarkConfig(block_size=5, mode="all")


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming_hands_out_every_token_once() -> None:
    model = models.landmark_model("llama", RETRIEVE)
    prompt = models.text(17)
    streamer = Heard()
    sequences = model.generate(prompt[None], max_new_tokens=11, do_sample=False, streamer=streamer)
    assert streamer.tokens == sequences[0].tolist() and streamer.ended


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 7, 100])
def test_logits_of_all_text_tokens_come_back(family: str, chunk_tokens: int) -> None:
    model = models.landmark_model(family, RETRIEVE.replace(chunk_tokens=chunk_tokens))
    ids = models.text(38).view(2, 19)
    with torch.no_grad():
        whole = model(ids, labels=ids)
        last = model(ids, logits_to_keep=3).logits
        first = model(ids[:, :6]).logits
    assert whole.logits.shape == (2, 19, models.VOCAB)
    torch.testing.assert_close(last, whole.logits[:, -3:], rtol=0, atol=1e-11)
    torch.testing.assert_close(first, whole.logits[:, :6], rtol=0, atol=1e-11)
    loss = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(whole.loss.float(), loss)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_batch_order_and_padding_change_nothing_below_top_k(family: str) -> None:
    model = models.landmark_model(family, RETRIEVE)
    rows = [models.text(length, seed=length) for length in (31, 3, 18)]
    ids, mask = models.padded(rows, "left")
    with torch.no_grad():
        straight = model(ids, attention_mask=mask).logits
        turned = model(ids.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
        alone = [model(row[None]).logits[0] for row in rows]
    for row, single in enumerate(alone):
        torch.testing.assert_close(straight[row][mask[row] == 1], single, rtol=0, atol=1e-11)
        torch.testing.assert_close(turned[row][mask[row] == 1], single, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_block_through_a_cache_equals_one_pass(family: str) -> None:
    model = models.landmark_model(family, EVERYTHING.replace(chunk_tokens=7))
    ids = models.text(60).view(2, 30)
    cache = LandmarkCache(model.config)
    with torch.no_grad():
        parts = [
            model(part, past_key_values=cache).logits for part in ids.split([19, 1, 1, 9], dim=1)
        ]
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


def test_rows_that_end_early_leave_the_others_alone() -> None:
    model = models.landmark_model("mistral", RETRIEVE)
    rows = [models.text(length, seed=length) for length in (16, 9, 21)]
    ids, mask = models.padded(rows, "left")
    free = [
        model.generate(row[None], max_new_tokens=14, do_sample=False)[0, len(row) :].tolist()
        for row in rows
    ]
    end = free[0][3]
    together = model.generate(
        ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=end
    )
    said = together[:, ids.shape[1] :].tolist()
    for row, alone in zip(said, free, strict=True):
        stop = alone.index(end) + 1 if end in alone else len(alone)
        assert row[:stop] == alone[:stop]
        assert set(row[stop:]) <= {0}
    assert any(end not in alone for alone in free)


def test_several_answers_to_one_prompt() -> None:
    model = models.landmark_model("qwen3", RETRIEVE)
    prompt = models.text(23)
    options = {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3}
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(model.generate(prompt[None], use_cache=use_cache, **options).tolist())
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) > 1


def test_hidden_states_align_with_the_text() -> None:
    model = models.landmark_model("llama", RETRIEVE.replace(chunk_tokens=6))
    ids = models.text(40).view(2, 20)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        logits = model.get_output_embeddings()(out.hidden_states[-1])
    assert [tuple(states.shape) for states in out.hidden_states] == [(2, 20, 32)] * 3
    torch.testing.assert_close(logits, out.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("by", ["position_ids", "seq_idx"])
def test_packed_rows_equal_separate_rows(family: str, by: str) -> None:
    model = models.landmark_model(family, EVERYTHING)
    lengths = (11, 4, 1, 17)
    rows = [models.text(length, seed=length) for length in lengths]
    packed = torch.cat(rows)[None]
    if by == "position_ids":
        extra = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    else:
        extra = {
            "seq_idx": torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])[
                None
            ]
        }
    with torch.no_grad():
        together = model(packed, use_cache=False, **extra).logits[0]
        apart = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    model = models.landmark_model(family, EVERYTHING).train()
    ids = models.text(42).view(2, 21)
    try:
        plain = gradients(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        calls = []
        attention = getattr(
            model.base_model.layers[0], "attention" if family == "gpt_neox" else "self_attn"
        )
        hook = attention.register_forward_hook(lambda *_: calls.append(1))
        checkpointed = gradients(model, ids)
        hook.remove()
        assert len(calls) == 2  # once more in the backward pass
    finally:
        model.gradient_checkpointing_disable()
        if reentrant:
            model.disable_input_require_grads()
        model.eval()
    assert plain.keys() == checkpointed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-12)
    assert any(
        "landmark_embedding" in name and gradient.abs().max() > 0
        for name, gradient in plain.items()
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_adapter_and_landmark_train_together_and_generate(family: str) -> None:
    peft = pytest.importorskip("peft")
    from landmark.hf.convert import convert

    base = convert(
        models.stock_model(family, dtype=torch.float32), block_size=5, top_k=2, local_blocks=1
    )
    base.configure_landmark(mode="all")
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query_key_value"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, modules_to_save=["landmark_embedding"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    ids = models.text(42).view(2, 21)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("landmark_embedding" in name for name in trained) and any(
        "lora_A" in name for name in trained
    )
    base.configure_landmark(mode="retrieval", landmark_trained=True)
    model.eval()
    sequences = model.generate(input_ids=ids[:, :13], max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(input_ids=sequences).logits[:, 12:-1]
    chosen = logits.gather(2, sequences[:, 13:, None])[..., 0]
    assert (chosen >= logits.max(dim=2).values - 1e-3).all()
