"""Documents ordered by their highest landmark scores: which of them would a query retrieve from?

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.data.characters import from_arguments
from landmark.data.encoding import Progress
from landmark.data.text import Document, read_documents
from landmark.data.tokenizer import row_start
from landmark.eval.fillers import tokenize
from landmark.eval.passkey import read_into_memory
from landmark.eval.reading import counted
from landmark.eval.subjects import Subject, require_landmark
from landmark.hf.cache import LandmarkCache
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.memory.rotary_tables import RotaryTables

# Documents have no order: all their landmarks stand where old ones do, and none may be evicted.
SETTINGS: dict[str, Any] = {
    "mode": "retrieval",
    "positions": "stingy",
    "local": "blocks",
    "max_blocks": None,
}


@dataclass(frozen=True)
class TextRead:
    """What is kept of a text, for each layer whose landmarks differ and that retrieves.

    Attributes:
        keys: ``(G, N, D)`` landmark keys of its ``N`` finished blocks.
        query: ``(G, R, D)`` float32 mean of its queries, scaled, turned to where old landmarks are
            scored.
    """

    keys: tuple[Tensor, ...]
    query: tuple[Tensor, ...]

    @property
    def blocks(self) -> int:
        """Its finished blocks."""
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Library:
    """Documents that can be ranked.

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
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.query))


@dataclass(frozen=True)
class Found:
    """What a query found in one document.

    Attributes:
        document: its index.
        score: the highest of its landmarks' scores.
        block: the block whose landmark that is, counted from the document's first.
    """

    document: int
    score: float
    block: int


def old_queries(memory: LayerMemory, query: Tensor, plan: CallGeometry, scale: float) -> Tensor:
    """Queries as they score old landmarks under ``stingy``, once there are local blocks enough.

    Args:
        memory: of their layer.
        query: ``(B, H, T, D)``, not rotated.
        plan: the geometry of the call.
        scale: the softmax scale.

    Returns:
        ``(B, H, T, D)``, at least float32.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    distance = torch.tensor(
        memory.config.top_k + 1 + memory.config.local_blocks, device=query.device
    )
    turned = (
        memory.tables.by_offset(plan.offsets, query.dtype)[:, None].rotate(query).to(precise)
        * scale
    )
    return memory.tables.by_distance(distance, precise, int(distance)).rotate(turned)


class _QueryMemory(LayerMemory):
    """A layer's memory that sums up the queries as its retrieval scores old landmarks with them."""

    total: Tensor | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, geometry: Any, *, scale: float, **rest: Any
    ) -> Any:
        """Attends as ``LayerMemory.attend`` does."""
        turned = old_queries(self, query, geometry, scale)
        summed = torch.unflatten(turned[0].sum(1), 0, (key.shape[1], -1))
        self.total = summed if self.total is None else self.total + summed
        return super().attend(query, key, value, geometry, scale=scale, **rest)


class _QueryCache(LandmarkCache):
    def memory(self, layer: int, tables: RotaryTables) -> LayerMemory:
        """Returns layer ``layer``'s memory, made at its first use."""
        if self.memories[layer] is None:
            self.memories[layer] = _QueryMemory(self.settings, tables, layer)
        return super().memory(layer, tables)

    def deciding(self) -> list[_QueryMemory]:
        """Returns the memories of layers that retrieve and whose landmarks differ."""
        made = [memory for memory in self.memories if isinstance(memory, _QueryMemory)]
        return [memory for memory in made if memory.retrieves and not memory.store.shared_landmark]


@torch.no_grad()
def read_text(subject: Subject, ids: Tensor, progress: Progress | None = None) -> TextRead:
    """Reads a text without retrieval and keeps what ranking needs.

    Args:
        subject: a landmark model.
        ids: ``(T,)`` token ids.
        progress: called while it is read.

    Raises:
        ValueError: no landmark model, no tokens, or a model of which no layer can tell documents
            apart.
    """
    require_landmark(subject)
    with subject.configured(**SETTINGS):
        cache = _QueryCache(subject.model.config)
        read_into_memory(
            subject, ids[None].to(subject.device), retrieve=False, cache=cache, progress=progress
        )
    (slots,) = cache.slots
    (tokens,) = cache.tokens
    memories = cache.deciding()
    if not memories:
        raise ValueError(
            "--model: expected a model that retrieves in some layer but the first, whose "
            f"landmarks are all equal, got {subject.name}, which retrieves in none; pass another, "
            "or configure its layers"
        )
    keys = tuple(memory.store.landmark_keys[0][:, : slots - tokens].clone() for memory in memories)
    return TextRead(
        keys, tuple(memory.total / slots for memory in memories if memory.total is not None)
    )


