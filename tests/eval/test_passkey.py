"""Pass key: what is counted as right, on models that know the answer and on random ones."""

import dataclasses
import random

import pytest
import torch

from landmark.eval import passkey
from landmark.eval.episodes import Question, build_episode, named_codes, pass_key
from landmark.eval.fillers import load_filler
from landmark.eval.variants import Variant
from tiny import BLOCK, Knowing, tiny_llama


def episodes_of(tokenizer, length, count, facts=1):
    filler = load_filler("paper", tokenizer)
    made = []
    for trial in range(count):
        rng = random.Random(trial)
        asked = [pass_key(rng)] if facts == 1 else named_codes(rng, facts)
        made.append(build_episode(rng, tokenizer, filler, length, asked))
    return made


def test_reads_the_logits_that_predict_the_answer(tokenizer):
    episodes = episodes_of(tokenizer, 200, 4)
    variant = Variant("knowing", Knowing(episodes, misses=[2]), tokenizer)
    assert passkey.answers_right(variant, episodes) == [[True], [True], [False], [True]]


def test_answers_of_different_length_share_a_batch(tokenizer):
    episodes = episodes_of(tokenizer, 300, 2, facts=3)
    variant = Variant("knowing", Knowing(episodes), tokenizer)
    assert len({len(q.ids) for episode in episodes for q in episode.questions}) > 1
    assert passkey.answers_right(variant, episodes) == [[True] * 3] * 2


def greedy(variant, document, prompt, count, read):
    ids = torch.cat((document, torch.tensor(prompt)))[None]
    extra = {}
    if variant.attention == "landmark":
        extra["past_key_values"] = variant.model.read(document[None], retrieve=read == "retrieve")
    written = variant.model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **extra
    )
    return written[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("read", passkey.READS)
@pytest.mark.parametrize("kind", ["plain", "marked", "choosing"])
def test_right_means_the_greedy_continuation(kind, read, request, tokenizer):
    """Answers made by generate count as right, whatever was asked before; one token changed counts
    as wrong.
    """
    variant = request.getfixturevalue(kind)
    episodes = []
    for episode in episodes_of(tokenizer, 150, 2, facts=3):
        prompts = [question.ids[: -question.answered] for question in episode.questions]
        answers = [greedy(variant, episode.document, prompt, 5, read) for prompt in prompts]
        answers[1][3] = (answers[1][3] + 1) % 300
        questions = tuple(Question(p + a, 5) for p, a in zip(prompts, answers, strict=True))
        episodes.append(dataclasses.replace(episode, questions=questions))
    assert passkey.answers_right(variant, episodes, read) == [[True, False, True]] * 2


def test_rows_count_and_carry_their_settings(tokenizer, marked, plain):
    task = passkey.PasskeyTask(
        lengths=(150, 250),
        trials=3,
        top_k=(1, 2),
        granularity=("head", "group"),
        fillers=("paper",),
        plain_limit=200,
        seed=5,
    )
    seen = []
    rows = passkey.run([marked, plain], task, seen.append)
    assert rows == seen
    assert len(rows) == 2 * 2 * 2 + 1
    first = rows[0]
    last = rows[-1]
    assert first.settings == marked.model.landmark.to_dict() | {"top_k": 1, "granularity": "head"}
    assert (first.seed, first.read, first.attention, first.dtype) == (
        5,
        "local",
        "landmark",
        "float64",
    )
    assert (last.attention, last.read, last.top_k, last.length) == ("full", "full", None, 150)
    assert all(row.asked == 3 == sum(depth["asked"] for depth in row.depths) for row in rows)
    assert marked.model.landmark.top_k == 2, "settings are restored"


def test_accuracy_counts_every_fact(tokenizer, monkeypatch):
    task = passkey.PasskeyTask(lengths=(400,), trials=2, facts=(4,), distractors=1)
    monkeypatch.setattr(
        passkey,
        "answers_right",
        lambda variant, episodes, read, *_: [[True, False, True, True]] * len(episodes),
    )
    variant = Variant("x", Knowing([]), tokenizer)
    (row,) = passkey.run([variant], task, lambda row: None)
    assert (row.task, row.facts, row.asked, row.correct, row.accuracy) == ("facts", 4, 8, 6, 0.75)


def test_all_models_are_asked_about_the_same_documents(tokenizer, marked, plain, monkeypatch):
    asked = []
    monkeypatch.setattr(
        passkey,
        "answers_right",
        lambda variant, episodes, read, *_: (
            asked.append([e.document.tolist() for e in episodes]) or [[True]] * len(episodes)
        ),
    )
    task = passkey.PasskeyTask(lengths=(150,), trials=4, top_k=(1, 2))
    passkey.run([marked, plain], task, lambda row: None)
    assert asked[0] == asked[1] == asked[2]


def test_beyond_the_trained_length(marked, plain):
    assert plain.beyond_trained(128) is False
    assert plain.beyond_trained(129) is True
    assert marked.model.landmark.stingy_positions == 6 * BLOCK <= 128
    assert marked.beyond_trained(100_000) is False
    with marked.configured(top_k=5):
        assert marked.beyond_trained(100_000) is True
        assert marked.beyond_trained(60) is False
    with marked.configured(positions="exact"):
        assert marked.beyond_trained(120) is False
        assert marked.beyond_trained(121) is True
    with marked.configured(local="chunk", chunk_tokens=60, top_k=3):
        assert marked.beyond_trained(1000) is False
    with marked.configured(local="chunk", chunk_tokens=61, top_k=3):
        assert marked.beyond_trained(1000) is True


def test_a_filler_is_read_once_for_all_models(tokenizer, tmp_path, monkeypatch):
    """A pipe has no second time."""
    read = []
    stock = passkey.filler_text
    monkeypatch.setattr(passkey, "filler_text", lambda name: read.append(name) or stock(name))
    variants = [Variant(name, tiny_llama(), tokenizer) for name in "ab"]
    task = passkey.PasskeyTask(lengths=(150,), trials=1, fillers=("paper", "paper"))
    rows = passkey.run(variants, task, lambda row: None)
    assert read == ["paper"] * 2 and len(rows) == 4
