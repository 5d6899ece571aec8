"""Order documents by their highest landmark scores for a query.

Of a document nothing is kept but its landmark keys, one vector for each block, layer and key/value
head, and the mean of its queries. A query text is read by itself; the mean of its positions is
scored against the landmarks of all documents as if these were old blocks before it. What is common
to all positions and to all landmarks is taken out first, and landmarks are scaled to length 1:
otherwise a few of them (of contents, of tables) lead for every query.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.data.tokenizer import row_start
from landmark.hf.cache import LandmarkCache
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.texts.files import file_documents
from landmark.texts.loading import LoadedModel, require_landmark
from landmark.texts.reading import counted, read_into_memory, tokenize

# Documents have no order: all their landmarks stand where old ones do, and none may be evicted.
SETTINGS: dict[str, Any] = {
    "mode": "retrieval",
    "positions": "stingy",
    "local": "blocks",
    "max_blocks": None,
}


@dataclass(frozen=True)
class TextLandmarks:
    """What ranking keeps of a text, for each layer that retrieves and whose landmarks differ.

    Attributes:
        keys: ``(G, N, D)`` landmark keys of its ``N`` finished blocks.
        query: ``(G, R, D)`` float32 mean of its queries, scaled and rotated as retrieval scores
            old landmarks with them.
    """

    keys: tuple[Tensor, ...]
    query: tuple[Tensor, ...]

    @property
    def blocks(self) -> int:
        """Its finished blocks."""
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class RankingIndex:
    """The landmarks of documents that can be ranked.

    Attributes:
        keys: for each layer ``(G, N, D)`` float32: the landmark keys of all documents, their mean
            taken out, of length 1.
        query: for each layer ``(G, R, D)`` float32, the mean over all positions of all documents.
        borders: first block of each document, and ``N``.
    """

    keys: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    borders: tuple[int, ...]

    def nbytes(self) -> int:
        """Returns the bytes that it holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.query))


@dataclass(frozen=True)
class DocumentScore:
    """The best block of one document for a query.

    Attributes:
        document: the document's index.
        score: the highest of its landmarks' scores.
        block: the block whose landmark that is, counted from the document's first.
    """

    document: int
    score: float
    block: int


