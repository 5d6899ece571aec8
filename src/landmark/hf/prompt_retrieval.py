"""Chooses the blocks that all layers read for a prompt.

Heads that find what a question asks for stand in the upper half of a model. The layers below them
have passed before anything is found, and read what is near. So the prompt is run twice: in the
first pass every head retrieves for itself, and old blocks are scored for the last tokens of the
prompt; in the second, and for all that is generated, every layer reads the best of them.

Two scores, one after the other:

* ``retrieval_layers``: the sum of the landmark's scores over all heads of these layers and over the
  tokens, which ``landmark.hf.gate_loss.JointContrast`` trains. It costs one product for each block.
* ``retrieval_heads``: the sum over these heads and over the tokens of the ``logsumexp`` of the
  scores of the block's own text. This is the logarithm of the mass that dense attention would give
  the block. It costs one product for each token of a block, and is taken of the blocks with the
  highest landmark scores alone where there are more than ``CANDIDATES``.

All keys are scored at the start of the prefix, where retrieval scores old landmarks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.config import LandmarkConfig
from landmark.hf.cache import LandmarkCache
from landmark.hf.compat import CACHE
from landmark.hf.gate_loss import QUESTION_TOKENS
from landmark.hf.old_queries import old_queries
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.memory.retrieval import is_candidate

CANDIDATES = 1024  # blocks of a row whose text is scored, where landmarks choose them
AT_ONCE = 512  # blocks of a row whose keys are copied at once


def pin_for_prompt(
    model: Any,
    cache: LandmarkCache,
    ids: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Pins the blocks that retrieval layers and heads choose for a prompt, which is not kept.

    Nothing is pinned where nothing can be retrieved, as in a text that is local as a whole.

    Args:
        model: a landmark model in eval mode, with ``retrieval_layers`` or ``retrieval_heads``.
        cache: what stands before the prompt.
        ids: ``(B, T)`` token ids of the prompt, or its ``(B, T, hidden)`` embeddings.
        mask: ``(B, T)``, 0 for padding; ``None`` for none.

    Returns:
        the pinned blocks ``(B, top_k)``, the best first, -1 for none.

    Raises:
        ValueError: a head that does not exist, a layer that does not retrieve, or as
            ``LandmarkCache.crop``, ``LandmarkCache.pin`` or the model.
    """
    new = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1).cpu()
    slots = _last_slots(torch.tensor(cache.tokens), new, cache.settings.block_size)
    settings: LandmarkConfig = model.landmark
    seen = PromptScores(slots, settings)
    observer = cache.observer
    record = cache.record
    cache.pin(None)
    cache.observer = seen
    cache.record = False
    try:
        name = "input_ids" if ids.ndim == 2 else "inputs_embeds"
        model(**{name: ids, CACHE: cache}, attention_mask=mask, logits_to_keep=1)
    finally:
        cache.observer = observer
        cache.record = record
    try:
        blocks = seen.best(settings.top_k)
    finally:
        cache.crop(-ids.shape[1])
    cache.pin(blocks if bool((blocks >= 0).any()) else None)
    return blocks


