"""Lets the heads of some layers choose together the blocks that all layers read for a prompt.

Layers that find what a question asks for stand in the upper half of a model. The layers below them
have passed before anything is found, and read what is near. So the prompt is run twice: in the
first pass every head retrieves for itself, and the landmarks of the named layers are scored; in the
second, and for all that is generated, every layer reads the blocks with the highest scores.

A block's score is the sum over all heads of these layers, and over the last tokens of the prompt,
of its landmark's scores at the start of the prefix, where retrieval scores old ones. This is what
``landmark.hf.gate_loss.JointContrast`` trains.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.hf.cache import LandmarkCache
from landmark.hf.compat import CACHE
from landmark.hf.gate_loss import QUESTION_TOKENS
from landmark.hf.query_sums import QuerySums
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.memory.retrieval import is_candidate


def pin_by_layers(
    model: torch.nn.Module,
    cache: LandmarkCache,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    layers: Collection[int],
) -> Tensor:
    """Pins the blocks whose landmarks some layers score highest for a prompt, which is not kept.

    Nothing is pinned where nothing can be retrieved, as in a text that is local as a whole.

    Args:
        model: a landmark model in eval mode.
        cache: what stands before the prompt.
        ids: ``(B, T)`` token ids of the prompt, or its ``(B, T, hidden)`` embeddings.
        mask: ``(B, T)``, 0 for padding; ``None`` for none.
        layers: the layers whose heads choose.

    Returns:
        the pinned blocks ``(B, top_k)``, the best first, -1 for none.

    Raises:
        ValueError: as ``LandmarkCache.crop`` and ``LandmarkCache.pin``, or as the model.
    """
    new = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1).cpu()
    seen = PromptScores(
        _last_slots(torch.tensor(cache.tokens), new, cache.settings.block_size), layers
    )
    observed = cache.observer
    cache.pin(None)
    cache.observer = seen
    try:
        name = "input_ids" if ids.ndim == 2 else "inputs_embeds"
        model(**{name: ids, CACHE: cache}, attention_mask=mask, logits_to_keep=1)
    finally:
        cache.observer = observed
    blocks = seen.best(cache.settings.top_k)
    cache.crop(-ids.shape[1])
    cache.pin(blocks if bool((blocks >= 0).any()) else None)
    return blocks


class PromptScores:
    """An observer of a ``LandmarkCache`` that scores landmarks for the end of a prompt.

    Args:
        slots: ``(B, n)`` slots of each row whose queries count, -1 for none.
        layers: the layers whose heads score.
    """

    def __init__(self, slots: Tensor, layers: Collection[int]) -> None:
        self.slots = slots
        self.layers = layers
        self._queries = QuerySums(slots)
        self._memories: dict[int, LayerMemory] = {}
        self._geometry: CallGeometry | None = None

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        """Adds the queries ``(B, H, T, D)`` of one call of one layer."""
        # In a first layer whose landmarks are all equal they cannot choose.
        if memory.layer in self.layers and not memory.store.shared_landmark:
            self._queries(memory, query, geometry, scale)
            self._memories[memory.layer] = memory
            self._geometry = geometry

    def best(self, count: int) -> Tensor:
        """Returns the blocks ``(B, count)`` of the highest scores, the best first, -1 for none."""
        found = torch.full((len(self.slots), count), -1)
        geometry = self._geometry
        if geometry is None or geometry.candidates == 0:
            return found
        total: Tensor | None = None
        for layer, memory in self._memories.items():
            landmarks = memory.store.landmarks_before(geometry.candidates)
            summed = self._queries.totals[layer]
            grouped = torch.unflatten(summed, 1, (landmarks.keys.shape[1], -1)).sum(2)
            scores = torch.einsum("bgd,bgpd->bp", grouped, landmarks.keys.to(grouped.dtype))
            total = scores if total is None else total + scores.to(total.device)
            is_open = is_candidate(geometry.grid, landmarks.blocks, memory.config).any(1)
            blocks = landmarks.blocks[0]
        assert total is not None
        total = total.masked_fill(~is_open.to(total.device), -torch.inf)
        scores, best = total.topk(min(count, total.shape[1]), dim=1)
        chosen = blocks.to(best.device)[best].masked_fill(scores == -torch.inf, -1)
        found[:, : chosen.shape[1]] = chosen.cpu()
        return found


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
