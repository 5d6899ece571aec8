"""The fused kernels against float64.

Small calls run through Triton's interpreter, many calls on a GPU (``make test-gpu``).
"""

import itertools
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from landmark import landmark_attention
from numerics import assert_close, low_precision_budget, lse_error, online_error, weight_error
from ops.cases import random_weights, results
from ops.eager import eager_attention
from ops.fused_cases import ROWS, Variant, random_call
from ops.loop import blocks_of_row, place_of_query

pytest.importorskip("triton")
configs = pytest.importorskip("landmark.ops.triton.configs")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels run on the GPU here: make test-gpu"
)

FAST = 60
FULL = 160
LONGEST = 256
CASES = 12
PARTS = 3
VARIANTS = [
    Variant(dtype, dim, block_size, rows)
    for dtype, dim, block_size in (
        (torch.bfloat16, 128, 64),
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 128, 51),
        (torch.bfloat16, 256, 64),
        (torch.bfloat16, 96, 128),
        (torch.bfloat16, 80, 16),
        (torch.bfloat16, 128, 256),
        (torch.float16, 128, 64),
        (torch.float16, 32, 32),
        (torch.float16, 64, 100),
        (torch.float16, 256, 256),
        (torch.float32, 64, 64),
        (torch.float32, 128, 20),
        (torch.float32, 40, 200),
    )
    for rows in ROWS
] + [
    Variant(torch.bfloat16, 128, 64, "plain", 8),
    Variant(torch.bfloat16, 64, 64, "starts", 4),
    Variant(torch.float16, 128, 51, "plain", 3),
    Variant(torch.float16, 96, 200, "starts", 1),
    Variant(torch.float32, 64, 64, "starts", 20),
    Variant(torch.bfloat16, 128, 64, "segments", 8),
    Variant(torch.bfloat16, 64, 16, "segments", 4),
    Variant(torch.float16, 128, 51, "segments", 3),
    Variant(torch.float16, 96, 200, "segments", 1),
    Variant(torch.float32, 64, 64, "segments", 20),
]


def fused(query, key, value, **options):
    return landmark_attention(query, key, value, impl="triton", return_lse=True, **options)


def reference(query, key, value, **options):
    return landmark_attention(query, key, value, impl="reference", return_lse=True, **options)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh buffers hold NaN, so that what a kernel does not write is seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def rounded_output(tensors, options, exact):
    """How far rounding ``delta``, and what it is subtracted from, moves the gradients.

    Those of query and key. ``delta`` is the product of the output, rounded to its dtype, with the
    gradient; it and the products of the gradient with the values are sums in float32. A backward
    pass takes all that only where it subtracts the gradient of the log-sum-exp too: the shift is
    the gradient of the log-sum-exp, weighed by these roundings.
    """
    leaves = [each.double().requires_grad_() for each in tensors]
    _, lse = reference(*leaves, **options)
    weights, _ = random_weights(exact["out"], exact["lse"])
    out = exact["out"]
    added = (weights * (out.to(tensors[0].dtype).double() - out)).sum(-1).abs()
    added = added + 2 * 2**-24 * (weights * out).abs().sum(-1)
    moved = torch.autograd.grad((torch.where(lse > -torch.inf, lse, 0.0) * added).sum(), leaves[:2])
    return dict(zip(("d_query", "d_key"), (each.abs().max().item() for each in moved), strict=True))


def check(tensors, options):
    """Checks results: within twice the error of eager PyTorch in the same dtype, and a little more.

    What a kernel rounds beside that is the result, the weights that are computed again, and the
    output that the gradients are made from (twice the shift of an exact output, as the kernel's own
    lies up to twice as far from it as eager's).
    """
    exact = results(reference, *(each.double() for each in tensors), options)
    moved = rounded_output(tensors, options, exact)
    eager = results(eager_attention, *tensors, options)
    found = results(fused, *tensors, options)
    for name, each in exact.items():
        if name == "lse":
            continue
        budget = low_precision_budget(eager[name].to(tensors[0].dtype), each)
        weights = online_error(exact["lse"]) if name == "out" else weight_error(exact["lse"])
        budget += weights * each.abs().max().item() + 2 * moved.get(name, 0.0)
        assert_close(found[name], each, budget, name)
    assert_close(found["lse"], exact["lse"], lse_error(tensors, exact["lse"]), "lse")
    return found


