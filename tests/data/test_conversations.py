"""Conversations: what the assistant says has loss, rows are full, conversations are apart."""

import json

import numpy as np
import pytest

from chats import CHANGING, CHATML, REFUSING, chat
from landmark.data.chat import read_messages, render
from landmark.data.conversations import (
    PackedConversations,
    encode_conversations,
    read_conversations,
)
from landmark.data.episodes import IGNORED
from landmark.data.rows import stack
from landmark.data.text import kind_of
from landmark.data.tokenizer import train_tokenizer
from small_text import sentences


def made_tokenizer(template=None):
    tokenizer = train_tokenizer([sentences(200), "Question: Answer: user assistant"], 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write_chats(path, *chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def labelled(tokenizer, encoded):
    """The runs of tokens with loss, as text."""
    runs = []
    for place, label in enumerate(encoded.labels):
        if label == IGNORED:
            continue
        assert label == encoded.ids[place]
        if place and encoded.labels[place - 1] != IGNORED:
            runs[-1].append(label)
        else:
            runs.append([label])
    return [tokenizer.decode(run) for run in runs]


def test_loss_is_taken_on_what_the_assistant_says(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    path = write_chats(
        tmp_path / "a.jsonl", chat("Who?", "The old man.", "Where?", "At home.", system="Be short.")
    )
    (encoded,) = encode_conversations(read_conversations(path), tokenizer)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(
        chat("Who?", "The old man.", "Where?", "At home.", system="Be short."), tokenize=False
    )
    assert labelled(tokenizer, encoded) == ["The old man.<|im_end|>", "At home.<|im_end|>"]


def test_without_a_template_questions_and_answers_are_named(tmp_path):
    tokenizer = made_tokenizer()
    path = write_chats(tmp_path / "a.jsonl", chat("Who?", "The old man.", "Where?", "At home."))
    (encoded,) = encode_conversations(read_conversations(path), tokenizer)
    assert (
        tokenizer.decode(encoded.ids)
        == "Question: Who?\nAnswer: The old man.\n\nQuestion: Where?\nAnswer: At home.\n\n"
    )
    assert [run.rstrip("\n") for run in labelled(tokenizer, encoded)] == [
        " The old man.",
        " At home.",
    ]
    assert all(run.endswith("\n") for run in labelled(tokenizer, encoded))


def test_the_tokens_are_those_of_the_template(tmp_path):
    """With special tokens as such, and no other before them."""
    tokenizer = made_tokenizer(CHATML)
    messages = chat("Who?", "Nobody.")
    path = write_chats(tmp_path / "a.jsonl", messages)
    (encoded,) = encode_conversations(read_conversations(path), tokenizer)
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encoded.ids.tolist() == expected


def random_chats(tmp_path, tokenizer, count=40):
    rng = np.random.default_rng(0)
    words = sentences(300).split()
    chats = []
    for number in range(count):
        turns = [" ".join(rng.choice(words, rng.integers(1, 25))) for _ in range(2)]
        chats.append(chat(f"{number}: {turns[0]}", turns[1]))
    path = write_chats(tmp_path / "many.jsonl", *chats)
    return encode_conversations(read_conversations(path), tokenizer)


@pytest.mark.parametrize("tokens", [30, 100, 333])
def test_rows_are_packed(tmp_path, tokens):
    """Full, each conversation whole in a pass unless it is longer than a row, and apart."""
    conversations = random_chats(tmp_path, made_tokenizer(CHATML))
    rows = PackedConversations(conversations, tokens=tokens, seed=1)
    known = {tuple(each.ids.tolist()): number for number, each in enumerate(conversations)}
    whole = set()
    lengths = []
    per_epoch = len(rows._packed(0))
    for number in range(per_epoch):
        row = rows(number)
        assert len(row.input_ids) == len(row.labels) == len(row.documents) == tokens
        lengths.append(tokens)
        for document in range(int(row.documents.max()) + 1):
            here = row.documents == document
            assert row.labels[here][0] == IGNORED
            ids = tuple(row.input_ids[here].tolist())
            if ids in known:
                whole.add(known[ids])
                expected = conversations[known[ids]].labels
                assert np.array_equal(row.labels[here][1:], expected[1:])
            else:
                assert any(ids == long[: len(ids)] for long in known), "the beginning of one"
    longer = {number for ids, number in known.items() if len(ids) > tokens}
    assert whole == set(known.values()) - longer
    assert not np.array_equal(rows(per_epoch).input_ids, rows(0).input_ids)
    again = PackedConversations(conversations, tokens=tokens, seed=1)
    for number in (3 * per_epoch, 1):
        assert np.array_equal(again(number).input_ids, rows(number).input_ids)


def test_positions_begin_anew_with_each_conversation(tmp_path):
    conversations = random_chats(tmp_path, made_tokenizer(CHATML))
    rows = PackedConversations(conversations, tokens=150, seed=1)
    batch = stack([(rows(0),), (rows(1),)], answers=False)
    for row, positions in zip((rows(0), rows(1)), batch["position_ids"].tolist(), strict=True):
        expected = []
        for document in range(int(row.documents.max()) + 1):
            expected += range(int((row.documents == document).sum()))
        assert positions == expected


def test_one_conversation_fills_rows_alone(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    path = write_chats(tmp_path / "a.jsonl", chat("Who?", "Nobody."))
    (encoded,) = encode_conversations(read_conversations(path), tokenizer)
    row = PackedConversations([encoded], tokens=100, seed=0)(5)
    assert np.array_equal(row.input_ids, np.resize(encoded.ids, 100))


def test_kinds_of_sources(tmp_path):
    chats = write_chats(tmp_path / "a.jsonl", chat("Who?", "Nobody."))
    (tmp_path / "b.jsonl").write_text('{"text": "words"}\n')
    (tmp_path / "c.txt").write_text("words")
    (tmp_path / "d.jsonl").write_text("")
    assert kind_of(chats) == "messages"
    assert kind_of(tmp_path / "b.jsonl") == kind_of(tmp_path / "c.txt") == "text"
    assert kind_of(tmp_path) == kind_of(tmp_path / "d.jsonl") == kind_of("none.txt") == "text"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "expected a list of messages, got str; write objects with role and content"),
        ([], "expected a list of messages, got list"),
        (["hi"], "expected role and content, both strings, in message 1, got str"),
        ([{"content": "hi"}], "in message 1, got content of type str; write both"),
        ([{"role": "user", "content": 3}], "got role of type str, content of type int"),
        ([{"role": "user", "content": "a"}, {}], "in message 2, got neither; write both"),
    ],
)
def test_messages_that_are_none(value, message):
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 1: .*{message}"):
        read_messages(value, "a.jsonl, line 1")


def test_half_a_character_becomes_one():
    ((_, content),) = read_messages([{"role": "user", "content": "cut \ud83d off"}], "a")
    assert content == "cut \ufffd off"


def test_templates_that_fail(tmp_path):
    messages = read_messages(chat("Who?", "Nobody.", system="Be short."), "row 3")
    with pytest.raises(
        ValueError, match=r"^row 3: expected messages that the .* takes, .*no system here.*; mend"
    ):
        render(made_tokenizer(REFUSING), messages, "row 3")
    with pytest.raises(ValueError, match=r"^row 3: expected a chat template that only adds text"):
        render(made_tokenizer(CHANGING), messages, "row 3")


def test_conversations_without_an_assistant(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    both = write_chats(tmp_path / "a.jsonl", chat("Who?"), chat("Who?", "Nobody."))
    assert len(encode_conversations(read_conversations(both), tokenizer)) == 1
    none = write_chats(tmp_path / "b.jsonl", chat("Who?"), chat("Where?"))
    with pytest.raises(ValueError, match="in which an assistant says something, got 2 without"):
        encode_conversations(read_conversations(none), tokenizer)


def test_a_row_without_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": chat("Who?", "Nobody.")}) + "\n[1]\n")
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: expected a list of messages, got None"
    ):
        list(read_conversations(path))
