"""The definition of landmark attention as a plain loop over rows, layers, heads and queries, in
float64.

Nothing here knows of chunks, caches or batches. A stock model of transformers runs over one row's
text with the landmark's embedding inserted; its positions are all 0, so that queries and keys
arrive unrotated, and the rotation, the choice of blocks and the two softmaxes are done here, one
query at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from landmark.config import LandmarkConfig

Array = np.ndarray
# (layer, head, slot of the query) -> {retrieved block: its gate weight}
Trace = dict[tuple[int, int, int], dict[int, float]]
# layer -> unrotated queries (H, S, D), keys and values (G, S, D) of a row's slots
Known = dict[int, list[Array]]


@dataclasses.dataclass
class Layer:
    """One layer's unrotated queries (H, S, D), keys and values (G, S, D) of a row's S slots, and
    what it needs.
    """

    query: Array
    key: Array
    value: Array
    frequencies: Array
    scale: float
    index: int
    settings: LandmarkConfig
    chunks: list[tuple[int, int]]
    trace: Trace
    silent: Container[int] = ()
    first: int = 0
    closest: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.memo: dict[tuple[int, int], dict[int, float]] = {}
        self.turned: dict[tuple[str, int, int, int], Array] = {}

    # Where things are.

    def block(self, slot: int) -> int:
        return slot // self.settings.block_size

    def landmark(self, block: int) -> int:
        return block * self.settings.block_size + self.settings.block_size - 1

    def texts(self, block: int) -> list[int]:
        start = block * self.settings.block_size
        return list(range(start, start + self.settings.block_size - 1))

    def chunk(self, slot: int) -> tuple[int, int]:
        return next((first, end) for first, end in self.chunks if first <= slot < end)

    def first_local(self, query: int) -> int:
        """The first block of the query's local context."""
        if self.settings.mode == "all":
            return 0
        if self.settings.local == "chunk":
            return self.block(self.chunk(query)[0])
        return max(0, self.block(query) - self.settings.local_blocks)

    def candidates(self, query: int) -> list[int]:
        """The blocks from which the query retrieves."""
        older = list(range(self.first_local(query)))
        recent = older
        if self.settings.max_blocks is not None:
            recent = older[max(0, len(older) - self.settings.max_blocks) :]
        if self.settings.local == "blocks" and older and 0 not in recent:
            return [0, *recent]
        return recent

    def age(self, query: int, block: int) -> int:
        return self.first_local(query) - 1 - block

    # Positions. Under stingy a block stands at a place of the prefix; the local context begins at
    # place top_k + 1.

    def stingy(self) -> bool:
        return self.settings.positions == "stingy" and self.settings.mode == "retrieval"

    def scoring_position(self, query: int, slot: int) -> int:
        block = self.block(slot)
        if not self.stingy():
            return slot
        if block >= self.first_local(query):
            place = self.settings.top_k + 1 + block - self.first_local(query)
        else:
            place = max(0, self.settings.top_k - self.age(query, block))
        return place * self.settings.block_size + slot % self.settings.block_size

    def final_position(self, query: int, slot: int, chosen: list[int]) -> int:
        block = self.block(slot)
        top_k = self.settings.top_k
        if not self.stingy() or block >= self.first_local(query):
            return self.scoring_position(query, slot)
        place = (
            chosen.index(block)
            + (top_k - len(chosen))
            + (1 if self.age(query, block) < top_k else 0)
        )
        return place * self.settings.block_size + slot % self.settings.block_size

    # Scores.

    def rotated(self, vector: Array, position: int) -> Array:
        half = len(self.frequencies)
        first = vector[:half]
        second = vector[half : 2 * half]
        rest = vector[2 * half :]
        cos = np.cos(position * self.frequencies)
        sin = np.sin(position * self.frequencies)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest])

    def head_key(self, head: int) -> int:
        return head * self.key.shape[0] // self.query.shape[0]

    def once(self, name: str, head: int, slot: int, position: int) -> Array:
        """A query or key at a position, rotated once."""
        if (name, head, slot, position) not in self.turned:
            self.turned[name, head, slot, position] = self.rotated(
                getattr(self, name)[head, slot], position
            )
        return self.turned[name, head, slot, position]

    def score(self, head: int, query: int, query_position: int, slot: int, position: int) -> float:
        key = self.once("key", self.head_key(head), slot, position)
        return self.scale * float(self.once("query", head, query, query_position) @ key)

    # The choice of blocks.

    def landmark_scores(self, head: int, query: int) -> dict[int, float]:
        """The scores that decide: of the candidates' landmarks at their scoring positions."""
        if (head, query) not in self.memo:
            own = self.scoring_position(query, query)
            scores = {}
            for block in self.candidates(query):
                slot = self.landmark(block)
                position = self.scoring_position(query, slot)
                if self.index == 0 and self.stingy():
                    slot = self.landmark(0)
                scores[block] = self.score(head, query, own, slot, position)
            self.memo[head, query] = scores
        return self.memo[head, query]

    def sharers(self, head: int, query: int) -> list[tuple[int, int]]:
        """The (head, query) pairs whose maximum decides for this one."""
        heads = range(self.query.shape[0])
        granularity = self.settings.granularity
        if granularity == "token":
            return [(other, query) for other in heads]
        if granularity == "group":
            return [
                (other, query) for other in heads if self.head_key(other) == self.head_key(head)
            ]
        if self.settings.local == "chunk":
            return [(head, other) for other in range(*self.chunk(query))]
        start = self.block(query) * self.settings.block_size
        return [(head, other) for other in range(start, query + 1)]

    def chosen(self, head: int, query: int) -> list[int]:
        """The retrieved blocks, oldest first."""
        if self.settings.mode == "all" or self.first_local(query) == 0:
            return []
        layers = self.settings.layers
        if query in self.silent or (layers is not None and self.index not in layers):
            return [0]
        if not self.candidates(query):
            return []
        if self.settings.granularity == "token_head":
            merit = self.landmark_scores(head, query)
        else:
            shares = [
                softmax(self.landmark_scores(*sharer)) for sharer in self.sharers(head, query)
            ]
            merit = {
                block: max(share[block] for share in shares) for block in self.candidates(query)
            }
        ranked = sorted(merit, key=lambda block: (-merit[block], block))
        self.note_closest(
            [merit[block] for block in ranked[self.settings.top_k - 1 : self.settings.top_k + 1]]
        )
        return sorted(ranked[: self.settings.top_k])

    def note_closest(self, merits: list[float]) -> None:
        """Notes how far the last chosen block lies before the best one left out, but for exact
        ties.
        """
        if len(merits) == 2 and merits[0] != merits[1]:
            shares = self.settings.granularity != "token_head"
            self.closest.append(
                math.log(merits[0] / merits[1]) if shares else merits[0] - merits[1]
            )

    # Attention.

    def output(self, head: int, query: int) -> Array:
        chosen = self.chosen(head, query)
        own_position = self.final_position(query, query, chosen)

        def score(slot: int) -> float:
            return self.score(
                head, query, own_position, slot, self.final_position(query, slot, chosen)
            )

        block = self.block(query)
        past = chosen + list(range(self.first_local(query), block))
        own = [slot for slot in self.texts(block) if slot <= query]
        gate = softmax(
            {slot: score(slot) for slot in [*(self.landmark(other) for other in past), *own]}
        )
        self.trace[self.index, head, query] = {
            block: gate[self.landmark(block)] for block in chosen
        }
        value = self.value[self.head_key(head)]
        result = np.zeros(value.shape[-1])
        for slot in own:
            result += gate[slot] * value[slot]
        for other in past:
            inside = softmax({slot: score(slot) for slot in self.texts(other)})
            for slot, weight in inside.items():
                result += gate[self.landmark(other)] * weight * value[slot]
        return result

    def attend(self) -> Array:
        """Returns the outputs (S - first, H, D) of the slots from ``first`` on."""
        heads, slots, _ = self.query.shape
        rows = range(self.first, slots)
        return np.stack(
            [np.stack([self.output(head, slot) for head in range(heads)]) for slot in rows]
        )


