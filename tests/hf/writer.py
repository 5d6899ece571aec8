"""A writer to be killed: reads a part of a text and saves, again and again, and acknowledges each
save.

As a program (`writer.py ROOT KILLS`) it lets children write to ROOT/0, ROOT/1, ... and kills each
at another instant, spread uniformly over the time that an undisturbed one takes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import models
from landmark import LandmarkCache
from landmark.config import LandmarkConfig

PART = 17
SAVES = 8  # tokens read before each save


def model() -> Any:
    settings = LandmarkConfig(block_size=4, top_k=64, local_blocks=1, granularity="head")
    return models.landmark_model("llama", settings, dtype=torch.float32)


def read(reader: Any, cache: LandmarkCache) -> None:
    """Reads the next part, which only the tokens read before decide."""
    reader.read(models.text(PART, seed=sum(cache.tokens))[None], cache=cache)


def log(folder: Path) -> Path:
    return folder.with_suffix(".acknowledged")


def acknowledged(folder: Path) -> int:
    """Tokens of the last save that returned."""
    lines = log(folder).read_text().splitlines() if log(folder).exists() else []
    return int(lines[-1]) if lines else 0


def go_on(reader: Any, cache: LandmarkCache, folder: Path) -> None:
    while sum(cache.tokens) < PART * SAVES:
        read(reader, cache)
        cache.save(folder)
        with log(folder).open("a") as file:
            file.write(f"{sum(cache.tokens)}\n")


def started(reader: Any, folder: Path) -> int:
    """Returns the number of a new process that writes."""
    child = os.fork()
    if child == 0:
        try:
            go_on(reader, LandmarkCache(reader.config, "disk"), folder)
        finally:
            os._exit(0)
    return child


def main(root: Path, kills: int) -> None:
    torch.set_num_threads(1)
    reader = model()
    times = []
    for index in range(3):
        begin = time.perf_counter()
        os.waitpid(started(reader, root / f"whole-{index}"), 0)
        times.append(time.perf_counter() - begin)
    for index in range(kills):
        child = started(reader, root / str(index))
        time.sleep(min(times) * (index + 0.5) / kills)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
