"""What a figure was made with: versions of packages, and the commit where the code lies in its
repository.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from landmark import __version__


def versions(*packages: str) -> dict[str, str | None]:
    """Returns the versions of landmark, Python and ``packages`` (``None`` where one is missing),
    and the commit.

    The commit is that of the checkout which holds this file, followed by ``with changes`` where
    tracked files differ from it; ``None`` for an installed package.
    """
    found: dict[str, str | None] = {"landmark": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if "torch" in packages:
        import torch

        found["torch"] = torch.__version__  # with its build, which the package's own version lacks
    found["commit"] = _commit()
    return found


def _commit() -> str | None:
    if _git("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changes else commit


def _git(*words: str) -> str | None:
    """Returns what git prints, ``None`` where it fails or is missing."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
