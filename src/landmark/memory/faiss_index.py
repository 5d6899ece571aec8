"""Indexes of faiss over old landmarks, for users who do not want every landmark scored.

``landmark_index.py`` has the interface, and says why a score is one inner product.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from landmark.memory.storage.store import BlockStore

KINDS = ("exact", "faiss-flat", "faiss-ivf", "faiss-hnsw")
MADE_FROM = 1024  # landmarks; below that every one is looked at
# Lists and graphs are built again when a landmark is longer than all before by more than this.
SPARE_LENGTH = 1.1
IVF_PROBED = 8  # one in this many lists is read
IVF_GROWTH = 4  # lists are built again when there are this many times as many landmarks
HNSW_LINKS = 32  # of a landmark
HNSW_BUILD = 100  # landmarks looked at to find its links
HNSW_SEARCH = 256  # landmarks looked at by a search


def require_faiss() -> Any:
    """Returns the package; raises ``ModuleNotFoundError`` where it is missing."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "an index needs the package faiss: pip install landmark-attention[index]"
        ) from None
    return faiss


class VectorIndex:
    """Vectors of one key/value head, numbered as they are added; float32, in host memory.

    Lists and graphs want distances. They are made of vectors less their mean, which changes all
    products of a query alike (landmarks lie much closer to each other than to zero), with one more
    column that brings all to one length: then the largest product with a query is the least
    distance from it.

    Args:
        kind: one of ``KINDS`` but ``exact``.
        dim: their length.
    """

    def __init__(self, kind: str, dim: int) -> None:
        self.kind = kind
        self.dim = dim
        self._index = require_faiss().IndexFlatIP(dim)
        self._made_of = 0  # vectors that lists or the graph were made of; 0 while there are neither
        self._mean = torch.zeros(dim)
        self._length = 0.0

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def __deepcopy__(self, memo: dict[int, Any]) -> VectorIndex:
        other = copy.copy(self)
        other._index = require_faiss().clone_index(self._index)
        return other

    def add(self, vectors: Tensor) -> None:
        """Adds ``vectors (n, D)`` float32."""
        total = len(self) + len(vectors)
        if self.kind == "faiss-flat" or total < MADE_FROM:
            self._index.add(vectors.contiguous().numpy())
            return
        many = self.kind == "faiss-ivf" and total >= IVF_GROWTH * self._made_of
        if not self._made_of or many or bool((self._norms(vectors) > self._length).any()):
            self._make(torch.cat((self._vectors(), vectors)))
        else:
            self._index.add(self._lengthened(vectors))

    def search(
        self, query: Tensor, count: int, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the vectors with the largest inner products.

        Args:
            query: ``(M, D)`` float32.
            count: how many are wanted.
            allowed: ``(len(self),)`` bool, ``None`` for all.

        Returns:
            products, best first, and numbers, ``(M, count)`` each; ``-inf`` and -1 where fewer were
            found.
        """
        scale = (
            query.norm(dim=1, keepdim=True).clamp(min=1e-30) / self._length
            if self._made_of
            else None
        )
        asked = query if scale is None else torch.nn.functional.pad(query / scale, (0, 1))
        found = self._index.search(asked.contiguous().numpy(), count, params=self._how(allowed))
        products, numbers = map(torch.from_numpy, found)
        if scale is not None:  # of two vectors of one length, from their squared distance
            products = (self._length**2 - products / 2) * scale + query @ self._mean[:, None]
        return products.masked_fill(numbers < 0, -torch.inf), numbers

    @property
    def nbytes(self) -> int:
        """Bytes held: vectors, and what leads to them."""
        held = len(self) * int(self._index.d) * 4
        if self._made_of and self.kind == "faiss-hnsw":
            graph = self._index.hnsw
            held += int(
                4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
            )
        elif self._made_of:
            held += len(self) * 8 + int(self._index.nlist) * int(self._index.d) * 4
        return held

    @property
    def settings(self) -> dict[str, int]:
        """What decides how well it finds."""
        if not self._made_of:
            return {}
        if self.kind == "faiss-hnsw":
            return {"links": HNSW_LINKS, "build": HNSW_BUILD, "search": HNSW_SEARCH}
        return {"lists": int(self._index.nlist), "probed": self._probed}

    @property
    def _probed(self) -> int:
        return math.ceil(int(self._index.nlist) / IVF_PROBED)

    def _how(self, allowed: Tensor | None) -> Any:
        faiss = require_faiss()
        chosen: dict[str, Any] = (
            {} if allowed is None else {"sel": faiss.IDSelectorBitmap(_bits(allowed).numpy())}
        )
        if not self._made_of:
            return faiss.SearchParameters(**chosen)
        if self.kind == "faiss-hnsw":
            return faiss.SearchParametersHNSW(efSearch=HNSW_SEARCH, **chosen)
        return faiss.SearchParametersIVF(nprobe=self._probed, **chosen)

    def _make(self, vectors: Tensor) -> None:
        """Makes the graph of all vectors, or as many lists as the square root of their number."""
        faiss = require_faiss()
        self._mean = vectors.mean(0)
        self._length = SPARE_LENGTH * float(self._norms(vectors).max())
        lengthened = self._lengthened(vectors)
        if self.kind == "faiss-hnsw":
            index = faiss.IndexHNSWFlat(self.dim + 1, HNSW_LINKS)
            index.hnsw.efConstruction = HNSW_BUILD
        else:
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatL2(self.dim + 1), self.dim + 1, math.isqrt(len(vectors))
            )
            index.cp.min_points_per_centroid = 1  # no warnings of few vectors
            index.train(lengthened)
        index.add(lengthened)
        self._index = index
        self._made_of = len(vectors)

    def _norms(self, vectors: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(vectors - self._mean, dim=1)
        return norms

    def _lengthened(self, vectors: Tensor) -> Any:
        """Vectors less the mean, with the column that makes each as long as all: ``(n, D + 1)``, an
        array.
        """
        rest = (self._length**2 - self._norms(vectors) ** 2).clamp(min=0).sqrt()
        return torch.cat((vectors - self._mean, rest[:, None]), dim=1).numpy()

    def _vectors(self) -> Tensor:
        """All vectors as they were added, to rounding."""
        if len(self) == 0:
            return torch.empty(0, self.dim)
        if self._made_of and self.kind == "faiss-ivf":
            self._index.make_direct_map()
        held: Tensor = torch.from_numpy(self._index.reconstruct_n(0, len(self)))
        return held[:, : self.dim] + self._mean


def _bits(flags: Tensor) -> Tensor:
    """``(n,)`` bool to bytes of eight flags, the first in the lowest bit."""
    eights = torch.nn.functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


class RowIndex:
    """The old landmarks of one row: an index for each key/value head, and which block each number
    stands for.

    No kind can drop a vector for certain (the graph of HNSW cannot at all): what is dropped is
    passed over, and when more than half is, the row is made anew.

    Args:
        kind: one of ``KINDS`` but ``exact``.
        heads: key/value heads.
        dim: length of a key.
    """

    def __init__(self, kind: str, heads: int, dim: int) -> None:
        self.heads = [VectorIndex(kind, dim) for _ in range(heads)]
        self.blocks = torch.empty(0, dtype=torch.long)  # of each number; -1 where it was dropped
        self.end = 0  # blocks before it are held, but for evicted ones

    def follow(self, store: BlockStore, row: int, end: int) -> None:
        """Holds the landmarks of block 0 and of those from the store's first up to ``end``
        (exclusive), no others.
        """
        evicted = (self.blocks > 0) & (self.blocks < store.first)
        self.blocks = self.blocks.masked_fill(evicted | (self.blocks >= end), -1)
        self.end = min(self.end, end)
        if int((self.blocks < 0).sum()) * 2 > len(self.blocks):
            kind = self.heads[0].kind
            dim = self.heads[0].dim
            self.heads = [VectorIndex(kind, dim) for _ in self.heads]
            self.blocks = self.blocks[:0]
            self.end = 0
        new = torch.arange(self.end, end)
        new = new[(new == 0) | (new >= store.first)]
        self.end = end
        if len(new) == 0:
            return
        keys = (
            store.landmark_keys[row][:, store.kept.index_of(new).to(store.landmark_keys.device)]
            .float()
            .cpu()
        )
        for head, vectors in zip(self.heads, keys, strict=True):
            head.add(vectors)
        self.blocks = torch.cat((self.blocks, new))

    def search(
        self, query: Tensor, count: int, lowest: int | None, keep_first: bool
    ) -> tuple[Tensor, Tensor]:
        """As ``FaissIndex.search``, for queries ``(G, M, D)`` that may all read the same
        blocks.
        """
        allowed = self.blocks >= max(0, lowest or 0)  # what was dropped is -1
        if keep_first:
            allowed = allowed | (self.blocks == 0)
        scores = query.new_full((*query.shape[:2], count), -torch.inf)
        blocks = torch.zeros(scores.shape, dtype=torch.long)
        if not bool(allowed.any()):
            return scores, blocks
        chosen = None if bool(allowed.all()) else allowed
        for head, index in enumerate(self.heads):
            scores[head], numbers = index.search(query[head], count, chosen)
            blocks[head] = torch.where(numbers >= 0, self.blocks[numbers.clamp(min=0)], 0)
        return scores, blocks


class FaissIndex:
    """The old landmarks of all rows of one layer, added as blocks grow old enough.

    It computes on the CPU: queries on a GPU are copied there, and what was found back.

    Args:
        kind: one of ``KINDS`` but ``exact``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rows: list[RowIndex] = []

    @property
    def ends(self) -> list[int]:
        """The first block of each row that is too young to be held."""
        return [row.end for row in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes held in host memory."""
        return sum(head.nbytes for row in self.rows for head in row.heads)

    def follow(self, store: BlockStore, ends: list[int]) -> None:
        """Brings the index to what a call may find in it.

        Called in every call, so that what was cropped or evicted goes before its numbers are used
        again.

        Args:
            store: the layer's blocks.
            ends: of each row, the first block that is too young.
        """
        _, heads, _, dim = store.landmark_keys.shape
        if not self.rows:
            self.rows = [RowIndex(self.kind, heads, dim) for _ in ends]
        for number, (row, end) in enumerate(zip(self.rows, ends, strict=True)):
            row.follow(store, number, end)

    def search(
        self, query: Tensor, count: int, lowest: Tensor | None, *, keep_first: bool
    ) -> tuple[Tensor, Tensor]:
        """Finds the landmarks with the largest scores, as far as this kind of index finds them.

        Args:
            query: ``(B, G, R, n, W, D)``, scaled and rotated to the start of the prefix.
            count: how many are wanted.
            lowest: ``(B, n)`` lowest block that each own block may read, ``None`` for all.
            keep_first: whether block 0 may be read all the same.

        Returns:
            scores and blocks, ``(B, G, R, n, W, count)``, blocks ascending; ``-inf`` where fewer
            were found.
        """
        _, _, repeats, blocks, width, _ = query.shape
        queries = query.float().cpu().permute(0, 3, 1, 2, 4, 5).flatten(3, 4)  # (B, n, G, R * W, D)
        bounds = [[None] * blocks] * len(queries) if lowest is None else lowest.tolist()
        found = [
            [
                row.search(part, count, bound, keep_first)
                for part, bound in zip(parts, bounds_of_row, strict=True)
            ]
            for row, parts, bounds_of_row in zip(self.rows, queries, bounds, strict=True)
        ]
        scores, numbers = (
            torch.stack([torch.stack([own[i] for own in row]) for row in found]) for i in (0, 1)
        )
        numbers, order = numbers.sort(dim=-1, stable=True)
        shape = (*queries.shape[:3], repeats, width, count)
        scores = scores.gather(-1, order).to(query.dtype).view(shape).permute(0, 2, 3, 1, 4, 5)
        return scores.to(query.device), numbers.view(shape).permute(0, 2, 3, 1, 4, 5).to(
            query.device
        )

    def select_rows(self, rows: list[int]) -> None:
        """Replaces the batch by the given rows, repeated or reordered; later calls add what is not
        held yet.
        """
        if not self.rows:
            return
        given: set[int] = set()
        kept = []
        for row in rows:
            kept.append(copy.deepcopy(self.rows[row]) if row in given else self.rows[row])
            given.add(row)
        self.rows = kept
