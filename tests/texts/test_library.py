"""Texts remembered once in a folder: asked, interrupted, continued, opened again."""

import dataclasses

import pytest
import torch

import landmark.texts.library
from landmark import Library, remember
from landmark.memory.storage.tiers import TIERS
from landmark.texts.loading import LoadedModel
from tiny import WORDS, tiny_landmark, tiny_tokenizer

QUESTION = " What is the pass key? The pass key is"


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny_landmark(), tiny_tokenizer())


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(landmark.texts.library, "SAVE_TOKENS", 50)
    for name, numbers in (("a.txt", range(12)), ("b.txt", range(12, 17))):
        (tmp_path / name).write_text(
            "\n".join(f"{number} {WORDS}" for number in numbers), encoding="utf-8"
        )
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
def test_opened_again_it_answers_the_same(loaded, files, tmp_path, tier):
    library = remember(files, tmp_path / "memory", loaded)
    assert library.tokens == len(library.reading.ids)
    expected = library.ask(QUESTION)
    assert any(step.spans for step in expected.steps)
    assert {passage.source for passage in expected.passages()} <= {str(file) for file in files}
    opened = Library.open(tmp_path / "memory", loaded, tier)
    assert opened.ask(QUESTION) == expected
    assert opened.reading.sources == library.reading.sources


def test_asking_changes_nothing(loaded, files, tmp_path):
    library = remember(files, tmp_path / "memory", loaded)
    before = {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()}
    first = library.ask(QUESTION)
    assert library.ask(QUESTION) == first and library.tokens == len(library.reading.ids)
    assert {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()} == before


@pytest.mark.parametrize("saves", [1, 3])
def test_goes_on_where_it_was_interrupted(loaded, files, tmp_path, saves):
    expected = remember(files, tmp_path / "whole", loaded).ask(QUESTION)
    with pytest.raises(Interrupted):
        remember(files, tmp_path / "memory", loaded, progress=interrupt_after(saves))
    half = Library.open(tmp_path / "memory", loaded)
    assert half.tokens == 50 * saves
    assert half.ask(QUESTION).answer  # what was read so far can be asked
    seen = []
    library = remember(files, tmp_path / "memory", loaded, progress=seen.append)
    assert (
        seen[0].tokens == min(50 * (saves + 1), seen[0].total)
        and seen[-1].read == seen[-1].total - 50 * saves
    )
    assert library.ask(QUESTION) == expected


class Clock:
    """Time passes only where a model reads: ``seconds`` for each chunk."""

    def __init__(self, monkeypatch, model, seconds):
        self.now = 0.0
        stock = type(model).read

        def read(reader, *arguments, **more):
            self.now += seconds
            return stock(reader, *arguments, **more)

        monkeypatch.setattr(type(model), "read", read)
        monkeypatch.setattr(landmark.texts.library.time, "perf_counter", lambda: self.now)


