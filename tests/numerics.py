"""Error budgets: how far results may lie apart, and why.

* ``EXACT``: the same formula in float64, another order of a few additions.
* ``REORDERED``: float64, sums cut into tiles and scaled by other maxima.
* Low precision is judged against float64, and allowed twice the error that plain PyTorch in that
  dtype makes on the same inputs, plus one rounding of the result.
* Fused kernels compute weights again from a stored log-sum-exp, by the hardware's exponential; see
  ``weight_error``.
"""

import torch

EXACT = 1e-12
REORDERED = 1e-10


def error(actual, expected):
    """Largest absolute difference; infinities must agree, NaN is an infinite error."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual = actual.detach().double()
    expected = expected.detach().double()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    difference = (actual - expected)[~infinite].abs().nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def assert_close(actual, expected, budget, what=""):
    found = error(actual, expected)
    assert found <= budget, f"{what}: error {found:.3g} over the budget {budget:.3g}"


def low_precision_budget(plain, exact):
    """Twice the error of ``plain``, the same computed by PyTorch in the low precision, plus one
    rounding.
    """
    return 2 * error(plain, exact) + torch.finfo(plain.dtype).eps * exact.abs().max().item()


def weight_error(lse):
    """Relative error of a softmax weight that a fused kernel computes in float32 from scores and a
    log-sum-exp.

    The exponent ``s * log2(e) - lse * log2(e)`` has five roundings (the stored sum, its product,
    the score's product, the peak's, the difference), each of 2 ** -24 of at most about ``|lse|``,
    as scores that weigh lie near it. The exponential and a quotient add 2 ** -22 each (PTX ISA:
    ``ex2.approx``, ``div.full``).
    """
    return 5 * 2**-24 * _largest(lse) + 2 * 2**-22


def online_error(lse):
    """The same of a weight that comes out of online softmaxes, as in the forward pass.

    Seven times 2 ** -22: the exponential of a score, the sum that it is divided by (its
    exponentials, and those that it was scaled by when the peak rose), the quotient; the exponential
    of the gate and its sum likewise.
    """
    return 5 * 2**-24 * _largest(lse) + 7 * 2**-22


def _largest(lse):
    finite = lse[lse.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def lse_error(tensors, lse):
    """Absolute error of a log-sum-exp in float32: it is never rounded to a lower dtype.

    A score is a sum of D products in float32: about ``D ** 0.5`` roundings of its size, at most
    ``|query| |key| scale`` with a scale of at most ``D ** -0.5``. Then the relative error of a sum
    of exponentials, as for a weight.
    """
    query, key, _ = tensors
    largest = query.double().norm(dim=-1).max().item() * key.double().norm(dim=-1).max().item()
    return 2**-24 * largest + weight_error(lse)
