"""`landmark eval agreement`: greedy answers of a reference, token by token, and perplexity."""

import json
import math

import pytest
import torch

from landmark.data.conversations import encode_conversations, read_conversations
from landmark.data.episodes import IGNORED
from landmark.eval import results
from landmark.eval.agreement import run
from landmark.eval.variants import Variant
from tiny import talking_tokenizer, tiny_landmark, tiny_llama, tiny_tokenizer

ANSWERED = [
    {"role": "user", "content": "Where is the gate?"},
    {"role": "assistant", "content": "In the north."},
    {"role": "user", "content": "And the key?"},
    {"role": "assistant", "content": "There as well, " * 20},
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": ANSWERED[:3]},
        {"messages": ANSWERED},
        {"prompt": "Who is there?"},
        {"prompt": "Who is there?", "completion": "Nobody."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_conversations(path))


@pytest.fixture(scope="module")
def reference():
    return Variant("stock", tiny_llama(), talking_tokenizer())


@pytest.fixture(scope="module")
def landmark():
    return Variant("landmark", tiny_landmark(), talking_tokenizer())


@torch.no_grad()
def next_tokens(variant, ids, places):
    """The logits behind each prefix, one prefix at a time."""
    return [variant.model(ids[None, :place]).logits[0, -1] for place in places]


def test_tokens_agree_and_losses_are_those_of_a_loop(chats, reference, landmark, tmp_path):
    seen = []
    recorder = results.Recorder(tmp_path / "rows.json", "cpu", seen.append)
    rows = run([landmark], reference, chats, recorder, data="x", max_new_tokens=12)
    assert rows == seen == results.read(tmp_path / "rows.json")
    own, kept = rows
    assert own.agreement == 1.0 and own.prompts == 2 and own.answer_tokens == 24
    assert kept.answer_tokens == 24 and kept.reference == "stock" and kept.attention == "landmark"
    agreed = 0
    for chat in (chats[0], chats[2]):
        messages = [each._asdict() for each in chat.messages]
        given = reference.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        ids = given[0]
        for _ in range(12):
            (logits,) = next_tokens(reference, ids, [len(ids)])
            (other,) = next_tokens(landmark, ids, [len(ids)])
            ids = torch.cat((ids, logits.argmax()[None]))
            agreed += int(other.argmax() == ids[-1])
    assert kept.agreed == agreed and kept.agreement == agreed / 24
    for row, variant in zip(rows, (reference, landmark), strict=True):
        losses = []
        for encoded in encode_conversations([chats[1], chats[3]], variant.tokenizer):
            ids = torch.from_numpy(encoded.ids)
            places = [at for at, label in enumerate(encoded.labels) if label != IGNORED]
            for at, logits in zip(places, next_tokens(variant, ids, places), strict=True):
                losses.append(-float(logits.log_softmax(-1)[ids[at]]))
        assert row.tokens == len(losses) and row.conversations == 2
        assert row.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert row.perplexity == pytest.approx(math.exp(row.loss))


def test_conversations_of_one_kind(chats, reference):
    (asked, _) = run(
        [reference], reference, chats[:1], lambda row: None, data="x", max_new_tokens=2
    )
    assert asked.perplexity is None and asked.answer_tokens == 2
    (said, _) = run([reference], reference, chats[1:2], lambda row: None, data="x")
    assert said.agreement is None and said.prompts == 0 and said.tokens > 80


def test_what_cannot_be_compared(chats, reference):
    other = Variant("other", tiny_llama(), tiny_tokenizer())
    with pytest.raises(ValueError, match="reference: expected the vocabulary of other, got"):
        run([other], reference, chats, print, data="x")
    with pytest.raises(ValueError, match="conversations: expected some, got none"):
        run([reference], reference, [], print, data="x")
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        run([reference], reference, chats, print, data="x", max_new_tokens=0)