def softmax(scores: dict[int, float]) -> dict[int, float]:
    most = max(scores.values())
    raised = {name: math.exp(score - most) for name, score in scores.items()}
    total = math.fsum(raised.values())
    return {name: value / total for name, value in raised.items()}


_run: dict[str, Any] = {}


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> Any:
    assert attention_mask is None and query.shape[0] == 1
    known = _run["known"]
    first = _run["first"]
    parts = [each[0].numpy() for each in (query, key, value)]
    if first:
        earlier = known[module.layer_idx]
        parts = [
            np.concatenate((old[:, :first], new), axis=1)
            for old, new in zip(earlier, parts, strict=True)
        ]
    known[module.layer_idx] = parts
    layer = Layer(
        query=parts[0],
        key=parts[1],
        value=parts[2],
        frequencies=_frequencies(_run["rotary"], module),
        scale=scaling,
        index=module.layer_idx,
        settings=_run["settings"],
        chunks=_run["chunks"],
        trace=_run["trace"],
        silent=_run["silent"],
        first=first,
        closest=_run["closest"],
    )
    return torch.from_numpy(layer.attend())[None], None


def _frequencies(rotary: Any, module: Any) -> Array:
    name = "inv_freq" if hasattr(rotary, "inv_freq") else f"{module.layer_type}_inv_freq"
    return np.asarray(getattr(rotary, name).double().numpy())


