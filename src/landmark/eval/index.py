"""Recall and time of indexes over the landmarks of one layer, beside scoring all.

Landmarks and queries are recorded while a model reads text. Where more landmarks are asked for than
were recorded, the rest are copies of these with noise, and the time alone is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.eval.results import IndexRow
from landmark.hf.cache import LandmarkCache
from landmark.hf.old_queries import old_queries
from landmark.memory.faiss_index import KINDS, VectorIndex, require_faiss
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.memory.retrieval import COPIES, SLAB_BYTES
from landmark.ops.select import running_top_k
from landmark.texts.loading import LoadedModel, require_landmark
from landmark.texts.reading import read_into_memory, tokenize

NOISE = 0.1  # of copied landmarks, in standard deviations of the recorded ones
ARRIVING = 1024  # landmarks that are added at once
SECONDS = 2.0  # of trials whose median is a time
LEAST = 5  # trials at least


@dataclass(frozen=True)
class IndexTask:
    """Settings of a measurement of indexes.

    Attributes:
        landmarks: numbers of landmarks of each head.
        kinds: indexes beside ``exact``.
        layer: which layer, ``None`` for the middle one.
        queries: positions of text whose queries search.
        max_tokens: text that is read at most, ``None`` for all that is needed and there is.
        seed: of the noise.

    Raises:
        ValueError: a value outside its range.
        ModuleNotFoundError: faiss is missing.
    """

    landmarks: tuple[int, ...] = (10_000,)
    kinds: tuple[str, ...] = KINDS
    layer: int | None = None
    queries: int = 256
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {
            "landmarks": self.landmarks,
            "queries": (self.queries,),
            "max_tokens": (1 if self.max_tokens is None else self.max_tokens,),
        }
        for name, values in numbers.items():
            if not values or min(values) < 1:
                raise ValueError(
                    f"{name}: expected integers of at least 1, got {list(values)}; pass for "
                    "example 256"
                )
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {list(self.kinds)}")
        if set(self.kinds) != {"exact"}:
            require_faiss()


@dataclass(frozen=True)
class Recorded:
    """What one layer computed while text was read, float32, on the CPU.

    Attributes:
        keys: ``(G, N, D)`` landmark keys.
        query: ``(G, R, Q, D)`` queries of the text behind them, scaled, rotated to where old
            landmarks are scored.
    """

    keys: Tensor
    query: Tensor


class LayerRecorder:
    """An observer of a ``LandmarkCache`` that keeps landmarks and the latest queries of one layer.

    Args:
        layer: the layer's index.
        queries: positions of text whose queries are kept at most.

    Attributes:
        keys: of each call, ``(G, n, D)`` float32 on the CPU: the landmark keys of the ``n`` blocks
            that it finished.
        query: ``(H, Q, D)`` float32 on the CPU, see ``old_queries``; ``None`` before the first
            call.
    """

    def __init__(self, layer: int, queries: int) -> None:
        self.layer = layer
        self.queries = queries
        self.keys: list[Tensor] = []
        self.query: Tensor | None = None

    def __call__(
        self, memory: LayerMemory, query: Tensor, geometry: CallGeometry, scale: float
    ) -> None:
        """Takes what one call of one layer has computed, its queries ``(1, H, T, D)``."""
        if memory.layer != self.layer:
            return
        latest = query[:, :, -self.queries :]
        offsets = geometry.offsets[:, -self.queries :]
        found = old_queries(memory, latest, offsets, scale)[0].float().cpu()
        if self.query is not None:
            found = torch.cat((self.query, found), dim=1)
        self.query = found[:, -self.queries :]
        # A layer that does not retrieve drops its older blocks, so these are taken as they come.
        index = memory.store.kept.index_of(geometry.writes.landmark_blocks)
        self.keys.append(memory.store.landmark_keys[0][:, index].float().cpu())


@torch.no_grad()
def record(
    loaded: LoadedModel, ids: Tensor, layer: int, queries: int, progress: Progress | None = None
) -> Recorded:
    """Reads a text without retrieval and records landmarks that are old for the queries of its end.

    Args:
        loaded: a landmark model.
        ids: ``(T,)`` token ids.
        layer: which layer is recorded.
        queries: positions of text whose queries are kept.
        progress: called while it is read.

    Raises:
        ValueError: no landmark model, or a text too short for one landmark.
    """
    config = loaded.model.landmark
    recorder = LayerRecorder(layer, queries)
    with loaded.configured(
        mode="retrieval", positions="stingy", local="blocks", layers=(), max_blocks=None
    ):
        cache = LandmarkCache(loaded.model.config)
        cache.observer = recorder
        read_into_memory(
            loaded, ids[None].to(loaded.device), retrieve=False, cache=cache, progress=progress
        )
    assert recorder.query is not None
    keys = torch.cat(recorder.keys, dim=1)
    old = keys.shape[1] - config.local_blocks - config.top_k - -(-queries // config.block_size)
    if old < 1:
        raise ValueError(
            f"texts: expected a text longer than the {queries} queries and what is local to "
            f"them, got {len(ids)} tokens; pass a longer text or fewer queries"
        )
    return Recorded(keys[:, :old], torch.unflatten(recorder.query, 0, (len(keys), -1)))


def run(
    loaded: LoadedModel,
    task: IndexTask,
    texts: Iterable[str],
    data: str,
    report: Callable[[IndexRow], None],
    progress: Progress | None = None,
) -> list[IndexRow]:
    """Measures every kind of index at every number of landmarks.

    Args:
        loaded: a landmark model.
        task: what is measured.
        texts: what is read, one after the other; no more of them than is needed.
        data: their name, for the rows.
        report: called with each row as soon as it is there.
        progress: called while texts are tokenised and read, and before each index.

    Raises:
        ValueError: no landmark model, a layer that it has not or whose landmarks are all equal, or
            too short a text.
    """
    require_landmark(loaded)
    layer = _layer(loaded, task.layer)
    config = loaded.model.landmark
    blocks = (
        max(task.landmarks)
        + config.local_blocks
        + config.top_k
        + -(-task.queries // config.block_size)
    )
    needed = blocks * config.text_per_block
    most = needed if task.max_tokens is None else min(needed, task.max_tokens)
    ids = _tokens(texts, loaded.tokenizer, most, progress)
    if len(ids) == 0:
        raise ValueError(
            f"texts: expected a text of at least one token, got none in {data}; pass another text"
        )
    recorded = record(loaded, ids, layer, task.queries, progress)
    rows = []
    for landmarks in sorted(task.landmarks):
        real = min(landmarks, recorded.keys.shape[1])
        found = recorded if real == landmarks else with_copies(recorded, landmarks, task.seed)
        right = (
            None
            if real < landmarks
            else exact(found.query, found.keys[:, :landmarks], config.top_k)
        )
        for kind in task.kinds:
            if progress is not None:
                progress(f"measuring {kind} with {landmarks:,} landmarks", 0, 0)
            measured = _measure(
                kind, Recorded(found.keys[:, :landmarks], found.query), config.top_k, right
            )
            rows.append(
                IndexRow(
                    index=kind,
                    model=loaded.name,
                    layer=layer,
                    heads=len(found.keys),
                    landmarks=landmarks,
                    recorded=real,
                    noise=0.0 if real == landmarks else NOISE,
                    top_k=config.top_k,
                    queries=found.query.shape[2],
                    threads=torch.get_num_threads(),
                    seed=task.seed,
                    dtype=loaded.dtype,
                    data=data,
                    **measured,
                )
            )
            report(rows[-1])
    return rows


def _tokens(texts: Iterable[str], tokenizer: Any, most: int, progress: Progress | None) -> Tensor:
    parts = [torch.empty(0, dtype=torch.long)]
    count = 0
    for text in texts:
        parts.append(tokenize(text, tokenizer, continues=count > 0, progress=progress))
        count += len(parts[-1])
        if count >= most:
            break
    return torch.cat(parts)[:most]


def _layer(loaded: LoadedModel, layer: int | None) -> int:
    """Returns the layer that is asked for, or the middle one; raises ``ValueError``."""
    layers = loaded.model.config.num_hidden_layers
    if layer is not None and not 1 <= layer < layers:
        raise ValueError(
            f"layer: expected 1 to {layers - 1}, got {layer}; the landmarks of layer 0 are all "
            "equal, no index serves it"
        )
    return layers // 2 if layer is None else layer


def with_copies(recorded: Recorded, landmarks: int, seed: int) -> Recorded:
    """Returns one head with noisy copies of its landmarks, up to so many in all.

    The noise in each column is proportional to the deviation of the column.
    """
    keys = recorded.keys[0]
    copies = keys[torch.arange(landmarks) % len(keys)]
    spread = NOISE * keys.std(0, unbiased=False)
    random = torch.Generator().manual_seed(seed)
    for begin in range(len(keys), landmarks, 2**16):
        part = copies[begin : begin + 2**16]
        part += spread * torch.randn(part.shape, generator=random)
    return Recorded(copies[None], recorded.query[:1])


def exact(query: Tensor, keys: Tensor, top_k: int) -> Tensor:
    """Returns the best landmarks of each query as a memory finds them.

    Args:
        query: ``(G, R, Q, D)``.
        keys: ``(G, N, D)``.
        top_k: landmarks of each query, ``K``.

    Returns:
        ``(G, R, Q, K)`` indices of keys.
    """
    flat = query.flatten(1, 2)
    at_once = max(1, SLAB_BYTES["cpu"] // (COPIES * 4 * flat.shape[0] * flat.shape[1]))
    found = running_top_k(
        lambda i, j: flat @ keys[:, i:j].transpose(-1, -2), keys.shape[1], top_k, at_once
    )
    return found.indices.view(*query.shape[:3], -1)


def _measure(kind: str, recorded: Recorded, top_k: int, right: Tensor | None) -> dict[str, Any]:
    """Returns the fields of an ``IndexRow`` that are measured."""
    query = recorded.query
    keys = recorded.keys
    exactly = kind == "exact"
    begin = time.perf_counter()
    indexes = [] if exactly else [_build(kind, head) for head in keys]
    built = time.perf_counter() - begin

    def search(part: Tensor) -> Tensor:
        if exactly:
            return exact(part, keys, top_k)
        found = [
            index.search(each.flatten(0, 1), top_k)[1]
            for index, each in zip(indexes, part, strict=True)
        ]
        return torch.stack(found).view(*part.shape[:3], -1)

    recall = None if right is None else _recall(search(query), right)
    return {
        "recall": recall,
        "step_ms": _milliseconds(search, torch.split(query, 1, dim=2)),
        "chunk_ms": _milliseconds(search, [query]),
        "build_seconds": round(built, 3),
        "nbytes": keys.nbytes if exactly else sum(index.nbytes for index in indexes),
        "settings": {} if exactly else indexes[0].settings,
    }


def _build(kind: str, keys: Tensor) -> VectorIndex:
    index = VectorIndex(kind, keys.shape[1])
    for part in torch.split(keys, ARRIVING):
        index.add(part)
    return index


def _recall(found: Tensor, right: Tensor) -> float:
    """Returns the share of ``right (..., K)`` that is among ``found (..., K)``."""
    return float((right[..., :, None] == found[..., None, :]).any(-1).float().mean())


def _milliseconds(search: Callable[[Tensor], Tensor], queries: Sequence[Tensor]) -> float:
    """Returns the median time of a search, going through ``queries`` again and again."""
    search(queries[0])
    times: list[float] = []
    while len(times) < LEAST or sum(times) < SECONDS:
        begin = time.perf_counter()
        search(queries[len(times) % len(queries)])
        times.append(time.perf_counter() - begin)
    return round(1000 * sorted(times)[len(times) // 2], 4)
