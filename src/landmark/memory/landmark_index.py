"""Interface of an index over old landmarks: it finds the best without scoring every one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from landmark.memory.storage.store import BlockStore


class LandmarkIndex(Protocol):
    """The old landmarks of all rows of one layer, added as blocks grow old enough.

    Under stingy positions all blocks older than the latest ``top_k`` candidates are scored at the
    start of the prefix. A score is then one inner product of the query, rotated to there, with the
    landmark key as it is stored.
    """

    @property
    def ends(self) -> list[int]:
        """The first block of each row that is too young for the index."""

    @property
    def nbytes(self) -> int:
        """Bytes held in host memory."""

    def follow(self, store: BlockStore, ends: list[int]) -> None:
        """Brings the index to what a call may find in it.

        It is called in every call, so that blocks that were cropped or dropped are gone before
        their numbers are used again.

        Args:
            store: the layer's blocks.
            ends: of each row, the first block that is too young.
        """

    def search(
        self, query: Tensor, count: int, lowest: Tensor | None, *, keep_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Finds the landmarks with the largest scores, as far as this index finds them.

        Args:
            query: ``(B, G, R, n, W, D)``, scaled and rotated to the start of the prefix.
            count: how many are wanted.
            lowest: ``(B, n)`` lowest block that each own block may read, ``None`` for all.
            keep_first: whether block 0 may be read all the same.

        Returns:
            scores and blocks, ``(B, G, R, n, W, count)``, blocks ascending; ``-inf`` where fewer
            were found.
        """

    def select_rows(self, rows: list[int]) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
