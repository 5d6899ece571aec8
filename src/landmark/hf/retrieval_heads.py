"""Lets a few heads choose the blocks that all layers read for a prompt.

Heads that find what a question asks for stand in some of the upper layers. The layers below them
have passed before anything is found, and read what is near. So the prompt is run twice: in the
first pass every head retrieves for itself, and what the named heads retrieved for its last tokens
is counted; in the second, and for all that is generated, every layer reads the blocks that got the
most of their gate weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from landmark.hf.cache import LandmarkCache
from landmark.hf.compat import CACHE
from landmark.memory.retrieval import Retrieval

LAST_TOKENS = 8  # of a prompt: its end, and the header of the answer's turn


def pin_by_heads(
    model: torch.nn.Module,
    cache: LandmarkCache,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    heads: Sequence[tuple[int, int]],
) -> Tensor:
    """Pins the blocks that some heads retrieve for a prompt; the prompt is not kept.

    Nothing is pinned where they retrieve nothing, as in a text that is local as a whole.

    Args:
        model: a landmark model in eval mode.
        cache: what stands before the prompt.
        ids: ``(B, T)`` token ids of the prompt, or its ``(B, T, hidden)`` embeddings.
        mask: ``(B, T)``, 0 for padding; ``None`` for none.
        heads: layer and query head of each that has a vote.

    Returns:
        the pinned blocks ``(B, top_k)``, the best first, -1 for none.

    Raises:
        ValueError: as ``most_voted``, ``LandmarkCache.crop`` and ``LandmarkCache.pin``, or as the
            model.
    """
    recorded = cache.record
    begin = len(cache.retrievals)
    cache.pin(None)
    cache.record = True
    try:
        name = "input_ids" if ids.ndim == 2 else "inputs_embeds"
        model(**{name: ids, CACHE: cache}, attention_mask=mask, logits_to_keep=1)
    finally:
        cache.record = recorded
    retrievals = cache.retrievals[begin:]
    del cache.retrievals[begin:]
    cache.crop(-ids.shape[1])
    voted = most_voted(retrievals, heads, cache.settings.block_size)
    blocks = voted[:, : cache.settings.top_k]
    cache.pin(blocks if bool((blocks >= 0).any()) else None)
    return blocks


def most_voted(
    retrievals: Iterable[Retrieval], heads: Sequence[tuple[int, int]], block_size: int
) -> Tensor:
    """Returns the blocks ``(B, blocks)`` by the gate weight that heads gave them, the most first.

    Args:
        retrievals: of one call, or of consecutive calls.
        heads: as for ``pin_by_heads``.
        block_size: positions of a block.

    Returns:
        the blocks, -1 behind those that have any weight.

    Raises:
        ValueError: a head that does not exist, or a layer that does not retrieve.
    """
    called = list(retrievals)
    there = {each.layer: each.blocks.shape[1] for each in called}
    missing = [[layer, head] for layer, head in heads if head >= there.get(layer, 0)]
    if missing:
        raise ValueError(
            f"retrieval_heads: expected heads of layers that retrieve, got {missing}; there are "
            f"{there} (heads of each layer)"
        )
    last = torch.stack([each.positions.amax(1) for each in called]).amax(0)
    count = 1 + max(int(each.blocks.max()) for each in called)
    votes = torch.zeros(len(last), max(count, 1))
    for each in called:
        is_last = each.positions > (last - LAST_TOKENS)[:, None]
        is_text = (each.positions >= 0) & (each.positions % block_size != block_size - 1)
        counts = (is_last & is_text)[..., None]
        for layer, head in heads:
            if layer != each.layer:
                continue
            weights = each.weights[:, head].float().masked_fill(~counts, 0)
            chosen = each.blocks[:, head].clamp(min=0)
            votes.scatter_add_(1, chosen.flatten(1), weights.flatten(1))
    order = votes.argsort(dim=1, descending=True, stable=True)
    return order.masked_fill(votes.gather(1, order) == 0, -1)