class PromptScores:
    """An observer of a ``LandmarkCache`` that scores old blocks for the end of a prompt.

    Args:
        slots: ``(B, n)`` slots of each row whose queries count, -1 for none.
        settings: which layers and heads score.
    """

    def __init__(self, slots: Tensor, settings: LandmarkConfig) -> None:
        self.slots = slots
        self._layers = settings.retrieval_layers or ()
        self._heads = settings.retrieval_heads or ()
        self._wanted = {*self._layers, *(layer for layer, _ in self._heads)}
        self._queries: dict[int, Tensor] = {}  # by layer, (B, H, n, D), 0 where there is none
        self._memories: dict[int, LayerMemory] = {}
        self._geometry: CallGeometry | None = None

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        """Keeps the queries that count, of ``(B, H, T, D)`` in one call of one layer."""
        if memory.layer not in self._wanted:
            return
        queries = old_queries(memory, query, geometry.offsets, scale)
        slots = self.slots.to(query.device)[:, :, None]
        is_here = (geometry.slots[:, None] == slots) & (slots >= 0)
        column = is_here.long().argmax(-1)[:, None, :, None]
        found = queries.gather(2, column.expand(*queries.shape[:2], -1, queries.shape[3]))
        found = found.masked_fill(~is_here.any(-1)[:, None, :, None], 0)
        before = self._queries.get(memory.layer)
        self._queries[memory.layer] = found if before is None else before + found
        self._memories[memory.layer] = memory
        self._geometry = geometry

    def best(self, count: int) -> Tensor:
        """Returns the blocks ``(B, count)`` of the highest scores, the best first, -1 for none.

        Raises:
            ValueError: a head that does not exist, or a layer that does not retrieve.
        """
        self._check()
        chosen = torch.full((len(self.slots), count), -1)
        geometry = self._geometry
        if geometry is None or geometry.candidates == 0:
            return chosen
        some = next(iter(self._memories.values()))
        kept = some.store.landmarks_before(geometry.candidates).blocks
        is_open = is_candidate(geometry.grid, kept, some.config).any(1)
        blocks = kept.expand(is_open.shape).to(is_open.device)
        scores = torch.zeros(is_open.shape, device=is_open.device)
        if self._layers:
            scores = self._landmark_scores(geometry.candidates).to(is_open.device)
        scores = scores.masked_fill(~is_open, -torch.inf)
        if self._heads:
            if self._layers and scores.shape[1] > CANDIDATES:
                scores, index = scores.topk(CANDIDATES, dim=1)
                blocks = blocks.gather(1, index)
            text = self._text_scores(blocks).to(scores.device)
            scores = text.masked_fill(scores == -torch.inf, -torch.inf)
        scores, index = scores.topk(min(count, scores.shape[1]), dim=1)
        best = blocks.gather(1, index).masked_fill(scores == -torch.inf, -1)
        chosen[:, : best.shape[1]] = best.cpu()
        return chosen

    def _landmark_scores(self, candidates: int) -> Tensor:
        """Returns the sum of the landmarks' scores ``(B, P)`` over the retrieval layers."""
        total: Tensor | None = None
        for layer in self._layers:
            landmarks = self._memories[layer].store.landmarks_before(candidates)
            queries = self._queries[layer].sum(2)
            # A first layer whose landmarks are all equal cannot choose; its key stands once.
            keys = landmarks.keys[:, :, :1] if landmarks.equal else landmarks.keys
            grouped = torch.unflatten(queries, 1, (keys.shape[1], -1)).sum(2)
            scores = torch.einsum("bgd,bgpd->bp", grouped, keys.to(grouped.dtype))
            total = scores if total is None else total + scores.to(total.device)
        assert total is not None
        return total.expand(-1, landmarks.blocks.shape[1])

    def _text_scores(self, blocks: Tensor) -> Tensor:
        """Returns the score of the text of blocks ``(B, C)`` by the retrieval heads, ``(B, C)``."""
        is_there = (self.slots >= 0)[:, :, None]
        total = torch.zeros(blocks.shape, device=blocks.device)
        for layer, head in self._heads:
            store = self._memories[layer].store
            queries = self._queries[layer]
            groups = store.landmark_keys.shape[1]
            group = head // (queries.shape[1] // groups)
            row_head = torch.arange(len(blocks), device=queries.device)[:, None] * groups + group
            parts = []
            for some in torch.split(blocks.to(queries.device), AT_ONCE, dim=1):
                keys, _ = store.pool.gather(row_head.expand_as(some).flatten(), some.flatten())
                text = torch.unflatten(keys[:, :-1], 0, some.shape).to(queries.dtype)
                scores = torch.einsum("bnd,bcld->bncl", queries[:, head], text).logsumexp(-1)
                parts.append(scores.masked_fill(~is_there.to(scores.device), 0).sum(1))
            total = total + torch.cat(parts, dim=1).to(total.device)
        return total

    def _check(self) -> None:
        """Raises ``ValueError`` where a head or a retrieving layer is missing."""
        there = {
            layer: queries.shape[1]
            for layer, queries in self._queries.items()
            if self._memories[layer].retrieves
        }
        layers = [layer for layer in self._layers if layer not in there]
        heads = [[layer, head] for layer, head in self._heads if head >= there.get(layer, 0)]
        for name, missing in (("retrieval_layers", layers), ("retrieval_heads", heads)):
            if missing:
                raise ValueError(
                    f"{name}: expected those of layers that retrieve, got {missing}; there are "
                    f"{there} (heads of each layer)"
                )


def _last_slots(read: Tensor, new: Tensor, block_size: int) -> Tensor:
    """Returns the slots ``(B, n)`` of the last ``QUESTION_TOKENS`` tokens of a prompt, -1 for none.

    Args:
        read: ``(B,)`` text tokens of each row before the prompt.
        new: ``(B,)`` of the prompt.
        block_size: positions of a block.
    """
    back = torch.arange(QUESTION_TOKENS, 0, -1)
    token = (read + new)[:, None] - back
    return torch.where(back <= new[:, None], slot_of(token, block_size), -1)
