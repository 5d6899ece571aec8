"""The versions that the tests run with, each in a virtual environment of its own: `make matrix`
runs every session.

`nox --session oldest -- tests/hf/test_turns.py` runs these files alone.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.stop_on_first_error = False

# torch stays where it is and is installed first and alone: pip then takes a CPU build from a local
# index where there is one. The triton beside it is the one that torch asks for.
TORCH, TRITON = re.findall(r"^t(?:orch|riton)==.*$", Path("constraints.txt").read_text(), re.M)
# What meets transformers, and the code blocks of README.md and docs/.
PART = ("tests/hf", "tests/train", "tests/test_docs.py")


@nox.session
def pinned(session: nox.Session) -> None:
    """The versions of constraints.txt: every test."""
    install(session, "-c", "constraints.txt", "-e", ".[test]")
    test(session)


@nox.session
def newest(session: nox.Session) -> None:
    """What pip installs today: every test, and the demo."""
    install(session, "-e", ".[test]")
    test(session)
    session.run("landmark", "demo")


@nox.session
def between(session: nox.Session) -> None:
    """A transformers between the oldest and the newest: the part that meets it."""
    install(session, "transformers==5.12.1", "-e", ".[test]")
    test(session, *PART)


@nox.session
def oldest(session: nox.Session) -> None:
    """The lowest versions that pyproject.toml allows (they have wheels for Python 3.10 to 3.12):
    the same part.
    """
    install(session, *lowest(), "-e", ".[test]")
    test(session, *PART)


@nox.session
def harness(session: nox.Session) -> None:
    """The newest beside lm-eval and trl: tools that load a saved folder by its name, or train."""
    install(session, "-e", ".[test]", "lm-eval[hf]", "trl")
    test(session, "tests/hf/test_stock_tools.py", "tests/train/test_trl.py")


def install(session: nox.Session, *packages: str) -> None:
    """Installs torch, then the packages beside it."""
    session.install("--quiet", TORCH)
    session.install("--quiet", TORCH, TRITON, *packages)


def test(session: nox.Session, *paths: str) -> None:
    """Runs these tests, or those that the command names, on all cores, one thread for each
    worker.
    """
    session.run("python", "-m", "pip", "list")
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    session.run(
        "python", "-m", "pytest", "-n", "auto", *(session.posargs or paths), env=environment
    )


def lowest() -> list[str]:
    """Returns the requirements of pyproject.toml with each lower bound as the version itself; torch
    stays.
    """
    project = nox.project.load_toml("pyproject.toml")["project"]
    wanted = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    bounds = [each.split(";")[0].strip() for each in wanted if ">=" in each]
    return [
        each.replace(">=", "==") for each in bounds if not each.startswith(("torch>", "triton>"))
    ]
