"""Times the tokens that whole models generate behind a long memory, by tier, beside their stock
twins.

    python benchmarks/generate.py --part large --out benchmarks/results/generate-large.json

Four parts, each a process and a file of its own: `small` and `large`, of a 1B shape and of an 8B
shape with random weights, which read random tokens without retrieval; `real`, the bundled model on
a book of the test split, which it reads and then generates by being told the book's own tokens;
`replayed`, the 8B shape, whose every choice is replaced by what the bundled model chose at the same
place in the book. The stock model's cache is filled with random keys, not read. A token's time is
the wall clock between two tokens that reach a streamer, the device waited for; the first ones are
left out. Bytes on the device are those that PyTorch counts as allocated, less those before the
memory was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch
from shapes import SHAPES, random_model
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

import landmark
from landmark import LandmarkCache
from landmark.blocks import slots_for
from landmark.data.text import read_documents
from landmark.memory.triton import decode
from landmark.memory.triton.decode import Scores
from landmark.texts.loading import load
from landmark.texts.reading import tokenize
from landmark.versions import made_with

HEADS = SHAPES["8B"]["num_attention_heads"]
GROUPS = SHAPES["8B"]["num_key_value_heads"]
VOCAB = 32000
BLOCK = 64
TOP_K = 16
CHUNK = 2016
CHUNK_OF_SCORES = decode.CHUNK.value
WARM_UP = 70
TIMED = 136
LEFT_OUT = 8  # tokens; they close two blocks each time
STOCK_WARM_UP = 10
STOCK_TIMED = 32
REAL_TOKENS = 128_000
PROMPT = 8
DEVICE = "cuda"


class Stamps:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Told of each token, and of the prompt."""
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class Told(LogitsProcessor):
    """Makes the next tokens of a text the only ones."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores that allow the next one alone."""
        wanted = self.ids[input_ids.shape[1]]
        return torch.full_like(scores, -torch.inf).index_fill_(1, wanted[None], 0.0)


