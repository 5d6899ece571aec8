"""The public function: its checks, and which implementation it picks."""

from typing import NamedTuple

import pytest
import torch

from landmark import landmark_attention
from landmark.ops import choice, chunked, reference
from ops.bad_inputs import CASES


@pytest.mark.parametrize(
    ("refused", "message"), [pytest.param(*each[1:], id=each[0]) for each in CASES]
)
def test_bad_inputs(refused, message):
    with pytest.raises(ValueError, match=message) as caught:
        refused()
    assert "\n" not in str(caught.value)


def test_every_bad_input_has_its_own_name():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 30


def test_auto_says_what_it_runs_and_why_nothing_else():
    for dtype, options in ((torch.float32, {}), (torch.float64, {}), (torch.float16, {"top_k": 3})):
        found = choice.explain_impl(torch.zeros(1, 1, 1, 64, dtype=dtype), **options)
        assert {found.chosen, *found.refused} == set(choice.IMPLS) - {"auto"}
        assert found.chosen == "chunked" and all(found.refused.values())


class Device(NamedTuple):
    major: int
    minor: int
    shared_memory_per_block_optin: int


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device(9, 0, 232448), None),
        (Device(8, 6, 101376), None),
        (Device(7, 5, 65536), "expected a GPU of compute capability 8.0 or later, got 7.5"),
        (
            Device(8, 0, 49152),
            "expected 98304 bytes of shared memory for a block of threads, got 49152",
        ),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_is_named(monkeypatch, device, reason):
    monkeypatch.setattr(choice, "_INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert choice._refusal_of_device.__wrapped__(torch.device("cuda:0")) == reason


def test_the_kernels_need_their_package_and_a_gpu(monkeypatch):
    query = torch.zeros(1, 1, 1, 64)
    monkeypatch.setattr(choice, "_INTERPRETED", False)
    assert choice.refusal(query, 64, None) == "expected tensors on an NVIDIA GPU, got cpu"
    monkeypatch.setattr(choice, "_INSTALLED", False)
    assert "pip install triton" in choice.refusal(query, 64, None)


def test_a_named_implementation_runs_itself(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("this one")

    tensors = [torch.zeros(1, 1, 4, 2)] * 3
    for module, name in ((reference, "reference"), (chunked, "chunked")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(RuntimeError, match="this one"):
                landmark_attention(*tensors, block_size=2, impl=name)
            other = {"reference": "chunked", "chunked": "reference"}[name]
            landmark_attention(*tensors, block_size=2, impl=other)
    with monkeypatch.context() as patch:
        patch.setattr(chunked, choice.explain_impl(tensors[0]).chosen, broken)
        with pytest.raises(RuntimeError, match="this one"):
            landmark_attention(*tensors, block_size=2)


def test_scale_and_query_start_have_their_defaults():
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 16)
    key = torch.randn(1, 1, 9, 16)
    value = torch.randn(1, 1, 9, 16)
    expected = landmark_attention(query, key, value, block_size=4, scale=0.25, query_start=6)
    assert torch.equal(landmark_attention(query, key, value, block_size=4), expected)
