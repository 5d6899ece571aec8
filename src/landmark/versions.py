"""The version of this package, and the versions and commit that a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str | None]:
    """Returns the versions that a result depends on, and the commit.

    The commit is that of the checkout which holds this file, followed by ``with changes`` where
    tracked files differ from it; ``None`` for an installed package.

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


def _commit() -> str | None:
    if _git("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if commit and changes:
        return f"{commit} with changes"
    return commit


def _git(*words: str) -> str | None:
    """Returns the output of a git command, ``None`` where it fails or git is missing."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