def generate(
    model: Any, ids: Tensor, cache: Any, tokens: int, told: Tensor | None = None
) -> tuple[Tensor, list[float]]:
    """Returns ``ids`` with what came after them, and the milliseconds of each token but the first
    ones.
    """
    stamps = Stamps()
    how = {
        # Otherwise random tokens that equal the padding's count as padding: a memory refuses such
        # a mask, and stock attention that is given one copies its keys for every query head.
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if told is not None:
        how["logits_processor"] = LogitsProcessorList([Told(told)])
    found = model.generate(ids, past_key_values=cache, streamer=stamps, **how)
    times = [1e3 * (b - a) for a, b in zip(stamps.times[1:], stamps.times[2:], strict=False)]
    return found, times[LEFT_OUT:]


def speed(times: list[float]) -> dict[str, Any]:
    """Returns what is told of tokens that took so many milliseconds."""
    return {
        "ms": statistics.median(times),
        "tokens_per_second": 1e3 / statistics.mean(times),
        "slowest_ms": max(times),
        "timed": len(times),
    }


def timed(
    model: Any, ids: Tensor, cache: LandmarkCache, told: Tensor | None = None
) -> dict[str, Any]:
    """Returns what a token takes, and what is fetched for it, after some that warm up."""
    ids, _ = generate(model, ids, cache, WARM_UP, told)
    before = dataclasses.astuple(cache.transfers)
    _, times = generate(model, ids, cache, TIMED, told)
    hits, misses, host, disk, *_ = (
        b - a for a, b in zip(before, dataclasses.astuple(cache.transfers), strict=True)
    )
    moved = {
        "hit_rate": hits / max(1, hits + misses),
        "host_bytes": host / TIMED,
        "disk_bytes": disk / TIMED,
    }
    return speed(times) | moved


def stock_model(shape: str) -> Any:
    """Returns a stock model of a shape, with random weights on the device."""
    fields = {"vocab_size": VOCAB, "max_position_embeddings": 2**21, "eos_token_id": None}
    return random_model(shape, DEVICE, **fields)


def random_ids(tokens: int) -> Tensor:
    """Returns ``(1, tokens)``, the same each time."""
    torch.manual_seed(0)
    return torch.randint(VOCAB, (1, tokens), device=DEVICE)


def allocated() -> int:
    """Returns the bytes that are allocated on the device."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def stock_row(model: Any, tokens: int) -> dict[str, Any]:
    """The stock model, behind as many random keys and values."""
    config = model.config
    before = allocated()
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(1, GROUPS, tokens, config.head_dim, dtype=torch.bfloat16, device=DEVICE)
        cache.update(keys, torch.randn_like(keys), layer)
        del keys
    row = {"attention": "stock", "tokens": tokens, "device_bytes": allocated() - before}
    ids, _ = generate(model, random_ids(tokens + 1), cache, STOCK_WARM_UP)
    return row | speed(generate(model, ids, cache, STOCK_TIMED)[1])


def landmark_row(model: Any, tokens: int, tier: str) -> dict[str, Any]:
    """The landmark model, behind as many tokens that it has read."""
    before = allocated()
    cache = LandmarkCache(model, tier)
    ids = random_ids(tokens + PROMPT)
    row: dict[str, Any] = {"attention": "landmark", "tokens": tokens, "tier": tier}
    begun = time.perf_counter()
    for begin, end in ((0, tokens // 10), (tokens // 10, tokens)):
        model.read(ids[:, begin:end], cache=cache, retrieve=False)
        device = allocated() - before - ids.nbytes
        landmarks = sum(each.store.landmark_keys.nbytes for each in cache.layers_in_use())
        when = "" if begin else "tenth_"
        row |= {f"{when}device_bytes": device, f"{when}mark_bytes": landmarks}
    row |= {"read_seconds": time.perf_counter() - begun, "host_bytes_held": cache.nbytes("host")}
    row |= timed(model, ids, cache)
    return row | {"generating_device_bytes": allocated() - before - ids.nbytes}


def of_shape(shape: str, sizes: list[tuple[int, tuple[str, ...]]]) -> Iterator[dict[str, Any]]:
    """Rows of the stock model first, then of the landmark model that is made of it."""
    model = stock_model(shape)
    for tokens, _ in sizes:
        yield {"model": shape, **stock_row(model, tokens)}
        torch.cuda.empty_cache()
    model = landmark.convert(model, block_size=BLOCK, top_k=TOP_K, chunk_tokens=CHUNK).eval()
    for tokens, tiers in sizes:
        for tier in tiers:
            yield {"model": shape, "top_k": TOP_K, **landmark_row(model, tokens, tier)}
            torch.cuda.empty_cache()


def small(_: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The 1B shape."""
    yield from of_shape("1B", [(32_768, ("device", "host")), (1_048_576, ("device", "host"))])


def large(_: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The 8B shape, whose blocks at 512k take 64 GiB of the host."""
    yield from of_shape("8B", [(32_768, ("device", "host")), (524_288, ("host",))])


def book(options: argparse.Namespace, tokenizer: Any) -> Tensor:
    """Returns ``(1, tokens)`` of the test split, enough to be read and to be told."""
    found = []
    held = 0
    for each in read_documents(options.data, split="test"):
        found.append(tokenize(each.text, tokenizer))
        held += len(found[-1])
        if held > REAL_TOKENS + 2000:
            return torch.cat(found)[None].to(DEVICE)
    raise ValueError(f"--data: expected {REAL_TOKENS + 2000} tokens in its test split, got {held}")


def real(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The bundled model on each tier; a disk whose files the system holds in its cache, and one
    that was dropped.
    """
    subject = load(None, DEVICE, "bfloat16")
    model = subject.model
    text = book(options, subject.tokenizer)
    model.configure_landmark(chunk_tokens=CHUNK)
    head = text[:, : REAL_TOKENS + PROMPT]
    for tier in ("device", "host", "disk"):
        cache = model.read(head[:, :REAL_TOKENS], cache=LandmarkCache(model, tier), retrieve=False)
        for state in ("",) if tier != "disk" else ("warm", "cold"):
            if state == "cold":
                drop(cache)
            row = timed(model, head, cache.fork(), text[0])
            about = {
                "model": "bundled",
                "attention": "landmark",
                "tokens": REAL_TOKENS,
                "tier": tier,
                "files": state,
            }
            yield (
                about
                | {"top_k": model.landmark.top_k, "granularity": model.landmark.granularity}
                | row
            )
        if tier == "host":
            torch.save(recorded(model, head, cache, text[0]), options.recorded)


def drop(cache: LandmarkCache) -> None:
    """Lets the system forget what it holds of the files of blocks."""
    for memory in cache.layers_in_use():
        file = memory.store.pool.offload.file
        file._map = None
        os.fsync(file.handle)
        os.posix_fadvise(file.handle, 0, 0, os.POSIX_FADV_DONTNEED)


def recorded(model: Any, ids: Tensor, cache: LandmarkCache, text: Tensor) -> dict[int, Tensor]:
    """Returns what each layer chose for each token that is told, ``(tokens, heads, K)``."""
    cache = cache.fork()
    cache.record = True
    generate(model, ids, cache, WARM_UP + TIMED, text)
    found: dict[int, list[Tensor]] = {}
    for each in cache.retrievals:
        found.setdefault(each.layer, []).append(
            each.blocks[0, :, each.positions[0] >= 0].transpose(0, 1)[:1]
        )
    return {
        layer: torch.cat(parts)[1:] for layer, parts in found.items()
    }  # the first is of the prompt


def replayed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The 8B shape chooses what the bundled model chose; layer and head ``i`` what ``i`` modulo
    their number did.
    """
    choices = {layer: blocks.to(DEVICE) for layer, blocks in torch.load(options.recorded).items()}
    model = landmark.convert(stock_model("8B"), block_size=BLOCK, chunk_tokens=CHUNK).eval()
    for tier in ("device", "host"):
        ids = random_ids(REAL_TOKENS + PROMPT)
        cache = LandmarkCache(model, tier)
        model.read(ids[:, :REAL_TOKENS], cache=cache, retrieve=False)
        with choosing(model, cache, choices):
            row = timed(model, ids, cache)
        about = {
            "model": "8B replaying",
            "attention": "landmark",
            "tokens": REAL_TOKENS,
            "tier": tier,
        }
        yield (
            about | {"top_k": model.landmark.top_k, "granularity": model.landmark.granularity} | row
        )
        del cache
        torch.cuda.empty_cache()


@contextmanager
def choosing(model: Any, cache: LandmarkCache, choices: dict[int, Tensor]) -> Iterator[None]:
    """Puts 1 to the scores of what was recorded and -inf to all others, once the landmarks were
    scored.
    """
    now = torch.zeros(1, dtype=torch.long, device=DEVICE)
    calls = [0]
    layer = [0]
    steps = len(choices[0])
    settings = model.landmark
    slots = torch.tensor(
        [slots_for(REAL_TOKENS + PROMPT + step, BLOCK) for step in range(steps)], device=DEVICE
    )
    latest_from = (slots // BLOCK - settings.local_blocks - settings.top_k)[:, None, None, None]
    known: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def of_every_step(
        layer: int, heads: torch.Size, latest_width: int, width: int
    ) -> tuple[Tensor, ...]:
        """Returns scores, the best of each chunk, and scores of the latest."""
        blocks = choices[layer % len(choices)]
        blocks = blocks[:, torch.arange(HEADS, device=DEVICE) % blocks.shape[1]].view(
            steps, *heads, -1
        )
        latest = blocks >= latest_from
        parts = []
        for index, there, wide in (
            (blocks, ~latest & (blocks >= 0), width),
            (blocks - latest_from, latest, latest_width),
        ):
            room = torch.full((*blocks.shape[:3], wide + 1), -torch.inf, device=DEVICE)
            room.scatter_(-1, torch.where(there, index, wide), 1.0)
            parts.append(room[..., :wide].contiguous())
        return parts[0], parts[0].unflatten(-1, (-1, CHUNK_OF_SCORES)).amax(-1), parts[1]

    def replaced(query: Tensor, *rest: Any) -> Scores:
        found = scored(query, *rest)
        key = (layer[0], found.scores.shape[-1])
        layer[0] = (layer[0] + 1) % len(cache.memories)
        if query.shape[4] > 1:
            return found
        # Also for the graph that may be captured next, which scores all indices.
        if key not in known:
            capacity = cache.memories[key[0]].store.capacity
            for width in (key[1], -(-capacity // CHUNK_OF_SCORES) * CHUNK_OF_SCORES):
                known[key[0], width] = of_every_step(
                    key[0], found.scores.shape[1:3], found.recent.shape[-1], width
                )
        scores, peaks, recent = (each.index_select(0, now) for each in known[key])
        return Scores(scores, peaks, recent, found.done, found.n_scored)

    def counted(self: Any, embeds: Tensor, *rest: Any, **named: Any) -> Any:
        now.fill_(min(calls[0], steps - 1))
        calls[0] += embeds.shape[1] == 1
        return extend(self, embeds, *rest, **named)

    decoder = type(model.base_model)
    scored = decode.score
    extend = decoder.extend
    decode.score = replaced
    decoder.extend = counted
    try:
        yield
    finally:
        decode.score = scored
        decoder.extend = extend


PARTS = {"small": small, "large": large, "real": real, "replayed": replayed}


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--data", type=Path, help="folder with test/*.txt, for the part `real`")
    parser.add_argument(
        "--recorded",
        type=Path,
        default=Path("out/recorded.pt"),
        help="what the bundled model chose: written by `real`, read by `replayed`",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, found none: run it where torch.cuda.is_available()")
    warnings.filterwarnings("ignore", message=".*was never trained.*")
    if options.part == "real" and options.data is None:
        parser.error("--data: expected a folder with test/*.txt for `real`, got none")
    options.recorded.parent.mkdir(parents=True, exist_ok=True)
    made = made_with(DEVICE, "torch", "triton", "transformers")
    rows = []
    with torch.no_grad():
        for row in PARTS[options.part](options):
            print(json.dumps(row), flush=True)
            rows.append(row)
            record.write(
                options.out, made, {**record.part(options.part, list(PARTS)), "rows": rows}
            )


if __name__ == "__main__":
    main()
