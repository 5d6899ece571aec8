"""A little made-up English without digits, different for every seed."""

from __future__ import annotations

import random
import re
from pathlib import Path

WORDS = re.findall(
    r"\w+",
    "the a old man river went walked saw found over under night day house tree great small and "
    "but then when she he it was had been never always said asked came home dark light wind rain "
    "long way little sister brother kept read",
)


def sentences(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    made = (
        " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(count)
    )
    return "".join(sentence + rng.choice((" ", " ", "\n", "\n\n")) for sentence in made)


def write_books(folder: Path, files: int = 2, count: int = 600) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (folder / f"book{number}.txt").write_text(sentences(count, seed=number), encoding="utf-8")
    return folder
