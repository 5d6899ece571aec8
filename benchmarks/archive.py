"""Remembers a long real text on disk, saves it, opens it in another process, and asks before and
after.

    python benchmarks/archive.py --tokens 1000000 --data books --out benchmarks/results/archive.json

The bundled model reads the books of the train split without retrieval, on the CPU and into a memory
on tier ``disk``; a pass key lies in the middle. The memory is saved, the system is asked to forget
its files, and a new process opens it, asks for the key again, appends a text with a code of its
own, saves, opens once more and asks for both. The answers before saving and after opening have to
be the same, and the logits of their tokens bit for bit, or nothing is written. Resident memory is
that of a whole process as Linux counts it, code and weights included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import record
import torch

from landmark import LandmarkCache
from landmark.data.text import read_documents
from landmark.data.tokenizer import row_start
from landmark.eval.episodes import Episode, Question, build_episode, named_codes, pass_key
from landmark.eval.fillers import Filler
from landmark.texts.loading import LoadedModel, load, quiet
from landmark.texts.reading import read_into_memory, tokenize
from landmark.versions import made_with

TENTH = 5  # of the text, counted from 0, that the key lies in
APPENDED = 1 << 13  # text tokens that are read after opening
PART = 1 << 16  # read between two lines of output


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
        "--tokens", type=int, default=1_000_000, help="remembered before the memory is saved"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where the files lie meanwhile: 40 KB for each token are needed"
    )
    options = parser.parse_args()
    quiet()
    subject = load(None, "cpu")
    made = {
        **made_with("cpu", "torch", "transformers"),
        "threads": torch.get_num_threads(),
    }
    document, more = episodes(subject, options.data, options.tokens, options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saved = remember(subject, document, folder, options.folder)
        forget(folder)
        appended = more.document[len(row_start(subject.tokenizer)) :].tolist()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            opened = other.submit(
                reopen, folder, document.questions[0], appended, more.questions[0]
            ).result()
    require_same(saved["asked"], opened["asked"])
    row = {
        "tokens": options.tokens,
        "data": options.data.name,
        "key_at": round(document.places[0].start / options.tokens, 4),
        "seed": options.seed,
        "saved": saved,
        "opened": opened,
        "settings": subject.model.landmark.to_dict(),
        "dtype": subject.dtype,
    }
    record.write(options.out, made, {"rows": [row]})


def episodes(subject: LoadedModel, data: Path, tokens: int, seed: int) -> tuple[Episode, Episode]:
    """Returns the text with the pass key, and the one with a code that is appended."""
    rng = random.Random(seed)
    filler = books(subject.tokenizer, data, tokens)
    document = build_episode(rng, subject.tokenizer, filler, tokens, [pass_key(rng)], bucket=TENTH)
    return document, build_episode(
        rng, subject.tokenizer, filler, APPENDED, named_codes(rng, 1, digits=5)
    )


def books(tokenizer: Any, data: Path, tokens: int) -> Filler:
    """Returns as many whole books of the train split as make so many tokens, or all."""
    found = []
    held = 0
    for book in read_documents(data, split="train"):
        found.append(tokenize(book.text, tokenizer))
        held += len(found[-1])
        if held >= tokens:
            break
    return Filler(data.name, torch.cat(found))


def remember(
    subject: LoadedModel, episode: Episode, folder: str, files: Path | None
) -> dict[str, Any]:
    """Reads the text into a memory, asks it, saves it to ``folder``."""
    cache = LandmarkCache(subject.model, "disk", spill_folder=files)
    start = time.perf_counter()
    for part in episode.document.split(PART):
        read_into_memory(subject, part[None], retrieve=False, cache=cache)
        seconds = time.perf_counter() - start
        print(
            f"{cache.tokens[0]:,} tokens  {cache.tokens[0] / seconds:,.0f} tokens/s  "
            f"{peak_bytes():,} bytes",
            flush=True,
        )
    found = {"read_seconds": seconds, "tokens_per_second": round(len(episode.document) / seconds)}
    found |= {"read_peak_bytes": peak_bytes(), "asked": ask(subject, cache, episode.questions[0])}
    return {**found, **save(cache, folder), "peak_bytes": peak_bytes()}


def reopen(folder: str, key: Question, appended: list[int], code: Question) -> dict[str, Any]:
    """Opens a memory and asks it, appends to it, saves it, opens and asks it again; in a process of
    its own.
    """
    quiet()
    subject = load(None, "cpu")
    before = resident_bytes()
    start = time.perf_counter()
    cache = LandmarkCache.open(folder, subject.model, "disk")
    found = {"open_seconds": time.perf_counter() - start, "resident_bytes": resident_bytes()}
    found |= {"resident_bytes_before": before, "asked": ask(subject, cache, key)}
    print(
        f"opened in {found['open_seconds']:.2f} s, {found['resident_bytes']:,} bytes",
        found["asked"],
        flush=True,
    )
    read_into_memory(subject, torch.tensor([appended]), retrieve=False, cache=cache)
    again = {"tokens": len(appended), **save(cache, folder)}
    cache = LandmarkCache.open(folder, subject.model, "disk")
    again |= {"asked": [ask(subject, cache, question) for question in (key, code)]}
    print(f"{len(appended):,} tokens appended", *again["asked"], flush=True)
    return {**found, "appended": again, "peak_bytes": peak_bytes()}


@torch.no_grad()
def ask(subject: LoadedModel, cache: LandmarkCache, question: Question) -> dict[str, Any]:
    """Asks on a fork, in one call as ``landmark eval passkey`` does: what it chose, and the logits
    of that.
    """
    begin = len(question.ids) - question.answered
    start = time.perf_counter()
    output = subject.model(
        torch.tensor([question.ids], device=subject.device), past_key_values=cache.fork()
    )
    best = output.logits[0, begin - 1 : -1].max(-1)
    chosen = best.indices.tolist()
    return {
        "answer": subject.tokenizer.decode(chosen).strip(),
        "right": chosen == question.ids[begin:],
        "logits": best.values.tolist(),
        "seconds": time.perf_counter() - start,
    }


def save(cache: LandmarkCache, folder: str) -> dict[str, Any]:
    """Saves, and returns the time and the bytes of the folder."""
    start = time.perf_counter()
    cache.save(folder)
    seconds = time.perf_counter() - start
    found = {
        "save_seconds": seconds,
        "bytes": sum(file.stat().st_size for file in Path(folder).iterdir()),
    }
    print(f"saved in {seconds:.1f} s, {found['bytes']:,} bytes", flush=True)
    return found


def require_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Ends the command unless two answers and their logits are equal, bit for bit."""
    if any(before[name] != after[name] for name in ("answer", "logits")):
        raise SystemExit(f"expected the answer that was given before saving, {before}, got {after}")


def forget(folder: str) -> None:
    """Asks the system to drop the files of a folder from its memory, so that the next reader reads
    the disk.
    """
    for file in Path(folder).iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resident_bytes(name: str = "VmRSS") -> int:
    """Bytes of this process in memory."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_bytes() -> int:
    """The most that ever were."""
    return resident_bytes("VmHWM")


if __name__ == "__main__":
    main()
