"""What a GPU computes is what the CPU computes: the operation and whole models. Run by ``make
test-gpu``.
"""

from __future__ import annotations

import pytest
import torch

import models
from landmark import landmark_attention
from landmark.config import GRANULARITIES, LandmarkConfig
from landmark.hf.cache import LandmarkCache
from landmark.hf.prompt_retrieval import pin_for_prompt
from numerics import REORDERED, assert_close, low_precision_budget
from ops.test_chunked import low_precision_case, plain

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("wide_norms")]


@pytest.fixture(scope="module")
def wide_norms():
    with models.wide_norms():
        yield


def tensors(dtype, device="cuda"):
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 300, 32, generator=random, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 700, 32, generator=random, dtype=torch.float64)
    return [each.to(device, dtype).requires_grad_() for each in (query, key, value)]


def with_gradients(leaves, impl, top_k):
    output = landmark_attention(*leaves, block_size=16, top_k=top_k, impl=impl)
    return output, *torch.autograd.grad(output.double().pow(2).sum(), leaves)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_operation_equals_the_reference_on_the_cpu(impl, top_k):
    found = with_gradients(tensors(torch.float64), impl, top_k)
    expected = with_gradients(tensors(torch.float64, "cpu"), "reference", top_k)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.cpu(), theirs, REORDERED * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_within_its_budget(dtype):
    rounded = low_precision_case(dtype)
    exact, _ = plain(*(each.double() for each in rounded), block_size=16)
    ordinary, _ = plain(*rounded, block_size=16)
    found = landmark_attention(
        *(each.cuda() for each in rounded), block_size=16, impl="chunked"
    ).cpu()
    assert_close(found, exact, low_precision_budget(ordinary.to(dtype), exact))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_models_compute_what_they_compute_on_the_cpu(family, granularity):
    settings = LandmarkConfig(
        block_size=5, top_k=2, local_blocks=1, granularity=granularity, chunk_tokens=9
    )
    model = models.landmark_model(family, settings)
    ids, mask = models.padded([models.text(40, seed=1), models.text(23, seed=2)], "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        spoken = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    try:
        model.to("cuda")
        with torch.no_grad():
            found = model(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
            heard = model.generate(
                ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=9, do_sample=False
            )
    finally:
        model.to("cpu")
    shown = mask.bool()
    assert_close(found[shown], expected[shown], 1e-8)
    assert heard.cpu().tolist() == spoken.tolist()


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("chosen_by", [{"retrieval_layers": (1,)}, {"retrieval_heads": ((1, 0),)}])
def test_blocks_are_chosen_as_on_the_cpu(chosen_by, family, tier):
    """The blocks that are pinned for a prompt, and what all layers then read of them."""
    settings = LandmarkConfig(block_size=5, top_k=2, local_blocks=1, chunk_tokens=20, **chosen_by)
    model = models.landmark_model(family, settings)
    text = models.text(2 * 70, seed=1).view(2, 70)
    question = models.text(2 * 9, seed=2).view(2, 9)
    found = {}
    try:
        for device in ("cpu", "cuda"):
            model.to(device)
            with torch.no_grad():
                cache = model.read(
                    text.to(device), cache=LandmarkCache(model.config, tier), retrieve=False
                )
                chosen = pin_for_prompt(model, cache, question.to(device))
                assert (chosen >= 0).all()
                logits = model(question.to(device), past_key_values=cache).logits
                step = model(question[:, :1].to(device), past_key_values=cache).logits
                fresh = model.read(text.to(device), retrieve=False)
                written = model.generate(
                    torch.cat((text, question), dim=1).to(device),
                    past_key_values=fresh,
                    max_new_tokens=9,
                    do_sample=False,
                )
            found[device] = (chosen, logits.cpu(), step.cpu(), written.tolist())
    finally:
        model.to("cpu")
    expected = found["cpu"]
    ours = found["cuda"]
    assert ours[0].tolist() == expected[0].tolist()
    assert_close(ours[1], expected[1], 1e-8)
    assert_close(ours[2], expected[2], 1e-8)
    assert ours[3] == expected[3]
