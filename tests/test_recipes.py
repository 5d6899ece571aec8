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


def test_prompts_about_texts(script, monkeypatch, tmp_path):
    folder = tmp_path / "p3"
    folder.mkdir()
    row = {"prompt": " Read this. ", "completion": " Yes \n"}
    write(folder / "quoref_a.jsonl", row, {**row, "completion": " "}, {**row, "prompt": "a" * 9000})
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
