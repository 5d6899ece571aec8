"""The files of a saved memory: what is committed stays, what is not counts as nothing, others are
left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from interrupt import Interrupted
from landmark.memory.archive import log
from landmark.memory.archive.layer import ArchivedLayer, saved_layers, verify
from landmark.memory.archive.log import Archive, Damaged

HEADS = 2
SIZE = 3
DIM = 2


def described(**more: Any) -> dict[str, Any]:
    return {"dtype": "float32", "layers": [[HEADS, SIZE, DIM]] * 2, **more}


def layers_of(opened: Archive) -> list[ArchivedLayer]:
    return [ArchivedLayer(opened, index, (HEADS, SIZE, DIM), torch.float32) for index in range(2)]


def blocks(begin: int, end: int) -> torch.Tensor:
    """Block ``b`` is full of numbers that only ``b`` decides."""
    count = HEADS * 2 * SIZE * DIM
    numbers = torch.arange(begin, end)[:, None] * 1000 + torch.arange(count)
    return numbers.view(-1, HEADS, 2, SIZE, DIM).float()


def work(folder: Path, times: int) -> None:
    """Commits so many times, 3 blocks each; the text replaces its tail."""
    opened = Archive.open(folder) if (folder / log.STATE).exists() else Archive.create(folder)
    layers = layers_of(opened)
    while opened.commits < times:
        opened.lock()
        begin = layers[0].count
        for layer in layers:
            layer.append(blocks(begin, begin + 3), blocks(begin, begin + 3)[:, :, 0, -1])
        name = f"tail-{opened.commits + 1}"
        old = opened.manifest.get("tail")
        opened.append(name, f"text {begin}".encode())
        opened.commit(described(tail=name), dropped=() if old is None else (old,))
        opened.unlock()


def content(folder: Path) -> tuple[int, list[torch.Tensor], bytes]:
    """Commits, all blocks and landmarks, and the tail; everything is checked."""
    assert verify(folder) == []
    opened = Archive.open(folder)
    layers = saved_layers(opened)
    found = [layer.of_all_heads(torch.arange(layer.count)) for layer in layers] + [
        each.landmarks() for each in layers
    ]
    return opened.commits, found, opened.read(opened.manifest["tail"])


def check(folder: Path, commits: int) -> None:
    times, found, tail = content(folder)
    assert times == commits and tail == f"text {3 * (commits - 1)}".encode()
    expected = blocks(0, 3 * commits)
    for each in found[:2]:
        assert torch.equal(each, expected)
    for each in found[2:]:
        assert torch.equal(each[0].transpose(0, 1), expected[:, :, 0, -1])


@pytest.mark.parametrize("done", [0, 1, 2])
def test_killed_at_every_call_to_the_system(done: int, quick: Path) -> None:
    """A writer that had committed ``done`` times dies at the n-th call of the next commit, for all
    n.
    """
    halves = 0
    for at in range(1000):
        folder = quick / str(at)
        if done:
            work(folder, done)
        child = os.fork()
        if child == 0:
            try:
                Interrupted(pytest.MonkeyPatch(), at, kill=True)
                work(folder, done + 1)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL
        if (folder / log.STATE).exists():
            opened = Archive.open(folder)
            assert opened.commits in ((done + 1,) if finished else (done, done + 1))
            check(folder, opened.commits)
            halves += opened.leftover() != {}
        else:
            assert done == 0 and not finished
        work(folder, done + 2)
        check(folder, done + 2)
        assert Archive.open(folder).leftover() == {}
        if finished:
            break
    assert at > 20 and halves >= (10 if done else 0)


def test_readers_see_whole_commits_beside_a_writer(quick: Path) -> None:
    work(quick, 1)
    child = os.fork()
    if child == 0:
        try:
            for commits in range(2, 120):
                work(quick, commits)
            os._exit(0)
        finally:
            os._exit(1)
    seen = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen.add(read_whole(quick))
    assert len(seen) >= 5
    check(quick, 119)


def read_whole(folder: Path) -> int:
    """Reads as opening a memory does, and returns the commits there were."""
    opened = Archive.open(folder)
    try:
        tail = opened.read(opened.manifest["tail"])
        layers = saved_layers(opened)
    except Damaged:
        assert opened.is_outdated(), "only a tail that was replaced may be gone"
        return read_whole(folder)
    assert tail == f"text {3 * (opened.commits - 1)}".encode()
    for layer in layers:
        assert torch.equal(
            layer.of_all_heads(torch.arange(layer.count)), blocks(0, 3 * opened.commits)
        )
    assert verify(folder) == []
    return opened.commits


@pytest.mark.parametrize("seed", range(8))
def test_random_writing_against_a_dictionary(seed: int, quick: Path) -> None:
    """Streams appended, rolled back, dropped and committed, beside one that is read after every
    commit.
    """
    chance = random.Random(seed)
    names = ["layer-00.landmarks", "layer-01.sums", "text-ids", "tail-1", "tail-2"]
    opened = Archive.create(quick / "memory")
    now: dict[str, bytes] = {}
    committed: dict[str, bytes] = {}
    for step in range(60):
        opened.lock()
        for _ in range(chance.randint(0, 4)):
            name = chance.choice(names)
            data = chance.randbytes(chance.randint(0, 9))
            opened.append(name, data)
            now[name] = now.get(name, b"") + data
        match chance.choice(("commit", "roll back", "leave", "drop")):
            case "commit":
                opened.commit({"step": step})
                committed = dict(now)
            case "drop":
                gone = tuple(name for name in now if chance.random() < 0.3)
                opened.commit({"step": step}, dropped=gone)
                now = {name: data for name, data in now.items() if name not in gone}
                committed = dict(now)
            case "roll back":
                opened.roll_back()
                now = dict(committed)
            case "leave":  # as one that was interrupted
                opened.unlock()
                if not opened.commits:
                    opened = Archive(opened.folder, log._nothing())
                else:
                    opened = Archive.open(opened.folder)
                now = dict(committed)
        if opened.commits:
            reader = Archive.open(opened.folder)
            assert {name: reader.read(name) for name in reader.streams()} == committed
            assert list(reader.verify()) == []
    assert opened.commits > 5


def test_what_was_skipped_reads_as_zeros_and_is_checked(tmp_path: Path) -> None:
    opened = Archive.create(tmp_path)
    first, second = layers_of(opened)
    for layer in (first, second):
        layer.append(blocks(0, 1), blocks(0, 1)[:, :, 0, -1])
        layer.skip(1000)
        layer.append(blocks(1001, 1003), blocks(1001, 1003)[:, :, 0, -1])
    opened.commit(described())
    opened.unlock()
    assert first.count == 1003 and verify(tmp_path) == []
    found = first.of_all_heads(torch.tensor([0, 500, 1002]))
    assert torch.equal(
        found, torch.cat((blocks(0, 1), torch.zeros(1, HEADS, 2, SIZE, DIM), blocks(1002, 1003)))
    )
    path = tmp_path / "layer-01.blocks"
    assert path.stat().st_blocks * 512 <= 2**14 < path.stat().st_size
    with path.open("r+b") as file:
        file.seek(500 * second.block_bytes)
        file.write(b"\1")
    assert (
        len(verify(tmp_path)) == 1
        and "layer-01.blocks: block 500, key/value head 0" in verify(tmp_path)[0]
    )


def test_every_byte_of_the_manifest_counts(quick: Path) -> None:
    work(quick, 2)
    path = quick / log.STATE
    data = path.read_bytes()
    for index in range(len(data)):
        for bit in (0, 5):
            path.write_bytes(data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :])
            with pytest.raises(Damaged, match=r"memory\.json"):
                Archive.open(quick)
    path.write_bytes(data)
    check(quick, 2)


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    work(tmp_path, 1)
    others = {
        name: tmp_path / name
        for name in ("notes.txt", "text-notes", "tail", "layer-00.blocks.bak", "lock.old")
    }
    for path in others.values():
        path.write_text("mine")
    (tmp_path / "tail-77").write_text("of an interrupted writer")
    work(tmp_path, 3)
    opened = Archive.open(tmp_path)
    opened.lock()
    assert all(path.read_text() == "mine" for path in others.values())
    assert not (tmp_path / "tail-77").exists()
    for name in ("text-notes", "tail-1"):
        folder = tmp_path / f"of-{name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            Archive.create(folder)
        assert (folder / name).read_text() == "mine"


def test_a_damaged_stream_is_not_made_longer(tmp_path: Path) -> None:
    work(tmp_path, 1)
    opened = Archive.open(tmp_path)
    path = tmp_path / "layer-00.blocks"
    os.truncate(path, 5)
    opened.lock()
    assert path.stat().st_size == 5


def test_a_folder_made_anew_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    """Though both have committed as often."""
    work(tmp_path, 1)
    opened = Archive.open(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    other = Archive.create(tmp_path)
    other.append("text-ids", b"something else")
    other.commit(described())
    other.unlock()
    with pytest.raises(ValueError, match="was written to since it was opened"):
        opened.lock()
    assert Archive.open(tmp_path).read("text-ids") == b"something else"


def test_a_name_outside_the_folder_is_refused(tmp_path: Path) -> None:
    """However right the checksum is: what a writer drops is deleted."""
    body = {
        "format": 1,
        "commits": 1,
        "manifest": {},
        "streams": {"../precious": {"bytes": 0, "crc32": 0}},
    }
    (tmp_path / log.STATE).write_bytes(log._file_of(body))
    with pytest.raises(Damaged, match=r"memory\.json"):
        Archive.open(tmp_path)


def test_one_writer_of_two_processes(tmp_path: Path) -> None:
    work(tmp_path, 1)
    first = Archive.open(tmp_path)
    first.lock()
    with pytest.raises(ValueError, match="is being written by another process"):
        Archive.open(tmp_path).lock()
    first.unlock()
    code = (
        f"import fcntl; file = open({str(tmp_path / 'lock')!r}, 'r+'); fcntl.flock(file, "
        "fcntl.LOCK_EX);"
    )
    code += "print('locked', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(
            ValueError, match="is being written by another process; wait for it, reading is free"
        ):
            Archive.open(tmp_path).lock()
        check(tmp_path, 1)  # reading goes on
        other.kill()
    work(tmp_path, 2)  # its lock went with it
    check(tmp_path, 2)


def test_what_was_taken_back_is_forgotten(tmp_path: Path) -> None:
    """Also by those who append: other blocks come to where the first ones were."""
    work(tmp_path, 1)
    opened = Archive.open(tmp_path)
    layers = saved_layers(opened)
    opened.lock()
    for layer in layers:
        layer.append(blocks(50, 54), blocks(50, 54)[:, :, 0, -1])
    assert [layer.count for layer in layers] == [7, 7]
    opened.roll_back()
    assert [layer.count for layer in layers] == [3, 3]
    for layer in layers:
        layer.append(blocks(3, 6), blocks(3, 6)[:, :, 0, -1])
    opened.commit(described(tail="tail-1"))
    for layer in layers:
        assert torch.equal(layer.of_all_heads(torch.arange(6)), blocks(0, 6))
    assert verify(tmp_path) == []


def test_checksums_are_those_of_the_standard(tmp_path: Path) -> None:
    """Read without this package: JSON, raw arrays, CRC-32."""
    work(tmp_path, 2)
    whole = json.loads((tmp_path / "memory.json").read_text())
    state = json.dumps(whole["state"], sort_keys=True, separators=(",", ":")).encode()
    assert whole["crc32"] == zlib.crc32(state)
    for name, each in whole["state"]["streams"].items():
        data = (tmp_path / name).read_bytes()
        assert len(data) == each["bytes"] and each["crc32"] in (None, zlib.crc32(data))
    data = (tmp_path / "layer-01.blocks").read_bytes()
    part = 2 * SIZE * DIM * 4
    sums = [zlib.crc32(data[i : i + part]) for i in range(0, len(data), part)]
    assert (tmp_path / "layer-01.sums").read_bytes() == b"".join(
        each.to_bytes(4, "little") for each in sums
    )
