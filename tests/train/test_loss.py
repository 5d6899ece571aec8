"""The loss, against loops over tokens."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from landmark.train.loss import answer_weighted_loss, answers_right, text_loss, token_losses
from small_text import sentences

VOCAB = 11


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 9, VOCAB, generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (3, 9), generator=random)
    labels[:, 0] = -100
    labels[1, 4:6] = -100
    answers = torch.zeros(3, 9, dtype=torch.bool)
    answers[0, 5:8] = answers[2, 2] = answers[2, 8] = True
    return logits, labels, answers


def by_hand(logits, labels):
    """Cross-entropy of ``labels[b, t]`` given ``logits[b, t - 1]``, token by token."""
    found = {}
    for b in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                found[b, t] = -torch.log_softmax(logits[b, t - 1].float(), -1)[labels[b, t]]
    return found


def test_token_losses(batch):
    logits, labels, _ = batch
    losses = token_losses(logits, labels)
    expected = torch.zeros(3, 9)
    for place, value in by_hand(logits, labels).items():
        expected[place] = value
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


def test_weighted_mean(batch):
    logits, labels, answers = batch
    losses = by_hand(logits, labels)
    text = sum(losses.values()) / len(losses)
    asked = [value for place, value in losses.items() if answers[place]]
    expected = text + 0.3 * sum(asked) / len(asked)
    torch.testing.assert_close(answer_weighted_loss(logits, labels, answers, 0.3), expected)


def test_without_answers_in_the_batch(batch):
    logits, labels, answers = batch
    nothing = torch.zeros_like(answers)
    loss = answer_weighted_loss(logits, labels, nothing, 0.5)
    torch.testing.assert_close(loss, text_loss(token_losses(logits, labels), labels))


def test_parts_add_up_to_the_whole(batch):
    """Text and answers are averaged over all parts."""
    logits, labels, answers = batch
    items = (labels != -100).sum()
    asked = answers.sum()
    parts = [
        answer_weighted_loss(
            logits[i : i + 1], labels[i : i + 1], answers[i : i + 1], 0.3, items, asked
        )
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), answer_weighted_loss(logits, labels, answers, 0.3))


def test_weight_zero_is_the_loss_of_the_stock_model():
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **fields, num_attention_heads=2)
    )
    ids = torch.arange(20).view(2, 10) % VOCAB
    output = model(input_ids=ids, labels=ids)
    ours = answer_weighted_loss(output.logits, ids, torch.ones_like(ids, dtype=torch.bool), 0.0)
    torch.testing.assert_close(ours, output.loss)


def test_right_answers_are_counted(batch):
    logits, labels, answers = batch
    logits = logits.detach().clone()
    logits[0, 4, labels[0, 5]] = logits[0, 6, labels[0, 7]] = logits[2, 1, labels[2, 2]] = 99.0
    logits[0, 5, (labels[0, 6] + 1) % VOCAB] = logits[2, 7, (labels[2, 8] + 1) % VOCAB] = 99.0
    right, asked = answers_right(logits, labels, answers)
    assert right.tolist() == [2, 0, 1] and asked.tolist() == [3, 0, 2]


def test_small_text_differs_by_seed():
    assert sentences(3, 1) == sentences(3, 1) != sentences(3, 2)
