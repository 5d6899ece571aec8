"""Files that are written whole or not at all, and asked for before anything is computed."""

import errno
import os
from pathlib import Path

import pytest

from landmark.eval import outputs
from landmark.eval.results import Recorder


def full_disk(monkeypatch):
    def write(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    outputs.write(tmp_path / "a.html", b"old")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.html"):
        outputs.write(tmp_path / "a.html", b"new and longer")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.html", b"old")]


def test_a_link_stays_and_a_pipe_is_written_into(tmp_path):
    (tmp_path / "link").symlink_to("target")
    outputs.write(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"data"
    outputs.write("/dev/null", b"data")
    assert not Path("/dev/null").is_file()


def test_asking_leaves_everything_as_it_is(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new", "new/er/est"):
        outputs.require_writable(tmp_path / name, "out")
        if name != "old":
            outputs.require_folder(tmp_path / name, "out")
    assert [(each.name, each.read_text()) for each in tmp_path.rglob("*")] == [("old", "old")]


@pytest.mark.parametrize("name", [".", "file/a", "/proc/a", "/dev/null/a", "n" * 300, "loop"])
@pytest.mark.parametrize("require", [outputs.require_writable, outputs.require_folder])
def test_what_cannot_be_written_is_said(tmp_path, monkeypatch, name, require):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    Path("loop").symlink_to("loop")
    if name == "." and require is outputs.require_folder:
        return
    with pytest.raises(ValueError, match=r"out: expected a .*; name another"):
        require(name, "out")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "loop"]


def test_old_results_stay_until_there_are_new_ones(tmp_path):
    (tmp_path / "rows.json").write_text("old")
    Recorder(tmp_path / "rows.json", "cpu", lambda row: None)
    assert (tmp_path / "rows.json").read_text() == "old"
    with pytest.raises(ValueError, match=r"out: expected a file that can be written.*folder"):
        Recorder(tmp_path, "cpu", lambda row: None)
