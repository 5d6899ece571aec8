"""The script that makes the data of the landmark SmolLM2 writes rows that training reads."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import models
from chats import CHATML
from landmark.data.conversations import read_conversations
from landmark.data.questions import read_question_sets
from landmark.data.tokenizer import train_tokenizer
from small_text import sentences

ROOT = Path(__file__).parents[1]

STORY = {
    "text": "A fox came by.\n\nThe fox was red. He ate grapes.\nIn the end a fox came by.",
    "sections": 3,
    "qas": [
        {"question": "Who came?", "answers": ["a fox."], "section": "3", "explicit": "explicit"},
        {"question": "Why?", "answers": ["grapes"], "section": "2", "explicit": "implicit"},
        {"question": "When?", "answers": ["at noon"], "section": "1", "explicit": "explicit"},
        {"question": "What?", "answers": ["rape"], "section": "2", "explicit": "explicit"},
    ],
}
PASSAGE = {"title": "Fox", "passage": "It is red.", "question": "is a fox red", "answer": True}


@pytest.fixture(scope="module")
def script():
    path = ROOT / "recipes" / "smollm2_data.py"
    spec = importlib.util.spec_from_file_location("smollm2_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["smollm2_data.py", *map(str, words)])
    script.main()


def test_question_sets(script, monkeypatch, tmp_path):
    stories = write(tmp_path / "stories.jsonl", STORY)
    passages = write(tmp_path / "passages.jsonl", PASSAGE, {**PASSAGE, "answer": False})
    run(script, monkeypatch, "--fairytale", stories, "--boolq", passages, "--out", tmp_path)
    (story,) = read_question_sets(tmp_path / "fairytale.jsonl")
    assert len(story.documents) == 3, "an empty line is no paragraph"
    (asked,) = story.questions
    assert (asked.question, asked.answer) == ("Who came?", "a fox")
    assert asked.evidence == ((2, 11, 16),), "the place that is nearest to the named section"
    yes, no = read_question_sets(tmp_path / "boolq.jsonl")
    assert yes.questions[0].question == "Is a fox red?"
    assert [each.questions[0].answer for each in (yes, no)] == ["Yes", "No"]
    assert yes.questions[0].evidence == ((0, 0, len("Fox\nIt is red.")),)


def test_the_last_articles_are_put_apart(script, monkeypatch, tmp_path):
    asked = {"question": "Where?", "answers": [{"text": "Here", "answer_start": 0}]}
    articles = [
        {"title": str(number), "paragraphs": [{"context": "Here.", "qas": [asked]}]}
        for number in range(6)
    ]
    (tmp_path / "all.json").write_text(json.dumps({"data": articles}))
    run(script, monkeypatch, "--squad", tmp_path / "all.json", "--out", tmp_path)
    for name, numbers in (("squad", "01"), ("squad-val", "2345")):
        path = tmp_path / f"{name}.json"
        kept = json.loads(path.read_text())["data"]
        assert [each["title"] for each in kept] == list(numbers)
        assert len(list(read_question_sets(path))) == len(kept)


def test_prompts_about_texts(script, monkeypatch, tmp_path):
    folder = tmp_path / "p3"
    folder.mkdir()
    row = {"prompt": " Read this. ", "completion": " Yes <|endoftext|>"}
    write(
        folder / "quoref_a.jsonl",
        row,
        {**row, "completion": " <|endoftext|>"},
        {**row, "prompt": "a" * 9000},
    )
    write(folder / "social_i_qa_b.jsonl", row)
    run(script, monkeypatch, "--p3", folder, "--out", tmp_path)
    (found,) = read_conversations(tmp_path / "reading.jsonl")
    said = [(each.role, each.content) for each in found.messages]
    assert said == [("user", "Read this."), ("assistant", "Yes")]


def test_a_model_writes_prompts(script, monkeypatch, tmp_path, made_chat_model):
    run(script, monkeypatch, "--prompts", 5, "--base", made_chat_model, "--out", tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len(set(lines)) == 5
    for found in read_conversations(tmp_path / "prompts.jsonl"):
        (message,) = found.messages
        assert message.role == "user" and message.content.strip() == message.content != ""


def test_questions_are_reversed_and_written(script, monkeypatch, tmp_path, made_chat_model):
    text = "A fox met the king of Far Norway in 1893. He ate 12 grapes."
    row = {"documents": [text, "No."], "questions": ["When?", "Who?"], "answers": ["1893", "fox"]}
    source = write(
        tmp_path / "sets.jsonl", row, {"documents": ["Nothing."], "questions": [], "answers": []}
    )
    run(script, monkeypatch, "--reversed", source, "--out", tmp_path)
    when, who = read_conversations(tmp_path / "reversed.jsonl")
    assert when.messages[0].content == script.request(text, "1893")
    assert who.messages[1].content == "Who?"

    asked = []

    def answers(self, texts):
        asked.extend(texts)
        return ["When was it?" if "1893" in text.split(":")[-1] else "Is it 12?" for text in texts]

    monkeypatch.setattr(script.Writer, "answers", answers)
    monkeypatch.setattr(script, "ASKED", 9)
    run(script, monkeypatch, "--ask-about", source, "--base", made_chat_model, "--out", tmp_path)
    assert {text.split(": ")[-1] for text in asked} == {"Far Norway", "1893", "12"}
    (found,) = read_question_sets(tmp_path / "written.jsonl")
    assert [(each.question, each.answer) for each in found.questions] == [
        ("Is it 12?", "Far Norway"),
        ("When was it?", "1893"),
    ], "a question that holds its answer is left out"
    for each in found.questions:
        (span,) = each.evidence
        assert found.documents[span.document][span.begin : span.end] == each.answer


def test_a_writer_answers_each_message(script, made_chat_model):
    """In batches, padded, as one by one; what does not end is empty."""
    writer = script.Writer(str(made_chat_model), 0)
    asked = ["a fox", "a fox came by and ate", "a"]
    given = writer.tokenizer.apply_chat_template(
        [{"role": "user", "content": asked[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = writer.model.generate(**given, max_new_tokens=30, do_sample=False)
    writer.tokenizer.eos_token_id = int(written[0, -1])  # an end that comes in one of them at least
    together = writer.answers(asked)
    assert together == [writer.answers([text])[0] for text in asked]
    first = written[0, given["input_ids"].shape[1] :].tolist()
    first = first[: first.index(writer.tokenizer.eos_token_id)]
    assert together[0] == writer.tokenizer.decode(first).strip()


@pytest.fixture
def made_chat_model(tmp_path):
    """The folder of a tiny model with random weights, whose tokenizer has a chat template."""
    tokenizer = train_tokenizer([sentences(200)], 300)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    model = models.family_model("llama", vocab_size=len(tokenizer))
    folder = tmp_path / "chat"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
