"""Documents with questions: what is read, and rows that hold the evidence where they say it is."""

import json

import numpy as np
import pytest
from test_conversations import made_tokenizer

from chats import CHATML
from landmark.data.episodes import IGNORED
from landmark.data.haystacks import Haystacks
from landmark.data.questions import read_question_sets
from landmark.data.text import kind_of
from small_text import sentences

SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Ob flows north. It is long.",
                    "qas": [
                        {
                            "question": "Where does the Ob flow?",
                            "answers": [{"text": "north", "answer_start": 13}],
                            "is_impossible": False,
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "The Nile is longer.", "qas": []},
            ],
        },
        {"title": "Empty", "paragraphs": [{"context": "Nothing.", "qas": []}]},
    ],
}
ROW = {
    "documents": ["The gate is red.", "The key is 71432. The key is small."],
    "questions": ["What is the key?", "Which colour has the gate?"],
    "answers": [["71432", "the key"], "red"],
}


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_squad_json(tmp_path):
    path = write(tmp_path / "squad.json", SQUAD)
    article, empty = read_question_sets(path)
    assert (empty.documents, empty.questions) == (("Nothing.",), ())
    assert article.documents == ("The Ob flows north. It is long.", "The Nile is longer.")
    (asked,) = article.questions
    assert (asked.question, asked.answer, asked.evidence) == (
        "Where does the Ob flow?",
        "north",
        ((0, 13, 18),),
    )
    assert kind_of(path) == "questions"


def test_rows_with_and_without_evidence(tmp_path):
    spans = [[[1, 4, 16], [0, 0, 3]], [[0, 12, 15]]]
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, "evidence": spans})
    found, given = read_question_sets(path)
    assert [asked.evidence for asked in found.questions] == [((1, 11, 16),), ((0, 12, 15),)]
    assert [asked.answer for asked in found.questions] == ["71432", "red"]
    assert [asked.evidence for asked in given.questions] == [
        ((1, 4, 16), (0, 0, 3)),
        ((0, 12, 15),),
    ]
    assert kind_of(path) == "questions"


HUB = [
    {
        "title": "Rivers",
        "context": "The Ob flows north.",
        "question": "Where does it flow?",
        "answers": {"text": ["north", "flows north"], "answer_start": [13, 7]},
    },
    {
        "title": "Rivers",
        "context": "The Ob flows north.",
        "question": "Why?",
        "answers": {"text": [], "answer_start": []},
    },
    {
        "title": "Rivers",
        "context": "The Nile is long.",
        "question": "How is the Nile?",
        "answers": {"text": ["long"], "answer_start": [12]},
    },
    {
        "title": "Hills",
        "context": "A hill.",
        "question": "What?",
        "answers": {"text": ["hill"], "answer_start": [2]},
    },
]


def test_squad_rows_of_the_hub(tmp_path):
    """Neighbours of one title are an article, whose paragraphs come once."""
    path = write(tmp_path / "a.jsonl", *HUB)
    rivers, hills = read_question_sets(path)
    assert rivers.documents == ("The Ob flows north.", "The Nile is long.")
    assert [(asked.answer, asked.evidence) for asked in rivers.questions] == [
        ("north", ((0, 13, 18),)),
        ("long", ((1, 12, 16),)),
    ]
    assert rivers.questions[0].others == ("flows north",)
    assert hills.documents == ("A hill.",) and kind_of(path) == "questions"


HOTPOT = {
    "question": " Who is it?",
    "answer": "yes",
    "context": [["One", ["First.", " Second."]], ["Two", ["Third."]]],
    "supporting_facts": [["One", 1], ["Two", 0], ["Two", 7]],
}


@pytest.mark.parametrize("form", ["file", "hub"])
def test_rows_of_hotpot(tmp_path, form):
    row = dict(HOTPOT)
    if form == "hub":
        row["context"] = {
            "title": ["One", "Two"],
            "sentences": [["First.", " Second."], ["Third."]],
        }
        row["supporting_facts"] = {"title": ["One", "Two", "Two"], "sent_id": [1, 0, 7]}
    path = write(tmp_path / "a.jsonl", row)
    (found,) = read_question_sets(path)
    assert found.documents == ("One\nFirst. Second.", "Two\nThird.")
    (asked,) = found.questions
    assert (asked.question, asked.answer) == ("Who is it?", "yes")
    said = [found.documents[span.document][span.begin : span.end] for span in asked.evidence]
    assert said == [" Second.", "Third."] and kind_of(path) == "questions"


