"""Documents: exact lengths, facts where they are said to be, questions that split where the answer
begins.
"""

import random

import pytest
import torch

from landmark.eval.episodes import BUCKETS, bucket_of, build_episode, named_codes, pass_key
from landmark.eval.fillers import PAPER, Filler, load_filler
from landmark.texts.reading import tokenize


def test_filler_goes_round():
    filler = Filler("x", torch.arange(5))
    assert filler.take(3, 9).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_tokenizing_in_pieces_keeps_the_text(tokenizer, monkeypatch):
    text = "one line\nand 12 more\n\n" * 40
    monkeypatch.setattr("landmark.data.encoding.PIECE", 50)
    monkeypatch.setattr("landmark.data.encoding.OVERLAP", 32)
    assert tokenizer.decode(tokenize(text, tokenizer).tolist()) == text


def test_fillers_by_name(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    assert tokenizer.decode(load_filler("paper", tokenizer).ids.tolist()) == PAPER + " "
    assert len(load_filler("pydoc", tokenizer).ids) > 100_000
    assert tokenizer.decode(load_filler(str(tmp_path), tokenizer).ids.tolist()) == "first\n\nsecond"


@pytest.mark.parametrize("length", [200, 201, 777])
@pytest.mark.parametrize("bucket", range(BUCKETS))
def test_document_is_as_long_as_said_and_holds_the_fact_where_said(tokenizer, length, bucket):
    rng = random.Random(length + bucket)
    fact = pass_key(rng)
    (other,) = named_codes(rng, 1, digits=5)
    episode = build_episode(
        rng, tokenizer, load_filler("paper", tokenizer), length, [fact], [other], bucket
    )
    assert len(episode.document) == length
    (place,) = episode.places
    assert tokenizer.decode(episode.document[place.start : place.stop].tolist()) == fact.statement
    ((first, second),) = episode.evidence
    for mention in (first, second):
        said = tokenizer.decode(episode.document[mention.start : mention.stop].tolist())
        assert said.strip() == fact.answer.strip()
        assert place.start < mention.start < mention.stop < place.stop
    assert other.statement in tokenizer.decode(episode.document.tolist())
    left = (
        tokenizer.decode(episode.document.tolist())
        .replace(fact.statement, "", 1)
        .replace(other.statement, "", 1)
    )
    assert (PAPER + " ").startswith(left[: len(PAPER)])


def test_buckets_spread_over_a_long_document(tokenizer):
    filler = load_filler("paper", tokenizer)
    length = 20_000
    for bucket in range(BUCKETS):
        rng = random.Random(bucket)
        episode = build_episode(rng, tokenizer, filler, length, [pass_key(rng)], bucket=bucket)
        assert abs(episode.places[0].start / length - (bucket + 0.5) / BUCKETS) <= 0.051
        assert bucket_of(episode.places[0].start, length) in (bucket - 1, bucket)


def test_question_ends_with_the_answer(tokenizer):
    rng = random.Random(0)
    fact = pass_key(rng)
    episode = build_episode(rng, tokenizer, load_filler("paper", tokenizer), 300, [fact])
    (question,) = episode.questions
    assert tokenizer.decode(question.ids) == fact.question + fact.answer
    assert tokenizer.decode(question.ids[-question.answered :]) == fact.answer


def test_named_codes_differ():
    facts = named_codes(random.Random(0), 200)
    assert len({fact.answer for fact in facts}) == len({fact.question for fact in facts}) == 200
    assert all(fact.answer.strip() in fact.statement and len(fact.answer) == 5 for fact in facts)


def test_same_seed_same_document(tokenizer):
    filler = load_filler("pydoc", tokenizer)

    def make():
        return build_episode(
            random.Random(3), tokenizer, filler, 400, named_codes(random.Random(4), 2)
        )

    first = make()
    second = make()
    assert torch.equal(first.document, second.document)
    assert first.questions == second.questions


def test_too_short_a_document_says_what_fits(tokenizer):
    with pytest.raises(
        ValueError, match=r"^lengths: expected at least \d+ text tokens for 8 facts, got 60"
    ):
        build_episode(
            random.Random(0),
            tokenizer,
            load_filler("paper", tokenizer),
            60,
            named_codes(random.Random(0), 8),
        )


def test_more_codes_than_names():
    with pytest.raises(ValueError, match="at most 256 in one document, got 257"):
        named_codes(random.Random(0), 257)
