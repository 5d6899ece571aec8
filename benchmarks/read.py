"""Times how the bundled model reads a text into its memory, by the fused kernels and in plain
PyTorch.

    python benchmarks/read.py --out benchmarks/results/read.json --remembered 0,32768,524288

What is remembered beforehand was read without retrieval; then ``--tokens`` more are read, with
retrieval and without, each several times in turns: medians. The text is Python's language
reference, again and again. On a CPU there are no kernels to compare with.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch

from landmark.eval.fillers import load_filler
from landmark.eval.measure import measured
from landmark.memory import layer
from landmark.texts.loading import LoadedModel, load
from landmark.versions import made_with

CHUNK = 1 << 14


@contextmanager
def plain(yes: bool) -> Iterator[None]:
    """Keeps the memory from using its kernels, if asked to."""
    runs_fused = layer.runs_fused
    if yes:
        layer.runs_fused = lambda *_: False
    try:
        yield
    finally:
        layer.runs_fused = runs_fused


@torch.no_grad()
def measure(
    subject: LoadedModel, remembered: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Returns a row for each way to read ``tokens`` more after ``remembered``."""
    model = subject.model
    device = subject.device
    ids = load_filler("pydoc", subject.tokenizer).take(0, remembered + tokens)[None].to(device)
    cache = model.read(ids[:, :remembered], retrieve=False) if remembered else None
    ways = {(by, read): [] for by in ("kernels", "plain") for read in ("retrieve", "local")}
    if not str(device).startswith("cuda"):
        ways = {way: times for way, times in ways.items() if way[0] == "plain"}
    for repeat in range(-1, repeats):  # the first is not counted: it compiles
        for (by, read), times in ways.items():
            with plain(by == "plain"), measured(str(device)) as found:
                after = model.read(ids[:, remembered:], cache=cache, retrieve=read == "retrieve")
            if cache is not None:
                after.crop(-tokens)
            if repeat >= 0:
                times.append(found.seconds)
    return [
        {
            "remembered": remembered,
            "tokens": tokens,
            "read": read,
            "by": by,
            "seconds": statistics.median(times),
            "tokens_per_second": round(tokens / statistics.median(times)),
            "repeats": repeats,
            "settings": subject.model.landmark.to_dict(),
            "dtype": subject.dtype,
        }
        for (by, read), times in ways.items()
    ]


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument("--remembered", default="0,32768,524288", help="text tokens, with commas")
    parser.add_argument("--tokens", type=int, default=CHUNK, help="read each time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    subject = load(None, options.device)
    made = made_with(subject.device, "torch", "triton")
    rows = []
    with subject.configured(chunk_tokens=CHUNK):
        for remembered in map(int, options.remembered.split(",")):
            found = measure(subject, remembered, options.tokens, options.repeats)
            rows += found
            for row in found:
                print(
                    *(
                        f"{key} {row[key]}"
                        for key in ("remembered", "read", "by", "tokens_per_second")
                    ),
                    flush=True,
                )
    record.write(options.out, made, {"rows": rows})


if __name__ == "__main__":
    main()