AttentionInterface.register("oracle", _attention)


def slots_of(tokens: int, block_size: int) -> list[int]:
    """The slots of the text tokens of a row: one is left out after every ``block_size - 1`` of
    them.
    """
    return [slot for slot in range(2 * tokens) if slot % block_size != block_size - 1][:tokens]


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    landmark: torch.Tensor,
    ids: torch.Tensor,
    settings: LandmarkConfig,
    *,
    chunks: list[int] | None = None,
    trace: Trace | None = None,
    silent: Container[int] = (),
    known: Known | None = None,
    seen: int = 0,
    closest: list[float] | None = None,
) -> torch.Tensor:
    """Computes the logits of one row of text by the definition.

    Args:
        model: a stock float64 model. It is left with the attention "oracle".
        landmark: the landmark's embedding (hidden,).
        ids: text token ids (T,), without padding.
        settings: the policy. Only ``local="chunk"`` depends on ``chunks``.
        chunks: text tokens of each chunk, in order; they sum to T.
        trace: filled with the retrieved blocks, and their gate weights, of each (layer, head,
            slot).
        silent: indices of text tokens that see their local context and block 0 only, as do the
            landmarks behind them.
        known: filled with what the layers computed of the text; at first what an earlier call
            filled in.
        seen: the first so many text tokens are the beginning of that earlier call's text: they are
            not computed again.
        closest: filled with how much decided each choice: a difference of scores, or of the
            logarithms of shares.

    Returns:
        logits (T - seen, vocabulary) of the text tokens from ``seen`` on.
    """
    size = settings.block_size
    embedded = model.get_input_embeddings()(ids)
    rows: list[torch.Tensor] = []
    ends: list[int] = [0]
    for token in range(len(ids)):
        rows.append(embedded[token])
        if (token + 1) % (size - 1) == 0:
            rows.append(landmark)
        ends.append(len(rows))
    bounds = np.cumsum([0, *(chunks or [len(ids)])])
    assert bounds[-1] == len(ids)
    _run.update(
        rotary=model.base_model.rotary_emb,
        settings=settings,
        chunks=[
            (ends[first], ends[end]) for first, end in itertools.pairwise(bounds) if end > first
        ],
        trace={} if trace is None else trace,
        silent={
            slot
            for token in range(len(ids))
            if token in silent
            for slot in range(ends[token], ends[token + 1])
        },
        known={} if known is None else known,
        first=ends[seen],
        closest=[] if closest is None else closest,
    )
    model.set_attn_implementation("oracle")
    places = torch.zeros(1, len(rows) - ends[seen], dtype=torch.long)
    new = torch.stack(rows[ends[seen] :])[None]
    everything = model(inputs_embeds=new, position_ids=places, use_cache=False).logits
    return everything[0, [slot - ends[seen] for slot in slots_of(len(ids), size)[seen:]]]