BABI = """1 John went to the hall.
2 Mary went to the garden.
3 Where is John? \thall\t1
4 John took the ball, the milk.
5 What does John carry?\tball,milk\t4 1
1 Sandra slept.
2 Who slept?\tSandra\t1
"""


def test_stories_of_babi(tmp_path):
    folder = tmp_path / "qa"
    folder.mkdir()
    (folder / "qa1.txt").write_text(BABI)
    found = list(read_question_sets(folder))
    assert found == list(read_question_sets(folder / "qa1.txt"))
    first, second, third = (each.documents[0] for each in found)
    assert first == "John went to the hall.\nMary went to the garden."
    assert second == f"{first}\nJohn took the ball, the milk." and third == "Sandra slept."
    asked = [each.questions[0] for each in found]
    assert [(each.question, each.answer) for each in asked] == [
        ("Where is John?", "hall"),
        ("What does John carry?", "ball, milk"),
        ("Who slept?", "Sandra"),
    ]
    said = [[second[span.begin : span.end] for span in each.evidence] for each in asked[:2]]
    assert said == [
        ["John went to the hall."],
        ["John went to the hall.", "John took the ball, the milk."],
    ]
    assert found[1].where.endswith("line 5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 A.\nA text.", "line 2: expected a number and a sentence, or .*got 'A text.'"),
        ("1 A.\n2 Who?\tA", "line 2: expected a number and a sentence"),
        ("1 A.\n2 Who?\tA\t7", "line 2: expected numbers of earlier lines of the story, got 7"),
        ("1 A.\n2 Who?\tA\t ", "line 2: expected numbers of earlier lines of the story, got none"),
        ("1 A.", "expected at least one question"),
    ],
)
def test_what_is_no_story_of_babi(tmp_path, text, message):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_question_sets(path))


def test_documents_without_questions_stand_among_others(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, {"documents": ["Alone."]})
    found = list(read_question_sets(path))
    assert [len(each.questions) for each in found] == [2, 0]
    make = Haystacks(found, made_tokenizer(CHATML), tokens=200, seed=0)
    texts = [made_tokenizer(CHATML).decode(make(n).input_ids.tolist()) for n in range(5)]
    assert any("Alone." in text for text in texts)


def many_sets(tmp_path, sets=6, documents=8):
    """Sets of documents, each of which states a number that is asked for."""
    rng = np.random.default_rng(1)
    words = sentences(400).split()
    rows = []
    for one in range(sets):
        texts = []
        answers = []
        for number in range(documents):
            code = str(10000 + one * 100 + number)
            filler = " ".join(rng.choice(words, rng.integers(5, 60)))
            texts.append(f"{filler} The code of {one}-{number} is {code}. {filler}")
            answers.append(code)
        rows.append(
            {
                "documents": texts,
                "questions": [f"What is the code of {one}-{n}?" for n in range(documents)],
                "answers": answers,
            }
        )
    return list(read_question_sets(write(tmp_path / "many.jsonl", *rows)))


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "plain"])
@pytest.mark.parametrize("tokens", [200, 1000])
def test_rows_hold_the_evidence_where_they_say(tmp_path, template, tokens):
    tokenizer = made_tokenizer(template)
    make = Haystacks(many_sets(tmp_path), tokenizer, tokens=tokens, seed=3, questions=3)
    counts = set()
    places = []
    for number in range(60):
        row = make(number)
        assert len(row.input_ids) == len(row.labels) == len(row.answers) == tokens
        counts.add(len(row.questions))
        text = tokenizer.decode(row.input_ids.tolist())
        assert np.array_equal(row.labels != IGNORED, row.answers)
        assert np.array_equal(row.labels[row.answers], row.input_ids[row.answers])
        answered = np.zeros(tokens, dtype=bool)
        for question in row.questions:
            code = tokenizer.decode(row.input_ids[question.answer].tolist()).strip()
            code = code.removesuffix("<|im_end|>")
            assert code.isdigit() and len(code) == 5
            asked = tokenizer.decode(row.input_ids[question.tokens].tolist())
            assert f"What is the code of {int(code) // 100 % 100}-{int(code) % 100}?" in asked
            (mention,) = question.evidence
            assert tokenizer.decode(row.input_ids[mention].tolist()).strip() == code
            assert mention.stop <= row.questions[0].tokens.start
            assert question.tokens.stop == question.answer.stop
            answered[question.answer] = True
            places.append(mention.start / tokens)
        assert np.array_equal(answered, row.answers)
        ending = "<|im_end|>" if template else "\n"
        assert text.endswith(ending)
    assert counts == {1, 2, 3} or tokens == 200
    assert min(places) < 0.25 and max(places) > 0.5
    again = Haystacks(many_sets(tmp_path), tokenizer, tokens=tokens, seed=3, questions=3)
    assert np.array_equal(again(7).input_ids, make(7).input_ids)
    assert not np.array_equal(make(8).input_ids, make(7).input_ids)


