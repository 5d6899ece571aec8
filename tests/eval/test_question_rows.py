"""`landmark eval questions`: scores, what stands in a haystack, and answers that are greedy."""

import json
import random

import pytest
import torch

from landmark.data.chat import MARK, SEPARATOR, Message, chat_ends, prompt_of
from landmark.data.questions import first_questions, read_question_sets
from landmark.data.tokenizer import encode
from landmark.eval import questions as task_module
from landmark.eval import results
from landmark.eval.asked_texts import found_by_bm25, haystacks, is_in_other_words, units_of
from landmark.eval.fillers import load_filler
from landmark.eval.questions import QuestionsTask, run
from landmark.eval.scoring import Score, normalised, score
from landmark.eval.variants import Variant, load_variants
from landmark.eval.yardsticks import EvidenceBlocks
from tiny import talking_tokenizer, tiny_landmark, tiny_llama

# Plain models get their cache by the name of the installed transformers.
pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

ROWS = [
    {
        "documents": [
            f"{n} grass is green. The code of the {n} gate is {n}{n}.",
            "The sky is blue.",
        ],
        "questions": [f"What is the code of the {n} gate?"],
        "answers": [[f"{n}{n}", f"code {n}"]],
    }
    for n in range(10, 22)
]
BOTH = {
    "documents": ["The key is here.", "Nothing.", "The gate is north."],
    "questions": ["What is both?", "What is north?"],
    "answers": ["yes", "gate"],
    "evidence": [[[0, 4, 7], [2, 4, 8]], [[2, 4, 8]]],
}


@pytest.fixture
def sets(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, BOTH]))
    return list(read_question_sets(path))


@pytest.fixture(scope="module")
def talking():
    return Variant("talking", tiny_landmark(), talking_tokenizer())


@pytest.fixture(scope="module")
def plain():
    return Variant("plain", tiny_llama(), talking_tokenizer())


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The Big 12!", ["big 12"], (True, True, 1.0)),
        ("It is the Big 12 Conference.", ["the Big 12"], (True, False, 4 / 7)),
        ("It is 121.", ["12"], (False, False, 0.0)),
        ("", ["12"], (False, False, 0.0)),
        ("a dog", ["cat", "the dog"], (True, True, 1.0)),
        ("red red green", ["red blue"], (False, False, 2 / 5)),
        ("the", ["the"], (False, False, 0.0)),
    ],
)
def test_scores_are_those_of_squad(answer, right, expected):
    found = score(answer, right)
    assert (found.contains, found.exact) == expected[:2]
    assert found.f1 == pytest.approx(expected[2])


def test_words_are_compared_without_articles_and_punctuation():
    assert normalised("The U.S., an island -- A test") == ["us", "island", "test"]


@pytest.mark.parametrize("length", [150, 2000])
def test_haystacks_hold_every_question_once(sets, talking, length):
    tokenizer = talking.tokenizer
    units = [unit for each in sets for unit in units_of(each, tokenizer)]
    asked = [unit for unit in units if unit.questions]
    others = [d for unit in units if not unit.questions for d in unit.documents]
    filler = load_filler("paper", tokenizer)
    texts = haystacks(asked, others, filler, length, random.Random(1))
    assert len(texts) == 1 if length == 2000 else len(texts) > 1
    questions = []
    for text in texts:
        assert len(text.ids) == length
        for question, evidence in zip(text.questions, text.evidence, strict=True):
            said = [tokenizer.decode([text.ids[t] for t in span]).strip() for span in evidence]
            if question.question == "What is both?":
                assert sorted(said) == ["gate", "key"]
            else:
                assert said == [question.answer]
            questions.append(question.question)
    assert sorted(questions) == sorted(q.question for each in sets for q in each.questions)


def prompt(variant, question, text=None):
    """The whole conversation as one text, up to where the answer begins."""
    said = question if text is None else text + question
    if variant.tokenizer.chat_template is None and text is not None:
        return text + prompt_of(variant.tokenizer, [Message("user", question)], "a")
    return prompt_of(variant.tokenizer, [Message("user", said)], "a")


def greedy(variant, ids, count):
    ends = chat_ends(variant.tokenizer, variant.model.generation_config.eos_token_id)
    found = variant.model.generate(
        ids, max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    return variant.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["talking", "plain", "without"])
def test_answers_are_greedy_generation_from_the_whole_prompt(sets, request, kind, tokenizer):
    if kind == "without":
        variant = Variant("marked", tiny_landmark(), tokenizer)
    else:
        variant = request.getfixturevalue(kind)
    heard = []
    stock = task_module.score

    def hearing(answer, right):
        heard.append(answer)
        return stock(answer, right)

    task = QuestionsTask(contexts=("evidence", "nothing"), read="retrieve", max_new_tokens=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_module, "score", hearing)
        run([variant], sets, task, print, data="x")
    questions = [(each, question) for each in sets for question in each.questions]
    assert len(heard) == 2 * len(questions)
    for number, (each, question) in enumerate(questions):
        needed = sorted({span.document for span in question.evidence})
        text = "".join(each.documents[document] + SEPARATOR for document in needed)
        for place, given in ((number, text), (len(questions) + number, None)):
            ids = encode(variant.tokenizer, prompt(variant, question.question, given)).ids
            assert heard[place] == greedy(variant, torch.from_numpy(ids)[None], 5), question


