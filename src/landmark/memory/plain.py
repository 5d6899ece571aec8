"""Attention to what is remembered in plain PyTorch: it runs everywhere, and the kernels are held to it."""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.memory.plan import Grid
from landmark.memory.positions import RotationTables
from landmark.memory.store import BlockStore


def attend(
    query: Tensor,
    grid: Grid,
    shared: tuple[Tensor, Tensor],
    chosen: tuple[Tensor, Tensor] | None,
    store: BlockStore,
    tables: RotationTables,
    scale: float,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Own text, blocks that all queries of an own block share, and blocks that each query chose, in one gate softmax.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its place inside the block.
        grid: where these queries stand.
        shared: places in the store ``(B, n, m)`` and distances in blocks from the own block, below 0 for none.
        chosen: places ``(B, G, R, n, W, K)`` and distances, likewise; ``G`` and ``R`` may be 1 for "all the same".
        store: the layer's blocks.
        tables: rotations.
        scale: the softmax scale.
        largest: a distance that none of these exceeds.

    Returns:
        the output, shape and dtype of ``query``, and ``(B, G, R, n, W, K)`` gate weights of the chosen blocks
        (``K = 0`` where there are none).
    """
    size = store.block_size
    keys, own_values = store.gather(store.place_of(grid.own)[:, None])
    own = torch.einsum("bgrnwd,bgnld->bgrnwl", query * scale, keys)
    place = torch.arange(size, device=query.device)
    seen = (place <= grid.offsets[..., None]) & (place < size - 1)
    own = _at_least_float32(own).masked_fill(~seen[:, None, None], -torch.inf)

    places, distances = shared
    keys, shared_values = store.gather(places[:, None])
    turned = tables.by_blocks(distances, query.dtype, largest)[:, None, None, :, None]
    scores = torch.einsum("bgrnwkd,bgnkld->bgrnwkl", turned.rotate(query[..., None, :] * scale), keys)
    logits = [own, _effective(scores, (distances >= 0)[:, None, None, :, None])]
    if chosen is not None:
        places, distances = chosen
        keys, chosen_values = store.gather(places.expand(-1, query.shape[1], *places.shape[2:]))
        turned = tables.by_blocks(distances, query.dtype, largest)
        scores = _per_query(turned.rotate(query[..., None, :] * scale), keys)
        logits.append(_effective(scores, distances >= 0))

    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
    parts = torch.split(weights.to(own_values.dtype), [part.shape[-1] for part in logits], dim=-1)
    output = torch.einsum("bgrnwl,bgnld->bgrnwd", parts[0], own_values)
    by_block = torch.unflatten(parts[1], -1, (shared[0].shape[-1], size))
    output = output + torch.einsum("bgrnwkl,bgnkld->bgrnwd", by_block, shared_values)
    if chosen is None:
        return output, weights[..., :0]
    output = output + _weighted(torch.unflatten(parts[2], -1, (-1, size)), chosen_values)
    return output, torch.unflatten(weights[..., -parts[2].shape[-1] :], -1, (-1, size)).sum(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _effective(scores: Tensor, valid: Tensor) -> Tensor:
    """Logits ``(..., K * L)`` of past text in the one softmax, from scores ``(..., K, L)``.

    ``text + (landmark - logsumexp(text))`` by block; landmarks and blocks that are not ``valid`` have ``-inf``.
    """
    scores = _at_least_float32(scores)
    text, landmark = scores[..., :-1], scores[..., -1].masked_fill(~valid, -torch.inf)
    logits = text + (landmark - text.logsumexp(-1))[..., None]
    return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).flatten(-2)


def _per_query(query: Tensor, keys: Tensor) -> Tensor:
    """Scores ``(B, G, R, n, W, K, L)`` against keys ``(B, G, S, n, W, K, L, D)``, where ``S`` is ``R`` or 1."""
    if keys.shape[2] == 1:
        return torch.einsum("bgrnwkd,bgnwkld->bgrnwkl", query, keys[:, :, 0])
    return (keys @ query[..., None])[..., 0]


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sums values ``(B, G, S, n, W, K, L, D)`` by ``weights (B, G, R, n, W, K, L)``."""
    if values.shape[2] == 1:
        return torch.einsum("bgrnwkl,bgnwkld->bgrnwd", weights, values[:, :, 0])
    return (weights.flatten(-2)[..., None, :] @ values.flatten(5, 6))[..., 0, :]
