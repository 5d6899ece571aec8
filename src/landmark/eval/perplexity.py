"""Perplexity over segments of several evaluation lengths, in the columns of the paper's Table 1.

The same spans of text are measured at every evaluation length: spans of the greatest length are
chosen once and cut into segments. Each segment is read on its own; its first token is context only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.data.encoding import Progress
from landmark.data.text import Document
from landmark.eval.measure import measured
from landmark.eval.results import PerplexityRow
from landmark.eval.variants import Variant
from landmark.eval.window import SINK
from landmark.texts.reading import tokenize

SCHEMES = ("paper", "blocks")
_BATCH_TOKENS = {"cuda": 1 << 16}


@dataclass(frozen=True)
class PerplexityTask:
    """Settings of a measurement of perplexity.

    Attributes:
        lengths: evaluation lengths, text tokens of a segment.
        scheme: ``paper`` (chunks of ``local`` tokens are local, all before is memory) or
            ``blocks``.
        local: text tokens of a chunk, each tried (scheme ``paper``).
        local_blocks: finished blocks before a query's own that it sees, each tried (scheme
            ``blocks``).
        blocks: memory blocks kept, ``None`` for all.
        top_k: retrieved blocks, each tried. 0 is local context and block 0 alone, with local blocks
            added until a query attends to as much as with the other values.
        granularity: of the retrieval, ``None`` for the model's own.
        max_tokens: how much text is measured.
        seed: of the choice of spans.

    Raises:
        ValueError: a value outside its range.
    """

    lengths: tuple[int, ...]
    scheme: str = "paper"
    local: tuple[int, ...] = (250,)
    local_blocks: tuple[int, ...] = (2,)
    blocks: int | None = None
    top_k: tuple[int, ...] = (4,)
    granularity: str | None = None
    max_tokens: int = 1 << 18
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("lengths", self.lengths, 2),
            ("local", self.local, 1),
            ("local_blocks", self.local_blocks, 0),
            ("top_k", self.top_k, 0),
        )
        for name, values, least in checks:
            if not values or any(value < least for value in values):
                raise ValueError(
                    f"{name}: expected integers of at least {least}, got {list(values)}; pass "
                    f"{max(least, 1)}"
                )
        greatest = max(self.lengths)
        odd = [length for length in self.lengths if greatest % length]
        if odd:
            raise ValueError(
                f"lengths: expected lengths that divide the greatest, {greatest}, so that all "
                f"rows measure the same text, got {odd}; pass for example "
                f"{greatest // 4},{greatest}"
            )
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(
                f"blocks: expected at least 1 block, got {self.blocks}; leave it out to keep all"
            )
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.max_tokens < max(self.lengths):
            raise ValueError(
                f"max_tokens: expected at least the greatest length {max(self.lengths)}, "
                f"got {self.max_tokens}; raise it"
            )


@dataclass(frozen=True)
class _Setup:
    """The attention of one row.

    Attributes:
        scheme: see ``PerplexityRow``.
        local: see ``PerplexityRow``.
        blocks: see ``PerplexityRow``.
        top_k: see ``PerplexityRow``.
        attention_size: the most text tokens that one query attends to in a text of any length.
        changes: settings of a landmark model that make it.
    """

    scheme: str
    local: int
    blocks: int | None
    top_k: int | None
    attention_size: int
    changes: dict[str, Any]


def run(
    variants: Sequence[Variant],
    task: PerplexityTask,
    documents: Sequence[Document],
    data: str,
    report: Callable[[PerplexityRow], None],
    progress: Progress | None = None,
) -> list[PerplexityRow]:
    """Measures every model at every length with every setup that is asked for.

    Args:
        variants: the models, of one vocabulary: perplexities of different tokens are not
            comparable.
        task: what is measured.
        documents: texts.
        data: their name, for the rows.
        report: called with each row as soon as it is there.
        progress: called while texts are tokenised, and before each row.

    Raises:
        ValueError: models with different vocabularies, no document as long as the greatest
            evaluation length, or settings that a model refuses.
    """
    vocabulary = variants[0].tokenizer.get_vocab()
    other = [variant.name for variant in variants if variant.tokenizer.get_vocab() != vocabulary]
    if other:
        raise ValueError(
            f"compare: expected the vocabulary of {variants[0].name}, got another in "
            f"{other[0]}: perplexities of different tokens are not comparable; measure each model "
            "in a run of its own"
        )
    rows = []
    for variant in variants:
        spans = choose_spans(
            documents, variant.tokenizer, max(task.lengths), task.max_tokens, task.seed, progress
        )
        for length in task.lengths:
            for setup in _setups(variant, task, length):
                if progress is not None:
                    progress(f"measuring {spans.numel():,} tokens in segments of {length:,}", 0, 0)
                with variant.configured(**setup.changes):
                    rows.append(
                        _row(variant, task, segments_of(spans, length), setup=setup, data=data)
                    )
                    report(rows[-1])
    return rows


def choose_spans(
    documents: Sequence[Document],
    tokenizer: Any,
    length: int,
    max_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> Tensor:
    """Chooses spans of ``length`` tokens that do not overlap, spread evenly over the documents.

    Returns:
        ``(max_tokens // length or fewer, length)`` int64.

    Raises:
        ValueError: every document is shorter.
    """
    rng = random.Random(seed)
    wanted = max_tokens // length
    order = rng.sample(range(len(documents)), len(documents))
    each = math.ceil(wanted / max(1, len(documents)))
    chosen: list[Tensor] = []
    spare: list[Tensor] = []
    for index in order:
        ids = tokenize(documents[index].text, tokenizer, progress=progress)
        spans = list(ids[: len(ids) // length * length].reshape(-1, length))
        rng.shuffle(spans)
        chosen += spans[:each]
        spare += spans[each : 4 * each]
        if len(chosen) >= wanted:
            break
    if not chosen:
        raise ValueError(
            f"lengths: expected documents of at least {length} tokens, got {len(documents)} "
            "shorter ones; pass smaller lengths or longer documents"
        )
    return torch.stack((chosen + spare)[:wanted])


def _setups(variant: Variant, task: PerplexityTask, length: int) -> Iterator[_Setup]:
    if not variant.is_landmark:
        size = min(length, SINK + variant.window) if variant.window else length
        yield _Setup(
            scheme="plain", local=size, blocks=None, top_k=None, attention_size=size, changes={}
        )
        return
    config: LandmarkConfig = variant.model.landmark
    retrieving = [top_k for top_k in task.top_k if top_k > 0]
    granularity = task.granularity or config.granularity
    without = set()
    for first in task.local if task.scheme == "paper" else task.local_blocks:
        for top_k in retrieving:
            setup = (
                _paper(config, first, top_k, task)
                if task.scheme == "paper"
                else _blocks(config, first, top_k, task)
            )
            yield replace(setup, changes={**setup.changes, "granularity": granularity})
            without.add(math.ceil(setup.attention_size / config.text_per_block) - 2)
        if not retrieving:
            local = math.ceil(first / config.text_per_block) if task.scheme == "paper" else first
            without.add(local)
    if 0 in task.top_k:
        for local_blocks in sorted(without):
            yield _without_retrieval(config, local_blocks)


def _paper(config: LandmarkConfig, local: int, top_k: int, task: PerplexityTask) -> _Setup:
    """Returns the setup of the paper, in which the whole chunk is local."""
    # A chunk may begin inside a block, which is then local as well.
    started = config.text_per_block - 1 if local % config.text_per_block else 0
    size = started + local + top_k * config.text_per_block
    changes = {
        "local": "chunk",
        "chunk_tokens": local,
        "max_blocks": task.blocks,
        "top_k": top_k,
        "positions": "stingy",
        "mode": "retrieval",
    }
    return _Setup(
        scheme="paper",
        local=local,
        blocks=task.blocks,
        top_k=top_k,
        attention_size=size,
        changes=changes,
    )


def _blocks(config: LandmarkConfig, local_blocks: int, top_k: int, task: PerplexityTask) -> _Setup:
    local = (local_blocks + 1) * config.text_per_block
    changes = {
        "local": "blocks",
        "local_blocks": local_blocks,
        "max_blocks": task.blocks,
        "top_k": top_k,
        "mode": "retrieval",
    }
    return _Setup(
        scheme="blocks",
        local=local,
        blocks=task.blocks,
        top_k=top_k,
        attention_size=local + top_k * config.text_per_block,
        changes=changes,
    )


def _without_retrieval(config: LandmarkConfig, local_blocks: int) -> _Setup:
    local = (local_blocks + 1) * config.text_per_block
    changes = {
        "local": "blocks",
        "local_blocks": local_blocks,
        "max_blocks": None,
        "top_k": 1,
        "layers": (),
        "mode": "retrieval",
    }
    return _Setup(
        scheme="blocks",
        local=local,
        blocks=None,
        top_k=0,
        attention_size=local + config.text_per_block,
        changes=changes,
    )


def segments_of(spans: Tensor, length: int) -> Tensor:
    """Cuts spans into segments ``(n, length)``, which do not overlap."""
    return spans[:, : spans.shape[1] // length * length].reshape(-1, length)


def _row(
    variant: Variant, task: PerplexityTask, segments: Tensor, *, setup: _Setup, data: str
) -> PerplexityRow:
    length = segments.shape[1]
    with measured(variant.device) as measure:
        loss = mean_loss(variant, segments)
    settings = variant.settings()
    return PerplexityRow(
        model=variant.name,
        attention=variant.attention,
        length=length,
        scheme=setup.scheme,
        local=setup.local,
        blocks=setup.blocks,
        top_k=setup.top_k,
        attention_size=min(setup.attention_size, length),
        granularity=settings.get("granularity") if setup.top_k else None,
        perplexity=math.exp(loss),
        loss=loss,
        tokens=segments.numel() - len(segments),
        segments=len(segments),
        settings=settings,
        beyond_trained=variant.beyond_trained(length),
        seed=task.seed,
        dtype=variant.dtype,
        seconds=round(measure.seconds, 3),
        peak_bytes=measure.peak_bytes,
        data=data,
    )


def mean_loss(variant: Variant, segments: Tensor) -> float:
    """Returns the mean loss in nats over the tokens of segments.

    Args:
        variant: the model.
        segments: ``(n, length)`` token ids; the first token of each is context only.
    """
    size = max(
        1, _BATCH_TOKENS.get(torch.device(variant.device).type, 1 << 12) // segments.shape[1]
    )
    total = 0.0
    for batch in torch.split(segments, size):
        ids = batch.to(variant.device)
        logits = variant.logits(ids)
        for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
            total += float(torch.nn.functional.cross_entropy(row.float(), targets, reduction="sum"))
    return total / (segments.numel() - len(segments))
