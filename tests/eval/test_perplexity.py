"""Perplexity: loss over all tokens, the same text at every length, and the columns of Table 1."""

import dataclasses
import math

import pytest
import torch

from landmark.data.text import Document
from landmark.data.tokenizer import train_tokenizer
from landmark.eval import perplexity
from landmark.eval.fillers import pydoc_text
from tiny import BLOCK

TEXT = BLOCK - 1


def documents(*sizes):
    text = pydoc_text()
    return [
        Document(f"d{i}", text[i * 40_000 : i * 40_000 + size], "") for i, size in enumerate(sizes)
    ]


def test_spans_do_not_overlap_and_come_from_every_document(tokenizer):
    texts = documents(6000, 6000, 50)
    spans = perplexity.choose_spans(texts, tokenizer, 200, 10 * 200, seed=1)
    assert spans.shape == (10, 200)
    decoded = [tokenizer.decode(span.tolist()) for span in spans]
    assert len(set(decoded)) == 10
    owners = [[text.title for text in texts if piece in text.text] for piece in decoded]
    assert {owner for (owner,) in owners} == {"d0", "d1"}
    assert torch.equal(spans, perplexity.choose_spans(texts, tokenizer, 200, 10 * 200, seed=1))
    assert not torch.equal(spans, perplexity.choose_spans(texts, tokenizer, 200, 10 * 200, seed=2))


def test_no_document_is_long_enough(tokenizer):
    with pytest.raises(ValueError, match="documents of at least 500 tokens, got 2 shorter ones"):
        perplexity.choose_spans(documents(50, 60), tokenizer, 500, 1000, 0)


@pytest.mark.parametrize("kind", ["plain", "marked"])
def test_mean_loss_is_that_of_every_token_but_the_first(kind, request, monkeypatch):
    variant = request.getfixturevalue(kind)
    segments = torch.randint(0, 290, (3, 130), generator=torch.Generator().manual_seed(0))
    losses = []
    for segment in segments:
        for end in range(1, 130):
            context = segment[None, :end]
            if end % 40 in (0, 1, 39):
                losses.append((end, -variant.logits(context)[0, -1].log_softmax(-1)[segment[end]]))
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", {"cpu": 2 * 130})
    got = perplexity.mean_loss(variant, segments)
    every = variant.logits(segments)[:, :-1].log_softmax(-1)
    every = -every.gather(-1, segments[:, 1:, None])[..., 0]
    assert got == pytest.approx(float(every.mean()), abs=1e-6)
    wanted = torch.stack([loss for _, loss in losses])
    found = torch.cat([row[[end - 1 for end, _ in losses[: len(losses) // 3]]] for row in every])
    assert torch.allclose(found, wanted, atol=1e-8)


def test_models_of_different_vocabularies_are_refused(plain):
    other = dataclasses.replace(
        plain, name="other", tokenizer=train_tokenizer(["Different words."], 280)
    )
    task = perplexity.PerplexityTask(lengths=(40,), max_tokens=400)
    with pytest.raises(
        ValueError, match=r"^compare: expected the vocabulary of .* got another in other"
    ):
        rows_of([plain, other], task, None)


def rows_of(variants, task, tokenizer, size=8000):
    return perplexity.run(variants, task, documents(size), "pydoc", lambda row: None)


def test_every_length_measures_the_same_text(marked, plain, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        perplexity, "mean_loss", lambda variant, segments, *_: seen.append(segments) or 1.0
    )
    task = perplexity.PerplexityTask(lengths=(60, 240), local=(30,), top_k=(2,), max_tokens=960)
    rows = rows_of([marked, plain], task, tokenizer)
    assert [(row.length, row.segments, row.tokens) for row in rows] == [
        (60, 16, 944),
        (240, 4, 956),
    ] * 2
    assert all(torch.equal(segments.flatten(), seen[0].flatten()) for segments in seen)
    assert all(row.perplexity == math.e for row in rows)


def test_columns_of_the_papers_scheme(marked, tokenizer):
    task = perplexity.PerplexityTask(
        lengths=(240,), local=(30, 31), blocks=5, top_k=(2, 0), granularity="head", max_tokens=480
    )
    whole, started, *without = rows_of([marked], task, tokenizer)
    assert (whole.scheme, whole.local, whole.blocks, whole.top_k, whole.attention_size) == (
        "paper",
        30,
        5,
        2,
        30 + 2 * TEXT,
    )
    assert started.attention_size == 31 + (TEXT - 1) + 2 * TEXT
    assert {
        name: whole.settings[name]
        for name in ("local", "chunk_tokens", "max_blocks", "top_k", "granularity")
    } == {
        "local": "chunk",
        "chunk_tokens": 30,
        "max_blocks": 5,
        "top_k": 2,
        "granularity": "head",
    }
    assert [(row.top_k, row.attention_size, row.granularity) for row in without] == [
        (0, 4 * TEXT, None),
        (0, 5 * TEXT, None),
    ]
    assert whole.beyond_trained is False


def test_without_retrieval_attends_to_as_much(marked, tokenizer):
    task = perplexity.PerplexityTask(
        lengths=(240,), scheme="blocks", local_blocks=(1,), top_k=(0, 2, 3), max_tokens=480
    )
    rows = rows_of([marked], task, tokenizer)
    assert [(row.top_k, row.local, row.attention_size) for row in rows] == [
        (2, 2 * TEXT, 4 * TEXT),
        (3, 2 * TEXT, 5 * TEXT),
        (0, 3 * TEXT, 4 * TEXT),
        (0, 4 * TEXT, 5 * TEXT),
    ]
    assert rows[2].settings["layers"] == []
    assert marked.model.landmark.layers is None, "settings are restored"


def test_without_retrieval_nothing_old_but_block_0_matters(marked, tokenizer):
    """What the row claims, on the model: changing an old block changes nothing, changing block 0
    does.
    """
    changes = perplexity._without_retrieval(marked.model.landmark, 2).changes
    ids = torch.randint(0, 290, (1, 12 * TEXT), generator=torch.Generator().manual_seed(0))
    with marked.configured(**changes):
        base = marked.logits(ids)[0, -1]
        # two layers reach back twice the two local blocks
        for block, matters in ((0, True), (1, False), (6, False), (7, True), (11, True)):
            changed = ids.clone()
            changed[0, block * TEXT + 3] = 295
            assert torch.allclose(marked.logits(changed)[0, -1], base, atol=1e-12) is not matters


def test_labels_what_lies_beyond_the_trained_length(marked, plain, tokenizer):
    task = perplexity.PerplexityTask(lengths=(120, 240), local=(100,), top_k=(2,), max_tokens=480)
    rows = rows_of([marked, plain], task, tokenizer)
    assert [(row.attention, row.length, row.beyond_trained) for row in rows] == [
        ("landmark", 120, False),
        ("landmark", 240, True),
        ("full", 120, False),
        ("full", 240, True),
    ]
    assert rows[0].attention_size == 120
