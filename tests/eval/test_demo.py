"""The demo's parts on a tiny model: what was read, and the same weights run densely."""

import dataclasses
import tempfile

import pytest
import torch

from landmark.eval import demo
from landmark.eval.dense import dense_model, run_dense
from landmark.eval.fillers import Filler
from landmark.hf.cache import LandmarkCache
from tiny import BLOCK, tiny_llama

TEXT = BLOCK - 1


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "LENGTHS", (400, 500, 700))
    monkeypatch.setattr(demo, "DENSE_LENGTH", 500)


@pytest.fixture
def episode(marked, tokenizer, small):
    return demo.build_document(marked, demo.load_text(None, tokenizer), 2, seed=0)


def test_the_trials_grow_and_their_keys_differ(marked, tokenizer, small):
    trials = list(demo.run_trials(marked, demo.load_text(None, tokenizer), seed=0))
    assert [trial.length for trial in trials] == [400, 500, 700]
    assert len({trial.expected for trial in trials}) == 3
    assert all(len(trial.expected) == 5 and trial.expected.isdigit() for trial in trials)
    assert all(trial.cache_bytes > 0 for trial in trials)


def test_one_memory_is_reopened(marked, tokenizer, small, tmp_path, monkeypatch):
    """That of the document, without the question: opening it is seen by what was read for the
    answer.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = []
    open_saved = LandmarkCache.open

    def seen(*arguments):
        opened.append(open_saved(*arguments))
        assert opened[-1].transfers.fetched_disk == 0 and opened[-1].nbytes("disk") > 0
        return opened[-1]

    monkeypatch.setattr(LandmarkCache, "open", seen)
    trials = list(demo.run_trials(marked, demo.load_text(None, tokenizer), seed=0))
    assert [trial.reopened is None for trial in trials] == [True, False, True]
    found = trials[1].reopened
    assert found.same and found.answer == trials[1].answer
    assert 0 < found.fetched_bytes < found.saved_bytes
    assert min(found.save_seconds, found.open_seconds, found.answer_seconds) > 0
    assert len(opened) == 1 and opened[0].tokens == [500], "it was asked on a fork"
    assert list(tmp_path.iterdir()) == []


def test_a_reopened_memory_that_answers_otherwise_is_seen(marked, episode, monkeypatch):
    """What is opened has lost the key."""
    (question,) = episode.questions
    prompt = torch.tensor([question.ids[: -question.answered]])
    cache = marked.model.read(episode.document[None], retrieve=False)
    written = demo._write(marked.model, prompt, cache.fork(), question.answered)
    assert demo.reopened(marked, cache, prompt, written).same
    other = marked.model.read(
        torch.randint(0, 290, (1, 700), generator=torch.Generator().manual_seed(1))
    )
    monkeypatch.setattr(LandmarkCache, "open", lambda *_: other)
    assert not demo.reopened(marked, cache.fork(), prompt, written).same


def test_blocks_read_are_those_that_were_recorded(marked, episode):
    """Shares come from a loop over the record, for the queries that predict the answer alone."""
    trial = demo.run_trial(marked, episode)
    (question,) = episode.questions
    known = len(question.ids) - question.answered
    cache = marked.model.read(episode.document[None], retrieve=False)
    cache.record = True
    ids = torch.tensor([question.ids[:known]])
    for _ in range(question.answered):
        ids = marked.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    weights = {}
    readers = 0
    length = len(episode.document)
    wanted = {r + r // TEXT for r in range(length + known - 1, length + len(question.ids) - 1)}
    for retrieval in cache.retrievals:
        for query, slot in enumerate(retrieval.positions[0].tolist()):
            for head in range(4 if slot in wanted else 0):
                readers += 1
                for block, weight in zip(
                    retrieval.blocks[0, head, query], retrieval.weights[0, head, query], strict=True
                ):
                    if block >= 0:
                        weights[int(block)] = weights.get(int(block), 0) + float(weight)
    assert readers == 2 * 4 * question.answered
    assert {block.block: pytest.approx(block.share * readers) for block in trial.blocks} == weights
    assert [block.share for block in trial.blocks] == sorted(
        (block.share for block in trial.blocks), reverse=True
    )


def test_blocks_carry_their_text_and_know_the_key(marked, episode):
    with marked.configured(top_k=60):
        trial = demo.run_trial(marked, episode)
    place = episode.places[0]
    local = {(700 // TEXT) - back for back in range(3)}
    holding = set(range(place.start // TEXT, (place.stop - 1) // TEXT + 1)) - local
    assert {block.block for block in trial.blocks if block.has_fact} == holding != set()
    for block in trial.blocks:
        ids = episode.document[block.block * TEXT : (block.block + 1) * TEXT]
        assert block.text == marked.tokenizer.decode(ids.tolist())


def test_right_is_the_answer_that_was_expected(marked, episode):
    trial = demo.run_trial(marked, episode)
    assert trial.right is (trial.answer == trial.expected) is False
    (question,) = episode.questions
    known = len(question.ids) - question.answered
    cache = marked.model.read(episode.document[None], retrieve=False)
    written = demo._write(
        marked.model, torch.tensor([question.ids[:known]]), cache, question.answered
    )
    own = dataclasses.replace(question, ids=question.ids[:known] + written)
    assert demo.run_trial(marked, dataclasses.replace(episode, questions=(own,))).right


def test_dense_weights_are_the_same_and_stock(marked, episode):
    dense = dense_model(marked.model)
    assert type(dense).__name__ == "LlamaForCausalLM"
    stock = tiny_llama()
    ids = torch.randint(0, 290, (1, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense(ids).logits, stock(ids).logits)
    shared = dict(marked.model.named_parameters())
    assert all(
        parameter.data_ptr() == shared[name].data_ptr()
        for name, parameter in dense.named_parameters()
    )
    run = run_dense(marked, episode)
    assert run.length == 700
    assert run.cache_bytes == 2 * 2 * 2 * 8 * 8 * 700, (
        "layers, keys and values, heads, dim, bytes, tokens"
    )


def test_the_document_nearest_to_that_length_is_compared(tokenizer, small):
    assert demo.compared_number(demo.load_text(None, tokenizer)) == 1


def test_a_short_text_shortens_the_documents(tokenizer, small):
    filler = Filler("mine", torch.arange(450))
    assert demo.lengths_for(filler) == (400, 450, 450)


def test_a_text_that_is_too_short(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"^text: expected a text of at least 1024 tokens, got \d"):
        demo.load_text(tmp_path / "a.txt", tokenizer)


def test_the_picture(marked, tokenizer, small, tmp_path):
    trials = list(demo.run_trials(marked, demo.load_text(None, tokenizer), seed=0))
    demo.draw(trials, None, tmp_path / "out" / "demo.png")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
