"""Remembers ten million tokens of real text in one memory, and asks for what was named on the way.

    python benchmarks/millions.py --tokens 10000000 --tier host --data books --out
    benchmarks/results/millions.json

The bundled model reads the books of the train split without retrieval, with named codes dropped in
at random places of the whole text, into one memory on the tier asked for. Each code is asked for on
a fork, by the exact match of ``landmark eval passkey``; then the first question is answered by
``generate``, token after token against the clock. Further readings have a single pass key, each in
another tenth of its text. What lies where is recorded after a tenth of the text, at its end, and
after the questions. The file is written after each reading.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import record
import torch
from archive import ask, books, resident_bytes
from torch import Tensor

from landmark import LandmarkCache
from landmark.eval.episodes import BUCKETS, Episode, Question, build_episode, named_codes, pass_key
from landmark.memory.storage.tiers import TIERS
from landmark.texts.loading import LoadedModel, load, quiet
from landmark.texts.reading import read_into_memory
from landmark.versions import made_with

PART = 1 << 16  # tokens that are taken to the model's device at once
WRITTEN = 64  # tokens, by ``generate``
SKIPPED = 8  # of them, before the clock counts: compiling, and capturing a CUDA graph


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of .txt files, read again and again if short",
    )
    parser.add_argument(
        "--tokens", type=int, default=10_000_000, help="of the text with the named codes"
    )
    parser.add_argument("--named", type=int, default=20, help="codes in it")
    parser.add_argument(
        "--single", type=int, default=3, help="further readings, of one pass key each"
    )
    parser.add_argument(
        "--single-tokens", type=int, help="of each of them; as --tokens if left out"
    )
    parser.add_argument("--tier", choices=TIERS, default="host")
    parser.add_argument(
        "--host-bytes", type=int, help="of blocks in host memory; see LandmarkCache"
    )
    parser.add_argument("--folder", type=Path, help="where the files of tier disk lie")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    quiet()
    subject = load(None, options.device, options.dtype)
    made = {
        **made_with(subject.device, "torch", "transformers", "triton"),
        "threads": torch.get_num_threads(),
    }
    budgets = {"host_bytes": options.host_bytes, "spill_folder": options.folder}
    budgets = {
        "tier": options.tier,
        **{name: value for name, value in budgets.items() if value is not None},
    }
    single = options.single_tokens or options.tokens
    filler = books(subject.tokenizer, options.data, max(options.tokens, single))
    print(f"{len(filler.ids):,} tokens of text", flush=True)
    row = {
        "tokens": options.tokens,
        "data": options.data.name,
        "data_tokens": len(filler.ids),
        "rounds_of_data": round(options.tokens / len(filler.ids), 4),
        "tier": options.tier,
        "host_bytes": options.host_bytes,
        "seed": options.seed,
        "settings": subject.model.landmark.to_dict(),
        "dtype": subject.dtype,
    }
    rng = random.Random(options.seed)
    codes = named_codes(rng, options.named)
    row |= many(
        subject, build_episode(rng, subject.tokenizer, filler, options.tokens, codes), budgets
    )
    row["single"] = []
    write(options.out, made, row)
    for number in range(options.single):
        rng = random.Random(f"{options.seed} {number}")
        bucket = (2 * number + 1) * BUCKETS // (2 * options.single)
        episode = build_episode(
            rng, subject.tokenizer, filler, single, [pass_key(rng)], bucket=bucket
        )
        row["single"].append(one(subject, episode, budgets))
        write(options.out, made, row)


def many(subject: LoadedModel, episode: Episode, budgets: dict[str, Any]) -> dict[str, Any]:
    """Reads a text, asks all its questions, and writes the answer to the first."""
    cache, found = remember(subject, episode.document, budgets)
    asked = questions(subject, cache, episode)
    found["named"] = {
        "asked": len(asked),
        "right": sum(each["right"] for each in asked),
        "questions": asked,
    }
    if asked:
        found["decode"] = decode(subject, cache, episode.questions[0])
    found["after"] = held(subject, cache)
    print(*(f"{name} {value}" for name, value in found["after"].items()), flush=True)
    return found


def one(subject: LoadedModel, episode: Episode, budgets: dict[str, Any]) -> dict[str, Any]:
    """Reads a text and asks its only question; what was read before is forgotten."""
    gc.collect()
    cache, found = remember(subject, episode.document, budgets)
    return {"tokens": len(episode.document), **questions(subject, cache, episode)[0], **found}


def remember(
    subject: LoadedModel, document: Tensor, budgets: dict[str, Any]
) -> tuple[LandmarkCache, dict[str, Any]]:
    """Reads a text ``(tokens,)`` on the CPU, piece by piece, and says how fast and what lay where
    on the way.
    """
    if subject.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    cache = LandmarkCache(subject.model, **budgets)
    tenths = []
    start = time.perf_counter()
    for part in document.split(min(PART, -(-len(document) // BUCKETS))):
        read_into_memory(subject, part[None].to(subject.device), retrieve=False, cache=cache)
        if cache.tokens[0] * BUCKETS >= (len(tenths) + 1) * len(document):
            tenths.append(held(subject, cache))
            seconds = time.perf_counter() - start
            rate = round(cache.tokens[0] / seconds)
            print(
                f"{cache.tokens[0]:,} tokens  {rate:,} tokens/s  {tenths[-1]['resident_bytes']:,} "
                "bytes",
                flush=True,
            )
    found = {"read_seconds": seconds, "tokens_per_second": rate}
    return cache, {**found, "after_a_tenth": tenths[0], "after_reading": tenths[-1]}


def held(subject: LoadedModel, cache: LandmarkCache) -> dict[str, int]:
    """Bytes of what the memory holds by tier, of the process, and on a GPU of what torch has taken.

    ``resident_bytes`` is the process as Linux counts it; whether pinned memory is part of it
    depends on the driver, so ``pinned_bytes`` says what torch has asked the driver for, rounding
    included.
    """
    landmarks = sum(memory.store.landmark_keys.nbytes for memory in cache.layers_in_use())
    found = {
        "tokens": cache.tokens[0],
        **{f"{tier}_tier_bytes": cache.nbytes(tier) for tier in TIERS},
    }
    found |= {"landmark_bytes": landmarks, "near_bytes": found["device_tier_bytes"] - landmarks}
    if subject.device.startswith("cuda"):
        torch.cuda.synchronize()
        found["device_bytes"] = torch.cuda.memory_allocated()
        found["device_bytes_but_landmarks"] = found["device_bytes"] - landmarks
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        found["pinned_bytes"] = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    return {**found, "resident_bytes": resident_bytes()}


def questions(subject: LoadedModel, cache: LandmarkCache, episode: Episode) -> list[dict[str, Any]]:
    """Asks every question on a fork of its own."""
    found = []
    for question, place in zip(episode.questions, episode.places, strict=True):
        asked = ask(subject, cache, question)
        found.append({"at": round(place.start / len(episode.document), 4), **asked})
        del found[-1]["logits"]
        print(*(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    return found


class Clock:
    """A streamer that notes when each token was there, and what had moved when it began to
    count.
    """

    def __init__(self, cache: LandmarkCache) -> None:
        self.cache = cache
        self.times = []
        self.before = cache.transfers

    def put(self, value: Tensor) -> None:
        """Told of the prompt first, then of each token."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if len(self.times) == SKIPPED:
            self.before = self.cache.transfers
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Told that there is no more."""


def decode(subject: LoadedModel, cache: LandmarkCache, question: Question) -> dict[str, Any]:
    """Lets the model answer on a fork, and says how long a token took and what was fetched for
    it.
    """
    fork = cache.fork()
    clock = Clock(fork)
    prompt = question.ids[: -question.answered]
    written = subject.model.generate(
        torch.tensor([prompt], device=subject.device),
        attention_mask=torch.ones(
            1, cache.get_seq_length() + len(prompt), dtype=torch.bool, device=subject.device
        ),
        position_ids=torch.arange(len(prompt), device=subject.device)[
            None
        ],  # or stock code makes one for every token
        past_key_values=fork,
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
        streamer=clock,
    )[0, len(prompt) :].tolist()
    steps = [1000 * (after - before) for before, after in itertools.pairwise(clock.times[SKIPPED:])]
    after = fork.transfers
    names = ("hits", "misses", "fetched_host", "fetched_disk")
    moved = {
        f"{name}_per_token": (getattr(after, name) - getattr(clock.before, name)) / len(steps)
        for name in names
    }
    found = {
        "tokens": len(steps),
        "ms_per_token": statistics.median(steps),
        "ms_mean": statistics.mean(steps),
        "ms_most": max(steps),
        **moved,
        "right": written[: question.answered] == question.ids[-question.answered :],
        "text": subject.tokenizer.decode(written),
    }
    print(*(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def write(out: Path, made: dict[str, Any], row: dict[str, Any]) -> None:
    """Writes what was measured so far."""
    row["single_right"] = sum(each["right"] for each in row["single"])
    record.write(out, made, {"rows": [row]})


if __name__ == "__main__":
    main()