def read_document(subject: Subject, ids: Tensor, progress: Progress | None = None) -> TextRead:
    """Reads a document ``(T,)`` behind what the tokenizer puts before every text.

    Its last block is filled up with its beginning, so that a landmark closes it. Warns where the
    landmark was never trained.

    Raises:
        ValueError: as ``read_text``.
    """
    require_landmark(subject)
    if not subject.model.landmark.landmark_trained:
        warnings.warn(
            "this model's landmark was never trained: fine-tune it first (landmark train)",
            stacklevel=2,
        )
    ids = torch.cat((_start(subject), ids))
    per_block = subject.model.landmark.text_per_block
    whole = math.ceil(len(ids) / per_block) * per_block
    return read_text(subject, ids[torch.arange(whole) % max(1, len(ids))], progress)


def _start(subject: Subject) -> Tensor:
    return torch.tensor(row_start(subject.tokenizer), dtype=torch.long)


def build_library(documents: Sequence[TextRead]) -> Library:
    """Puts documents side by side, at least one, in this order."""
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
    return Library(tuple(keys), tuple(queries), tuple(borders))


def search(library: Library, query: TextRead) -> list[Found]:
    """Returns what a query finds in each document, in the documents' order."""
    best = torch.full((library.borders[-1],), -math.inf, dtype=torch.float64)
    for keys, common, mean in zip(library.keys, library.query, query.query, strict=True):
        scores = (mean - common).to(keys.dtype) @ keys.transpose(-1, -2)
        best = torch.maximum(best, scores.amax((0, 1)).to(best))
    found = []
    for index, (first, end) in enumerate(itertools.pairwise(library.borders)):
        block = int(best[first:end].argmax())
        found.append(Found(index, float(best[first + block]), block))
    return found


def ordered(found: Sequence[Found]) -> list[Found]:
    """Returns the best first, equal ones by index."""
    return sorted(found, key=lambda each: -each.score)


@dataclass(frozen=True)
class Line:
    """One line of a ranking.

    Attributes:
        title: the document's.
        score: see ``Found``.
        passage: text of the block with the highest score.
    """

    title: str
    score: float
    passage: str


def rank_files(
    subject: Subject, query: str, files: Sequence[Path], progress: Progress | None = None
) -> list[Line]:
    """Ranks texts for a query, best first.

    Args:
        subject: a landmark model.
        query: any text.
        files: text files, or ``.jsonl`` files with a document in each row.
        progress: called while they are tokenised and read.

    Raises:
        ValueError: no landmark model, no files, an empty query, or a file without text.
        FileNotFoundError: no such file.
    """
    require_landmark(subject)
    if not query.strip():
        raise ValueError(
            "QUERY: expected a text of at least one token, got an empty one; write what to look for"
        )
    wanted = tokenize(query, subject.tokenizer)
    if len(wanted) == 0:
        raise ValueError(
            "QUERY: expected a text of at least one token, got one of none; write what to look for"
        )
    titles = []
    ids = []
    for document in (document for file in files for document in _documents(file)):
        found = tokenize(document.text, subject.tokenizer, progress=progress)
        if len(found):
            titles.append(document.title)
            ids.append(found)
        else:
            warnings.warn(
                f"{document.title}: not ranked, as the tokenizer finds no token in it", stacklevel=2
            )
    if not ids:
        names = ", ".join(map(str, files[:3])) or "none"
        raise ValueError(
            f"FILES: expected at least one text with a token, got {names}; name other files"
        )
    library = build_library(
        [
            read_document(subject, each, progress)
            for each in counted("documents read", ids, progress)
        ]
    )
    return [
        Line(titles[best.document], best.score, _text(subject, ids[best.document], best.block))
        for best in ordered(search(library, read_text(subject, wanted)))
    ]


def _text(subject: Subject, ids: Tensor, block: int) -> str:
    """Text of a block of a document ``(T,)``, in one line."""
    size = subject.model.landmark.text_per_block
    before = len(_start(subject))
    first = block * size - before
    return " ".join(subject.tokenizer.decode(ids[max(0, first) : first + size].tolist()).split())


def _documents(file: Path) -> list[Document]:
    if file.is_dir() or not file.exists():
        what = "a folder" if file.is_dir() else "which does not exist"
        raise FileNotFoundError(
            f"FILES: expected text files, got {file}, {what}; name the files, {file}/*.txt"
        )
    found = read_documents(file)
    return [
        replace(document, title=from_arguments(str(file.parent / document.title)))
        for document in found
    ]