def small_case(seed, monkeypatch):
    """A small call, and tiles of any kind for it."""
    rng = random.Random(seed)
    tiles = [
        configs.Tiles(rng.choice([32, 64]), rng.choice([32, 64]), 4, 1, rng.random() < 0.5)
        for _ in range(3)
    ]
    monkeypatch.setattr(configs, "INTERPRETED", configs.Config(*tiles))
    dtype = rng.choice([torch.float32, torch.float16])
    dim = rng.choice([32, 40, 64, 80, 96])
    block_size = rng.choice([16, 16, 17, 20, 32, 51, 64, 100, 128, 256])
    longest = LONGEST if rng.random() < 0.06 else 48
    rows = rng.choice(ROWS)
    top_k = rng.choice([0, 0, 1, 3])
    most = 1 if longest == LONGEST else 2  # the interpreter takes a second for a few tiles
    return random_call(Variant(dtype, dim, block_size, rows, top_k), seed, longest, most=most)


@interpreted
@pytest.mark.parametrize("seed", range(FAST))
def test_within_the_budget(seed, monkeypatch):
    check(*small_case(seed, monkeypatch))


@interpreted
@pytest.mark.full
@pytest.mark.parametrize("seed", range(FAST, FULL))
def test_within_the_budget_full(seed, monkeypatch):
    check(*small_case(seed, monkeypatch))


PIPELINED = [Variant(dtype, 128, 64, "blocks") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="not Hopper"
)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("variant", PIPELINED, ids=str)
def test_pipelined_within_the_budget_on_a_gpu(variant, part, monkeypatch):
    """The forward pass in Gluon, which no interpreter runs.

    It ran wherever the tensors can be loaded by descriptors.
    """
    launch = pytest.importorskip("landmark.ops.triton.launch")
    ran = []
    run = launch.run_pipelined
    monkeypatch.setattr(launch, "run_pipelined", lambda *args: (ran.append(1), run(*args)))
    expected = 0
    for seed in range(part, 4 * CASES, PARTS):
        tensors, options = random_call(variant, seed, 1500, "cuda")
        found = check(tensors, options)
        for name, each in results(fused, *tensors, options).items():
            assert torch.equal(each, found[name]), (name, seed)
        expected += 2 * (tensors[1].shape[2] >= 64 and launch._describable(*tensors[1:]))
    assert len(ran) == expected > 0


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_within_the_budget_on_a_gpu(variant, part):
    """Twelve calls of each compiled variant; the same bits in a second run."""
    for seed in range(part, CASES, PARTS):
        tensors, options = random_call(variant, seed, 1500, "cuda")
        found = check(tensors, options)
        for name, each in results(fused, *tensors, options).items():
            assert torch.equal(each, found[name]), f"{name} differs between two runs of case {seed}"


def test_there_are_as_many_cases_as_promised():
    assert len(VARIANTS) <= 60 and len(VARIANTS) * CASES >= 500
    kinds = [
        set(random_call(variant, seed, 64)[1]) for variant in VARIANTS[:3] for seed in range(40)
    ]
    for name in ("starts", "segments", "query_start", "scale"):
        assert sum(name in kind for kind in kinds) > 10, name


def test_small_cases_reach_packed_rows_with_top_k(monkeypatch):
    calls = [small_case(seed, monkeypatch)[1] for seed in range(FAST)]
    assert sum({"segments", "top_k"} <= set(each) for each in calls) >= 5
    assert sum("forced" in each for each in calls) >= 5
    assert sum({"segments", "forced"} <= set(each) for each in calls) >= 2
    assert sum({"starts", "forced"} <= set(each) for each in calls) >= 2


def options_of_each_kind():
    segments = torch.tensor([[0] * 30 + [1] * 15, [3] * 45])
    return [{}, {"starts": torch.tensor([7, 0])}, {"segments": segments}]


def small_tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, heads, 45, 32, dtype=dtype) for heads in (2, 1, 1)]


@interpreted
@pytest.mark.parametrize("options", options_of_each_kind(), ids=ROWS)
def test_operators_keep_the_rules_of_torch(options, monkeypatch):
    op = pytest.importorskip("landmark.ops.triton.op")
    monkeypatch.undo()  # the rules compare outputs with those of a second call, poison included
    starts = options.get("starts")
    segments = options.get("segments")
    origins, ends = (None, None) if segments is None else op.documents_of(segments, None)
    starts = None if starts is None else starts.int()
    leaves = [each.requires_grad_() for each in small_tensors()]
    asked = (leaves[0].detach(), leaves[1].detach(), starts, origins, 16, 0, 0.2, 2)
    forced = torch.randint(-1, 2, (2, 45, 3), dtype=torch.int32)
    for each in (None, forced):
        torch.library.opcheck(op.select_blocks_op, (*asked, each))
    selection = op.select_blocks_op(*asked, forced)
    torch.library.opcheck(op.attention, (*leaves, starts, origins, ends, *(None,) * 5, 16, 0, 0.2))
    torch.library.opcheck(op.attention, (*leaves, starts, origins, ends, *selection, 16, 0, 0.2))


