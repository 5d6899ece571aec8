"""Public function ``landmark_attention``: its contract, and the checks of its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from landmark.ops.choice import pick_implementation
from landmark.ops.metadata import AttentionMetadata

BLOCK_NUMBERS = (torch.int32, torch.int64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    top_k: int | None = None,
    query_start: int | None = None,
    starts: Tensor | None = None,
    segments: Tensor | None = None,
    landmarks: Tensor | None = None,
    forced: Tensor | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes landmark attention: a gate over blocks, times a softmax inside each block.

    The scaled scores are ``s[i, j] = scale * query_i . key_j``. A query ``i`` takes one *gate
    softmax* (the paper's grouped softmax) over the landmarks of the past blocks and the text of
    its own block up to ``i``, and one *in-block softmax* over the text of every past block. The
    weight of own text is its gate weight. The weight of past text is the gate weight of its
    landmark times its in-block weight. The weight of a landmark's own value is 0. The weights of a
    query sum to 1. A landmark used as a query sees the text of the block that it closes and the
    past landmarks. Source: Mohtashami and Jaggi, arXiv 2305.16300, section 3.1;
    ``docs/mathematics.md`` derives the forms that the implementations use.

    A *past block* of a query lies before the query's own block in the same document, ends with a
    landmark among the keys, and has text. Keys of an earlier block without landmark are invisible,
    as nothing could open the gate to them. A query that sees nothing (padding, for instance) gets
    an output of zeros and a log-sum-exp of ``-inf``.

    Shapes: ``B`` rows, ``H`` query heads, ``G`` key/value heads, ``T`` queries, ``S`` keys, ``D``
    head dim. Query head ``h`` reads key/value head ``h // (H // G)``. All slots count landmarks.

    Args:
        query: (B, H, T, D), floating point.
        key: (B, G, S, D), ``H % G == 0``, dtype and device of ``query``.
        value: (B, G, S, D).
        block_size: slots of a block, landmark included, at least 2. Slot ``p`` of a document is a
            landmark where ``p % block_size == block_size - 1``, unless ``landmarks`` is given.
        scale: factor of the scores, ``D ** -0.5`` by default.
        top_k: past blocks that each query keeps, those with the highest landmark scores; of equal
            scores the lower block wins. The other past blocks get weight 0 and leave the gate.
            ``None`` keeps all.
        query_start: slot of the first query, ``S - T`` by default. Keys at later slots than a query
            are invisible to it. Queries may lie behind all keys (``query_start >= S``, any ``T``):
            they see finished blocks as past blocks, and the keys of an unfinished last block only
            where their own slot lies in that same block.
        starts: (B,) integers, slot of each row's first text. Slots before it are padding, and the
            row's blocks are counted from it. 0 by default.
        segments: (B, S) integers, the document of each key in a packed row. A document is a run of
            equal ids. It has its own blocks and sees nothing of other documents. Not together with
            ``query_start``.
        landmarks: (B, S) booleans, whether a key is a landmark; blocks may have any length. A query
            behind all keys continues the last block, or begins a new one if a landmark closed it.
        forced: (B, T, F) integers, past blocks that a query keeps whatever their scores, among its
            ``top_k``; so many fewer are selected by score. They are counted from the first block of
            the query's document; -1, or any block that is no past block of the query, is none. Of
            more than ``top_k`` the lower blocks are kept. Only with ``top_k``.
        impl: ``reference`` (the definition), ``chunked`` (plain PyTorch in memory linear in S),
            ``triton`` (fused kernels for NVIDIA GPUs, see ``docs/kernels.md``), or ``auto``. A
            named implementation runs or raises; only ``auto`` chooses.
        return_lse: also return the gate's log-sum-exp: natural, of the scaled scores, over past
            landmarks and own text. Results over parts of the keys merge by it, with the ``softmax``
            over the parts' ``lse`` as weights, if every past block lies wholly in one part, all
            parts share one block grid, and ``top_k`` was chosen over their union.

    Returns:
        The output (B, H, T, D) in the dtype of ``query``; with ``return_lse`` also (B, H, T) in
        float32 (float64 for float64). Both are differentiable in ``query``, ``key`` and ``value``.
        Under autocast the operation runs in the autocast dtype.

    Raises:
        ValueError: an argument that does not fit; the message says what was expected, what was got,
            and the remedy. The contents of ``starts`` and ``segments`` are checked on a CPU only:
            on a GPU the check would have to wait for the device.
    """
    _check_tensors(query, key, value)
    _check_numbers(block_size, top_k, scale)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    query_start = _check_query_start(query_start, segments, query.shape[2], key.shape[2])
    _check_rows(key, starts, segments, landmarks)
    _check_forced(forced, query, top_k)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        query, key, value = (
            each.to(torch.get_autocast_dtype(device_type)) for each in (query, key, value)
        )
    metadata = AttentionMetadata(
        block_size=block_size,
        scale=scale,
        top_k=top_k,
        query_start=query_start,
        starts=starts,
        segments=segments,
        landmarks=landmarks,
        forced=forced,
    )
    chosen = pick_implementation(impl, query, metadata)
    if chosen == "triton":
        from landmark.ops.triton.op import fused as run
    elif chosen == "reference":
        from landmark.ops.reference import reference as run
    else:
        from landmark.ops.chunked import chunked as run
    with torch.autocast(device_type, enabled=False):
        out, lse = run(query, key, value, metadata)
    return (out, lse) if return_lse else out


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, each in (("query", query), ("key", key), ("value", value)):
        if not isinstance(each, Tensor):
            raise ValueError(
                f"{name}: expected a tensor, got {type(each).__name__}; pass a torch.Tensor"
            )
        if each.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, heads, slots, head dim), got shape "
                f"{tuple(each.shape)}; split the heads into their own dimension"
            )
        if each.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {each.dtype}; "
                "convert it first"
            )
    if key.shape != value.shape:
        raise ValueError(
            f"value: expected the shape of key {tuple(key.shape)}, got {tuple(value.shape)}; "
            "pass one value of the same head dim for each key"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"key: expected {query.shape[0]} rows as query has, got {key.shape[0]}; expand the "
            "batch"
        )
    if query.shape[3] != key.shape[3] or query.shape[3] == 0:
        raise ValueError(
            f"key: expected the head dim of query, {query.shape[3]} (at least 1), got "
            f"{key.shape[3]}; pass tensors of shape (batch, heads, slots, head dim)"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query: expected heads that are a multiple of the {key.shape[1]} key/value heads, "
            f"got {query.shape[1]}; pass whole groups of query heads"
        )
    autocast = torch.is_autocast_enabled(query.device.type)
    if not autocast and not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"key, value: expected the dtype of query, {query.dtype}, got {key.dtype} and "
            f"{value.dtype}; convert them"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"key, value: expected the device of query, {query.device}, got {key.device} and "
            f"{value.device}; move them"
        )