def old_queries(memory: LayerMemory, query: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Returns queries as retrieval scores old landmarks with them under ``stingy``.

    These are the queries of a text that is long enough to have all its local blocks.

    Args:
        memory: of their layer.
        query: ``(B, H, T, D)``, not rotated.
        offsets: ``(B, T)`` place of each query inside its block.
        scale: the softmax scale.

    Returns:
        ``(B, H, T, D)``, at least float32.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    distance = torch.tensor(
        memory.config.top_k + 1 + memory.config.local_blocks, device=query.device
    )
    inside = memory.tables.by_offset(offsets, query.dtype)[:, None].rotate(query).to(precise)
    return memory.tables.by_distance(distance, precise, int(distance)).rotate(inside * scale)


class QuerySums:
    """An observer of a ``LandmarkCache`` that sums up the queries of each layer.

    Attributes:
        totals: by layer, ``(H, D)``: the sum over all positions, see ``old_queries``.
    """

    def __init__(self) -> None:
        self.totals: dict[int, Tensor] = {}

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        """Adds the queries ``(1, H, T, D)`` of one call of one layer."""
        summed = old_queries(memory, query, geometry.offsets, scale)[0].sum(1)
        before = self.totals.get(memory.layer)
        self.totals[memory.layer] = summed if before is None else before + summed


def deciding_layers(cache: LandmarkCache) -> list[LayerMemory]:
    """Returns the memories of the layers that retrieve and whose landmarks differ."""
    return [
        memory
        for memory in cache.layers_in_use()
        if memory.retrieves and not memory.store.shared_landmark
    ]


@torch.no_grad()
def read_text(loaded: LoadedModel, ids: Tensor, progress: Progress | None = None) -> TextLandmarks:
    """Reads a text without retrieval and keeps what ranking needs.

    Args:
        loaded: a landmark model.
        ids: ``(T,)`` token ids.
        progress: called while it is read.

    Raises:
        ValueError: no landmark model, no tokens, or a model of which no layer can tell documents
            apart.
    """
    require_landmark(loaded)
    queries = QuerySums()
    with loaded.configured(**SETTINGS):
        cache = LandmarkCache(loaded.model.config)
        cache.observer = queries
        read_into_memory(
            loaded, ids[None].to(loaded.device), retrieve=False, cache=cache, progress=progress
        )
    (slots,) = cache.slots
    (tokens,) = cache.tokens
    memories = deciding_layers(cache)
    if not memories:
        raise ValueError(
            "model: expected a model that retrieves in some layer but the first, whose "
            f"landmarks are all equal, got {loaded.name}, which retrieves in none; pass another, "
            "or configure its layers"
        )
    landmarks = slots - tokens
    keys = [memory.store.landmark_keys[0][:, :landmarks].clone() for memory in memories]
    means = [queries.totals[memory.layer] / slots for memory in memories]
    grouped = [
        torch.unflatten(mean, 0, (len(key), -1)) for mean, key in zip(means, keys, strict=True)
    ]
    return TextLandmarks(tuple(keys), tuple(grouped))


def read_document(
    loaded: LoadedModel, ids: Tensor, progress: Progress | None = None
) -> TextLandmarks:
    """Reads a document ``(T,)`` behind what the tokenizer puts before every text.

    Its last block is filled up with its beginning, so that a landmark closes it. Warns where the
    landmark was never trained.

    Raises:
        ValueError: as ``read_text``.
    """
    require_landmark(loaded)
    if not loaded.model.landmark.landmark_trained:
        warnings.warn(
            "this model's landmark was never trained: fine-tune it first (landmark train)",
            stacklevel=2,
        )
    ids = torch.cat((_start(loaded), ids))
    per_block = loaded.model.landmark.text_per_block
    whole = math.ceil(len(ids) / per_block) * per_block
    return read_text(loaded, ids[torch.arange(whole) % max(1, len(ids))], progress)


def _start(loaded: LoadedModel) -> Tensor:
    """Returns the ids ``(n,)`` that the tokenizer puts before every text."""
    return torch.tensor(row_start(loaded.tokenizer), dtype=torch.long)


def build_index(documents: Sequence[TextLandmarks]) -> RankingIndex:
    """Puts the landmarks of documents side by side, at least one document, in this order."""
    borders = [0]
    for document in documents:
        borders.append(borders[-1] + document.blocks)
    keys = []
    queries = []
    for layer in range(len(documents[0].keys)):
        joined = torch.cat([document.keys[layer] for document in documents], dim=1)
        joined = joined.to(torch.promote_types(joined.dtype, torch.float32))
        keys.append(torch.nn.functional.normalize(joined - joined.mean(1, keepdim=True), dim=-1))
        means = torch.stack([document.query[layer] * document.blocks for document in documents])
        queries.append(means.sum(0) / borders[-1])
    return RankingIndex(tuple(keys), tuple(queries), tuple(borders))


def search(index: RankingIndex, query: TextLandmarks) -> list[DocumentScore]:
    """Returns what a query finds in each document, in the documents' order."""
    best = torch.full((index.borders[-1],), -math.inf, dtype=torch.float64)
    for keys, common, mean in zip(index.keys, index.query, query.query, strict=True):
        scores = (mean - common).to(keys.dtype) @ keys.transpose(-1, -2)
        best = torch.maximum(best, scores.amax((0, 1)).to(best))
    found = []
    for document, (first, end) in enumerate(itertools.pairwise(index.borders)):
        block = int(best[first:end].argmax())
        found.append(DocumentScore(document, score=float(best[first + block]), block=block))
    return found


def best_first(found: Sequence[DocumentScore]) -> list[DocumentScore]:
    """Returns the best first, equal ones by index."""
    return sorted(found, key=lambda each: -each.score)


@dataclass(frozen=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        title: what names it.
        score: see ``DocumentScore``.
        passage: text of the block with the highest score.
    """

    title: str
    score: float
    passage: str


def rank_files(
    loaded: LoadedModel, query: str, files: Sequence[Path], progress: Progress | None = None
) -> list[RankedDocument]:
    """Ranks texts for a query, best first.

    Args:
        loaded: a landmark model.
        query: any text.
        files: text files, or ``.jsonl`` files with a document in each row.
        progress: called while they are tokenised and read.

    Raises:
        ValueError: no landmark model, no files, an empty query, or a file without text.
        FileNotFoundError: no such file.
    """
    require_landmark(loaded)
    if not query.strip():
        raise ValueError(
            "query: expected a text of at least one token, got an empty one; write what to look for"
        )
    wanted = tokenize(query, loaded.tokenizer)
    if len(wanted) == 0:
        raise ValueError(
            "query: expected a text of at least one token, got one of none; write what to look for"
        )
    titles = []
    ids = []
    for document in itertools.chain.from_iterable(map(file_documents, files)):
        tokens = tokenize(document.text, loaded.tokenizer, progress=progress)
        if len(tokens) == 0:
            warnings.warn(
                f"{document.title}: not ranked, as the tokenizer finds no token in it", stacklevel=2
            )
            continue
        titles.append(document.title)
        ids.append(tokens)
    if not ids:
        names = ", ".join(map(str, files[:3])) or "none"
        raise ValueError(
            f"files: expected at least one text with a token, got {names}; name other files"
        )
    index = build_index(
        [read_document(loaded, each, progress) for each in counted("documents read", ids, progress)]
    )
    found = search(index, read_text(loaded, wanted))
    return [
        RankedDocument(
            title=titles[best.document],
            score=best.score,
            passage=_text(loaded, ids[best.document], best.block),
        )
        for best in best_first(found)
    ]


def _text(loaded: LoadedModel, ids: Tensor, block: int) -> str:
    """Returns the text of a block of a document ``(T,)``, in one line."""
    size = loaded.model.landmark.text_per_block
    before = len(_start(loaded))
    first = block * size - before
    return " ".join(loaded.tokenizer.decode(ids[max(0, first) : first + size].tolist()).split())
