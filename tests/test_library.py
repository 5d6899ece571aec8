"""Texts remembered once in a folder: asked, interrupted, continued, opened again."""

import dataclasses

import pytest
import torch

import landmark.library
from landmark import Library, remember
from landmark.eval.subjects import Subject
from landmark.memory.tiers import TIERS
from tiny import WORDS, tiny_landmark, tiny_tokenizer

QUESTION = " What is the pass key? The pass key is"


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", tiny_landmark(), tiny_tokenizer(), "landmark")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(landmark.library, "SAVE_TOKENS", 50)
    for name, numbers in (("a.txt", range(12)), ("b.txt", range(12, 17))):
        (tmp_path / name).write_text("\n".join(f"{number} {WORDS}" for number in numbers), encoding="utf-8")
    return [tmp_path / "a.txt", tmp_path / "b.txt"]


class Interrupted(Exception):
    pass


def interrupt_after(saves):
    seen = []

    def progress(found):
        seen.append(found.tokens)
        if len(seen) == saves:
            raise Interrupted

    return progress


@pytest.mark.parametrize("tier", TIERS)
def test_opened_again_it_answers_the_same(subject, files, tmp_path, tier):
    library = remember(files, tmp_path / "memory", subject)
    assert library.tokens == len(library.reading.ids)
    expected = library.ask(QUESTION)
    assert any(step.spans for step in expected.steps)
    assert {passage.source for passage in expected.passages()} <= {str(file) for file in files}
    opened = Library.open(tmp_path / "memory", subject, tier)
    assert opened.ask(QUESTION) == expected
    assert opened.reading.sources == library.reading.sources


def test_asking_changes_nothing(subject, files, tmp_path):
    library = remember(files, tmp_path / "memory", subject)
    before = {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()}
    first = library.ask(QUESTION)
    assert library.ask(QUESTION) == first and library.tokens == len(library.reading.ids)
    assert {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()} == before


@pytest.mark.parametrize("saves", [1, 3])
def test_goes_on_where_it_was_interrupted(subject, files, tmp_path, saves):
    expected = remember(files, tmp_path / "whole", subject).ask(QUESTION)
    with pytest.raises(Interrupted):
        remember(files, tmp_path / "memory", subject, progress=interrupt_after(saves))
    half = Library.open(tmp_path / "memory", subject)
    assert half.tokens == 50 * saves
    assert half.ask(QUESTION).answer  # what was read so far can be asked
    seen = []
    library = remember(files, tmp_path / "memory", subject, progress=seen.append)
    assert seen[0].tokens == min(50 * (saves + 1), seen[0].total) and seen[-1].read == seen[-1].total - 50 * saves
    assert library.ask(QUESTION) == expected


def test_further_files_are_added(subject, files, tmp_path):
    expected = remember(files, tmp_path / "whole", subject).ask(QUESTION)
    remember(files[:1], tmp_path / "memory", subject)
    seen = []
    library = remember(files, tmp_path / "memory", subject, progress=seen.append)
    assert 0 < seen[-1].read < seen[-1].total
    opened = Library.open(tmp_path / "memory", subject).reading
    assert opened.sources == library.reading.sources
    assert torch.equal(opened.ids, library.reading.ids) and torch.equal(opened.spans, library.reading.spans)
    found = library.ask(QUESTION)  # cut elsewhere while it was read: rounded otherwise
    assert found.answer == expected.answer
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert [span.block for span in ours.spans] == [span.block for span in theirs.spans]
        assert [span.weight for span in ours.spans] == pytest.approx([span.weight for span in theirs.spans])


def test_bytes_of_all_tiers_are_reported(subject, files, tmp_path):
    seen = []
    remember(files, tmp_path / "memory", subject, progress=seen.append)
    assert set(seen[-1].nbytes) == set(TIERS) and seen[-1].nbytes["disk"] > 0
    assert dataclasses.asdict(seen[-1])["seconds"] > 0


def test_files_of_tier_disk_lie_where_they_are_told(subject, files, tmp_path):
    (tmp_path / "spill").mkdir()
    made = remember(files[:1], tmp_path / "memory", subject, spill_folder=tmp_path / "spill")
    opened = Library.open(tmp_path / "memory", subject, spill_folder=tmp_path / "spill")
    continued = remember(files, tmp_path / "memory", subject, spill_folder=tmp_path / "spill")
    for library in (made, opened, continued):
        assert library.memory.tiers.spill_folder == tmp_path / "spill"
    for library in (made, continued):  # which wrote
        stores = [memory.store for memory in library.memory.made()]
        assert {store.near.shelf.file.folder for store in stores} == {tmp_path / "spill"}


def test_another_working_directory_changes_nothing(subject, files, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted):
        remember(files, "memory", subject, progress=interrupt_after(1))
    library = Library.open("memory", subject)
    library.reading = remember(files, "whole", subject).reading
    monkeypatch.chdir(tmp_path / "elsewhere")
    library.read()
    expected = Library.open(tmp_path / "whole", subject).ask(QUESTION)
    assert library.ask(QUESTION) == expected == Library.open(tmp_path / "memory", subject).ask(QUESTION)
    assert list((tmp_path / "elsewhere").iterdir()) == []
