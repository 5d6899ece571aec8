"""What was read for each token: sums over layers and heads, characters of the sources, passages."""

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import landmark
from cutters import cutter
from landmark.blocks import slot_of
from landmark.data.sources import Reading, Source, read_sources
from landmark.data.tokenizer import encode, train_tokenizer
from landmark.eval.episodes import named_codes, pass_key
from landmark.eval.fillers import pydoc_text
from landmark.hf.bundled import model_path
from landmark.memory.retrieval import Retrieval
from landmark.texts.explain import (
    block_shares,
    explain,
    explain_memory,
    spans_of,
    token_texts,
)
from landmark.texts.explanation import Explanation, Step
from landmark.texts.files import file_sources
from landmark.texts.passages import Passage, Span
from tiny import BLOCK, tiny_landmark

LAYERS = 3
HEADS = 4
TOP_K = 2


def hand_made(rng, calls):
    """Retrievals of all layers for calls of the given slots; heads and places may hold the same
    block, or none.
    """
    found = []
    for slots in calls:
        for layer in range(LAYERS):
            shape = (1, HEADS, len(slots), TOP_K)
            blocks = torch.tensor(
                [rng.choice((-1, 0, 3, 4, 9)) for _ in range(HEADS * len(slots) * TOP_K)]
            )
            weights = torch.tensor(
                [rng.random() / TOP_K for _ in range(len(blocks))], dtype=torch.float64
            )
            weights = weights.masked_fill(blocks < 0, 0).view(shape)
            found.append(Retrieval(layer, torch.tensor([slots]), blocks.view(shape), weights))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_means_over_layers_and_heads(seed):
    rng = random.Random(seed)
    retrievals = hand_made(rng, [[40, 41, 42, 44], [45], [46], [48]])
    shares = block_shares(retrievals, [44, 45, 48])
    for slot, found in zip([44, 45, 48], shares, strict=True):
        expected = {}
        for retrieval in retrievals:
            for column in range(retrieval.positions.shape[1]):
                if int(retrieval.positions[0, column]) == slot:
                    for head in range(HEADS):
                        for place in range(TOP_K):
                            block = int(retrieval.blocks[0, head, column, place])
                            if block >= 0:
                                weight = float(retrieval.weights[0, head, column, place])
                                expected[block] = expected.get(block, 0) + weight / (LAYERS * HEADS)
        assert found == pytest.approx(expected)


def test_layers_that_retrieve_nothing_count_as_readers():
    blocks = torch.full((1, HEADS, 1, TOP_K), 7)
    weights = torch.full((1, HEADS, 1, TOP_K), 0.25)
    some = Retrieval(0, torch.tensor([[5]]), blocks, weights)
    nothing = Retrieval(
        1, torch.tensor([[5]]), torch.full_like(blocks, -1), torch.zeros_like(weights)
    )
    assert block_shares([some, nothing], [5]) == [{7: 0.25}]


LETTERS = "aé😀 ñ漢字b\nΩ 12👩‍👩‍👧!"


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """The bytes alone: most characters of LETTERS are several tokens."""
    return train_tokenizer(["a"], 258)


@pytest.mark.parametrize("text_per_block", [1, 2, 3, 7])
def test_blocks_have_the_characters_that_their_bytes_are_of(bytes_tokenizer, text_per_block):
    sources = [Source("one", LETTERS), Source("none", ""), Source("two", LETTERS[::-1])]
    reading = read_sources(sources, bytes_tokenizer)
    whole = LETTERS + LETTERS[::-1]
    of_byte = [place for place, letter in enumerate(whole) for _ in letter.encode()]
    assert len(reading.ids) == len(of_byte)
    assert bytes_tokenizer.decode(reading.ids) == whole
    for block in range(len(of_byte) // text_per_block + 2):
        held = of_byte[block * text_per_block : (block + 1) * text_per_block]
        begin, end = reading.of_block(block, text_per_block)
        assert list(range(begin, end)) == sorted(set(held)), block


def test_a_long_text_is_read_in_pieces_with_the_same_characters(tokenizer, monkeypatch):
    text = "The grass is green.\n\nWhat is the pass key?\n" * 20
    whole = read_sources([Source("a", text)], tokenizer)
    monkeypatch.setattr("landmark.data.encoding.PIECE", 50)
    monkeypatch.setattr("landmark.data.encoding.OVERLAP", 32)
    cut = read_sources([Source("a", text)], tokenizer)
    assert all(
        tokenizer.decode(one) == text[begin:end]
        for one, (begin, end) in zip(cut.ids.tolist(), cut.spans.tolist(), strict=True)
    )
    assert torch.equal(whole.ids, cut.ids) and torch.equal(whole.spans, cut.spans)


def test_tokens_before_the_text_have_no_characters(tokenizer):
    from test_generate import adding

    reading = read_sources([Source("a", "The grass")], adding(tokenizer))
    assert reading.ids[0] == tokenizer.bos_token_id
    assert reading.spans[0].tolist() == [0, 0]
    assert reading.of_block(0, 100) == (0, len("The grass"))


def test_what_lies_behind_the_sources_is_no_span(tokenizer):
    reading = read_sources([Source("a", "What is the pass key?")], tokenizer)
    count = len(reading.ids)
    spans = spans_of({0: 0.5, 1: 0.25, 9: 0.125}, reading, count - 1)
    assert [(span.block, span.weight) for span in spans] == [(0, 0.5), (1, 0.25)]
    assert (spans[0].begin, spans[1].end) == (0, len("What is the pass key?"))


def test_token_texts_join_to_the_text(bytes_tokenizer):
    ids = bytes_tokenizer(LETTERS)["input_ids"]
    for count in range(len(ids) + 1):
        texts = list(token_texts(bytes_tokenizer, ids[:count]))
        assert "".join(texts) == bytes_tokenizer.decode(ids[:count])
        assert len(texts) == count
    assert list(token_texts(bytes_tokenizer, ids))[1:3] == ["", "é"]


@pytest.mark.parametrize("name", ["llama", "bpe-always"])
def test_an_answer_keeps_the_space_it_begins_with(name):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cutter(name), clean_up_tokenization_spaces=False
    )
    asked, written = (
        encode(tokenizer, text, continues=True).ids.tolist()
        for text in ("the old man", " went down")
    )
    texts = list(token_texts(tokenizer, written, asked))
    assert "".join(texts) == " went down" and len(texts) == len(written)