def test_questions_about_one_text_do_not_see_each_other(sets, talking):
    """A text is read once; the answer to a question does not depend on those before it."""
    read = []
    stock = task_module._read

    def reading(variant, prefixes, **more):
        read.append(len(prefixes))
        return stock(variant, prefixes, **more)

    answers = []
    for asked in (sets, sets[3:4] + sets[:3] + sets[4:]):
        found = {}
        task = QuestionsTask(lengths=(2000,), contexts=("haystack",), max_new_tokens=4)
        units = [unit for each in sets for unit in units_of(each, talking.tokenizer)]
        asked_units = [unit for unit in units if unit.questions]
        filler = load_filler("paper", talking.tokenizer)
        (text,) = haystacks(asked_units, [], filler, 2000, random.Random(0))
        order = list(range(len(text.questions)))
        if asked is not sets:
            order.reverse()
        text = text._replace(
            questions=[text.questions[n] for n in order],
            evidence=[text.evidence[n] for n in order],
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task_module, "_read", reading)
            for question, answer in zip(
                text.questions,
                task_module._answers(talking, [text], task, None, None),
                strict=True,
            ):
                found[question.question] = answer
        answers.append(found)
    assert answers[0] == answers[1] and len(answers[0]) == 14
    assert read == [1, 1]


@pytest.mark.parametrize(
    ("kind", "layers"), [("talking", None), ("talking", (1,)), ("plain", None)]
)
def test_several_questions_at_once_are_answered_as_one_by_one(
    sets, request, monkeypatch, kind, layers
):
    """About one text or one each, with the blocks found, forced or chosen for all layers."""
    variant = request.getfixturevalue(kind)
    task = QuestionsTask(
        lengths=(900,),
        contexts=("nothing", "evidence", "bm25", "haystack"),
        bm25_tokens=300,
        granularity=("token_head", "evidence") if kind == "talking" else None,
        read="retrieve",
        max_new_tokens=4,
    )
    heard: list[str] = []
    stock = task_module.score
    monkeypatch.setattr(
        task_module, "score", lambda said, right: heard.append(said) or stock(said, right)
    )
    calls = []
    generate = variant.model.generate

    def counting(ids, **settings):
        calls.append(len(ids))
        return generate(ids, **settings)

    monkeypatch.setattr(variant.model, "generate", counting)
    found = []
    for tokens in (1, 1 << 20):
        monkeypatch.setattr(task_module, "CPU_BATCH_TOKENS", tokens)
        with variant.configured(**({"retrieval_layers": layers} if layers else {})):
            rows = run([variant], sets, task, lambda row: None, data="x")
        found.append(([(row.right, row.f1, row.queries, row.layers) for row in rows], heard[:]))
        heard.clear()
    assert found[0] == found[1]
    assert calls.count(1) == 14 * len(rows) and calls[-1] == 14


def test_rows(sets, talking, plain, tmp_path):
    task = QuestionsTask(lengths=(400, 900), plain_limit=500, max_new_tokens=3, seed=2)
    seen = []
    recorder = results.Recorder(tmp_path / "rows.json", "cpu", seen.append)
    rows = run([talking, plain], sets, task, recorder, data="x")
    assert rows == seen == results.read(tmp_path / "rows.json")
    kinds = [(row.model, row.context, row.length) for row in rows]
    both = [("evidence", None), ("nothing", None), ("haystack", 400)]
    assert kinds == [
        *(("talking", *each) for each in [*both, ("haystack", 900)]),
        *(("plain", *each) for each in both),
    ]
    assert all(row.asked == 14 and row.data == "x" for row in rows)
    haystack = rows[3]
    assert haystack.queries > 0 and {layer["layer"] for layer in haystack.layers} == {0, 1}
    assert rows[1].queries == 0 and rows[1].texts == 1 and rows[0].texts == 14
    assert rows[-1].read == "full" and rows[-1].top_k is None and haystack.top_k == 2


def test_questions_in_other_words(tmp_path):
    text = "He came home. The famous fox ate grapes in June, near Oslo. It rained."
    asked = {
        "What did the famous fox eat in June?": "grapes",  # 3 of 4 words
        "Which fruit did an animal consume?": "grapes",  # none of 4
        "What did a fox like best?": "grapes",  # 1 of 3
        "When did he come?": "June",  # the sentence with the evidence counts, not that before
    }
    row = {"documents": [text], "questions": list(asked), "answers": list(asked.values())}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_question_sets(path)
    judged = [is_in_other_words(each, found.documents) for each in found.questions]
    assert judged == [False, True, True, True]


