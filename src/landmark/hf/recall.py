"""How often the blocks that hold the evidence for an answer are retrieved, by layer and head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.config import LandmarkConfig
from landmark.memory.retrieval import Retrieval

NO_BLOCK = -2  # fills up lists of evidence; a retrieval fills up with -1


class EvidenceQuery(NamedTuple):
    """A token that predicts a part of an answer, and where that answer was said before.

    Attributes:
        row: row of the batch.
        token: index of the text token in its row.
        evidence: text tokens of each mention; retrieving a block of one of them is enough.
    """

    row: int
    token: int
    evidence: tuple[range, ...]


@dataclass(frozen=True)
class LayerRecall:
    """Recall of one layer.

    Attributes:
        layer: its index.
        heads: for each query head, the share of queries that retrieved a block with evidence.
        any_head: the share of queries for which at least one head did.
    """

    layer: int
    heads: tuple[float, ...]
    any_head: float


class EvidenceRecall:
    """Counts how often evidence is retrieved.

    A query whose evidence is local already has nothing to retrieve and is not counted.

    Args:
        settings: the landmark settings.

    Attributes:
        queries: how many were counted.
    """

    def __init__(self, settings: LandmarkConfig) -> None:
        self.settings = settings
        self.queries = 0
        self._found: dict[int, Tensor] = {}  # by layer, (H + 1,) counts; the last is of any head

    def add(self, retrievals: Iterable[Retrieval], queries: Sequence[EvidenceQuery]) -> None:
        """Counts the queries of one batch.

        Args:
            retrievals: ``LandmarkCache.retrievals`` of the calls that hold these queries, recorded
                with ``LandmarkCache.record``.
            queries: the queries. Rows have no padding before them.
        """
        far = far_queries(queries, self.settings)
        if not far:
            return
        self.queries += len(far)
        blocks = [blocks_of(query, self.settings.block_size) for query in far]
        longest = max(map(len, blocks))
        evidence = torch.tensor([found + [NO_BLOCK] * (longest - len(found)) for found in blocks])
        rows = torch.tensor([query.row for query in far])
        tokens = torch.tensor([query.token for query in far])
        slots = slot_of(tokens, self.settings.block_size)
        for retrieval in retrievals:
            self._count(retrieval, rows, slots, evidence)

    def layers(self) -> list[LayerRecall]:
        """Returns the recall of each layer that retrieves; none where no query was counted."""
        found = []
        for layer, counts in sorted(self._found.items()):
            shares = (counts / self.queries).tolist()
            found.append(LayerRecall(layer, tuple(shares[:-1]), shares[-1]))
        return found

    def _count(self, retrieval: Retrieval, rows: Tensor, slots: Tensor, evidence: Tensor) -> None:
        """Counts the queries that are in one call.

        Args:
            retrieval: what a layer retrieved in the call.
            rows: ``(Q,)``.
            slots: ``(Q,)`` slot of each query.
            evidence: ``(Q, E)`` blocks.
        """
        device = retrieval.blocks.device
        rows, slots, evidence = (each.to(device) for each in (rows, slots, evidence))
        is_here = retrieval.positions.to(device)[rows] == slots[:, None]
        here = is_here.any(-1).nonzero()[:, 0]
        columns = is_here[here].long().argmax(-1)
        # (queries, H, K): dimensions that are sliced follow those of the index.
        blocks = retrieval.blocks[rows[here], :, columns]
        hits = (blocks[..., None] == evidence[here][:, None, None]).any(-1).any(-1)
        counts = torch.cat((hits.sum(0), hits.any(-1).sum(0, keepdim=True))).cpu()
        before = self._found.get(retrieval.layer)
        self._found[retrieval.layer] = counts if before is None else before + counts


def far_queries(queries: Iterable[EvidenceQuery], settings: LandmarkConfig) -> list[EvidenceQuery]:
    """Returns the queries none of whose evidence is in their own or a local block."""
    far = []
    for query in queries:
        own = query.token // settings.text_per_block
        if blocks_of(query, settings.block_size)[-1] < own - settings.local_blocks:
            far.append(query)
    return far


def blocks_of(query: EvidenceQuery, block_size: int) -> list[int]:
    """Returns the blocks that hold the evidence of a query, ascending."""
    size = block_size - 1
    spans = [range(tokens[0] // size, tokens[-1] // size + 1) for tokens in query.evidence]
    return sorted({block for span in spans for block in span})
