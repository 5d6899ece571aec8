"""Calls of the operation that must be refused: (name, call, what the message says)."""

import torch

from landmark import landmark_attention


def call(query=(2, 4, 6, 8), key=(2, 2, 6, 8), value=None, dtype=torch.float32, **options):
    """Calls the operation on tensors of the given shapes, or on what is passed instead."""
    tensors = [
        torch.zeros(each, dtype=dtype) if isinstance(each, tuple) else each
        for each in (query, key, key if value is None else value)
    ]
    return landmark_attention(*tensors, **{"block_size": 4, **options})


def integers(*shape):
    return torch.zeros(shape, dtype=torch.long)


def fused(dim=32, dtype=torch.float32, **options):
    tensors = [torch.zeros(1, 1, 20, dim, dtype=dtype)] * 3
    return landmark_attention(*tensors, **{"block_size": 16, "impl": "triton", **options})


CASES = [
    (
        "forced blocks without top_k",
        lambda: call(forced=integers(2, 6, 1)),
        "forced: expected None without top_k, got blocks; leave them out",
    ),
    (
        "a forced block for each row",
        lambda: call(top_k=1, forced=integers(2, 1)),
        r"forced: expected int32 or int64 of shape \(2, 6, F\), got torch.int64 of shape \(2, 1\)",
    ),
    (
        "forced blocks of other queries",
        lambda: call(top_k=1, forced=integers(2, 5, 1)),
        r"forced: expected int32 or int64 of shape \(2, 6, F\), got .* \(2, 5, 1\); pass F blocks",
    ),
    (
        "forced blocks as numbers",
        lambda: call(top_k=1, forced=torch.zeros(2, 6, 1)),
        r"forced: expected int32 or int64 .* got torch.float32",
    ),
    (
        "forced blocks as a list",
        lambda: call(top_k=1, forced=[0]),
        "forced: expected int32 or int64 .* got list",
    ),
    (
        "forced blocks on another device",
        lambda: call(top_k=1, forced=integers(2, 6, 1).to("meta")),
        "forced: expected the device of query, cpu, got meta; move it",
    ),
    (
        "query without heads",
        lambda: call(query=(2, 6, 8)),
        "query: expected 4 dimensions .* got shape .* split the heads",
    ),
    (
        "key as a list",
        lambda: call(key=[1.0]),
        "key: expected a tensor, got list; pass a torch.Tensor",
    ),
    (
        "integers",
        lambda: call(dtype=torch.int64),
        "query: expected float16, .* got torch.int64; convert",
    ),
    (
        "complex numbers",
        lambda: call(dtype=torch.complex64),
        "query: expected float16, .* got torch.complex64",
    ),
    (
        "mixed dtypes",
        lambda: call(key=torch.zeros(2, 2, 6, 8).half()),
        "dtype of query, torch.float32, got torch.float16",
    ),
    (
        "another device",
        lambda: call(key=torch.zeros(2, 2, 6, 8, device="meta")),
        "device of query, cpu, got meta .* move",
    ),
    (
        "values of another length",
        lambda: call(value=(2, 2, 5, 8)),
        "value: expected the shape of key .* got",
    ),
    (
        "values of another head dim",
        lambda: call(value=(2, 2, 6, 4)),
        "value: expected the shape of key .* same head dim",
    ),
    ("another batch", lambda: call(key=(1, 2, 6, 8)), "key: expected 2 rows .* got 1; expand"),
    (
        "another head dim",
        lambda: call(key=(2, 2, 6, 4)),
        "key: expected the head dim of query, 8 .* got 4",
    ),
    (
        "heads in no whole groups",
        lambda: call(key=(2, 3, 6, 8)),
        "multiple of the 3 key/value heads, got 4",
    ),
    ("no key/value heads", lambda: call(key=(2, 0, 6, 8)), "multiple of the 0 key/value heads"),
    (
        "block of one slot",
        lambda: call(block_size=1),
        "block_size: expected an integer of at least 2, got 1",
    ),
    (
        "block of half slots",
        lambda: call(block_size=4.0),
        "block_size: expected an integer .* got 4.0",
    ),
    (
        "top_k of none",
        lambda: call(top_k=0),
        "top_k: expected None or an integer of at least 1, got 0; pass None",
    ),
    (
        "top_k negative",
        lambda: call(top_k=-1),
        "top_k: expected None or an integer of at least 1, got -1",
    ),
    ("top_k true", lambda: call(top_k=True), "top_k: expected None or an integer .* got True"),
    (
        "scale of text",
        lambda: call(scale="0.1"),
        "scale: expected None or a finite number, got '0.1'",
    ),
    (
        "scale not finite",
        lambda: call(scale=float("nan")),
        "scale: expected None or a finite number, got nan",
    ),
    (
        "more queries than keys",
        lambda: call(query=(2, 4, 9, 8)),
        "at most as many queries as the 6 keys, got 9; pass query_s",
    ),
    (
        "query_start negative",
        lambda: call(query_start=-1),
        "query_start: expected .* at least 0, got -1",
    ),
    ("query_start of a half", lambda: call(query_start=1.5), "query_start: expected .* got 1.5"),
    (
        "query_start with segments",
        lambda: call(query_start=0, segments=integers(2, 6)),
        "query_start: expected None together with segments, got 0",
    ),
    (
        "starts of another batch",
        lambda: call(starts=integers(3)),
        r"starts: expected integers of shape \(2,\), got",
    ),
    (
        "starts of floats",
        lambda: call(starts=torch.zeros(2)),
        "starts: expected integers .* got torch.float32",
    ),
    ("starts as a list", lambda: call(starts=[0, 1]), "starts: expected integers .* got list"),
    (
        "starts behind the end",
        lambda: call(starts=integers(2) + 7),
        "starts: expected slots from 0 to 6, got 7 to 7",
    ),
    (
        "starts negative",
        lambda: call(starts=integers(2) - 1),
        "starts: expected slots from 0 to 6, got -1",
    ),
    (
        "segments of one row",
        lambda: call(segments=integers(6)),
        r"segments: expected integers of shape \(2, 6\)",
    ),
    (
        "segments of a split document",
        lambda: call(segments=torch.tensor([[0] * 6, [0, 1, 1, 0, 0, 2]])),
        "segments: expected each document's slots side by side, got a split document in row 1",
    ),
    (
        "landmarks as integers",
        lambda: call(landmarks=integers(2, 6)),
        "landmarks: expected booleans .* got torch.int64",
    ),
    (
        "landmarks of another length",
        lambda: call(landmarks=torch.zeros(2, 5, dtype=torch.bool)),
        r"landmarks: expected booleans of shape \(2, 6\)",
    ),
    (
        "unknown implementation",
        lambda: call(impl="fast"),
        "impl: expected one of auto, .* got 'fast'; pass impl='auto'",
    ),
    (
        "kernels: head dim too small",
        lambda: fused(dim=16),
        "triton': expected a head dim from 32 to 256, .* got 16",
    ),
    (
        "kernels: head dim of odd size",
        lambda: fused(dim=36),
        "triton': expected .* a multiple of 8, got 36",
    ),
    (
        "kernels: head dim too large",
        lambda: fused(dim=264),
        "triton': expected a head dim from 32 to 256, .* got 264",
    ),
    (
        "kernels: float64",
        lambda: fused(dtype=torch.float64),
        "triton': expected float16, .* got torch.float64",
    ),
    (
        "kernels: small blocks",
        lambda: fused(block_size=8),
        "triton': expected a block_size from 16 to 256, got 8",
    ),
    (
        "kernels: large blocks",
        lambda: fused(block_size=300),
        "triton': expected a block_size from 16 to 256, got 300",
    ),
    (
        "kernels: large top_k",
        lambda: fused(top_k=65),
        "triton': expected top_k of at most 64, got 65; pass impl='auto'",
    ),
    (
        "kernels: irregular landmarks",
        lambda: fused(landmarks=torch.zeros(1, 20, dtype=torch.bool)),
        "triton': expected a landmark at every block_size-th slot",
    ),
    (
        "kernels: mixed dtypes",
        lambda: landmark_attention(
            torch.zeros(1, 1, 4, 32),
            *[torch.zeros(1, 1, 4, 32).half()] * 2,
            block_size=16,
            impl="triton",
        ),
        "expected the dtype of query, torch.float32, got torch.float16",
    ),
    (
        "kernels: bfloat16 in the interpreter",
        lambda: fused(dtype=torch.bfloat16),
        "triton': (Triton's interpreter has no arithmetic in bfloat16|expected tensors on an "
        "NVIDIA GPU, got cpu)",
    ),
]
