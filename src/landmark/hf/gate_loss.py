"""Losses on the gate: what landmarks are scored at, beside what the next token is.

Under retrieval a block that no head selects gets no gradient from the loss on text, so that a
landmark that is not found cannot learn to be. These losses say at some tokens directly which
landmarks should have the highest scores. A pass in mode ``all`` or ``top_k`` takes one as
``gate_loss`` and calls it in each layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from landmark.blocks import slot_of
from landmark.config import LandmarkConfig
from landmark.hf.devices import device_count, device_number, gather_counts, gather_rows
from landmark.hf.recall import NO_BLOCK, EvidenceQuery, blocks_of, far_queries
from landmark.rotary import Rotary, Rotation

RotaryType = str | None

QUESTION_TOKENS = 32  # of a question at most, its last ones, when retrieval layers score for it
CONTRAST_TOKENS = 6  # before the first that predicts an answer: a turn's header, the question's end


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


@dataclass(frozen=True)
class _Kept:
    """What a layer is scored by in a contrast.

    Attributes:
        query: ``(Q, H, D)`` of the tokens that need evidence, not rotated.
        key: ``(B, G, P, D)`` of the landmarks, not rotated.
        scale: the softmax scale.
        rotary_type: the rotary type of the layer.
    """

    query: Tensor
    key: Tensor
    scale: float
    rotary_type: RotaryType

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers that are alike in this are scored together."""
        return self.query.shape, self.key.shape, self.scale, self.rotary_type


