"""Times one token against a long memory: the layer's two kernels, the whole call of a layer, and
dense attention.

    python benchmarks/decode.py --out benchmarks/results/decode.json

32 query heads over 8 key/value heads of 128, blocks of 64, top_k 16, bfloat16; keys and values are
random. Eight layers with tensors of their own take turns, so that no cache holds what is read next.
Figures without ``graph`` are launched from Python, the others replay a CUDA graph of the eight.
Dense attention is cuDNN's, on the very same keys, nothing rotated. Before anything is timed,
selections are compared with those of plain PyTorch in float32, and the error of the output with
that of plain PyTorch in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import record
import torch
from torch import Tensor

from landmark import LandmarkConfig
from landmark.memory.context import LayerContext
from landmark.memory.geometry import CallGeometry, make_geometry, move
from landmark.memory.layer import LayerMemory
from landmark.memory.retrieval import landmark_scores
from landmark.memory.rotary_tables import RotaryTables
from landmark.rotary import Rotary
from landmark.versions import made_with

if TYPE_CHECKING:
    from landmark.memory.triton.decode import Decoded

LAYERS = 8
HEADS = 32
GROUPS = 8
DIM = 128
BLOCK = 64
TOP_K = 16
LOCAL = 2
SCALE = 0.125  # a power of two, so that scaling rounds nothing
LEFT = 31  # slots of the own block behind the query's
CLOSE = 1e-5  # of the highest score, two scores that rounding may swap
ROUNDS = 10
SAMPLES = 21


class Token(NamedTuple):
    """What a call of a layer is given, and the layer; tensors as in ``LayerMemory.attend``."""

    memory: LayerMemory
    query: Tensor
    key: Tensor
    value: Tensor
    geometry: CallGeometry


class PlainStep(NamedTuple):
    """What plain PyTorch computes for one token.

    Attributes:
        output: ``(1, G, R, 1, 1, D)``.
        blocks: ``(1, G, R, 1, 1, K)`` selected blocks.
        scores: ``(1, G, R, 1, 1, P)`` landmark scores, by index.
    """

    output: Tensor
    blocks: Tensor
    scores: Tensor


def token(
    slots: int,
    heads: tuple[int, int],
    dim: int,
    block: int,
    top_k: int,
    dtype: torch.dtype,
    device: str,
) -> Token:
    """Returns a layer that remembers ``slots`` random ones, a whole number of blocks, and a query
    near their end.
    """
    config = LandmarkConfig(block_size=block, top_k=top_k, local_blocks=LOCAL)
    frequencies = 1 / 10000 ** (torch.arange(dim) % (dim // 2) / (dim // 2)).double()
    signs = torch.ones(dim).double()
    signs[: dim // 2] = -1
    memory = LayerMemory(config, RotaryTables(Rotary(frequencies, signs, False), block), layer=1)
    query, key, value = (
        torch.randn(1, each, 1, dim, dtype=dtype, device=device) for each in (*heads, heads[1])
    )
    store = memory.store
    shape = (1, heads[1], slots // block, block, dim)
    store.pool.keys = torch.randn(shape, dtype=dtype, device=device)
    store.pool.values = torch.randn(shape, dtype=dtype, device=device)
    store.landmark_keys = store.pool.keys[:, :, :, -1].contiguous()
    geometry = move(make_geometry([slots - 1 - min(LEFT, block - 2)], [1], config), query.device)
    return Token(memory, query, key, value, geometry)


def on_grid(case: Token) -> Tensor:
    """Returns the query as the layer hands it on, ``(1, G, R, 1, 1, D)``."""
    rotation = case.memory.tables.by_offset(case.geometry.offsets, case.query.dtype)
    rotated = rotation[:, None].rotate(case.query)
    return rotated.unflatten(1, (case.key.shape[1], -1))[:, :, :, None]


def context_of(case: Token) -> LayerContext:
    """Returns the layer as its kernels are given it."""
    memory = case.memory
    return LayerContext(memory.store, memory.tables, memory.config, SCALE)


def attended(case: Token, query: Tensor) -> Decoded:
    """Returns what the kernels compute for a query ``(1, G, R, 1, 1, D)``."""
    from landmark.memory.triton.decode import decode

    return decode(query, case.geometry.grid, case.geometry.candidates, context_of(case))


def plain(case: Token, query: Tensor) -> PlainStep:
    """Returns what plain PyTorch computes, in the dtype of ``query``."""
    geometry = case.geometry
    store = copy.copy(case.memory.store)
    store.pool = copy.copy(store.pool)
    store.pool.keys = store.pool.keys.to(query.dtype)
    store.pool.values = store.pool.values.to(query.dtype)
    context = replace(context_of(case), store=store)
    found = case.memory.reader.read(
        query[:, :, :, 0], geometry, context, retrieve=True, fused=False, record=True
    )
    assert found.retrieval is not None
    blocks = found.retrieval.blocks.view(*query.shape[:-1], -1).to(query.device)
    landmarks = store.landmarks_before(geometry.candidates)
    scores = landmark_scores(query * SCALE, geometry.grid, landmarks, context)
    return PlainStep(found.output.view(query.shape), blocks, scores)


def check(case: Token) -> dict[str, float]:
    """Compares the kernels with plain PyTorch.

    Raises:
        RuntimeError: another selection than rounding explains, or an error above twice that of
            plain PyTorch.
    """
    query = on_grid(case)
    decoded = attended(case, query)
    output = decoded.output.view(query.shape)
    exact = plain(case, query.float())
    rounded = plain(case, query)
    scores = exact.scores
    best = case.memory.store.kept.index_of(exact.blocks)
    one, other = (
        scores.gather(-1, each.long()).sort(-1).values for each in (decoded.selected, best)
    )
    gap = ((one - other).abs().max() / scores[scores > -torch.inf].abs().max()).item()
    if gap > CLOSE:
        raise RuntimeError(
            f"selection: expected scores within {CLOSE:g} of the best, got {gap:g} below"
        )
    alike = (decoded.blocks == exact.blocks).all(-1) & (rounded.blocks == exact.blocks).all(-1)
    error, usual = (
        (each.float() - exact.output)[alike].abs().max().item() for each in (output, rounded.output)
    )
    if not alike.any() or error > 2 * usual + 1e-6:
        raise RuntimeError(
            f"output: expected an error of at most twice {usual:g}, got {error:g} in "
            f"{int(alike.sum())}"
        )
    return {"heads_alike": int(alike.sum()), "error": error, "plain_error": usual}


def bytes_read(case: Token, selected: Tensor) -> dict[str, int]:
    """Returns the bytes that the kernels ask for, and the least: landmarks once, each selected
    block once for each key/value head.
    """
    grid = case.geometry.grid
    config = case.memory.config
    store = case.memory.store
    _, groups, _, size, dim = store.pool.keys.shape
    itemsize = case.key.element_size()
    block = 2 * size * dim * itemsize
    heads = case.query.shape[1]
    local = 1 + grid.local.shape[-1]
    landmarks = groups * store.kept.count_before(case.geometry.candidates) * dim * itemsize
    distinct = sum(len(each.unique()) for each in selected.flatten(2)[0])
    return {
        "landmark_bytes": landmarks,
        "bytes": landmarks + heads * (config.top_k + local) * block,
        "least_bytes": landmarks + (distinct + groups * local) * block,
    }


def milliseconds(run: Callable[[], Any]) -> float:
    """Median over samples of the GPU's time of ``run``."""
    for _ in range(3):
        run()
    samples = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(ROUNDS):
            run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / ROUNDS)
    return statistics.median(samples)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """Returns a CUDA graph's replay of ``run``, which was warmed up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def dense(case: Token) -> Tensor:
    """Attention to all keys, by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pool = case.memory.store.pool
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            case.query,
            pool.keys.flatten(2, 3),
            pool.values.flatten(2, 3),
            scale=SCALE,
            enable_gqa=True,
        )


