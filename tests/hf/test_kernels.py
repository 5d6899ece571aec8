"""Landmark models on the fused kernels: the losses and gradients of the same model on ``chunked``,
in one graph too.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import landmark
from landmark.hf import attention

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
CLOSE = 2e-5  # float32 through two layers, whose sums are ordered differently


@functools.cache
def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = LlamaConfig(
        vocab_size=61, intermediate_size=96, num_hidden_layers=2, initializer_range=0.2, **shape
    )
    made = landmark.convert(LlamaForCausalLM(config), block_size=16)
    made.configure_landmark(mode="all")
    return made.to(DEVICE)


def rows(name: str) -> dict[str, torch.Tensor]:
    """Whole rows, rows with padding on either side, packed rows."""
    ids = torch.arange(2 * 50).view(2, 50) * 7 % 61
    found = {"input_ids": ids, "labels": ids.clone()}
    if name in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 9) if name == "left" else slice(41, 50)] = 0
        found["attention_mask"] = mask
        found["labels"] = ids.masked_fill(mask == 0, -100)
    if name == "packed":
        found["seq_idx"] = (torch.arange(50) >= 21).long().expand(2, -1)
    return {key: each.to(DEVICE) for key, each in found.items()}


def losses(call: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    made = model()
    made.zero_grad()
    loss = call(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), *(weight.grad.clone() for weight in made.parameters())


@pytest.fixture
def implementation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the models' attention runs on."""
    model()  # converted on the CPU, by what runs there

    def set_to(impl: str) -> None:
        run = functools.partial(landmark.landmark_attention, impl=impl)
        monkeypatch.setattr(attention, "landmark_attention", run)

    return set_to


@pytest.mark.parametrize("name", ["whole", "left", "right", "packed"])
def test_losses_and_gradients_are_those_of_chunked(name: str, implementation: Any) -> None:
    implementation("chunked")
    expected = losses(model(), rows(name))
    implementation("triton")
    for found, each in zip(losses(model(), rows(name)), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=0, atol=CLOSE)


def test_one_graph(implementation: Any) -> None:
    implementation("triton")
    expected = losses(model(), rows("whole"))
    torch._dynamo.reset()
    compiled = torch.compile(model(), fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for found, each in zip(losses(compiled, rows("whole")), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=0, atol=CLOSE)
    torch._dynamo.reset()