@dataclass
class _LandmarkContrast:
    """What contrasts of the evidence's landmarks with all others (InfoNCE) have in common.

    A query's loss is ``logsumexp`` of its landmark scores over all candidates and over the blocks
    of the other rows, those on other devices as well, less ``logsumexp`` over the blocks with the
    evidence. All landmarks are scored at the start of the prefix, where retrieval scores old ones
    (``positions="stingy"``).

    Every device takes part in each pass, one without queries by its blocks alone. Loss and
    gradients, averaged over devices, are those of one device with all rows.

    Attributes:
        queries: the queries of this device, and where their evidence is, in rows of one text.
        blocks: finished blocks of each row, 0 of a packed one, whose landmarks stand elsewhere;
            ``None`` for as many as a row has slots for.
    """

    queries: Sequence[EvidenceQuery]
    blocks: Sequence[int] | None = None
    _kept: dict[int, _Kept] = field(default_factory=dict, init=False, repr=False)

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[RotaryType, Rotary], like: Tensor
    ) -> None:
        """See ``GateLoss.prepare``."""
        size = settings.block_size
        device = like.device
        batch, width, _ = like.shape
        shapes = torch.tensor(gather_counts(batch, width // size, device=device))
        most, count = shapes.amax(0).tolist()
        # All that follows is computed on the device: on the CPU, threads of other work delay it.
        whole = partial(torch.tensor, dtype=torch.long, device=device)
        rows = whole([query.row for query in self.queries])
        slots = slot_of(whole([query.token for query in self.queries]), size)
        evidence = [blocks_of(query, size) for query in self.queries]
        longest = max(map(len, evidence), default=0)
        filled = [found + [NO_BLOCK] * (longest - len(found)) for found in evidence]
        wanted = whole(filled).view(len(rows), longest)
        own = slots // size
        local = own.clamp(max=settings.local_blocks)
        number = torch.arange(count, device=device)
        here = [width // size] * batch if self.blocks is None else list(self.blocks)
        finished = whole(gather_counts(*here, *[0] * (most - batch), device=device))
        # (devices * R, P): what is there of the blocks that are gathered.
        is_there = number < finished.view(-1, 1)
        row = torch.arange(len(is_there), device=device)
        is_own_row = row == device_number() * most + rows[:, None]
        is_older = number < (own - local)[:, None]
        is_evidence = (number[:, None] == wanted[:, None]).any(-1) & is_older
        # (Q, devices * R, P)
        self._candidates = is_there & (~is_own_row[:, :, None] | is_older[:, None])
        self._evidence = is_own_row[:, :, None] & is_evidence[:, None]
        # As pad takes it: nothing at the end of D, blocks, nothing in G and layers, rows.
        self._missing = (0, 0, 0, count - width // size, 0, 0, 0, 0, 0, most - batch)
        read = self._tokens_read()
        self._rows = whole([row for row, _ in read])
        self._slots = slot_of(whole([token for _, token in read]), size)
        at = _prefix_positions(self._slots, settings)
        start = torch.tensor([size - 1], device=device)
        self._rotations = {
            kind: (rotary.rotation(at, like.dtype), rotary.rotation(start, like.dtype))
            for kind, rotary in rotaries.items()
        }
        self._block_size = size
        self._layers_passed = 0

    def _tokens_read(self) -> list[tuple[int, int]]:
        """Returns row and token of those whose queries are kept of each layer."""
        return [(query.row, query.token) for query in self.queries]

    def _is_kept(self, layer: int) -> bool:
        """Returns whether a layer takes part."""
        return True

    def add(self, layer: LayerInputs) -> None:
        """Keeps what is scored; all layers are scored at once after the pass.

        Between two compiled graphs, many small operations in every layer keep a GPU waiting.
        """
        number = self._layers_passed
        self._layers_passed += 1
        if not self._is_kept(number):
            return
        size = self._block_size
        query = layer.query[self._rows, :, self._slots]
        key = layer.key[:, :, size - 1 :: size]
        self._kept[number] = _Kept(query, key, layer.scale, layer.rotary_type)

    def _alike(self) -> list[list[int]]:
        """Returns the layers that were kept, those of one kind together."""
        alike: dict[Any, list[int]] = {}
        for number, kept in self._kept.items():
            alike.setdefault(kept.kind, []).append(number)
        return list(alike.values())

    def _rotated(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns what some layers of one kind are scored by, at least in float32.

        Returns:
            the queries of the tokens that were kept ``(layers, N, H, D)``, and the landmark keys
            of all devices ``(devices * R, layers, G, P, D)``.
        """
        kept = [self._kept[number] for number in layers]
        at, start = self._rotations[kept[0].rotary_type]
        query = torch.stack([each.query for each in kept])
        key = torch.stack([each.key for each in kept], dim=1)
        exact = torch.promote_types(key.dtype, torch.float32)
        here = start.rotate(key.to(exact))
        keys = gather_rows(functional.pad(here, self._missing))
        return at[:, None].rotate(query.to(exact)), keys

    def _of_scores(self, scores: Tensor, dim: int) -> Tensor:
        """Returns the losses of scores ``(..., Q, ..., devices * R, P)`` with ``Q`` at ``dim``."""
        shape = [1] * scores.ndim
        shape[dim] = len(self.queries)
        shape[-2:] = self._candidates.shape[1:]
        candidates = self._candidates.view(shape)
        evidence = self._evidence.view(shape)
        everything = scores.masked_fill(~candidates, -torch.inf).flatten(-2)
        wanted = scores.masked_fill(~evidence, -torch.inf).flatten(-2)
        return everything.logsumexp(-1) - wanted.logsumexp(-1)


@dataclass
class GateContrast(_LandmarkContrast):
    """Contrast of the evidence's landmarks with all others, by each head for itself.

    A query is a token that needs evidence.
    """

    @cached_property
    def losses(self) -> list[Tensor]:
        """``(Q, H)`` of each layer, after the pass."""
        found: dict[int, Tensor] = {}
        for numbers in self._alike():
            query, keys = self._rotated(numbers)
            grouped = torch.unflatten(query, 2, (keys.shape[2], -1))
            scores = torch.einsum("lqgrd,blgpd->lqgrbp", grouped, keys).flatten(2, 3)
            losses = self._of_scores(self._kept[numbers[0]].scale * scores, 1)
            found |= zip(numbers, losses.unbind(), strict=True)
        return [found[number] for number in range(len(self._kept))]

    def loss(self, heads: int) -> Tensor:
        """Returns the mean over queries and over the ``heads`` heads, of all layers, that do best.

        Not every head has to retrieve; those that come nearest to it are trained to. The mean is
        over the queries of all devices, and the same on each of them.
        """
        by_head = _mean_of_devices(torch.cat(self.losses, dim=1))
        best = by_head.topk(min(heads, len(by_head)), largest=False).values
        return best.mean()


class QuestionSpan(NamedTuple):
    """A question of a row.

    Attributes:
        query: its last token, which predicts the answer, and where the evidence is.
        tokens: the tokens whose queries count, up to that one.
    """

    query: EvidenceQuery
    tokens: range


@dataclass
class JointContrast(_LandmarkContrast):
    """Contrast of the evidence's landmarks with all others, by the heads of some layers together.

    A query is a question. A block's score is the sum over these heads of the landmark's score for
    the mean of the question's queries, divided by the square root of the number of heads: so it
    varies by chance as much as that of one head. This is what ``retrieval_layers`` choose blocks by
    (``landmark.hf.prompt_retrieval``).

    Attributes:
        spans: tokens of each query whose queries are averaged; its ``token`` is the last of them.
        layers: the layers.
    """

    spans: Sequence[range] = ()
    layers: Collection[int] = ()

    def _tokens_read(self) -> list[tuple[int, int]]:
        pairs = zip(self.queries, self.spans, strict=True)
        return [(query.row, token) for query, span in pairs for token in span]

    def _is_kept(self, layer: int) -> bool:
        return layer in self.layers

    @cached_property
    def losses(self) -> Tensor:
        """``(Q,)``, after the pass."""
        lengths = self._rows.new_tensor([len(span) for span in self.spans])
        question = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        total = torch.zeros((), device=self._rows.device)
        heads = 0
        for numbers in self._alike():
            query, keys = self._rotated(numbers)
            heads += query.shape[0] * query.shape[2]
            parts = query / lengths[question, None, None]
            mean = query.new_zeros(len(query), len(lengths), *query.shape[2:])
            mean = mean.index_add(1, question, parts)
            grouped = torch.unflatten(mean, 2, (keys.shape[2], -1)).sum(3)
            scores = torch.einsum("lqgd,blgpd->qbp", grouped, keys)
            total = total + self._kept[numbers[0]].scale * scores
        return self._of_scores(total / math.sqrt(heads), 0)

    def loss(self) -> Tensor:
        """Returns the mean over the queries of all devices, the same on each of them."""
        return _mean_of_devices(self.losses[:, None])[0]


@dataclass(frozen=True)
class _KeptText:
    """What some heads of a layer are scored by in a contrast of text.

    Attributes:
        query: ``(N, h, D)`` of the tokens that ask, for each of the heads, not rotated.
        key: ``(B, h, T, D)`` of all slots, for the key/value head of each, not rotated.
        scale: the softmax scale.
        rotary_type: the rotary type of the layer.
    """

    query: Tensor
    key: Tensor
    scale: float
    rotary_type: RotaryType


@dataclass
class TextContrast:
    """Contrast of the blocks with the evidence with the other old blocks of the row, by their text.

    A block's score is the sum over some heads of the mean over a question's tokens of the
    ``logsumexp`` of the scores of the block's text, divided by the square root of the number of
    heads. This is what ``retrieval_heads`` choose blocks by (``landmark.hf.prompt_retrieval``). All
    text is scored in the first block of the prefix.

    Attributes:
        questions: those of this device, whose evidence is not local, in rows of one text.
        heads: layer and query head of each.
    """

    questions: Sequence[QuestionSpan]
    heads: Sequence[tuple[int, int]]
    _kept: list[_KeptText] = field(default_factory=list, init=False, repr=False)

    def prepare(
        self, settings: LandmarkConfig, rotaries: dict[RotaryType, Rotary], like: Tensor
    ) -> None:
        """See ``GateLoss.prepare``."""
        size = settings.block_size
        device = like.device
        whole = partial(torch.tensor, dtype=torch.long, device=device)
        self._blocks = like.shape[1] // size
        self._block_size = size
        self._rows = whole([each.query.row for each in self.questions for _ in each.tokens])
        self._question = whole([n for n, each in enumerate(self.questions) for _ in each.tokens])
        self._slots = slot_of(whole([at for each in self.questions for at in each.tokens]), size)
        own = slot_of(whole([each.query.token for each in self.questions]), size) // size
        number = torch.arange(self._blocks, device=device)
        self._is_old = number < (own - settings.local_blocks)[:, None]
        evidence = torch.zeros(len(self.questions), self._blocks, dtype=torch.bool)
        for row, each in enumerate(self.questions):
            evidence[row, blocks_of(each.query, size)] = True
        self._is_evidence = evidence.to(device) & self._is_old
        at = _prefix_positions(self._slots, settings)
        inside = torch.arange(size - 1, device=device)
        self._rotations = {
            kind: (rotary.rotation(at, like.dtype), rotary.rotation(inside, like.dtype))
            for kind, rotary in rotaries.items()
        }
        self._layers_passed = 0

    def add(self, layer: LayerInputs) -> None:
        """Keeps what is scored after the pass."""
        heads = [head for number, head in self.heads if number == self._layers_passed]
        self._layers_passed += 1
        if heads:
            repeats = layer.query.shape[1] // layer.key.shape[1]
            groups = [head // repeats for head in heads]
            query = layer.query[self._rows, :, self._slots][:, heads]
            key = layer.key[:, groups]
            self._kept.append(_KeptText(query, key, layer.scale, layer.rotary_type))

    @cached_property
    def losses(self) -> Tensor:
        """``(Q,)``, after the pass."""
        total = torch.zeros(self._is_old.shape, device=self._rows.device)
        for kept in self._kept:
            total = total + self._scores(kept)
        scores = total / math.sqrt(len(self.heads))
        everything = scores.masked_fill(~self._is_old, -torch.inf).logsumexp(-1)
        return everything - scores.masked_fill(~self._is_evidence, -torch.inf).logsumexp(-1)

    def _scores(self, kept: _KeptText) -> Tensor:
        """Returns the sum over a layer's heads of the scores ``(Q, P)`` of blocks."""
        at, inside = self._rotations[kept.rotary_type]
        exact = torch.promote_types(kept.key.dtype, torch.float32)
        query = at[:, None].rotate(kept.query.to(exact)) * kept.scale
        blocks = kept.key[:, :, : self._blocks * self._block_size]
        text = torch.unflatten(blocks, 2, (self._blocks, -1))[:, :, :, :-1].to(exact)
        text = inside.rotate(text)
        mass = torch.zeros(len(query), self._blocks, dtype=exact, device=query.device)
        for row in sorted({each.query.row for each in self.questions}):
            tokens = (self._rows == row).nonzero()[:, 0]
            products = torch.einsum("nhd,hpld->nhpl", query[tokens], text[row])
            mass = mass.index_put((tokens,), products.logsumexp(-1).sum(1))
        lengths = torch.bincount(self._question, minlength=len(self.questions))
        found = mass.new_zeros(len(self.questions), self._blocks)
        return found.index_add(0, self._question, mass / lengths[self._question, None])

    def loss(self) -> Tensor:
        """Returns the mean over the questions of all devices, the same on each of them.

        Devices have no keys of each other, so that each has gradients from its own questions alone.
        """
        count = self.losses.new_tensor(len(self.losses))
        here = torch.stack((self.losses.sum().detach(), count))
        total, questions = gather_rows(here[None]).sum(0)
        share = device_count() * self.losses.sum() / questions
        loss: Tensor = share + (total / questions - share).detach()
        return loss


def _prefix_positions(slots: Tensor, settings: LandmarkConfig) -> Tensor:
    """Returns the positions of queries where the prefix and their local blocks stand before them.

    Args:
        slots: ``(N,)`` slots of the queries.
        settings: the landmark settings.
    """
    size = settings.block_size
    local = (slots // size).clamp(max=settings.local_blocks)
    return (settings.top_k + 1 + local) * size + slots % size


def _mean_of_devices(losses: Tensor) -> Tensor:
    """Returns the mean ``(X,)`` over the queries of all devices, of ``(Q, X)`` on each."""
    # A column of ones counts the queries.
    here = functional.pad(losses, (0, 1), value=1.0).sum(0, keepdim=True)
    sums = gather_rows(here).sum(0)
    return sums[:-1] / sums[-1]


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
        slots = torch.tensor(self.slots, device=like.device)
        count = -(-width // size)
        number = torch.arange(count, device=like.device)
        slot = torch.arange(count * size, device=like.device)
        own = slots // size
        # (S, P), (S, P * L)
        self._is_past = number < own[:, None]
        is_own = (slot // size == own[:, None]) & (slot <= slots[:, None])
        self._is_own_text = is_own & (slot % size != size - 1)
        self._slots = slots
        self._missing = count * size - width
        self._block_size = size

    def add(self, layer: LayerInputs) -> None:
        """See ``GateLoss.add``."""
        query = layer.rotation.rotate(layer.query)[:, :, self._slots].float()
        key = layer.rotation.rotate(layer.key).float()
        grouped = torch.unflatten(query, 1, (key.shape[1], -1))
        scores = layer.scale * torch.einsum("bgrsd,bgtd->bgrst", grouped, key)
        scores = functional.pad(scores, (0, self._missing), value=-torch.inf)
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
    queries: Iterable[EvidenceQuery],
    settings: LandmarkConfig,
    count: int,
    device: torch.device,
) -> list[EvidenceQuery] | None:
    """Returns some of the queries whose evidence is not local, evenly, some of them repeated.

    They are the same whatever devices share the rows of a batch.

    Args:
        queries: those of this device.
        settings: the landmark settings.
        count: how many to take, summed up over all devices.
        device: the device.

    Returns:
        those of this device, which may have none; ``None`` where no device has such a query.
    """
    far = far_queries(queries, settings)
    counts = gather_counts(len(far), count, device=device)
    total, wanted = map(sum, zip(*counts, strict=True))
    if not total:
        return None
    before = sum(there for there, _ in counts[: device_number()])
    taken = [number * total // wanted - before for number in range(wanted)]
    return [far[index] for index in taken if 0 <= index < len(far)]


def far_questions(
    questions: Iterable[QuestionSpan], settings: LandmarkConfig, device: torch.device
) -> list[QuestionSpan] | None:
    """Returns the questions whose evidence is not local.

    Args:
        questions: those of this device.
        settings: the landmark settings.
        device: the device.

    Returns:
        those of this device, which may have none; ``None`` where no device has such a question.
    """
    far = [each for each in questions if far_queries([each.query], settings)]
    (counts,) = zip(*gather_counts(len(far), device=device), strict=True)
    return far if sum(counts) else None