def test_right_answers_are_numbered_as_the_data(sets, talking, monkeypatch):
    """Whatever the order in which a haystack holds them."""
    right = {"What is the code of the 12 gate?", "What is north?"}
    said = {question.answer: question.question for each in sets for question in each.questions}

    def scored(answer, wanted):
        return Score(contains=said[wanted[0]] in right, exact=False, f1=0.0)

    monkeypatch.setattr(task_module, "score", scored)
    task = QuestionsTask(lengths=(400,), contexts=("evidence", "haystack"), max_new_tokens=1)
    for row in run([talking], sets, task, lambda row: None, data="x"):
        assert row.right == (2, 13) and row.contains == 2 / 14
        assert row.other_words == (12,)


def test_evidence_is_forced_into_the_selection(sets, talking):
    """One row finds what it finds; in the other every head retrieves what holds the answer."""
    task = QuestionsTask(
        lengths=(900,),
        contexts=("haystack",),
        granularity=("token_head", "evidence"),
        max_new_tokens=2,
    )
    own, forced = run([talking], sets, task, lambda row: None, data="x")
    assert own.queries == forced.queries > 5
    assert {share for layer in forced.layers for share in layer["heads"]} == {1.0}
    assert min(share for layer in own.layers for share in layer["heads"]) < 1
    assert EvidenceBlocks.blocks == (), "it is taken back"


def test_the_best_documents_by_bm25(sets, talking):
    tokenizer = talking.tokenizer
    units = [unit for each in sets for unit in units_of(each, tokenizer)]
    asked = [unit for unit in units if unit.questions]
    others = [d for unit in units if not unit.questions for d in unit.documents]
    texts = list(found_by_bm25(asked, others, tokenizer, 60))
    assert len(texts) == 14
    found = 0
    for text in texts:
        (question,) = text.questions
        (spans,) = text.evidence
        assert len(text.ids) == 60 and all(0 <= span.start < span.stop <= 60 for span in spans)
        for span in spans:
            said = tokenizer.decode(text.ids[span.start : span.stop]).strip()
            right = {"gate", "key"} if question.question == "What is both?" else {question.answer}
            assert said in right
        if "code" in question.question:
            first = tokenizer.decode(text.ids).split(SEPARATOR)[0]
            found += question.answer in first
    assert found == 12, "the number in the question is in one document alone"
    task = QuestionsTask(contexts=("bm25",), bm25_tokens=60, max_new_tokens=1)
    (row,) = run([talking], sets, task, lambda row: None, data="x")
    assert (row.context, row.length, row.texts, row.asked) == ("bm25", 60, 14, 14)


def test_the_weights_run_densely(saved):
    name = str(saved / "marked")
    landmark, dense = load_variants(name, None, device="cpu", dtype="auto", dense=True)
    assert (landmark.attention, dense.attention) == ("landmark", "full")
    assert dense.model.generation_config is landmark.model.generation_config
    weights = landmark.model.state_dict()
    del weights["model.landmark_embedding.weight"]
    stock = tiny_llama().to(dense.model.dtype)
    stock.load_state_dict(weights)
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(dense.logits(ids), stock(ids).logits)
    shared = dense.model.model.embed_tokens.weight.data_ptr()
    assert shared == weights["model.embed_tokens.weight"].data_ptr()


def test_documents_longer_than_a_haystack(sets, talking):
    task = QuestionsTask(lengths=(10,), contexts=("haystack",))
    with pytest.raises(
        ValueError, match=r"lengths: expected at least \d+ tokens for the documents"
    ):
        run([talking], sets, task, print, data="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (0,)}, "lengths: expected integers of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected integers of at least 1"),
        (
            {"contexts": ("all",)},
            "contexts: expected some of evidence, nothing, bm25, haystack, got all",
        ),
        ({"contexts": ()}, "contexts: expected some of .*, got none"),
        ({"read": "fast"}, "read: expected one of local, retrieve, got 'fast'"),
    ],
)
def test_wrong_tasks(changes, message):
    with pytest.raises(ValueError, match=message):
        QuestionsTask(**changes)


def test_first_questions(sets):
    kept = first_questions(sets, 3)
    assert [len(each.questions) for each in kept] == [1, 1, 1] + 10 * [0]
    assert [each.documents for each in kept] == [each.documents for each in sets]
    assert first_questions(sets, None) == sets
    with pytest.raises(ValueError, match="questions: expected at least 1, got 0"):
        first_questions(sets, 0)
    assert MARK not in prompt_of(talking_tokenizer(), [Message("user", "hi")], "a")