@pytest.fixture(scope="module")
def asked(tokenizer):
    return explain(
        tiny_landmark(), tokenizer, "The grass is green. " * 60, " What is", max_new_tokens=5
    )


def test_shares_of_a_token_and_the_rest_are_one(asked):
    assert len(asked.steps) == 5
    for step in asked.steps:
        assert all(0 < span.weight <= 1 for span in step.spans)
        assert step.spans and 0 <= step.rest < 1
        assert sum(span.weight for span in step.spans) + step.rest == pytest.approx(1)
        assert [span.block for span in step.spans] == sorted({span.block for span in step.spans})


def test_every_token_is_explained_by_the_query_that_gave_it(tokenizer):
    """The same shares, from calls of one token each, each of whose retrievals belong to its token
    alone.
    """
    model = tiny_landmark()
    text = "The grass is green. " * 60
    question = " What is"
    explanation = explain(model, tokenizer, text, question, max_new_tokens=5)
    document = tokenizer(text, return_tensors="pt").input_ids
    cache = model.read(document, retrieve=False)
    ids = tokenizer(question, return_tensors="pt").input_ids
    for step in explanation.steps:
        cache.record = True
        cache.retrievals = []
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        sums = {}
        for found in cache.retrievals:
            for block, weight in zip(
                found.blocks[0, :, -1].flatten(), found.weights[0, :, -1].flatten(), strict=True
            ):
                sums[int(block)] = sums.get(int(block), 0) + float(weight) / (2 * 4)
        inside = {
            block: share
            for block, share in sums.items()
            if 0 <= block * (BLOCK - 1) < document.shape[1]
        }
        assert {span.block: span.weight for span in step.spans} == pytest.approx(inside, abs=1e-9)
        ids = logits[:, -1:].argmax(-1)
    assert explanation.answer == "".join(step.token for step in explanation.steps) != ""


def test_a_memory_is_asked_twice_and_stays_as_it_is(tokenizer):
    model = tiny_landmark()
    reading = read_sources(
        [Source("a", "The grass is green. " * 30), Source("b", "What is the key? " * 30)], tokenizer
    )
    memory = model.read(reading.ids[None], retrieve=False)
    first = explain_memory(model, tokenizer, memory, reading, " The", max_new_tokens=3)
    assert memory.tokens == [len(reading.ids)] and memory.retrievals == []
    assert explain_memory(model, tokenizer, memory, reading, " The", max_new_tokens=3) == first
    texts = [(source.name, source.text) for source in reading.sources]
    assert explain(model, tokenizer, texts, " The", max_new_tokens=3) == first


def test_an_answer_ends_before_the_end_token(tokenizer):
    model = tiny_landmark()
    text = "The grass is green. " * 30
    free = explain(model, tokenizer, text, " What", max_new_tokens=30)
    ids = tokenizer(text + " What", return_tensors="pt").input_ids
    cache = model.read(ids[:, : len(tokenizer(text)["input_ids"])], retrieve=False)
    written = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
    place = next(place for place in range(1, 30) if written[place] not in written[:place])
    model.generation_config.eos_token_id = [319, written[place]]
    ended = explain(model, tokenizer, text, " What", max_new_tokens=30)
    assert [step.spans for step in ended.steps] == [step.spans for step in free.steps[:place]]
    model.generation_config.eos_token_id = written[0]
    nothing = explain(model, tokenizer, text, " What", max_new_tokens=30)
    assert (nothing.answer, nothing.steps, nothing.passages(), nothing.spans()) == ("", (), (), ())


