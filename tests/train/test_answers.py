"""A teacher's answers: what it would write to each prompt, sampled once and kept."""

import json

import pytest
import torch
from toy import silent, toy_recipe
from transformers import AutoModelForCausalLM

from landmark.data.chat import Message, chat_ends, prompt_of
from landmark.data.conversations import read_conversations
from landmark.data.text import kind_of
from landmark.data.tokenizer import encode, load_tokenizer
from landmark.train import answers as module
from landmark.train.answers import TeacherAnswers
from landmark.train.run import train


@pytest.fixture
def teacher(twin):
    model = AutoModelForCausalLM.from_pretrained(twin[0], dtype=torch.float64).eval()
    return model, load_tokenizer(twin[0])


@pytest.fixture
def prompts(tmp_path):
    """Of different lengths, one of them answered, one with turns before it."""
    rows = [
        {"prompt": "Who went over the river?"},
        {"prompt": "Where?"},
        {"prompt": "When?", "completion": "At night."},
        {
            "messages": [
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "The old man."},
                {"role": "user", "content": "Was he never asked where the house was?"},
            ]
        },
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_conversations(prompts):
    found = list(read_conversations(prompts))
    assert kind_of(prompts) == "messages"
    assert [len(each.messages) for each in found] == [1, 1, 2, 3]
    assert found[2].messages == (("user", "When?"), ("assistant", "At night."))


def test_answers_are_what_the_teacher_writes(teacher, prompts, tmp_path, monkeypatch):
    """In batches with padding, at a temperature that takes the most probable token."""
    monkeypatch.setattr(module, "TEMPERATURE", 1e-4)
    monkeypatch.setattr(module, "NEW_TOKENS", 8)
    model, tokenizer = teacher
    asked = list(read_conversations(prompts))
    found = TeacherAnswers(model, "twin", tokenizer, tmp_path, 1)(asked)
    ends = chat_ends(tokenizer, model.generation_config.eos_token_id)
    for before, after in zip(asked, found, strict=True):
        if before.messages[-1].role == "assistant":
            assert after == before
            continue
        ids = encode(tokenizer, prompt_of(tokenizer, before.messages, "a")).ids
        written = model.generate(
            torch.from_numpy(ids)[None], max_new_tokens=8, do_sample=False, eos_token_id=ends
        )[0, len(ids) :].tolist()
        text = tokenizer.decode([token for token in written if token not in ends]).strip()
        assert after.messages == (*before.messages, ("assistant", text))


def test_without_memory_fewer_are_answered_at_once(teacher, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TEMPERATURE", 1e-4)
    monkeypatch.setattr(module, "NEW_TOKENS", 8)
    model, tokenizer = teacher
    asked = list(read_conversations(prompts))
    expected = TeacherAnswers(model, "twin", tokenizer, tmp_path / "a", 1)(asked)
    generate = model.generate
    rows = []

    def scarce(ids, **options):
        rows.append(len(ids))
        if len(ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(ids, **options)

    monkeypatch.setattr(model, "generate", scarce)
    limit = 1
    assert TeacherAnswers(model, "twin", tokenizer, tmp_path / "b", 1)(asked) == expected
    assert rows[0] == 3 and rows.count(1) == 3
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        TeacherAnswers(model, "twin", tokenizer, tmp_path / "c", 1)(asked)


def test_answers_are_sampled_once(teacher, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NEW_TOKENS", 8)
    model, tokenizer = teacher
    asked = list(read_conversations(prompts))
    heard = []
    first = TeacherAnswers(model, "twin", tokenizer, tmp_path / "a", 1)(
        asked, lambda *done: heard.append(done)
    )
    assert heard[-1] == ("prompts answered by the teacher", 3, 3)
    state = torch.get_rng_state()
    other = TeacherAnswers(model, "twin", tokenizer, tmp_path / "b", 1)(asked)
    assert other == first, "the seed decides"
    assert torch.equal(torch.get_rng_state(), state), "and nobody else's random numbers"
    assert TeacherAnswers(model, "twin", tokenizer, tmp_path / "c", 2)(asked) != first
    monkeypatch.setattr(model, "generate", None)
    assert TeacherAnswers(model, "twin", tokenizer, tmp_path / "a", 1)(asked) == first
    with pytest.raises(TypeError):
        TeacherAnswers(model, "another", tokenizer, tmp_path / "a", 1)(asked)


def test_a_run_trains_on_them(twin, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NEW_TOKENS", 8)
    recipe = toy_recipe(steps=2, episodes=0.0, teacher="stock")
    options = {"recipe": recipe, "model": str(twin[0]), "report": silent}
    summary = train(str(prompts), tmp_path / "out", **options)
    (kept,) = (tmp_path / "out" / "tokens").glob("answers-*.json")
    assert len(json.loads(kept.read_text())) == 3
    tokenizer = load_tokenizer(twin[0])
    alone = encode(tokenizer, prompt_of(tokenizer, [Message("user", "Where?")], "a"))
    assert summary["texts"][0]["tokens"] > 4 * len(alone)


def test_without_a_teacher_prompts_are_left_out(twin, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Who?"}\n')
    with pytest.raises(ValueError, match="in which an assistant says something, got 1 without"):
        train(
            str(tmp_path / "a.jsonl"),
            tmp_path / "out",
            recipe=toy_recipe(episodes=0.0),
            model=str(twin[0]),
            report=silent,
        )
