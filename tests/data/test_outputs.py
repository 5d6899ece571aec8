"""Files that are written whole or not at all, and asked for before anything is computed."""

import errno
import os
import resource
from pathlib import Path

import pytest
from safetensors import SafetensorError

from landmark.data import outputs
from landmark.eval.results import FIGURES, Recorder, read
from landmark.hf.bundled import model_path


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


def save(folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "config.json").write_text("new")


def test_a_folder_is_added_to_whole(tmp_path):
    out = tmp_path / "new" / "out"
    outputs.write_folder(out, save)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old weights, in two files")
    (out / "notes.txt").write_text("mine")
    outputs.write_folder(out, save)
    kept = {str(each.relative_to(out)) for each in out.rglob("*") if each.is_file()}
    assert kept == {"model.safetensors", "adapter/config.json", "notes.txt"}


@pytest.mark.parametrize("kind", [OSError, SafetensorError, RuntimeError])
def test_a_folder_that_cannot_be_written_whole_stays_as_it_was(tmp_path, kind):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes(b"old")

    def fail(folder):
        save(folder)
        raise kind("PytorchStreamWriter failed: No space left on device")

    for name in ("old", "new/er"):
        with pytest.raises(
            ValueError, match=r"expected room for all its files, got none .*No space left.*another"
        ):
            outputs.write_folder(tmp_path / name, fail)
    assert [each.name for each in tmp_path.rglob("*")] == ["old", "model.safetensors"]
    with pytest.raises(ZeroDivisionError):
        outputs.write_folder(tmp_path / "new", lambda folder: 1 // 0)


@pytest.mark.parametrize("preallocated", [True, False])
def test_room_is_asked_for_and_given_back(tmp_path, monkeypatch, preallocated):
    if not preallocated:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    outputs.require_room(tmp_path / "new", 3 << 20, "out")
    assert list(tmp_path.iterdir()) == []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(
            ValueError, match=r"out: expected room for a file of 3,145,728 bytes in .* got none"
        ):
            outputs.require_room(tmp_path / "new", 3 << 20, "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_kept_before_they_are_told(tmp_path):
    def tell(row):
        raise BrokenPipeError

    recorder = Recorder(tmp_path / "rows.json", "cpu", tell)
    with pytest.raises(BrokenPipeError):
        recorder(next(iter(read(model_path() / FIGURES))))
    assert len(read(tmp_path / "rows.json")) == 1
