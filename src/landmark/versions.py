"""The version of this package, and what a result was made with: versions, commit, sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

__version__ = "0.1.0"

SOURCE_FOLDERS = ("src", "benchmarks")
# Where runs write: what lies there is no source.
RESULTS = "benchmarks/results/"
COMMIT_VARIABLE = "LANDMARK_COMMIT"


def versions(*packages: str) -> dict[str, str | None]:
    """Returns the versions that a result depends on, and the commit.

    The commit is that of the checkout which holds this file, followed by ``with changes`` where
    tracked sources differ from it (results, docs and tests are none). Outside a checkout it is what
    the environment variable ``LANDMARK_COMMIT`` says, and ``None`` without one.

    Args:
        *packages: names of packages beside landmark and Python.

    Returns:
        the version by name, ``None`` for a package that is missing; the commit as ``commit``.
    """
    found: dict[str, str | None] = {"landmark": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if "torch" in packages:
        import torch

        found["torch"] = torch.__version__  # with its build, which package metadata lacks
    found["commit"] = _commit()
    return found


def made_with(device: str, *packages: str) -> dict[str, str | None]:
    """Returns what a result is made with: ``versions``, the sources and the device.

    Args:
        device: ``cpu``, ``cuda`` or one of several, ``cuda:1``.
        *packages: as for ``versions``.

    Returns:
        ``versions``; the hash of ``sources`` as ``sources``; the GPU's name, or the processor
        and its number of cores, as ``device``.
    """
    if device.startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()}, {os.cpu_count()} cores"
    return {**versions(*packages), "sources": sources(), "device": name}


def sources() -> str | None:
    """Returns a hash over the files of ``src`` and ``benchmarks`` as they were when it was first
    asked for in this process.

    Returns:
        64 hexadecimal digits; ``None`` for an installed package, which has no such folders.
    """
    return _sources_at_start(root())


@functools.cache
def _sources_at_start(folder: Path) -> str | None:
    return sources_on_disk(folder)


def sources_on_disk(folder: Path) -> str | None:
    """Returns the hash of ``sources`` over the files of the checkout ``folder``, ``None`` where it
    is no checkout.

    Results and what Python leaves behind (``__pycache__``, ``*.egg-info``) are no sources.
    """
    if not all((folder / name).is_dir() for name in SOURCE_FOLDERS):
        return None
    found = {}
    for name in SOURCE_FOLDERS:
        for path in (folder / name).rglob("*"):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = _blob(path.read_bytes())
    return _hash(found.items())


def sources_of_commit(folder: Path, commit: str) -> str | None:
    """Returns the hash of ``sources`` over the files of a commit, ``None`` where the repository
    ``folder`` does not hold it, or git is missing.
    """
    listing = _git(folder, "ls-tree", "-r", "-z", "--full-tree", commit, *SOURCE_FOLDERS)
    if not listing:
        return None
    found = []
    for line in listing.rstrip("\0").split("\0"):
        kind, path = line.split("\t")
        found.append((path, kind.split()[-1]))
    return _hash(found)


def _hash(blobs: Iterable[tuple[str, str]]) -> str:
    """Returns a hash over pairs of a path and git's name for what the file holds."""
    lines = sorted(f"{path} {blob}\n" for path, blob in blobs if _is_source(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_source(path: str) -> bool:
    left_behind = any(
        part == "__pycache__" or part.endswith(".egg-info") for part in path.split("/")
    )
    return not left_behind and not path.startswith(RESULTS)


def _blob(content: bytes) -> str:
    """Returns the name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def root() -> Path:
    """Returns the checkout that holds this file; for an installed package, some folder."""
    return Path(__file__).resolve().parents[2]


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", __file__) is None:
        return os.environ.get(COMMIT_VARIABLE)
    commit = _git(folder, "rev-parse", "HEAD")
    here = [f":/{name}" for name in SOURCE_FOLDERS]
    results = f":(exclude,top){RESULTS}"
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *here, results)
    if commit and changes:
        return f"{commit} with changes"
    return commit


def _git(folder: Path, *words: str) -> str | None:
    """Returns the output of a git command, ``None`` where it fails or git is missing."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
