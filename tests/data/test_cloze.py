"""Inverse cloze: what is asked for is not in the text, and the answer is where it is said to be."""

from collections import Counter

import numpy as np
import pytest

from chats import CHATML
from landmark.data.cloze import QUESTIONS, WORD, Cloze
from landmark.data.episodes import IGNORED
from landmark.data.tokenizer import backend, train_tokenizer
from small_text import sentences

TEXT = sentences(4000)


@pytest.fixture(scope="module", params=[CHATML, None], ids=["template", "plain"])
def tokenizer(request):
    made = train_tokenizer([TEXT, *QUESTIONS], 600)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = request.param
    return made


@pytest.fixture(scope="module")
def ids(tokenizer):
    return np.array(backend(tokenizer).encode(TEXT).ids, dtype=np.uint16)


def text_of(tokenizer, row, tokens):
    decoded = tokenizer.decode(row.input_ids[tokens].tolist(), skip_special_tokens=True)
    return " ".join(decoded.split())


@pytest.mark.parametrize("tokens", [200, 800])
def test_answers_are_quoted_from_the_text(tokenizer, ids, tokens):
    make = Cloze(tokenizer, ids, tokens=tokens, seed=3, questions=3)
    counts = set()
    for number in range(60):
        row = make(number)
        assert len(row.input_ids) == len(row.labels) == len(row.answers) == tokens
        counts.add(len(row.questions))
        assert np.array_equal(row.labels != IGNORED, row.answers)
        answers = np.zeros(tokens, dtype=bool)
        for question in row.questions:
            answers[question.answer] = True
            (evidence,) = question.evidence
            answer = text_of(tokenizer, row, question.answer)
            assert answer == text_of(tokenizer, row, evidence)
            assert evidence.stop <= row.questions[0].tokens.start
            assert 8 <= len(evidence) <= 64
        assert np.array_equal(answers, row.answers)
    assert counts == {1, 2, 3} if tokens == 800 else 1 in counts


def test_most_sentences_are_taken_out_and_shared_words_dropped(tokenizer, ids):
    make = Cloze(tokenizer, ids, tokens=600, seed=1, questions=1)
    whole = " ".join(TEXT.split())
    stays = shorter = 0
    for number in range(150):
        row = make(number)
        (question,) = row.questions
        (evidence,) = question.evidence
        answer = text_of(tokenizer, row, evidence)
        before = text_of(tokenizer, row, range(max(0, evidence.start - 64), evidence.start))
        is_whole = f"{before[-40:]} {answer}" in whole
        stays += is_whole
        asked = text_of(tokenizer, row, range(question.tokens.start, question.answer.start))
        assert len(WORD.findall(asked)) >= 4
        shorter += not any(
            sentence.strip() and sentence.strip() in asked for sentence in whole.split(".")
        )
    assert 3 <= stays <= 35, "a tenth of them"
    assert shorter > 100, "what is asked is no sentence of the text"


def test_a_row_follows_from_seed_and_number(tokenizer, ids):
    make = Cloze(tokenizer, ids, tokens=300, seed=3)
    again = Cloze(tokenizer, ids, tokens=300, seed=3)
    other = Cloze(tokenizer, ids, tokens=300, seed=4)
    for number in (5, 0, 10**8):
        assert np.array_equal(make(number).input_ids, again(number).input_ids)
        assert not np.array_equal(make(number).input_ids, other(number).input_ids)


def test_rarer_shared_words_go_first(tokenizer, ids):
    make = Cloze(tokenizer, ids, tokens=300, seed=3)
    make._frequency = Counter({"the": 1000, "was": 100, "river": 50, "aardvark": 1})
    sentence = "The aardvark saw the river, and the lamp was green."
    left = make._without_shared(sentence, {"the", "aardvark", "river", "was"})
    assert "aardvark" not in left and "river" not in left
    assert left.split()[0] == "The" and "lamp" in left and "green" in left
    assert make._without_shared(sentence, set()) == sentence
    assert len(WORD.findall(make._without_shared("a b c d", {"a", "b", "c", "d"}))) == 4


def test_texts_that_cannot_ask(tokenizer, ids):
    with pytest.raises(ValueError, match=r"at least 100000 tokens \(two rows\), got"):
        Cloze(tokenizer, ids, tokens=50_000, seed=0)
    silent = np.array(backend(tokenizer).encode("the old man " * 400).ids, dtype=np.uint16)
    with pytest.raises(ValueError, match="cloze: expected a text with sentences of 8 to 64 tokens"):
        Cloze(tokenizer, silent, tokens=200, seed=0)(0)