def _kind(given: object) -> str:
    """Returns the dtype and shape of a tensor, the type of anything else."""
    if isinstance(given, Tensor):
        return f"{given.dtype} of shape {tuple(given.shape)}"
    return type(given).__name__


def _is_integer(number: object) -> bool:
    return isinstance(number, int | torch.SymInt) and not isinstance(number, bool)


def _check_numbers(block_size: int, top_k: int | None, scale: float | None) -> None:
    if not _is_integer(block_size) or block_size < 2:
        raise ValueError(
            f"block_size: expected an integer of at least 2, got {block_size!r}; a block is text "
            "and one landmark"
        )
    if top_k is not None and (not _is_integer(top_k) or top_k < 1):
        raise ValueError(
            f"top_k: expected None or an integer of at least 1, got {top_k!r}; pass None to keep "
            "all past blocks"
        )
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(
            f"scale: expected None or a finite number, got {scale!r}; pass None for head_dim ** "
            "-0.5"
        )


def _check_query_start(
    query_start: int | None, segments: Tensor | None, queries: int, keys: int
) -> int:
    if query_start is None:
        if queries > keys:
            raise ValueError(
                f"query: expected at most as many queries as the {keys} keys, got {queries}; "
                "pass query_start to say where the queries lie"
            )
        return keys - queries
    if segments is not None:
        raise ValueError(
            f"query_start: expected None together with segments, got {query_start!r}; "
            "the queries are the last of the packed row"
        )
    if not _is_integer(query_start) or query_start < 0:
        raise ValueError(
            f"query_start: expected None or an integer of at least 0, got {query_start!r}; "
            "pass the slot of the first query, counted from the first key"
        )
    return query_start


def _check_rows(
    key: Tensor, starts: Tensor | None, segments: Tensor | None, landmarks: Tensor | None
) -> None:
    rows = key.shape[0]
    length = key.shape[2]
    for name, each, shape, kind in (
        ("starts", starts, (rows,), "integers"),
        ("segments", segments, (rows, length), "integers"),
        ("landmarks", landmarks, (rows, length), "booleans"),
    ):
        if each is None:
            continue
        fits = isinstance(each, Tensor) and tuple(each.shape) == shape
        if fits and kind == "integers":
            fits = not (each.is_floating_point() or each.is_complex() or each.dtype == torch.bool)
        elif fits:
            fits = each.dtype == torch.bool
        if not fits:
            item = "row" if len(shape) == 1 else "key"
            raise ValueError(
                f"{name}: expected {kind} of shape {shape}, got {_kind(each)}; pass one for each "
                f"{item}"
            )
        if each.device != key.device:
            raise ValueError(
                f"{name}: expected the device of key, {key.device}, got {each.device}; move it"
            )
    if torch.compiler.is_compiling():
        return
    if (
        starts is not None
        and starts.device.type == "cpu"
        and bool(((starts < 0) | (starts > length)).any())
    ):
        raise ValueError(
            f"starts: expected slots from 0 to {length}, got {starts.min()} to {starts.max()}; "
            "pass the number of padding slots before each row"
        )
    if segments is not None and segments.device.type == "cpu":
        _check_runs(segments)


def _check_forced(forced: Tensor | None, query: Tensor, top_k: int | None) -> None:
    if forced is None:
        return
    rows = query.shape[0]
    queries = query.shape[2]
    fits = isinstance(forced, Tensor) and forced.dim() == 3
    if not fits or tuple(forced.shape[:2]) != (rows, queries) or forced.dtype not in BLOCK_NUMBERS:
        raise ValueError(
            f"forced: expected int32 or int64 of shape ({rows}, {queries}, F), got "
            f"{_kind(forced)}; pass F blocks for each query, -1 for none"
        )
    if forced.device != query.device:
        raise ValueError(
            f"forced: expected the device of query, {query.device}, got {forced.device}; move it"
        )
    if top_k is None:
        raise ValueError(
            "forced: expected None without top_k, got blocks; leave them out, as every past block "
            "is kept"
        )


def _check_runs(segments: Tensor) -> None:
    changes = (segments[:, 1:] != segments[:, :-1]).sum(dim=1)
    ordered = segments.sort(dim=1).values
    kinds = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)
    broken = (changes != kinds).nonzero()
    if len(broken):
        raise ValueError(
            "segments: expected each document's slots side by side, got a split document in row "
            f"{int(broken[0])}; sort the row by document or give each part its own id"
        )
