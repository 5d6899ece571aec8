"""Error budgets: how far results may lie apart, and why.

* ``EXACT``: the same formula in float64, another order of a few additions.
* ``REORDERED``: float64, sums cut into tiles and scaled by other maxima.
* Low precision is judged against float64, and allowed twice the error that plain PyTorch in that dtype makes on the
  same inputs, plus one rounding of the result.
"""

import torch

EXACT = 1e-12
REORDERED = 1e-10


def error(actual, expected):
    """Largest absolute difference; infinities must agree, NaN is an infinite error."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    difference = (actual - expected)[~infinite].abs().nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def assert_close(actual, expected, budget, what=""):
    found = error(actual, expected)
    assert found <= budget, f"{what}: error {found:.3g} over the budget {budget:.3g}"


def low_precision_budget(plain, exact):
    """Twice the error of ``plain``, the same computed by PyTorch in the low precision, plus one rounding."""
    return 2 * error(plain, exact) + torch.finfo(plain.dtype).eps * exact.abs().max().item()
