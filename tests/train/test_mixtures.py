"""Training on conversations and on documents with questions, alone and mixed with texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import silent, toy_recipe
from transformers import AutoModelForCausalLM

import landmark
from landmark.data.rows import stack
from landmark.data.tokenizer import load_tokenizer
from landmark.train.loss import token_losses
from landmark.train.prepare import prepare_rows
from landmark.train.run import train
from landmark.train.trainer import LandmarkTrainer
from small_text import sentences


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """120 conversations of one question."""
    rng = np.random.default_rng(0)
    words = sentences(300).split()
    rows = []
    for number in range(120):
        question, answer = (" ".join(rng.choice(words, rng.integers(3, 30))) for _ in range(2))
        messages = [
            {"role": "user", "content": f"{number} {question}"},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages})
    return write(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """30 sets of four documents, each of which states a number."""
    rng = np.random.default_rng(1)
    words = sentences(300).split()
    rows = []
    for number in range(30):
        codes = [str(1000 + 10 * number + n) for n in range(4)]
        texts = [
            f"{' '.join(rng.choice(words, 40))} The code of gate {n} is {code}. "
            for n, code in enumerate(codes)
        ]
        asked = [f"What is the code of gate {n}?" for n in range(4)]
        rows.append({"documents": texts, "questions": asked, "answers": codes})
    return write(tmp_path_factory.mktemp("questions") / "questions.jsonl", rows)


@pytest.mark.parametrize("plain", [False, True], ids=["landmark", "plain"])
def test_conversations_are_trained_on(chats, scratch, tmp_path, plain):
    recipe = toy_recipe(steps=20, lr=1e-2, episodes=0.0, evaluate_every=10)
    options = {"tokenizer": str(scratch[0]), "report": silent, "plain": plain}
    summary = train(chats, tmp_path, recipe=recipe, **options)
    losses = [entry["loss"] for entry in summary["losses"]]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert [set(found) for found in summary["evaluations"]] == 2 * [{"step", "conversations_loss"}]
    (text,) = summary["texts"]
    assert text["title"] == chats and len(text["sha256"]) == 64 and text["tokens"] > 3000


@pytest.mark.parametrize("plain", [False, True], ids=["landmark", "plain"])
def test_conversations_do_not_see_each_other(chats, twin, scratch, tmp_path, plain):
    """The loss of a row is that of its conversations, each in a pass of its own."""
    tokenizer = load_tokenizer(scratch[0])
    recipe = toy_recipe(episodes=0.0)
    prepared = prepare_rows(chats, tmp_path, recipe, tokenizer, block_size=16)
    if plain:
        model = AutoModelForCausalLM.from_pretrained(twin[0]).train()
    else:
        model = landmark.load(scratch[0], dtype=torch.float32)
        model.configure_landmark(mode="all", position_gap=0)
        model.train()
    (row,) = prepare_rows_first(prepared)
    assert row.documents.max() > 0
    batch = stack([(row,)], answers=False)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        together = token_losses(logits, batch["labels"])[0]
        for document in range(int(row.documents.max()) + 1):
            here = np.flatnonzero(row.documents == document)
            alone = model(input_ids=batch["input_ids"][:, here], use_cache=False).logits
            losses = token_losses(alone, batch["labels"][:, here])[0]
            torch.testing.assert_close(together[here], losses, rtol=0, atol=1e-4)


def prepare_rows_first(prepared):
    return next(group for group in prepared.train if group[0].documents.max() > 0)


def test_questions_are_trained_on_and_their_evidence_is_followed(questions, scratch, tmp_path):
    recipe = toy_recipe(steps=2, episodes=0.0, evaluate_every=2)
    lines = []
    summary = train(
        questions, tmp_path, recipe=recipe, tokenizer=str(scratch[0]), report=lines.append
    )
    (found,) = summary["evaluations"]
    assert set(found) == {"step", "questions_loss", "questions_accuracy", "questions_recall"}
    assert {layer["layer"] for layer in found["questions_recall"]} == {0, 1}
    assert any("evidence retrieved by the best head" in line for line in lines)


def test_documents_without_questions_are_never_asked_about(questions, scratch, tmp_path):
    """They stand among the others, also of the few sets that are held out."""
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    alone = [{"documents": [f"Nothing is asked about text {n}. " * 9]} for n in range(150)]
    path = write(tmp_path / "both.jsonl", [*alone, *rows])
    tokenizer = load_tokenizer(scratch[0])
    recipe = toy_recipe(episodes=0.0, steps=20)
    prepared = prepare_rows(path, tmp_path, recipe, tokenizer, block_size=16)
    groups = [*prepared.train, *prepared.held_out["questions"]]
    texts = [tokenizer.decode(row.input_ids) for group in groups for row in group]
    assert all(row.questions for group in groups for row in group)
    assert any("Nothing is asked" in text for text in texts[80:]) and len(texts) == 80 + 64
    held_out = [row for group in prepared.held_out["questions"] for row in group]
    sets = {
        int(tokenizer.decode(row.input_ids[asked.answer])) // 10
        for row in held_out
        for asked in row.questions
    }
    assert len(sets) == 1, "one of the 30 that are asked about, not nine of all 180"


def test_a_mixture_has_the_shares_of_its_sources(books, chats, questions, scratch, tmp_path):
    mixture = [{"source": chats, "share": 0.3}, {"source": questions, "share": 0.4}]
    recipe = toy_recipe(mixture=mixture, steps=100, batch=4)
    tokenizer = load_tokenizer(scratch[0])
    prepared = prepare_rows(str(books), tmp_path, recipe, tokenizer, block_size=16)
    counts = {"chats": 0, "questions": 0, "episodes": 0, "windows": 0}
    for (row,) in prepared.train:
        if row.documents is not None:
            counts["chats"] += 1
        elif row.questions and (row.labels != -100).sum() == row.answers.sum():
            counts["questions"] += 1
        else:
            counts["episodes" if row.questions else "windows"] += 1
    shares = {name: count / 400 for name, count in counts.items()}
    assert abs(shares["chats"] - 0.3) < 0.07 and abs(shares["questions"] - 0.4) < 0.07
    assert abs(shares["episodes"] - 0.3 * 0.5 * 0.85) < 0.06
    assert set(prepared.held_out) == {"text", "episodes", "conversations", "questions"}
    assert [document.title for document in prepared.documents][-2:] == [chats, questions]


def test_inverse_cloze_is_trained_on(books, scratch, tmp_path):
    recipe = toy_recipe(steps=2, length=320, episodes=0.2, cloze=0.6, contrast=0.1)
    options = {"tokenizer": str(scratch[0]), "report": silent}
    summary = train(str(books), tmp_path, recipe=recipe, **options)
    (found,) = summary["evaluations"]
    assert {"cloze_loss", "cloze_accuracy", "cloze_recall", "episodes_loss"} < set(found)


def test_a_mixture_is_trained_on_and_resumed(books, chats, questions, scratch, tmp_path):
    """Rows with and without packed documents in one step; the same losses after a break."""
    mixture = [{"source": chats, "share": 0.4}, {"source": questions, "share": 0.4}]
    recipe = toy_recipe(mixture=mixture, steps=4, batch=6, micro_batch=2, save_every=2)
    options = {"recipe": recipe, "tokenizer": str(scratch[0]), "report": silent}
    whole = train(str(books), tmp_path, **options)
    last = tmp_path / "checkpoints" / "checkpoint-4"
    last.rename(tmp_path / "elsewhere")
    again = train(str(books), tmp_path, resume=True, **options)
    assert again["losses"] == whole["losses"]


def test_conversations_are_evaluated_as_they_are_trained(
    books, chats, questions, scratch, tmp_path, monkeypatch
):
    """Their positions never start again; other rows are read with retrieval where theirs do."""
    modes = set()
    stock = LandmarkTrainer.prediction_step

    def noting(self, model, inputs, *args, **kwargs):
        found = stock(self, model, inputs, *args, **kwargs)
        modes.add(("position_ids" in inputs, self._unwrapped.landmark.mode))
        return found

    monkeypatch.setattr(LandmarkTrainer, "prediction_step", noting)
    mixture = [{"source": chats, "share": 0.4}, {"source": questions, "share": 0.4}]
    recipe = toy_recipe(mixture=mixture, steps=1, position_span=112, position_gap=0, all_blocks=0.5)
    train(str(books), tmp_path, recipe=recipe, tokenizer=str(scratch[0]), report=silent)
    assert modes == {(True, "top_k"), (False, "retrieval")}
    assert landmark.load(tmp_path).landmark.mode == "retrieval"


@pytest.mark.parametrize("kind", ["chats", "questions"])
def test_a_source_is_tokenised_once(kind, chats, questions, scratch, tmp_path):
    """A damaged file, another chat template and other rows are tokenised anew."""
    source = {"chats": chats, "questions": questions}[kind]
    tokenizer = load_tokenizer(scratch[0])
    lines = []

    def prepared(cutter=tokenizer, data=source):
        lines.clear()
        recipe = toy_recipe(episodes=0.0)
        found = prepare_rows(
            data,
            tmp_path,
            recipe,
            cutter,
            block_size=16,
            progress=lambda what, done, of: lines.append(what),
        )
        return [row for group in found.train for row in group]

    expected = prepared()
    assert any("tokenised" in line for line in lines)
    again = prepared()
    assert not any("tokenised" in line for line in lines)
    file = tmp_path / "train.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    mended = prepared()
    assert any("tokenised" in line for line in lines)
    for rows in (again, mended):
        for row, other in zip(rows, expected, strict=True):
            assert (row.input_ids == other.input_ids).all()
            assert (row.labels == other.labels).all()
    assert file.read_bytes() == whole
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(source).read_text().splitlines(keepends=True)[:-1]))
    prepared(data=str(fewer))
    assert any("tokenised" in line for line in lines)
    if kind == "chats":
        other = load_tokenizer(scratch[0])
        other.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        prepared(other, str(fewer))
        assert any("tokenised" in line for line in lines)


def test_held_out_conversations_and_questions_are_not_trained_on(
    chats, questions, scratch, tmp_path
):
    tokenizer = load_tokenizer(scratch[0])
    recipe = toy_recipe(episodes=0.0, steps=60)

    def texts(rows):
        return "\n".join(tokenizer.decode(row.input_ids) for group in rows for row in group)

    prepared = prepare_rows(chats, tmp_path, recipe, tokenizer, block_size=16)
    held_out = texts(prepared.held_out["conversations"])
    first_words = [line.removeprefix("Question: ") for line in held_out.split("\n")]
    unseen = [line for line in first_words if line[:1].isdigit() and len(line) > 20]
    assert unseen and not any(line in texts(prepared.train) for line in unseen)
    prepared = prepare_rows(questions, tmp_path, recipe, tokenizer, block_size=16)
    codes = {
        tokenizer.decode(row.input_ids[asked.answer]).strip()
        for group in prepared.held_out["questions"]
        for row in group
        for asked in row.questions
    }
    trained = texts(prepared.train)
    assert codes and not any(f"is {code}." in trained for code in codes)
