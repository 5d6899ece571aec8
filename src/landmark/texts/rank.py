"""Order documents by their highest landmark scores for a query.

Of a document nothing is kept but its landmark keys, one vector for each block, layer and key/value
head, and the mean of its queries. A query text is read by itself; the mean of its positions is
scored against the landmarks of all documents as if these were old blocks before it. What is common
to all positions and to all landmarks is taken out first, and landmarks are scaled to length 1:
otherwise a few of them (of contents, of tables) lead for every query.

Where the tokenizer has a chat template, a document is the beginning of what a user says and the
query the question that ends it. The mean is then that of the tokens at which training by contrast
scores landmarks: the last of the question and the header of the answer's turn.
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

from landmark.blocks import slot_of
from landmark.data.chat import closing, opening
from landmark.data.encoding import Progress
from landmark.data.tokenizer import row_start
from landmark.hf.cache import LandmarkCache
from landmark.hf.gate_loss import CONTRAST_TOKENS
from landmark.hf.old_queries import old_queries
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.texts.explain import uses_template
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
        query: ``(G, R, D)`` float32 mean of its queries that count, scaled and rotated as retrieval
            scores old landmarks with them.
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


class QuerySums:
    """An observer of a ``LandmarkCache`` that sums up the queries of each layer.

    Args:
        slots: ``(n,)`` slots whose queries count; ``None`` for all.

    Attributes:
        totals: by layer, ``(H, D)``: the sum over these slots, see ``old_queries``.
    """

    def __init__(self, slots: Tensor | None = None) -> None:
        self.slots = slots
        self.totals: dict[int, Tensor] = {}

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        """Adds the queries ``(1, H, T, D)`` of one call of one layer."""
        queries = old_queries(memory, query, geometry.offsets, scale)[0]
        if self.slots is not None:
            queries = queries[:, torch.isin(geometry.slots[0], self.slots)]
        summed = queries.sum(1)
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
def read_text(
    loaded: LoadedModel,
    ids: Tensor,
    progress: Progress | None = None,
    *,
    last: int | None = None,
) -> TextLandmarks:
    """Reads a text without retrieval and keeps what ranking needs.

    Args:
        loaded: a landmark model.
        ids: ``(T,)`` token ids.
        progress: called while it is read.
        last: only the queries of so many tokens count, the last ones; ``None`` for those of all
            slots.

    Raises:
        ValueError: no landmark model, no tokens, or a model of which no layer can tell documents
            apart.
    """
    require_landmark(loaded)
    wanted = None
    if last is not None:
        final = torch.arange(len(ids), device=loaded.device)[-last:]
        wanted = slot_of(final, loaded.model.landmark.block_size)
    queries = QuerySums(wanted)
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
    count = slots if wanted is None else len(wanted)
    keys = [memory.store.landmark_keys[0][:, :landmarks].clone() for memory in memories]
    means = [queries.totals[memory.layer] / count for memory in memories]
    grouped = [
        torch.unflatten(mean, 0, (len(key), -1)) for mean, key in zip(means, keys, strict=True)
    ]
    return TextLandmarks(tuple(keys), tuple(grouped))


def read_document(
    loaded: LoadedModel, ids: Tensor, progress: Progress | None = None, *, chat: bool = False
) -> TextLandmarks:
    """Reads a document behind what stands before every document.

    This is what the tokenizer puts before every text, in a conversation what opens a user's
    message. The last block is filled up with the document's beginning, so that a landmark closes
    it. Warns where the landmark was never trained.

    Args:
        loaded: a landmark model.
        ids: ``(T,)`` token ids, as ``tokenize_document`` returns them.
        progress: called while it is read.
        chat: whether it is the beginning of what a user says. Blocks without a token of it are then
            left out, as they are the same in all documents.

    Raises:
        ValueError: no tokens, a chat template that fails, or as ``read_text``.
    """
    require_landmark(loaded)
    if not loaded.model.landmark.landmark_trained:
        warnings.warn(
            "this model's landmark was never trained: fine-tune it first (landmark train)",
            stacklevel=2,
        )
    begin = _begin(loaded, chat=chat)
    whole = torch.cat((begin, ids))
    again = ids if chat else whole
    if len(again) == 0:
        raise ValueError("document: expected at least one token, got none; leave it out")
    per_block = loaded.model.landmark.text_per_block
    filled = again[torch.arange(-len(whole) % per_block) % len(again)]
    found = read_text(loaded, torch.cat((whole, filled)), progress)
    if not chat:
        return found
    first = len(begin) // per_block
    return replace(found, keys=tuple(key[:, first:] for key in found.keys))


def read_question(loaded: LoadedModel, question: str) -> TextLandmarks:
    """Reads a query as the question that ends what a user says, up to where the answer begins.

    The documents before it are left out, so that all are compared with the same query. The tokens
    that count are those of it at which training by contrast scores landmarks: the one that predicts
    the answer and the ``CONTRAST_TOKENS`` before it.

    Args:
        loaded: a landmark model whose tokenizer has a chat template.
        question: any text.

    Raises:
        ValueError: the template fails, or as ``read_text``.
    """
    said = closing(loaded.tokenizer, question.strip())
    ids = tokenize(said, loaded.tokenizer, continues=True)
    begin = _begin(loaded, chat=True)
    return read_text(loaded, torch.cat((begin, ids)), last=CONTRAST_TOKENS + 1)


def tokenize_document(
    loaded: LoadedModel, text: str, progress: Progress | None = None, *, chat: bool
) -> Tensor:
    """Returns the token ids ``(T,)`` of a document.

    Args:
        loaded: a model.
        text: of any length.
        progress: called while a long text is tokenised.
        chat: whether it is the beginning of what a user says.

    Raises:
        ValueError: a slow tokenizer, or a chat template that fails.
    """
    continues = chat and len(_begin(loaded, chat=True)) > 0
    return tokenize(text, loaded.tokenizer, continues=continues, progress=progress)


def _begin(loaded: LoadedModel, *, chat: bool) -> Tensor:
    """Returns the ids ``(n,)`` that stand before a document."""
    if chat:
        return tokenize(opening(loaded.tokenizer), loaded.tokenizer)
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
    loaded: LoadedModel,
    query: str,
    files: Sequence[Path],
    progress: Progress | None = None,
    *,
    chat: bool | None = None,
) -> list[RankedDocument]:
    """Ranks texts for a query, best first.

    Where the tokenizer has a chat template, each text is the beginning of what a user says, and the
    query the question that ends it.

    Args:
        loaded: a landmark model.
        query: any text.
        files: text files, or ``.jsonl`` files with a document in each row.
        progress: called while they are tokenised and read.
        chat: whether to use the chat template; ``None`` for yes where there is one.

    Raises:
        ValueError: no landmark model, no files, an empty query, a file without text, or a chat
            template that is missing or fails.
        FileNotFoundError: no such file.
    """
    require_landmark(loaded)
    in_chat = uses_template(loaded.tokenizer, chat)
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
        tokens = tokenize_document(loaded, document.text, progress, chat=in_chat)
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
        [
            read_document(loaded, each, progress, chat=in_chat)
            for each in counted("documents read", ids, progress)
        ]
    )
    found = search(index, read_question(loaded, query) if in_chat else read_text(loaded, wanted))
    return [
        RankedDocument(
            title=titles[best.document],
            score=best.score,
            passage=_text(loaded, ids[best.document], best.block, chat=in_chat),
        )
        for best in best_first(found)
    ]


def _text(loaded: LoadedModel, ids: Tensor, block: int, *, chat: bool = False) -> str:
    """Returns the text of a block of a document ``(T,)``, in one line."""
    size = loaded.model.landmark.text_per_block
    before = len(_begin(loaded, chat=chat))
    if chat:
        before %= size  # blocks are counted from the first with a token of the document
    first = block * size - before
    return " ".join(loaded.tokenizer.decode(ids[max(0, first) : first + size].tolist()).split())
