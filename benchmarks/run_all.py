"""Measures every file of ``benchmarks/results`` anew, and writes the tables from them.

    python benchmarks/run_all.py --data books
    python benchmarks/run_all.py --data books --only decode,ops

``RESULTS`` has the command of each file. Those that need a GPU run where there is one, the others
where there is none: their figures are of a CPU. Each command is a process of its own, printed
before it runs; its file is taken when it ends well, and the one before stays otherwise. Those that
measure no times (``bundled.py``) run last, and with ``--jobs 8`` eight of them at once, as a small
model does not fill a GPU.

A result names the commit that it is of, so the sources (``src`` and ``benchmarks``) have to be
those of a commit before anything is measured. In a copy without ``.git`` the environment variable
``LANDMARK_COMMIT`` names it; ``tests/test_recorded_results.py`` compares the hash in the file with
the files of that commit. No tables and cards are written there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import bundled
import model_cards
import tables
import torch

from landmark.versions import COMMIT_VARIABLE, root, sources, sources_of_commit, versions

OUT = Path("out/results")
# Memory is pinned by eight threads: what docs/offloading.md advises for long texts on tier host.
PINNED = {
    "PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
}


class Result(NamedTuple):
    """How a result file is made.

    Attributes:
        command: arguments of Python; ``{data}`` stands for the folder of texts, ``{twin}`` and
            ``{tuned}`` for the models of ``bundled.py``.
        device: ``gpu``, or ``cpu`` for a result of two cores.
        environment: variables beside those that are set; ``None`` for none.
        timed: whether times are measured, which other work at the same time would change.
    """

    command: str
    device: str
    environment: dict[str, str] | None = None
    timed: bool = True


RESULTS = {
    "decode": Result("benchmarks/decode.py", "gpu"),
    "read": Result("benchmarks/read.py", "gpu"),
    "step": Result("benchmarks/step.py", "gpu"),
    "ops": Result("benchmarks/ops.py", "gpu"),
    # `real` before `replayed`, which reads what it recorded.
    "generate-real": Result("benchmarks/generate.py --part real --data {data}", "gpu", PINNED),
    "generate-replayed": Result("benchmarks/generate.py --part replayed", "gpu", PINNED),
    "generate-large": Result("benchmarks/generate.py --part large", "gpu", PINNED),
    "generate-small": Result("benchmarks/generate.py --part small", "gpu", PINNED),
    "millions": Result(
        "benchmarks/millions.py --tokens 10000000 --tier host --data {data}", "gpu", PINNED
    ),
    "eviction": Result("benchmarks/eviction.py --tier host", "cpu"),
    "rank-books": Result("-m landmark.cli.app eval rank --data {data}", "cpu"),
    "archive": Result("benchmarks/archive.py --tokens 1000000 --data {data}", "cpu"),
    "millions_disk": Result(
        "benchmarks/millions.py --tokens 2000000 --tier disk --single 0 --device cpu --data {data}",
        "cpu",
    ),
    **{name: Result(command, "gpu", timed=False) for name, command in bundled.commands().items()},
}


def main() -> int:
    """Parses, measures, writes tables; returns the number of commands that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with train/*.txt and test/*.txt")
    parser.add_argument("--only", help=f"names, with commas: {', '.join(RESULTS)}")
    parser.add_argument("--twin", default="out/twin", help="folder of the twin: see bundled.py")
    parser.add_argument("--tuned", default="out/tuned", help="folder of the tuned twin")
    parser.add_argument(
        "--jobs", type=int, default=1, help="commands at once that measure no times"
    )
    options = parser.parse_args()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    names = [name for name, result in RESULTS.items() if result.device == device]
    if options.only:
        names = options.only.split(",")
        unknown = [name for name in names if name not in RESULTS]
        if unknown:
            parser.error(f"--only: expected some of {', '.join(RESULTS)}, got {', '.join(unknown)}")
    refusal = unnamed_sources()
    if refusal:
        parser.error(refusal)
    folders = {"data": options.data, "twin": options.twin, "tuned": options.tuned}
    done = {name: measure(name, folders) for name in names if RESULTS[name].timed}
    untimed = [name for name in names if not RESULTS[name].timed]
    with ThreadPoolExecutor(options.jobs) as pool:
        done |= zip(untimed, pool.map(lambda name: measure(name, folders), untimed), strict=True)
    failed = [name for name in names if not done[name]]
    if failed:
        print(f"failed: {', '.join(failed)}; the files in benchmarks/results stay as they were")
    if sources_of_commit(root(), str(versions()["commit"]).split()[0]) is None:
        return len(failed)  # a copy: cards in it would change the sources of the next results
    try:
        tables.main()
        model_cards.main()
    except ValueError as error:
        print(error)
        return 1
    return len(failed)


def unnamed_sources() -> str | None:
    """Returns why no commit can be named for the sources that would run; ``None`` if one can."""
    commit = versions()["commit"]
    if commit is None:
        return (
            "expected the commit of these sources, got a copy without .git; set "
            f"{COMMIT_VARIABLE} to what `git rev-parse HEAD` prints in the repository"
        )
    commit = commit.split()[0]
    known = sources_of_commit(root(), commit)
    if known is not None and known != sources():
        return f"expected the sources of commit {commit}, got changed ones; commit them first"
    return None


def measure(name: str, folders: dict[str, str]) -> bool:
    """Runs the command of one result; returns whether it ended well."""
    result = RESULTS[name]
    out = root() / OUT / f"{name}.json"
    out.unlink(missing_ok=True)
    words = [word.format(**folders) for word in result.command.split()]
    environment = result.environment or {}
    given = "".join(f"{key}={value} " for key, value in environment.items())
    print(f"{given}python {' '.join(words)} --out {OUT}/{name}.json", flush=True)
    start = time.perf_counter()
    code = subprocess.run(
        [sys.executable, *words, "--out", str(out)],
        cwd=root(),
        env={**os.environ, **environment},
        check=False,
    ).returncode
    print(f"{name}: exit code {code} after {time.perf_counter() - start:.0f} s", flush=True)
    if code == 0:
        shutil.copyfile(out, tables.RESULTS / f"{name}.json")
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
