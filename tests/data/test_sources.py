"""Sources one after the other: ids as of one text that goes on, and the characters of each
token.
"""

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from cutters import CUTTERS, ENDS, cutter
from landmark.data.encoding import TextEncoder
from landmark.data.sources import Source, read_sources

TEXTS = ["The old man\n", "", "went down ", " to the river", "\r\n", "and 99 houses.", "漢字 🙂"]


def made(name, ends):
    return PreTrainedTokenizerFast(
        tokenizer_object=cutter(name, ends), bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", CUTTERS)
@pytest.mark.parametrize("ends", ["none", "bos-eos", "eos", "two"])
def test_nothing_stands_between_sources(name, ends):
    reading = read_sources(
        [Source(str(number), text) for number, text in enumerate(TEXTS)], made(name, ends)
    )
    encoder = TextEncoder(cutter(name))
    expected = list(ENDS[ends][1])
    first = True
    for text in TEXTS:
        ids = encoder.encode(text, continues=not first).ids.tolist()
        expected = expected + ids
        first = first and not ids
    assert reading.ids.tolist() == expected
    assert reading.ids.dtype == torch.int64


@pytest.mark.parametrize(
    "name", ["bytes", "bytes-prefix", "llama", "gemma", "bpe-always", "unigram-first", "bert"]
)
def test_spans_are_of_the_characters_of_all_sources(name):
    reading = read_sources(
        [Source(str(number), text) for number, text in enumerate(TEXTS)], made(name, "bos-eos")
    )
    whole = "".join(TEXTS)
    at = 0
    assert reading.spans[0].tolist() == [0, 0]
    assert reading.starts[-1] == len(whole)
    core = cutter(name)
    for number, (begin, end) in zip(
        reading.ids.tolist()[1:], reading.spans.tolist()[1:], strict=True
    ):
        assert at <= end <= len(whole) and begin <= end
        at = begin
        token = core.id_to_token(number).strip("▁Ġ").removeprefix("##")
        if token.isascii() and token.isalnum():
            assert token in whole[begin:end].lower() or token in whole[begin:end]


def test_the_first_text_with_tokens_begins_the_row():
    core = cutter("bert")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    reading = read_sources([Source("a", " \n "), Source("b", "the river")], tokenizer)
    assert reading.ids.tolist() == core.encode("the river", add_special_tokens=False).ids
    assert reading.spans[0, 0] == 3


def test_a_first_text_keeps_its_prefix_and_only_it():
    reading = read_sources([Source("a", "river"), Source("b", "river")], made("bpe-always", "bos"))
    names = [cutter("bpe-always").id_to_token(number) for number in reading.ids.tolist()]
    assert "".join(names) == "<s>▁riverriver"


def dropping(*characters):
    """A tokenizer that finds no token in these characters."""
    core = cutter("words")
    core.normalizer = normalizers.Sequence([normalizers.Replace(each, "") for each in characters])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_texts_without_a_token_are_refused():
    tokenizer = dropping("a", "b")
    with pytest.raises(
        ValueError,
        match=r"text: expected at least one token, got none in one\.txt, two\.txt: the tok",
    ):
        read_sources([Source("one.txt", "ab"), Source("two.txt", "aaa")], tokenizer)
    assert len(read_sources([Source("one.txt", "ab"), Source("two.txt", "The")], tokenizer).ids)