def test_questions_of_other_sets_follow_where_one_has_few(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    make = Haystacks(many_sets(tmp_path, documents=1), tokenizer, tokens=400, seed=0, questions=4)
    counts = set()
    for number in range(60):
        row = make(number)
        codes = [tokenizer.decode(row.input_ids[asked.answer].tolist()) for asked in row.questions]
        assert len(set(codes)) == len(codes), "each is asked once"
        assert all(len(asked.evidence) == 1 for asked in row.questions)
        counts.add(len(codes))
    assert counts == {1, 2, 3, 4}


def test_a_document_remains_that_is_not_asked_about(tmp_path):
    sets = many_sets(tmp_path, sets=2, documents=1)
    make = Haystacks(sets, made_tokenizer(CHATML), tokens=300, seed=0, questions=9)
    assert {len(make(number).questions) for number in range(9)} == {1}


def test_a_row_reads_as_the_template_says(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    (one,) = read_question_sets(write(tmp_path / "a.jsonl", ROW))
    row = Haystacks([one], tokenizer, tokens=90, seed=0, questions=1)(0)
    text = tokenizer.decode(row.input_ids.tolist())
    assert text.startswith("<|im_start|>user\n")
    question, answer = next(
        (q, a) for q, a in zip(ROW["questions"], ("71432", "red"), strict=True) if q in text
    )
    assert text.endswith(f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")


def test_half_of_the_rows_take_the_same_article_first(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    make = Haystacks(many_sets(tmp_path, sets=20), tokenizer, tokens=600, seed=1, questions=1)
    same = 0
    for number in range(80):
        row = make(number)
        text = tokenizer.decode(row.input_ids.tolist())
        code = tokenizer.decode(row.input_ids[row.questions[0].answer].tolist())
        one = int(code.removesuffix("<|im_end|>")) // 100 % 100
        documents = text.count("The code of ")
        same += text.count(f"The code of {one}-") > 0.7 * documents
    assert 20 < same < 60


def test_a_long_document_is_cut_around_its_evidence(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    filler = sentences(300)
    middle = len(filler) // 2
    row = {
        "documents": [f"{filler[:middle]} The code is 71432. {filler[middle:]}", "Else."],
        "questions": ["What is the code?"],
        "answers": ["71432"],
    }
    sets = list(read_question_sets(write(tmp_path / "a.jsonl", row)))
    made = Haystacks(sets, tokenizer, tokens=150, seed=0)(0)
    (question,) = made.questions
    (mention,) = question.evidence
    assert tokenizer.decode(made.input_ids[mention].tolist()).strip() == "71432"
    assert 20 < mention.start < 120


BAD_ROWS = {
    "no documents": (
        {"documents": []},
        "documents: expected a list of at least one string",
    ),
    "a document that is a number": (
        {"documents": ["a", 3]},
        "documents: expected a list of at least one string",
    ),
    "no answers": (
        {"answers": ["71432"]},
        "answers: expected a list with an entry for each of the 2 questions, got 1",
    ),
    "answers in a word": ({"answers": "71432"}, "answers: expected a list .*, got str"),
    "an empty answer": (
        {"answers": ["", "red"]},
        "answers: expected a string for question 1, got ''",
    ),
    "an answer that is not there": (
        {"answers": ["71433", "red"]},
        "expected an answer that stands in a document, got '71433', which .* under evidence",
    ),
    "evidence of no document": (
        {"evidence": [[[2, 0, 1]], [[0, 0, 1]]]},
        "evidence: expected a document from 0 to 1, got 2",
    ),
    "evidence out of range": (
        {"evidence": [[[0, 12, 17]], [[0, 0, 1]]]},
        "evidence: expected characters in document 0, which has 16, got 12 to 17",
    ),
    "evidence that ends before it begins": (
        {"evidence": [[[0, 5, 5]], [[0, 0, 1]]]},
        "evidence: expected characters in document 0, which has 16, got 5 to 5",
    ),
    "evidence without a place": (
        {"evidence": [[[0, 5]], [[0, 0, 1]]]},
        r"evidence: expected a list of \[document, begin, end\]",
    ),
    "no evidence for one": (
        {"evidence": [[[0, 5, 6]]]},
        "evidence: expected a list with an entry for each of the 2 questions, got 1",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name):
    changes, message = BAD_ROWS[name]
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, **changes})
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 2: {message}"):
        list(read_question_sets(path))


def test_a_row_that_is_no_object(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, 7)
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 2: expected an object, got int"):
        list(read_question_sets(path))


def squad(**changes):
    asked = {"question": "Where?", "answers": [{"text": "north", "answer_start": 13}], **changes}
    paragraph = {"context": "The Ob flows north. It is long.", "qas": [asked]}
    return {"data": [{"title": "Rivers", "paragraphs": [paragraph]}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            squad(answers=[{"text": "south", "answer_start": 13}]),
            "expected the answer 'south' at character 13 of its paragraph, got 'north'",
        ),
        (
            squad(answers=[{"text": "north", "answer_start": 90}]),
            "evidence: expected characters in document 0, which has 31, got 90 to 95",
        ),
        (squad(answers=[{"text": "north"}]), "expected SQuAD JSON .*KeyError: 'answer_start'"),
        ({"data": [{"title": "Rivers"}]}, "expected SQuAD JSON .*KeyError: 'paragraphs'"),
        ({"data": ["Rivers"]}, "expected SQuAD JSON"),
        (
            {**HUB[0], "answers": {"text": ["south"], "answer_start": [13]}},
            "expected the answer 'south' at character 13 of its paragraph, got 'north'",
        ),
        ({**HUB[0], "answers": ["north"]}, "expected a row of SQuAD .*TypeError"),
        (
            {**HOTPOT, "supporting_facts": [["Three", 0]]},
            "expected a row of HotpotQA .*ValueError: 'Three' is not in list",
        ),
    ],
)
def test_bad_squad(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        list(read_question_sets(write(tmp_path / "a.json", value)))


def test_no_question_at_all(tmp_path):
    path = write(tmp_path / "a.json", squad(answers=[], is_impossible=True))
    with pytest.raises(ValueError, match=r"a\.json: expected at least one question with an answer"):
        list(read_question_sets(path))


def test_rows_that_a_question_does_not_fit(tmp_path):
    tokenizer = made_tokenizer(CHATML)
    (one,) = read_question_sets(
        write(tmp_path / "a.jsonl", {**ROW, "answers": [ROW["documents"][1], "red"]})
    )
    make = Haystacks([one], tokenizer, tokens=40, seed=0, questions=1)
    with pytest.raises(ValueError, match="leave room for a document in 40 tokens, got"):
        for number in range(20):
            make(number)


def test_documents_that_cannot_fill_a_row(tmp_path):
    row = {"documents": ["The key is 71432."], "questions": ["What?"], "answers": ["71432"]}
    sets = list(read_question_sets(write(tmp_path / "a.jsonl", row)))
    make = Haystacks(sets, made_tokenizer(CHATML), tokens=100, seed=0)
    with pytest.raises(ValueError, match="expected further documents to fill a row of 100 tokens"):
        make(0)