def ways(cases: list[Token]) -> dict[str, Callable[[], Any]]:
    """What is timed: each runs every layer once."""
    queries = [on_grid(case) for case in cases]
    settings = {"scale": SCALE, "retrieve": True, "record": False}
    return {
        "kernels": lambda: [
            attended(case, query) for case, query in zip(cases, queries, strict=True)
        ],
        "layer": lambda: [case.memory.attend(*case[1:], **settings) for case in cases],
        "dense": lambda: [dense(case) for case in cases],
    }


@torch.no_grad()
def measure(slots: int, copied: float) -> dict[str, Any]:
    """Returns a row: milliseconds of a layer for each way, bytes, and how far the results are from
    plain PyTorch's.
    """
    torch.manual_seed(0)
    cases = [
        token(slots, (HEADS, GROUPS), DIM, BLOCK, TOP_K, torch.bfloat16, "cuda")
        for _ in range(LAYERS)
    ]
    row = {
        "slots": slots,
        **check(cases[0]),
        **bytes_read(cases[0], attended(cases[0], on_grid(cases[0])).selected),
    }
    row["least_ms"] = row["least_bytes"] / copied * 1e3
    for name, run in ways(cases).items():
        row[f"{name}_ms"] = milliseconds(run) / LAYERS
        row[f"{name}_graph_ms"] = milliseconds(captured(run)) / LAYERS
    row["speedup"] = row["dense_graph_ms"] / row["kernels_graph_ms"]
    return row


def copy_speed() -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.numel() / milliseconds(lambda: target.copy_(source))


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument(
        "--slots", default="32768,131072,524288,1048576", help="remembered, with commas"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, found none: run it where torch.cuda.is_available()")
    made = made_with("cuda", "torch", "triton")
    copied = copy_speed()
    rows = []
    print(
        f"{torch.cuda.get_device_name()}, copies {copied / 1e12:.2f} TB/s; milliseconds of a layer",
        flush=True,
    )
    for slots in map(int, options.slots.split(",")):
        rows.append(measure(slots, copied))
        print(*(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
        torch.cuda.empty_cache()
    settings = {
        "layers": LAYERS,
        "heads": HEADS,
        "groups": GROUPS,
        "dim": DIM,
        "block_size": BLOCK,
        "top_k": TOP_K,
        "local_blocks": LOCAL,
        "dtype": "bfloat16",
        "copied_bytes_per_second": copied,
    }
    record.write(options.out, made, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
