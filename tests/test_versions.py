"""The commit that is recorded with a figure, in a repository made for it."""

import subprocess

import pytest
import torch

from landmark import __version__
from landmark import versions as module


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one committed file, which stands for the package."""
    file = tmp_path / "src" / "versions.py"
    file.parent.mkdir()
    file.write_text("")

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    monkeypatch.setattr(module, "__file__", str(file))
    return file, git


def test_commit_of_a_checkout(checkout):
    file, git = checkout
    assert module.versions()["commit"] is None, "not tracked"
    git("add", str(file))
    git("commit", "-qm", "one")
    assert module.versions()["commit"] == git("rev-parse", "HEAD")
    for name in ("benchmarks/results/a.json", "docs/a.md"):  # which a run writes
        written = file.parents[1] / name
        written.parent.mkdir(parents=True)
        written.write_text("")
        git("add", str(written))
    assert module.versions()["commit"] == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert module.versions()["commit"] == git("rev-parse", "HEAD") + " with changes"


def test_packages():
    found = module.versions("torch", "no-such-package")
    assert found["landmark"] == __version__ and found["no-such-package"] is None
    assert torch.__version__.startswith(found["torch"].split("+")[0])
