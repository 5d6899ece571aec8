"""Tests of ``chunked`` alone: its ways through a call, low precision, compilation, memory."""

import subprocess
import sys
import textwrap

import pytest
import torch

from landmark import landmark_attention
from landmark.blocks import key_grid, query_blocks
from landmark.ops import chunked
from landmark.ops.layout import lay_out
from numerics import REORDERED, assert_close, error, low_precision_budget
from ops.cases import assert_same, random_call, results


def run(impl):
    def attention(query, key, value, **options):
        return landmark_attention(query, key, value, impl=impl, return_lse=True, **options)

    return attention


def plain(query, key, value, block_size):
    """Landmark attention on whole blocks, every step in the dtype of the inputs."""
    length = query.shape[2]
    scores = (query.shape[3] ** -0.5 * (query @ key.transpose(-1, -2))).unflatten(
        -1, (-1, block_size)
    )
    slot = torch.arange(length)
    text = (slot % block_size != block_size - 1) & (slot <= slot[:, None])
    number = torch.arange(length // block_size)
    block = (slot // block_size)[:, None]
    inner = scores.masked_fill(~text.unflatten(-1, (-1, block_size)), -1e4)
    sums = inner.logsumexp(-1)
    gate = torch.where(number == block, sums, scores[..., -1]).masked_fill(number > block, -1e4)
    weights = torch.softmax(inner, -1) * torch.softmax(gate, -1)[..., None]
    return weights.flatten(-2) @ value, gate.logsumexp(-1)


@pytest.fixture
def one_tile(monkeypatch):
    """The single tile that a GPU and a compiler get."""

    def regular(metadata, query, key):
        return metadata.has_equal_blocks and metadata.starts is None and metadata.top_k is None

    monkeypatch.setattr(chunked, "is_direct", regular)


@pytest.mark.parametrize("seed", range(12))
def test_one_tile_equals_reference(one_tile, seed):
    query, key, value, options = random_call(2000 + seed)
    options = {
        name: each
        for name, each in options.items()
        if name in ("block_size", "query_start", "scale")
    }
    expected = results(run("reference"), query, key, value, options)
    assert_same(results(run("chunked"), query, key, value, options), expected, REORDERED)


def low_precision_case(dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 4, 128, 16).mul(scale).to(dtype) for scale in (3, 1, 1)]


def assert_within_low_precision(dtype):
    tensors = low_precision_case(dtype)
    options = {"block_size": 16}
    exact = results(plain, *(each.double() for each in tensors), options)
    ordinary = results(plain, *tensors, options)
    ours = results(run("chunked"), *tensors, options)
    for name, each in exact.items():
        ordinary_low = ordinary[name].to(dtype)
        assert_close(ours[name], each, low_precision_budget(ordinary_low, each), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    assert_within_low_precision(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_of_one_tile(one_tile, dtype):
    assert_within_low_precision(dtype)


def test_the_plain_formula_of_these_tests_is_the_definition():
    tensors = [each.double() for each in low_precision_case(torch.float32)]
    expected = results(run("reference"), *tensors, {"block_size": 16})
    assert_same(results(plain, *tensors, {"block_size": 16}), expected, REORDERED)


def test_large_scores_do_not_overflow():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    for impl in ("reference", "chunked"):
        found = results(run(impl), 300 * query, key, value, {"block_size": 8})
        exact = results(
            run("reference"), 300 * query.double(), key.double(), value.double(), {"block_size": 8}
        )
        assert all(each.isfinite().all() for each in found.values())
        assert error(found["out"], exact["out"]) < 1e-3


def compiled_equals_eager(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 60, 8) for heads in (4, 2, 2)]
    options = {"block_size": 16}
    attention = torch.compile(run("auto"), fullgraph=True, backend=backend)
    expected = results(run("reference"), *tensors, options)
    assert_same(results(attention, *tensors, options), expected, 2e-5)


def test_compiles_in_one_graph():
    compiled_equals_eager("aot_eager")


@pytest.mark.full
def test_compiles_to_fused_code():
    compiled_equals_eager("inductor")


def test_layout_stays_linear_where_blocks_differ_widely():
    """Hundreds of short blocks, then one as long as all of them: the long one is cut."""
    length = 4096
    landmarks = torch.zeros(1, length, dtype=torch.bool)
    landmarks[:, 3 : length // 2 : 4] = True
    options = {"block_size": 2, "starts": None, "segments": None, "landmarks": landmarks}
    layout = lay_out(length, torch.arange(length), **options)
    assert layout.piece_block is not None
    assert layout.slot.numel() <= 4 * length
    slots = layout.gather_slot[layout.gather_slot < length]
    assert torch.equal(slots.sort().values, (~landmarks[0]).nonzero()[:, 0])
    grid = key_grid(length, block_size=2, landmarks=landmarks)
    own = query_blocks(grid, slots, block_size=2, regular=False)[0]
    pieces = layout.piece_block[:, :, None].expand_as(layout.gather_slot)[
        layout.gather_slot < length
    ]
    assert torch.equal(own[0], pieces)


def peak_mebibytes(queries, keys, options="", groups=1, heads=1, backward=True):
    """Peak memory that one call adds, operands included, after a small call before it.

    It runs in a fresh process. ``VmHWM`` is the peak of this process alone; ``ru_maxrss`` would
    start at the peak of the process that started it.
    """
    code = f"""
        import re, torch
        from landmark import landmark_attention

        def call(queries, keys):
            query = torch.randn(1, {heads}, queries, 64, requires_grad={backward})
            shape = (1, {groups}, keys, 64)
            key, value = (torch.randn(shape, requires_grad={backward}) for _ in range(2))
            out = landmark_attention(query, key, value, block_size=64, {options})
            if {backward}:
                out.sum().backward()

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

        torch.set_num_threads(1)
        call(64, 128)
        before = peak()
        call({queries}, {keys})
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 2**10


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
@pytest.mark.full
def test_peak_memory_at_32k():
    assert peak_mebibytes(32768, 32768) < 1024


@on_linux
def test_peak_memory_of_the_last_queries_at_32k():
    """A T x S tensor of these would take 256 MiB; the operands and their gradients take 64."""
    assert peak_mebibytes(2048, 32768) < 200


@on_linux
def test_peak_memory_with_top_k_at_32k():
    assert peak_mebibytes(1024, 32768, "top_k=4") < 200


@on_linux
def test_key_value_heads_are_not_expanded():
    """Keys and values take 16 MiB; expanded to 16 heads they would take 256."""
    assert peak_mebibytes(1, 32768, groups=1, heads=16, backward=False) < 100