@interpreted
@pytest.mark.parametrize("options", options_of_each_kind(), ids=ROWS)
def test_gradcheck(options):
    """In float32, so with steps and tolerances that its rounding allows."""
    leaves = [each.requires_grad_() for each in small_tensors()]

    def function(*leaves):
        out, lse = fused(*leaves, block_size=16, **options)
        return out, torch.where(lse > -torch.inf, lse, 0.0)

    assert torch.autograd.gradcheck(
        function, leaves, eps=1e-2, atol=2e-3, rtol=2e-2, fast_mode=True
    )


# Documents of blocks of 16: shorter than one, of a whole one and of one slot more, and of several.
# Their borders lie inside tiles of 32 queries.
DOCUMENTS = (1, 10, 66, 17, 3, 16, 43)


def packed_row():
    """Query, key and value of one row of ``DOCUMENTS``, and its ``segments``."""
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, sum(DOCUMENTS), 32, generator=noise) for heads in (2, 1, 1)]
    number = torch.arange(len(DOCUMENTS)).flip(0)
    return tensors, torch.repeat_interleave(number, torch.tensor(DOCUMENTS))[None]


@interpreted
@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_packed_documents_are_those_alone(top_k):
    tensors, segments = packed_row()
    options = {"block_size": 16, "top_k": top_k}
    weights, lse_weights = (torch.randn(1, 2, sum(DOCUMENTS), *more) for more in ((32,), ()))

    def found(leaves, part, **more):
        leaves = [each.clone().requires_grad_() for each in leaves]
        out, lse = fused(*leaves, **options, **more)
        seen = torch.where(lse > -torch.inf, lse, 0.0)
        total = (out * weights[:, :, part]).sum() + (seen * lse_weights[:, :, part]).sum()
        return out, seen, *torch.autograd.grad(total, leaves)

    whole = found(tensors, slice(None), segments=segments)
    low = 0
    for length in DOCUMENTS:
        part = slice(low, low + length)
        alone = found([each[:, :, part] for each in tensors], part)
        for each, expected in zip(whole, alone, strict=True):
            assert_close(each[:, :, part], expected, 5e-6, f"document of {length}")
        low += length


@interpreted
@pytest.mark.parametrize("rows", ROWS)
def test_of_equal_scores_the_lower_block_of_the_document_wins(rows):
    """All landmarks are equal, so each query keeps the first two of its document."""
    tensors, segments = packed_row()
    tensors[1][:] = tensors[1].round()
    tensors[0][:] = tensors[0].round()
    options = {"block_size": 16, "top_k": 2}
    if rows == "segments":
        options["segments"] = segments
    if rows == "starts":
        options["starts"] = torch.tensor([7])
    row_segments = segments[0].tolist() if rows == "segments" else None
    for document in blocks_of_row(sum(DOCUMENTS), 16, 7 * (rows == "starts"), row_segments):
        tensors[1][:, :, [slot for _, slot in document if slot is not None]] = 1.0
    check(tensors, options)


