"""The operation on a GPU: the same results, and one compiled graph for a training shape."""

import pytest
import torch

from landmark import landmark_attention
from numerics import REORDERED, assert_close, error, low_precision_budget
from ops.cases import IMPLS, assert_same, random_call, results
from ops.eager import smallest_gap

pytestmark = pytest.mark.gpu
SEED = 0


def run(impl):
    def attention(query, key, value, **options):
        return landmark_attention(query, key, value, impl=impl, return_lse=True, **options)

    return attention


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(20))
def test_equals_the_reference_on_cpu(impl, seed):
    *tensors, options = random_call(seed)
    expected = results(run("reference"), *tensors, options)
    on_gpu = {
        name: each.cuda() if isinstance(each, torch.Tensor) else each
        for name, each in options.items()
    }
    found = results(run(impl), *(each.cuda() for each in tensors), on_gpu)
    assert_same({name: each.cpu() for name, each in found.items()}, expected, REORDERED)


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_shape_compiles_and_keeps_its_digits(packed):
    """Plain, and packed with a ``top_k``, where no selection hangs on a rounding."""
    noise = torch.Generator().manual_seed(SEED)
    rows = 1 if packed else 4
    tensors = [torch.randn(rows, 6, 512, 64, generator=noise).bfloat16() for _ in range(3)]
    options = {"block_size": 64}
    if packed:
        segments = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 400, 72]))[None]
        options |= {"top_k": 2, "segments": segments}
        assert smallest_gap(*tensors[:2], options) > 1e-6
        options["segments"] = segments.cuda()
    tensors = [each.cuda() for each in tensors]
    exact = results(run("reference"), *(each.double() for each in tensors), options)
    eager = results(run("chunked"), *tensors, options)
    compiled = results(torch.compile(run("auto"), fullgraph=True), *tensors, options)
    for name, each in exact.items():
        budget = 2 * error(eager[name], each)
        if packed:
            # Of one row: eager code computes it in float32, and its largest error is hardly more
            # than the rounding of the result.
            budget = low_precision_budget(eager[name], each)
        assert_close(compiled[name], each, budget, name)
