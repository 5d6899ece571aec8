"""Every file of benchmarks/results is of one run of the sources of a commit, and names them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from landmark import versions as module
from landmark.versions import made_with, sources_of_commit, sources_on_disk

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import record  # noqa: E402
import run_all  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))  # its ops.py is not tests/ops

FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_is_of_the_sources_of_its_commit(path):
    found = json.loads(path.read_text(encoding="utf-8"))["versions"]
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert re.fullmatch("[0-9a-f]{64}", found["sources"])
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("a copy without .git has no commits to compare with")
    if git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("a shallow clone lacks the commit")
    assert found["sources"] == sources_of_commit(ROOT, found["commit"])


def test_run_all_makes_every_file():
    assert set(run_all.RESULTS) == {path.stem for path in FILES}
    for result in run_all.RESULTS.values():
        script = result.command.split()[0]
        assert script == "-m" or (ROOT / script).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_that_is_a_part_says_so(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    parts = run_all.RESULTS[path.stem].command.partition("--part ")[2].split()[:1]
    assert [found["part"]["name"]] == parts if parts else "part" not in found
    if parts:
        others = {
            path.with_name(f"{path.stem.split('-')[0]}-{name}.json") for name in found["part"]["of"]
        }
        assert others <= set(FILES)


@pytest.fixture
def checkout(tmp_path):
    """A repository with sources, results, and what Python leaves behind."""
    for name in (
        "src/landmark/one.py",
        "benchmarks/two.py",
        "benchmarks/results/two.json",
        "docs/a.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def commit_of(checkout: Path) -> str:
    return git(checkout, "rev-parse", "HEAD")


def test_disk_and_commit_have_one_hash(checkout):
    for left_behind in (
        "src/landmark/__pycache__/one.pyc",
        "src/landmark.egg-info/PKG-INFO",
        "benchmarks/results/new.json",
        "docs/b.md",
    ):
        path = checkout / left_behind
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert sources_on_disk(checkout) == sources_of_commit(checkout, commit_of(checkout))


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_changed_sources_have_another_hash(checkout, change):
    committed = sources_of_commit(checkout, commit_of(checkout))
    source = checkout / "src/landmark/one.py"
    if change == "edit":
        source.write_text("edited")
    elif change == "add":
        source.with_name("new.py").write_text("")
    elif change == "remove":
        source.unlink()
    else:
        source.rename(source.with_name("new.py"))
    assert sources_on_disk(checkout) != committed
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "two")
    assert sources_on_disk(checkout) == sources_of_commit(checkout, commit_of(checkout))


def test_no_hash_without_sources(tmp_path):
    assert sources_on_disk(tmp_path) is None
    assert sources_of_commit(tmp_path, "HEAD") is None


@pytest.fixture
def in_checkout(checkout, monkeypatch):
    """The package lies in the repository ``checkout``."""
    monkeypatch.setattr(module, "__file__", str(checkout / "src/landmark/one.py"))
    return checkout


def test_measuring_is_refused_while_sources_differ_from_the_commit(in_checkout, monkeypatch):
    assert run_all.unnamed_sources() is None
    commit = commit_of(in_checkout)
    (in_checkout / "benchmarks/untracked.py").write_text("")
    module._sources_at_start.cache_clear()
    assert "commit them first" in run_all.unnamed_sources()
    shutil.rmtree(in_checkout / ".git")
    assert "set LANDMARK_COMMIT" in run_all.unnamed_sources()
    monkeypatch.setenv("LANDMARK_COMMIT", commit)
    assert run_all.unnamed_sources() is None, "tests/test_recorded_results.py compares it later"
    assert made_with("cpu")["commit"] == commit


def test_a_result_whose_sources_changed_meanwhile_says_so(in_checkout):
    made = made_with("cpu")
    path = in_checkout / "out" / "a.json"
    record.write(path, made, {"rows": [{"a": 1}, {"a": 2}]})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == {"versions": made, "rows": [{"a": 1}, {"a": 2}]}
    assert found["versions"]["sources"] == sources_of_commit(
        in_checkout, found["versions"]["commit"]
    )
    (in_checkout / "src/landmark/one.py").write_text("edited")
    record.write(path, made, {"rows": []})
    assert json.loads(path.read_text(encoding="utf-8"))["versions"]["sources"] == record.CHANGED


def test_a_failed_command_leaves_the_result(tmp_path, monkeypatch):
    script = tmp_path / "some.py"
    monkeypatch.setattr(run_all, "root", lambda: tmp_path)
    monkeypatch.setattr(run_all.tables, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "RESULTS", {"some": run_all.Result("some.py {data}", "cpu")})
    kept = tmp_path / "some.json"
    kept.write_text("before")
    begin = (
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[3])\n"
        "out.parent.mkdir(exist_ok=True, parents=True)\n"
    )
    script.write_text(begin + "out.write_text('half')\nsys.exit(1)\n")
    folders = {"data": "books"}
    assert not run_all.measure("some", folders)
    assert kept.read_text() == "before"
    script.write_text(begin + "out.write_text(sys.argv[1])\n")
    assert run_all.measure("some", folders)
    assert kept.read_text() == "books"
