"""Text to token ids, and token ids into a memory, chunk by chunk with progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.data.tokenizer import encode
from landmark.hf.cache import LandmarkCache
from landmark.texts.loading import LoadedModel

READS = ("local", "retrieve")
LARGE_CHUNK = 1 << 14  # text tokens computed at once on a GPU

Item = TypeVar("Item")


def tokenize(
    text: str, tokenizer: Any, *, continues: bool = False, progress: Progress | None = None
) -> Tensor:
    """Returns the token ids ``(n,)`` of a text of any length.

    Args:
        text: of any length.
        tokenizer: of transformers, a fast one.
        continues: whether the text goes on from another one.
        progress: called while a long text is tokenised.

    Raises:
        ValueError: a slow tokenizer.
    """
    return torch.from_numpy(encode(tokenizer, text, continues=continues, progress=progress).ids)


def read_reporting(
    model: Any,
    ids: Tensor,
    *,
    retrieve: bool,
    cache: LandmarkCache | None = None,
    progress: Progress | None = None,
) -> LandmarkCache:
    """Reads ``ids (B, T)`` as ``model.read`` does, in the same chunks.

    Args:
        model: a landmark model.
        ids: token ids on its device.
        retrieve: as for ``model.read``.
        cache: a memory to go on from, a new one for ``None``.
        progress: called before the first chunk and after each.

    Raises:
        ValueError: as ``model.read``.
    """
    if progress is None:
        return model.read(ids, cache=cache, retrieve=retrieve)  # type: ignore[no-any-return]
    length = ids.shape[1]
    chunk = model.landmark.chunk_tokens
    progress("tokens read", 0, length)
    for begin in range(0, max(1, length), chunk):
        cache = model.read(ids[:, begin : begin + chunk], cache=cache, retrieve=retrieve)
        progress("tokens read", min(length, begin + chunk), length)
    assert cache is not None
    return cache


def read_into_memory(
    loaded: LoadedModel,
    documents: Tensor,
    *,
    retrieve: bool,
    cache: LandmarkCache | None = None,
    progress: Progress | None = None,
) -> LandmarkCache:
    """Reads documents as ``read_reporting`` does, on a GPU in larger chunks.

    The size of a chunk changes results by rounding only.

    Args:
        loaded: a landmark model.
        documents: ``(B, T)`` token ids on its device.
        retrieve: as for ``model.read``.
        cache: a memory to go on from, a new one for ``None``.
        progress: called before the first chunk and after each.

    Raises:
        ValueError: as ``model.read``.
    """
    changes = {}
    if documents.is_cuda and loaded.model.landmark.local == "blocks":
        changes["chunk_tokens"] = LARGE_CHUNK
    with loaded.configured(**changes):
        return read_reporting(
            loaded.model, documents, retrieve=retrieve, cache=cache, progress=progress
        )


def counted(what: str, items: Sequence[Item], progress: Progress | None) -> Iterator[Item]:
    """Yields items, and says before each how many are done."""
    for number, item in enumerate(items):
        if progress is not None:
            progress(what, number, len(items))
        yield item
