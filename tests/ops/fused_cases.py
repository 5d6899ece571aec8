"""Random calls for the fused kernels.

A *variant* is what a kernel is compiled for, a *case* is a call of it.
"""

import random
from typing import NamedTuple

import torch

from ops.eager import smallest_gap

# Kinds of rows; one more is "blocks": plain rows whose first query is the first slot of a block.
ROWS = ("plain", "starts", "segments")


class Variant(NamedTuple):
    dtype: torch.dtype
    dim: int
    block_size: int
    rows: str
    top_k: int = 0

    def __str__(self):
        top_k = f"-{self.top_k}" if self.top_k else ""
        return f"{str(self.dtype)[6:]}-{self.dim}-{self.block_size}-{self.rows}{top_k}"


def random_call(variant, seed, longest, device="cpu", most=2):
    """Query, key, value and options; lengths up to ``longest``, up to ``most`` rows and groups.

    With a ``top_k``, no selection hangs on a rounding.
    """
    for attempt in range(100):
        tensors, options = any_call(variant, f"{seed} {attempt}", longest, most)
        if not variant.top_k or smallest_gap(*tensors[:2], options) > 1e-6:
            break
    else:
        raise AssertionError(f"no call of {variant} without near ties")
    on_device = {
        name: each.to(device) if isinstance(each, torch.Tensor) else each
        for name, each in options.items()
    }
    return [each.to(device) for each in tensors], on_device


def any_call(variant, seed, longest, most):
    """As ``random_call``, near ties or not."""
    rng = random.Random(f"{variant} {seed}")
    noise = torch.Generator().manual_seed(rng.randrange(2**31))
    rows = rng.randint(1, most)
    groups = rng.randint(1, most)
    group_size = rng.choice([1, 1, 2, most + 1])
    keys = rng.choice([rng.randint(1, longest // 4), rng.randint(longest // 4, longest)])
    queries = keys
    options = {"block_size": variant.block_size}
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.3, -0.2, 0.0, 1.0]) / variant.dim**0.5
    if variant.rows == "starts":
        starts = torch.tensor([[rng.choice([0, rng.randint(0, keys)])] * 2 for _ in range(rows)])
        options["starts"] = rng.choice(
            [starts[:, 0], starts.int()[:, 0], starts[:1, 0].int().expand(rows)]
        )
    if variant.rows == "segments":
        documents = min(rng.choice([1, 4, 20]), keys // 4)
        options["segments"] = (torch.rand(rows, keys, generator=noise) < documents / keys).cumsum(1)
        if rng.random() < 0.3:
            options["starts"] = torch.tensor([rng.randint(0, keys) for _ in range(rows)])
    if variant.top_k:
        options["top_k"] = variant.top_k
    if variant.rows == "blocks":
        options["query_start"] = rng.randrange(0, keys, variant.block_size)
        queries = rng.choice(
            [keys - options["query_start"], rng.randint(1, keys - options["query_start"])]
        )
    elif rng.random() < 0.5:
        queries = rng.randint(1, keys)
        if variant.rows != "segments":
            options["query_start"] = rng.choice(
                [rng.randint(0, keys), keys, keys + rng.randint(0, 2 * longest)]
            )
    if variant.top_k and rng.random() < 0.5:
        shape = rows, queries, rng.randint(1, 3)
        most = max(1, keys // variant.block_size)
        forced = torch.randint(-1, most + 1, shape, generator=noise)
        options["forced"] = rng.choice([forced, forced.int()])
    shape = rows, groups * group_size, queries, variant.dim
    tensors = [strided(rng, noise, shape, variant.dtype, rng.choice([0.5, 2.0]))]
    for _ in range(2):
        tensors.append(strided(rng, noise, (rows, groups, keys, variant.dim), variant.dtype, 1.0))
    return tensors, options


def strided(rng, noise, shape, dtype, spread):
    """A random tensor (B, H, T, D) with random strides.

    It is contiguous, laid out as transformers hands it, or part of a wider tensor, aligned to 16
    bytes or not; or all heads are the same memory.
    """
    rows, heads, length, dim = shape
    tensor = (spread * torch.randn(shape, generator=noise)).to(dtype)
    layout = rng.choice(["contiguous", "transposed", "transposed", "part", "unaligned", "expanded"])
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part":
        wide = torch.full((rows, length, heads, 2 * dim), torch.nan, dtype=dtype)
        wide[..., :dim] = tensor.transpose(1, 2)
        return wide[..., :dim].transpose(1, 2)
    if layout == "unaligned":
        wide = torch.full((rows, heads, length, dim + 1), torch.nan, dtype=dtype)
        wide[..., 1:] = tensor
        return wide[..., 1:]
    if layout == "expanded":
        return tensor[:, :1].expand(shape)
    return tensor