@interpreted
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", ROWS)
def test_lists_of_blocks_and_of_tiles(rows, seed):
    """Against a loop over the queries, which selected blocks at random."""
    lists_of = pytest.importorskip("landmark.ops.triton.block_lists").build_block_lists
    op = pytest.importorskip("landmark.ops.triton.op")
    rng = random.Random(seed)
    _, segments = packed_row()
    keys = segments.shape[1]
    start = rng.choice([0, 45])
    starts = torch.tensor([start], dtype=torch.int32) if start or rows == "starts" else None
    queries = rng.choice([keys, 70])
    first = keys - queries
    row_segments = segments[0].tolist() if rows == "segments" else None
    documents = blocks_of_row(keys, 16, start, row_segments)
    selected = torch.full((1, 1, queries, 3), -1, dtype=torch.int32)
    blocks = {}
    tiles = {}
    for index in range(queries):
        place = place_of_query(first + index, documents, keys, 16, start, irregular=False)
        if place is None:
            continue
        document, own = place
        # Odd blocks or even ones, in turn, so that documents do not select the same numbers.
        candidates = range((documents.index(document) + 1) % 2, own, 2)
        picked = rng.sample(candidates, min(len(candidates), 3))
        selected[0, 0, index, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
        tile = index // 32
        for block in picked:
            slots = [*document[block][0], document[block][1]]
            if slots[-1] < first + tile * 32:
                blocks.setdefault(tile, set()).add(block)
                number = slots[0] // 16 if rows == "segments" else block
                tiles.setdefault(number, set()).add(tile)
    origins = op.documents_of(segments, starts)[0] if rows == "segments" else None
    found = lists_of(
        selected, starts, origins, keys=keys, block_size=16, query_start=first, rows=32
    )
    for tile in range(-(-queries // 32)):
        listed = found.blocks[0, 0, tile, : found.counts[0, 0, tile]].tolist()
        assert listed == sorted(blocks.get(tile, set()))
    for number, (low, high) in enumerate(itertools.pairwise(found.indptr[0, 0].tolist())):
        assert found.tiles[0, 0, low:high].tolist() == sorted(tiles.get(number, set()))
    assert found.indptr.shape[-1] == -(-keys // 16) + 1 and tiles


@interpreted
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("shape", [(1, 2, 5, 0), (1, 2, 0, 20), (0, 2, 20, 20)])
def test_nothing_to_compute(shape, top_k, monkeypatch):
    by_descriptor = configs.Tiles(
        32, 32, 4, 1, tma=True
    )  # of which there is none of an empty tensor
    monkeypatch.setattr(configs, "INTERPRETED", configs.Config(*[by_descriptor] * 3))
    rows, heads, queries, keys = shape
    leaves = [
        torch.randn(rows, heads, length, 32, requires_grad=True) for length in (queries, keys, keys)
    ]
    out, lse = fused(*leaves, block_size=16, top_k=top_k, query_start=0)
    assert out.shape == (rows, heads, queries, 32) and not out.any() and (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(out.sum() + lse.exp().sum(), leaves):
        assert not gradient.any()


@interpreted
def test_memory_that_overlaps_and_scales_that_vanish():
    overlapping = torch.randn(2, 2, 59).unfold(2, 32, 1)
    tensors = [overlapping] * 3
    for options in ({}, {"scale": 1e-46}, {"scale": -1e-46}):
        check(tensors, {"block_size": 16, **options})


@interpreted
@pytest.mark.parametrize(("top_k", "documents"), [(None, None), (1, None), (1, [0, 33, 7])])
def test_the_very_first_call_may_be_a_compiled_one(top_k, documents):
    """A fresh process makes one graph, forward and backward, with the results of a plain call."""
    code = f"""
        import torch
        from landmark import landmark_attention

        documents = {documents}
        segments = None
        if documents:
            segments = torch.repeat_interleave(torch.arange(3), torch.tensor(documents))[None]

        def attend(query, key, value):
            return landmark_attention(
                query,
                key,
                value,
                block_size=16,
                top_k={top_k},
                segments=segments,
                impl="triton",
            )

        tensors = [torch.randn(1, heads, 40, 32, requires_grad=True) for heads in (2, 1, 1)]
        out = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")(*tensors)
        found = torch.autograd.grad(out.sum(), tensors)
        expected = attend(*tensors)
        assert torch.equal(out, expected)
        for each, other in zip(found, torch.autograd.grad(expected.sum(), tensors)):
            assert torch.equal(each, other)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_auto_is_compiled_into_one_graph(device):
    """In a fresh process, whatever ``auto`` runs there, with and without ``top_k``."""
    code = f"""
        import torch
        from landmark import landmark_attention

        tensors = [torch.randn(1, 2, 130, 64, device="{device}") for _ in range(3)]
        for top_k in (None, 1):
            def attend(*tensors):
                return landmark_attention(*tensors, block_size=64, top_k=top_k)

            out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
            torch.testing.assert_close(out, attend(*tensors), rtol=0, atol=1e-5)
    """
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


@interpreted
@pytest.mark.full
@pytest.mark.parametrize(("capability", "shared"), [(80, 163), (86, 99), (89, 99), (90, 227)])
def test_compiles_for_cards_that_are_not_here(capability, shared):
    """Every table of tiles, within the shared memory (KiB) that a block of threads gets there."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 125 + 2 * (capability == 90)  # the pipelined forward pass, in both dtypes
    assert {name: taken for name, taken in found.items() if taken > shared * 1024} == {}
