"""Synthetic episodes: exact lengths and labels, right answers, varied, held out from what
evaluation asks.
"""

import random
import re
from collections import Counter

import numpy as np
import pytest

from landmark.data import wordings
from landmark.data.episodes import IGNORED, Episodes, _names, _subjects, sentence_ends
from landmark.data.tokenizer import backend

TOKENS = 504
COUNT = 600


@pytest.fixture(scope="module")
def make(ids, tokenizer):
    return Episodes(backend(tokenizer), ids, tokens=TOKENS, seed=7, block_tokens=63)


@pytest.fixture(scope="module")
def rows(make):
    return [make(index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def digits(tokenizer):
    return {tokenizer.convert_tokens_to_ids(str(digit)): str(digit) for digit in range(10)}


def numbers(row, digits):
    """Runs of digit tokens as (value, places)."""
    runs = []
    run = []
    for place, token in enumerate([*row.input_ids.tolist(), -1]):
        if token in digits:
            run.append(place)
        elif run:
            runs.append(("".join(digits[int(row.input_ids[p])] for p in run), run))
            run = []
    return runs


def test_rows_are_full(rows):
    for row in rows:
        assert row.input_ids.shape == row.labels.shape == row.answers.shape == (TOKENS,)
        assert row.input_ids.dtype == row.labels.dtype == np.int64 and row.answers.dtype == bool


def test_labels_are_exact(rows, digits):
    """No loss at the first token and at a code's first mention; answers are later mentions; all
    else is text.
    """
    for row in rows:
        said = set()
        silent = {0}
        later = set()
        for value, places in numbers(row, digits):
            (later if value in said else silent).update(places)
            said.add(value)
        assert set(np.flatnonzero(row.labels == IGNORED)) == silent
        kept = row.labels != IGNORED
        assert np.array_equal(row.labels[kept], row.input_ids[kept])
        taught = set(np.flatnonzero(row.answers))
        assert {place for place in taught if row.input_ids[place] in digits} <= later


def test_answers_are_the_codes_of_what_was_asked(rows, tokenizer):
    asked = 0
    for row in rows:
        text = re.sub(r"\b(Mrs?)\.", r"\1", tokenizer.decode(row.input_ids.tolist()))
        for label, name, value in re.findall(
            r"What is the ([^?]+?) of ([^?]+)\? The \1 of \2 is (\d+)\.", text
        ):
            before = text[: text.index(f"What is the {label} of {name}?")]
            facts = [
                s
                for s in re.findall(r"[^.\n\[\]]*\d+[^.\n\[\]]*", before)
                if re.search(rf"\b{name}\b(?!')", s) and re.search(rf"\b{label}\b", s)
            ]
            assert facts and all(value in fact for fact in facts), (facts, value)
            asked += 1
        key = re.search(r"What is the pass key\? The pass key is (\d+)\.", text)
        if key:
            before = text[: key.start()]
            assert re.search(
                rf"pass key\b[^.\d]*{key[1]}\b|\b{key[1]}\b[^.\d]* pass key", before
            ), before
            asked += 1
    assert asked > 100


def test_every_question_follows_its_fact(rows, digits):
    for row in rows:
        first = {}
        for value, places in numbers(row, digits):
            first.setdefault(value, places[0])
            if row.answers[places[0]]:
                assert all(row.answers[places]) and first[value] < places[0]


def test_questions_say_where_their_answer_was_said(rows, tokenizer):
    """Each with all mentions before it; the first of them has no loss. A space before the answer
    is taught with it."""
    space = tokenizer.convert_tokens_to_ids("Ġ")
    spaces = 0
    seen = 0
    for row in rows:
        answers = np.zeros(TOKENS, dtype=bool)
        for question in row.questions:
            answers[question.answer] = True
            before = question.answer.start - 1
            answers[before] = row.input_ids[before] == space
            spaces += answers[before]
            assert question.tokens.stop == question.answer.stop
            assert question.tokens.start < question.answer.start
            wanted = row.input_ids[question.answer].tolist()
            text = tokenizer.decode(row.input_ids[: question.tokens.start].tolist())
            code = tokenizer.decode(wanted)
            said = len(re.findall(rf"(?<!\d){code}(?!\d)", text))
            assert [row.input_ids[tokens].tolist() for tokens in question.evidence] == said * [
                wanted
            ]
            assert question.evidence[-1].stop <= question.tokens.start
            assert (row.labels[question.evidence[0]] == IGNORED).all()
            seen += said
        assert np.array_equal(answers, row.answers)
    assert seen > COUNT and spaces > COUNT // 2


def subjects(row, tokenizer):
    """What the codes of a row are of, as (kind, name), by plain statements."""
    text = tokenizer.decode(row.input_ids.tolist())
    return set(re.findall(r"The ([a-z ]+?) of ([^.?]+?) is \d+\.", text))


def test_rows_hold_as_many_facts_as_asked_for(ids, tokenizer):
    make = Episodes(
        backend(tokenizer),
        ids,
        tokens=4000,
        seed=3,
        block_tokens=63,
        facts=64,
        questions=16,
        distractors=40,
    )
    rows = [make(index) for index in range(60)]
    assert max(len(row.questions) for row in rows) > 12
    stated = [len(subjects(row, tokenizer)) for row in rows]
    assert max(stated) > 40
    for row in rows:
        for question in row.questions:
            wanted = row.input_ids[question.answer].tolist()
            assert all(row.input_ids[tokens].tolist() == wanted for tokens in question.evidence)


@pytest.mark.parametrize("prefix", [[], [0]])
def test_blocks_end_inside_codes_more_often_than_by_chance(ids, tokenizer, prefix):
    """A code of four digits is divided by chance in about one of twenty facts."""
    block_tokens = 63
    make = Episodes(
        backend(tokenizer),
        ids,
        tokens=4032,
        seed=3,
        block_tokens=block_tokens,
        prefix=prefix,
        facts=64,
        questions=64,
    )
    codes = [
        question.evidence[0]
        for index in range(60)
        for question in make(index).questions
        if len(question.evidence[0]) > 1
    ]
    divided = [code.start // block_tokens != (code.stop - 1) // block_tokens for code in codes]
    assert len(codes) > 400
    assert 0.15 < sum(divided) / len(codes) < 0.3


@pytest.mark.parametrize("count", [1, 8, 64])
def test_some_facts_differ_by_their_kind_alone(count):
    shared = 0
    for seed in range(400):
        found = _subjects(random.Random(seed), count)
        assert len(found) == len(set(found)) == count
        names = Counter(subject.name for subject in found)
        if max(names.values()) == 1:
            continue
        shared += 1
        kinds = {subject.label for subject in found}
        assert len(kinds) <= 3 and len(names) <= 1 + count // 2
        assert not any(a != b and a in b for a in kinds for b in kinds), kinds
    assert abs(shared / 400 - 0.25) < 0.08 or (count == 1 and shared == 0)


def test_a_third_of_names_share_their_words():
    few = 0
    for seed in range(300):
        names = _names(random.Random(seed), 40)
        assert len(set(names)) == 40
        words = Counter(word for name in names for word in name.split() if word != "the")
        few += sum(times > 1 for times in words.values()) > len(words) / 2
    assert abs(few / 300 - 1 / 3) < 0.08


def test_shares_of_kinds(rows, digits):
    quotes = sum(not row.answers.any() for row in rows) / COUNT
    assert abs(quotes - 0.15) < 0.05
    lengths = Counter(
        len(value)
        for row in rows
        for value, places in numbers(row, digits)
        if row.answers[places[0]]
    )
    assert set(lengths) == {3, 4, 5, 6, 7}
    questions = Counter(
        sum(row.answers[places[0]] for _, places in numbers(row, digits)) for row in rows
    )
    assert set(questions) == {0, 1, 2, 3, 4}


def test_answers_lie_everywhere(rows):
    """Questions come at any place of the row, also inside a block, not at its end only."""
    places = [np.flatnonzero(row.answers)[0] for row in rows if row.answers.any()]
    assert min(places) < TOKENS // 4 and max(places) > TOKENS - 16
    assert len({place % 63 for place in places}) > 55


def test_quoted_passages_were_said_before(rows):
    for row in (row for row in rows if not row.answers.any()):
        text = row.input_ids.tolist()
        length = TOKENS // 32
        grams = [tuple(text[i : i + length]) for i in range(TOKENS - length + 1)]
        assert len(set(grams)) < len(grams)


def test_row_follows_from_seed_and_index(make, ids, tokenizer):
    again = Episodes(backend(tokenizer), ids, tokens=TOKENS, seed=7, block_tokens=63)
    other = Episodes(backend(tokenizer), ids, tokens=TOKENS, seed=8, block_tokens=63)
    for index in (40, 3, 10**9):
        assert np.array_equal(again(index).input_ids, make(index).input_ids)
        assert np.array_equal(again(index).answers, make(index).answers)
        assert not np.array_equal(other(index).input_ids, make(index).input_ids)


def test_wordings_vary(rows, tokenizer):
    text = "\n".join(tokenizer.decode(row.input_ids.tolist()) for row in rows)
    for wording in (*wordings.KEY_QUESTIONS, *wordings.FACT_QUESTIONS, *wordings.KEY_STATEMENTS):
        pattern = re.escape(wording)
        for field in ("label", "name", "value"):
            pattern = pattern.replace(re.escape("{" + field + "}"), r"[^?\n]+")
        assert re.search(pattern, text), wording


def test_the_filler_of_the_paper_is_held_out(rows, tokenizer):
    """Evaluation repeats it; no wording and no row may hold a sentence of it."""
    said = " ".join(
        part
        for name in dir(wordings)
        if name.isupper()
        for part in map(str, getattr(wordings, name))
    )
    said += " ".join(tokenizer.decode(row.input_ids.tolist()) for row in rows)
    for sentence in (
        "grass is green",
        "sky is blue",
        "sun is yellow",
        "Here we go",
        "There and back again",
    ):
        assert sentence.lower() not in said.lower()


@pytest.mark.parametrize("tokens", [128, 160, 250])
def test_short_rows_hold_fewer_facts(ids, tokenizer, tokens):
    make = Episodes(backend(tokenizer), ids, tokens=tokens, seed=1, block_tokens=63, prefix=[0])
    for index in range(200):
        row = make(index)
        assert len(row.input_ids) == tokens and row.input_ids[0] == 0


def test_ids_of_a_vocabulary_may_have_holes():
    class Sparse:
        def get_vocab(self):
            return {"a": 0, "b.": 7}

    assert sentence_ends(Sparse()).tolist() == [False] * 7 + [True]
