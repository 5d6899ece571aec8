"""Arguments of landmark attention beside query, key and value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionMetadata(NamedTuple):
    """What every implementation takes beside query, key and value.

    ``landmark_attention`` explains and checks the arguments, fills in their defaults and builds
    this once for each call.

    Attributes:
        block_size: slots of a block, landmark included.
        scale: factor of the scores.
        top_k: past blocks that a query keeps; ``None`` for all.
        query_start: slot of the first query.
        starts: (B,) integers, slot of each row's first text; ``None`` where no row is padded.
        segments: (B, S) integers, document of each key; ``None`` where each row is one document.
        landmarks: (B, S) booleans, which keys are landmarks; ``None`` where every
            ``block_size``-th slot of a document is one.
        forced: (B, T, F) integers, past blocks that a query keeps whatever their score; ``None``
            for none.
    """

    block_size: int
    scale: float
    top_k: int | None
    query_start: int
    starts: Tensor | None
    segments: Tensor | None
    landmarks: Tensor | None
    forced: Tensor | None = None

    @property
    def has_equal_blocks(self) -> bool:
        """Whether all finished blocks of a row have the same size."""
        return self.segments is None and self.landmarks is None