def held(folder):
    """The streams of an archive, by name: all that only grows."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if not file.name.startswith(("tail", "memory."))
    }


@pytest.mark.parametrize("tier", TIERS)
def test_saved_by_time_and_the_same_to_the_bit_wherever_it_was_interrupted(
    loaded, files, tmp_path, monkeypatch, tier
):
    monkeypatch.setattr(landmark.texts.library, "SAVE_TOKENS", 1 << 16)
    remember(files, tmp_path / "whole", loaded, tier=tier)
    clock = Clock(monkeypatch, loaded.model, 4.0)
    lines = []

    def watch(what, done, total):
        lines.append((clock.now, what, done, total))

    with pytest.raises(Interrupted):
        remember(
            files, tmp_path / "memory", loaded, tier=tier, progress=interrupt_after(2), watch=watch
        )
    chunk = loaded.model.landmark.chunk_tokens
    half = Library.open(tmp_path / "memory", loaded)
    assert half.tokens == 6 * chunk  # two saves, each after three chunks of four seconds
    read = [line for line in lines if line[1] == "tokens read"]
    assert [line[0] for line in read] == [0, 4, 8, 12, 16, 20]  # before every chunk
    assert [line[2:] for line in read] == [
        (index * chunk, len(half.reading.ids)) for index in range(6)
    ]
    library = remember(files, tmp_path / "memory", loaded, tier=tier)
    assert library.tokens == len(library.reading.ids)
    assert held(tmp_path / "memory") == held(tmp_path / "whole")
    ids = torch.arange(1, 40)[None]
    both = [Library.open(tmp_path / name, loaded, "device").memory for name in ("memory", "whole")]
    assert torch.equal(*(loaded.model(ids, past_key_values=cache).logits for cache in both))


def test_a_memory_of_other_tokens_of_the_same_texts_is_refused(
    loaded, files, tmp_path, monkeypatch
):
    remember(files[:1], tmp_path / "memory", loaded)
    stock = landmark.texts.library.read_sources

    def otherwise(*arguments, **more):
        reading = stock(*arguments, **more)
        return dataclasses.replace(reading, ids=reading.ids.flip(0))

    monkeypatch.setattr(landmark.texts.library, "read_sources", otherwise)
    with pytest.raises(ValueError, match="tokenised otherwise"):
        remember(files, tmp_path / "memory", loaded)


def test_further_files_are_added(loaded, files, tmp_path):
    expected = remember(files, tmp_path / "whole", loaded).ask(QUESTION)
    remember(files[:1], tmp_path / "memory", loaded)
    seen = []
    library = remember(files, tmp_path / "memory", loaded, progress=seen.append)
    assert 0 < seen[-1].read < seen[-1].total
    opened = Library.open(tmp_path / "memory", loaded).reading
    assert opened.sources == library.reading.sources
    assert torch.equal(opened.ids, library.reading.ids) and torch.equal(
        opened.spans, library.reading.spans
    )
    found = library.ask(QUESTION)  # cut elsewhere while it was read: rounded otherwise
    assert found.answer == expected.answer
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert [span.block for span in ours.spans] == [span.block for span in theirs.spans]
        assert [span.weight for span in ours.spans] == pytest.approx(
            [span.weight for span in theirs.spans]
        )


def test_bytes_of_all_tiers_are_reported(loaded, files, tmp_path):
    seen = []
    remember(files, tmp_path / "memory", loaded, progress=seen.append)
    assert set(seen[-1].nbytes) == set(TIERS) and seen[-1].nbytes["disk"] > 0
    assert dataclasses.asdict(seen[-1])["seconds"] > 0


def test_files_of_tier_disk_lie_where_they_are_told(loaded, files, tmp_path):
    (tmp_path / "spill").mkdir()
    made = remember(files[:1], tmp_path / "memory", loaded, spill_folder=tmp_path / "spill")
    opened = Library.open(tmp_path / "memory", loaded, spill_folder=tmp_path / "spill")
    continued = remember(files, tmp_path / "memory", loaded, spill_folder=tmp_path / "spill")
    for library in (made, opened, continued):
        assert library.memory.offload_config.spill_folder == tmp_path / "spill"
    for library in (made, continued):  # which wrote
        stores = [memory.store for memory in library.memory.layers_in_use()]
        assert {store.pool.offload.file.folder for store in stores} == {tmp_path / "spill"}


def test_another_working_directory_changes_nothing(loaded, files, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Interrupted):
        remember(files, "memory", loaded, progress=interrupt_after(1))
    library = Library.open("memory", loaded)
    library.reading = remember(files, "whole", loaded).reading
    monkeypatch.chdir(tmp_path / "elsewhere")
    library.read()
    expected = Library.open(tmp_path / "whole", loaded).ask(QUESTION)
    assert (
        library.ask(QUESTION) == expected == Library.open(tmp_path / "memory", loaded).ask(QUESTION)
    )
    assert list((tmp_path / "elsewhere").iterdir()) == []
