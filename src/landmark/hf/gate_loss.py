"""Losses on the gate: what landmarks are scored at, beside what the next token is.

Under retrieval a block that no head selects gets no gradient from the loss on text, so that a
landmark that is not found cannot learn to be. These losses say at some tokens directly which
landmarks should have the highest scores. A pass in mode ``all`` or ``top_k`` takes one as
``gate_loss`` and calls it in each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.config import LandmarkConfig
from landmark.hf.recall import NO_BLOCK, EvidenceQuery, blocks_of, far_queries
from landmark.rotary import Rotary, Rotation

RotaryType = str | None


@dataclass(frozen=True)
class LayerInputs:
    """What a layer attends with, in a pass over rows of whole texts.

    Attributes:
        query: ``(B, H, T, D)`` of all slots, not rotated.
        key: ``(B, G, T, D)``, not rotated.
        rotation: the rotation of each slot by its position.
        scale: the softmax scale.
        rotary_type: the rotary type of the layer.
    """

    query: Tensor
    key: Tensor
    rotation: Rotation
    scale: float
    rotary_type: RotaryType


class GateLoss(Protocol):
    """A loss that every layer adds to."""

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[RotaryType, Rotary], like: Tensor
    ) -> None:
        """Called before the first layer.

        Args:
            settings: the landmark settings.
            rotaries: the rotary embedding of each type.
            like: ``(B, T, hidden)`` states of all slots.
        """

    def add(self, layer: LayerInputs) -> None:
        """Called by each layer, in their order."""


@dataclass
class GateContrast:
    """Contrast of the evidence's landmarks with all others (InfoNCE).

    At a token that needs evidence, a head's loss is ``logsumexp`` of its landmark scores over all
    candidates and over the blocks of the other rows, less ``logsumexp`` over the blocks with the
    evidence. All landmarks are scored at the start of the prefix, where retrieval scores old ones
    (``positions="stingy"``). Rows hold one text each; blocks of packed ones are negatives only.

    Attributes:
        queries: the tokens, and where their evidence is.
        losses: ``(Q, H)`` of each layer so far.
    """

    queries: Sequence[EvidenceQuery]
    losses: list[Tensor] = field(default_factory=list)

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[RotaryType, Rotary], like: Tensor
    ) -> None:
        """See ``GateLoss.prepare``."""
        size = settings.block_size
        device = like.device
        batch, width, _ = like.shape
        count = width // size
        rows = torch.tensor([query.row for query in self.queries])
        slots = slot_of(torch.tensor([query.token for query in self.queries]), size)
        evidence = [blocks_of(query, size) for query in self.queries]
        longest = max(map(len, evidence))
        blocks = torch.tensor([found + [NO_BLOCK] * (longest - len(found)) for found in evidence])
        own = slots // size
        local = own.clamp(max=settings.local_blocks)
        number = torch.arange(count)
        is_own_row = torch.arange(batch) == rows[:, None]
        is_older = number < (own - local)[:, None]
        is_evidence = (number[:, None] == blocks[:, None]).any(-1) & is_older
        candidates = ~is_own_row[:, :, None] | is_older[:, None]
        self._rows = rows.to(device)
        self._slots = slots.to(device)
        # (Q, 1, B, P)
        self._candidates = candidates[:, None].to(device)
        self._evidence = (is_own_row[:, :, None] & is_evidence[:, None])[:, None].to(device)
        at = ((settings.top_k + 1 + local) * size + slots % size).to(device)
        start = torch.tensor([size - 1], device=device)
        self._rotations = {
            kind: (rotary.rotation(at, like.dtype), rotary.rotation(start, like.dtype))
            for kind, rotary in rotaries.items()
        }
        self._block_size = size

    def add(self, layer: LayerInputs) -> None:
        """See ``GateLoss.add``."""
        at, start = self._rotations[layer.rotary_type]
        size = self._block_size
        keys = start.rotate(layer.key[:, :, size - 1 :: size].float())
        query = at[:, None].rotate(layer.query[self._rows, :, self._slots].float())
        grouped = torch.unflatten(query, 1, (keys.shape[1], -1))
        scores = layer.scale * torch.einsum("qgrd,bgpd->qgrbp", grouped, keys).flatten(1, 2)
        everything = scores.masked_fill(~self._candidates, -torch.inf).flatten(2)
        evidence = scores.masked_fill(~self._evidence, -torch.inf).flatten(2)
        self.losses.append(everything.logsumexp(-1) - evidence.logsumexp(-1))

    def loss(self, heads: int) -> Tensor:
        """Returns the mean over queries and over the ``heads`` heads, of all layers, that do best.

        Not every head has to retrieve; those that come nearest to it are trained to.
        """
        by_head = torch.cat(self.losses, dim=1).mean(0)
        best = by_head.topk(min(heads, len(by_head)), largest=False).values
        return best.mean()


@dataclass
class GateBlockMass:
    """Fits the gate to the mass that dense attention gives each past block.

    At some slots a head's loss is the Kullback-Leibler divergence of its gate from the softmax over
    its own block's text and, for each past block, the ``logsumexp`` of the scores of that block's
    text. This is what the gate would be if a landmark's score were that ``logsumexp``: landmark
    attention then equals dense attention. The target has no gradient. Rows hold one text each.

    Attributes:
        slots: slots of the queries, the same in each row, none of a landmark.
        losses: scalars, of each layer so far.
    """

    slots: Sequence[int]
    losses: list[Tensor] = field(default_factory=list)

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[RotaryType, Rotary], like: Tensor
    ) -> None:
        """See ``GateLoss.prepare``."""
        size = settings.block_size
        width = like.shape[1]
        slots = torch.tensor(self.slots)
        count = -(-width // size)
        number = torch.arange(count)
        slot = torch.arange(count * size)
        own = slots // size
        # (S, P), (S, P * L)
        self._is_past = (number < own[:, None]).to(like.device)
        is_own = (slot // size == own[:, None]) & (slot <= slots[:, None])
        self._is_own_text = (is_own & (slot % size != size - 1)).to(like.device)
        self._slots = slots.to(like.device)
        self._missing = count * size - width
        self._block_size = size

    def add(self, layer: LayerInputs) -> None:
        """See ``GateLoss.add``."""
        query = layer.rotation.rotate(layer.query)[:, :, self._slots].float()
        key = layer.rotation.rotate(layer.key).float()
        grouped = torch.unflatten(query, 1, (key.shape[1], -1))
        scores = layer.scale * torch.einsum("bgrsd,bgtd->bgrst", grouped, key)
        scores = torch.nn.functional.pad(scores, (0, self._missing), value=-torch.inf)
        blocks = torch.unflatten(scores, -1, (-1, self._block_size))
        landmarks = blocks[..., -1].masked_fill(~self._is_past, -torch.inf)
        mass = blocks[..., :-1].logsumexp(-1).masked_fill(~self._is_past, -torch.inf)
        own = scores.masked_fill(~self._is_own_text, -torch.inf)
        target = torch.cat((mass, own), dim=-1).detach().log_softmax(-1)
        gate = torch.cat((landmarks, own), dim=-1).log_softmax(-1)
        seen = target > -torch.inf
        difference = torch.where(seen, target - gate, 0.0)
        self.losses.append((target.exp() * difference).sum(-1).mean())

    def loss(self) -> Tensor:
        """Returns the mean over layers."""
        return torch.stack(self.losses).mean()


def contrast_queries(
    queries: Iterable[EvidenceQuery], settings: LandmarkConfig, count: int
) -> list[EvidenceQuery]:
    """Returns ``count`` of the queries whose evidence is not local, evenly, some of them repeated.

    The number is fixed so that compiled layers see tensors of one shape. It is empty where there is
    no such query.
    """
    far = far_queries(queries, settings)
    if not far:
        return []
    return [far[number * len(far) // count] for number in range(count)]
