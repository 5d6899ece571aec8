"""The public operation: its checks and its choice of implementation."""

import pytest
import torch

from landmark import landmark_attention
from landmark.ops import chunked, reference
from landmark.ops.attention import IMPLS, explain_impl
from ops.bad_inputs import CASES


@pytest.mark.parametrize(("refused", "message"), [pytest.param(*each[1:], id=each[0]) for each in CASES])
def test_bad_inputs(refused, message):
    with pytest.raises(ValueError, match=message) as caught:
        refused()
    assert "\n" not in str(caught.value)


def test_every_bad_input_has_its_own_name():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 30


def test_auto_says_what_it_runs_and_why_nothing_else():
    choice = explain_impl()
    assert {choice.chosen, *choice.refused} == set(IMPLS) - {"auto"}
    assert all(choice.refused.values())


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
        patch.setattr(chunked, explain_impl().chosen, broken)
        with pytest.raises(RuntimeError, match="this one"):
            landmark_attention(*tensors, block_size=2)


def test_scale_and_query_start_have_their_defaults():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)
    expected = landmark_attention(query, key, value, block_size=4, scale=0.25, query_start=6)
    assert torch.equal(landmark_attention(query, key, value, block_size=4), expected)