SOURCES = (Source("a.txt", "one\ntwo\n"), Source("b.txt", "three\nfour\nfive"))


def test_passages_are_neighbours_merged_the_strongest_first():
    steps = (
        Step(
            "x",
            (
                Span(0, 0, 4, 0.1),
                Span(3, 12, 16, 0.2),
                Span(4, 16, 20, 0.25),
                Span(5, 20, 23, 0.02),
            ),
        ),
        Step("y", (Span(0, 0, 4, 0.5),)),
    )
    explanation = Explanation(SOURCES, "?", "xy", steps)
    assert explanation.passages(0) == (
        Passage("b.txt", 1, 12, 23, "e\nfour\nfive", 0.25),
        Passage("a.txt", 1, 0, 4, "one\n", 0.1),
    )
    assert explanation.passages(0, count=2) == (Passage("b.txt", 1, 12, 20, "e\nfour\nf", 0.25),)
    assert [(p.begin, p.weight) for p in explanation.passages(count=1)] == [(0, pytest.approx(0.3))]
    whole = {span.block: span.weight for span in explanation.spans()}
    assert whole == pytest.approx({0: 0.3, 3: 0.1, 4: 0.125, 5: 0.01})


def test_blocks_that_are_no_neighbours_are_two_passages():
    explanation = Explanation(
        SOURCES, "?", "x", (Step("x", (Span(2, 8, 10, 0.2), Span(4, 14, 19, 0.1))),)
    )
    assert [(p.source, p.line, p.text) for p in explanation.passages(0)] == [
        ("b.txt", 1, "th"),
        ("b.txt", 2, "four\n"),
    ]


def test_a_block_across_a_border_is_a_passage_in_both_sources():
    explanation = Explanation(
        SOURCES, "?", "x", (Step("x", (Span(1, 4, 10, 0.2), Span(2, 10, 14, 0.3))),)
    )
    assert explanation.passages(0) == (
        Passage("b.txt", 1, 8, 14, "three\n", 0.3),
        Passage("a.txt", 2, 4, 8, "two\n", 0.2),
    )


def test_files_are_sources_by_their_paths(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name in ("folder/b.txt", "folder/deep/a.txt", "folder/no.md", "code.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    found = file_sources([tmp_path / name for name in ("code.py", "folder", "rows.jsonl")])
    assert [(source.name, source.text) for source in found] == [
        (f"{tmp_path}/code.py", "code.py"),
        (f"{tmp_path}/folder/b.txt", "folder/b.txt"),
        (f"{tmp_path}/folder/deep/a.txt", "folder/deep/a.txt"),
        (f"{tmp_path}/rows.jsonl, line 1", "first"),
        (f"{tmp_path}/rows.jsonl, line 2", "second"),
    ]


@pytest.mark.parametrize("seed", range(2))
def test_the_bundled_model_reads_the_passage_that_holds_the_key(seed):
    from transformers import AutoTokenizer

    model = landmark.load()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    rng = random.Random(seed)
    key = pass_key(rng)
    text = pydoc_text()
    begin = rng.randrange(len(text) - 18_000)
    others = [fact.statement for fact in named_codes(rng, 4, digits=5)]
    parts = [text[begin + 3_000 * number : begin + 3_000 * (number + 1)] for number in range(6)]
    statements = rng.sample([key.statement, *others], 5)
    document = "".join(
        part + statement for part, statement in zip(parts, [*statements, ""], strict=True)
    )
    explanation = landmark.explain(model, tokenizer, document, key.question, max_new_tokens=6)
    assert explanation.answer.strip() == key.answer.strip()
    place = document.index(key.answer)
    top = explanation.passages()[0]
    assert top.begin <= place < top.end
    assert top.text == document[top.begin : top.end] and key.answer in top.text
    assert top.line == document[: top.begin].count("\n") + 1
    digits = [
        number for number, step in enumerate(explanation.steps) if step.token.strip().isdigit()
    ]
    assert len(digits) == 5
    for number in digits:
        assert explanation.passages(number)[0].begin <= place < explanation.passages(number)[0].end


def test_a_reading_knows_its_slots(tokenizer):
    """Blocks of the memory are blocks of the reading: the last token of a block stands in its last
    slot but one.
    """
    reading = read_sources([Source("a", "The grass is green. " * 9)], tokenizer)
    assert isinstance(reading, Reading) and reading.starts == (0, 180)
    for block in range(len(reading.ids) // (BLOCK - 1)):
        last = (block + 1) * (BLOCK - 1) - 1
        assert slot_of(last, BLOCK) // BLOCK == block
        assert reading.of_block(block, BLOCK - 1)[1] == int(reading.spans[last, 1])
