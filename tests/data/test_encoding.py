"""Texts of any length and texts that go on: the ids are those of the whole text, whatever the
tokenizer puts around.
"""

import random

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cutters import CUTTERS, ENDS, cutter
from landmark.data import encoding
from landmark.data.encoding import TextEncoder
from landmark.data.tokenizer import encode, encoder_of, row_start

BITS = (
    "the",
    "river",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "🙂",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "ﬁ",
    "漢字",
    "1",
    "23456",
    "A",
    "x" * 7,
    "</s>",
    "<s>",
    ".",
    "'s",
    "▁",
    "İ",
    "\u00a0",
    "-",
    "The man went",
)
RUNS = (
    "a" * 1501,
    "1" * 1200 + "x",
    " " * 1300 + "x",
    "ab" * 700,
    "river" * 300,
    "🙂" * 600,
    "</s>" * 300,
    "the " * 500,
)


def made_text(seed, count, bits=BITS):
    rng = random.Random(seed)
    return "".join(rng.choice(bits) for _ in range(count))


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "OVERLAP", 128)


def same_as_whole(core, text):
    found = TextEncoder(core).encode(text)
    whole = core.encode(text, add_special_tokens=False)
    assert found.ids.tolist() == whole.ids
    assert [tuple(span) for span in found.spans.tolist()] == whole.offsets


@pytest.mark.parametrize("name", CUTTERS)
@pytest.mark.parametrize("ends", ["none", "bos-eos"])
def test_pieces_have_the_ids_of_the_whole_text(name, ends, short_pieces):
    core = cutter(name, ends)
    for seed in range(6):
        same_as_whole(core, made_text(seed, (0, 1, 300, 300, 600, 600)[seed]))


@pytest.mark.parametrize("name", CUTTERS)
def test_texts_that_have_no_place_for_a_cut(name, short_pieces):
    core = cutter(name)
    for run in RUNS:
        same_as_whole(core, "the man " + run + " went " * 60)
        same_as_whole(core, run)


@pytest.mark.parametrize("name", ["bytes", "llama", "bpe-always", "unigram-always", "bert"])
def test_a_long_line_is_really_cut(name, monkeypatch):
    monkeypatch.setattr(encoding, "PIECES", 2)
    core = cutter(name)
    seen = []
    text = made_text(1, 60_000, ("the ", "river ", "man ", "went ", "1234 ", "漢字 ", "down"))
    found = TextEncoder(core).encode(text, progress=lambda *step: seen.append(step))
    assert found.ids.tolist() == core.encode(text, add_special_tokens=False).ids
    assert len(seen) > 1 and seen[-1] == ("characters tokenised", len(text), len(text))
    assert seen == sorted(seen)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("name", ["bytes", "bytes-prefix", "llama", "words", "bert"])
def test_what_begins_a_row_is_what_the_tokenizer_puts_before_a_text(name, ends):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cutter(name, ends), bos_token="<s>", eos_token="</s>"
    )
    assert row_start(tokenizer) == ENDS[ends][1]
    text = "The old man  went\nto the river 99."
    ids = [*row_start(tokenizer), *encode(tokenizer, text).ids.tolist()]
    stock = tokenizer(text)["input_ids"]
    assert stock[: len(ids)] == ids
    assert set(stock[len(ids) :]) <= {2, 5}  # what it puts behind is left out
    assert not {1, 2, 4, 5} & set(ids[len(row_start(tokenizer)) :])


def test_a_row_begins_with_nothing_where_bos_is_put_behind():
    """The end token of many tokenizers is their bos token too."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cutter("bytes", "eos"), bos_token="</s>", eos_token="</s>"
    )
    assert tokenizer("")["input_ids"] == [2]
    assert row_start(tokenizer) == []


def bare(name):
    """A tokenizer of the same words that was built to put nothing before a text."""
    core = cutter(name)
    if name == "llama":
        core.normalizer = normalizers.Replace(" ", "▁")
    elif name == "bytes-prefix":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif core.pre_tokenizer is not None and "Metaspace" in repr(core.pre_tokenizer):
        core.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="never", split="whole" not in name
        )
    return core


PLAIN = [bit for bit in BITS if bit not in ("</s>", "<s>")]


@pytest.mark.parametrize(
    "name", [name for name in CUTTERS if name not in ("t5", "bytes-each-digit-prefix")]
)
def test_a_text_that_goes_on_has_no_prefix(name, short_pieces):
    core = cutter(name, "bos-eos")
    expected = bare(name)
    for seed in range(40):
        text = made_text(seed, random.Random(seed).choice((0, 1, 2, 5, 150)), PLAIN)
        found = TextEncoder(core).encode(text, continues=True)
        whole = expected.encode(text, add_special_tokens=False)
        assert found.ids.tolist() == whole.ids, repr(text)
        assert [tuple(span) for span in found.spans.tolist()] == whole.offsets


def tokens(core, encoded):
    return [core.id_to_token(number) for number in encoded.ids.tolist()]


def test_a_prefix_of_every_word_stays():
    """Where each word gets a space, only the first word of a text that goes on without one has
    none.
    """
    core = cutter("t5")
    encoder = TextEncoder(core)
    assert (
        tokens(core, encoder.encode("the river"))
        == core.encode("the river", add_special_tokens=False).tokens
    )
    assert tokens(core, encoder.encode("the river", continues=True))[:1] != ["▁the"]
    assert tokens(core, encoder.encode("the river", continues=True))[-1].startswith(
        ("▁", "r", "er", "iver")
    )
    spaced = encoder.encode(" the river", continues=True).ids.tolist()
    assert spaced == core.encode("the river", add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["llama", "bpe-always", "bytes-prefix"])
def test_what_is_put_behind_a_special_token_in_the_text_stays(name):
    core = cutter(name)
    found = TextEncoder(core).encode("the man</s>the river", continues=True).ids.tolist()
    head = TextEncoder(core).encode("the man", continues=True).ids.tolist()
    assert found == head + core.encode("</s>the river", add_special_tokens=False).ids
    assert (
        len(head) > 0 and found != core.encode("the man</s>the river", add_special_tokens=False).ids
    )


@pytest.mark.parametrize("name", CUTTERS)
def test_only_tokenizers_with_a_prefix_have_one(name):
    prefixed = TextEncoder(cutter(name)).prefixes
    core = cutter(name)
    differs = TextEncoder(core).encode("the", continues=True).ids.tolist() != core.encode("the").ids
    assert prefixed == (differs or "always" in name or "first" in name)


def test_truncation_and_padding_of_a_saved_tokenizer_do_not_touch_texts():
    core = cutter("bytes", "bos-eos")
    core.enable_truncation(4)
    core.enable_padding(length=50, direction="left")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    text = "The old man went down to the river"
    assert row_start(tokenizer) == [1]
    assert encode(tokenizer, text).ids.tolist() == cutter("bytes").encode(text).ids


def test_special_tokens_of_the_text_are_split_where_the_tokenizer_splits_them():
    core = cutter("bytes")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", split_special_tokens=True
    )
    assert 2 not in encode(tokenizer, "the </s> man").ids
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert 2 in encode(tokenizer, "the </s> man").ids


def test_added_tokens_that_take_the_spaces_around_them(short_pieces):
    core = cutter("bytes")
    core.add_tokens(
        [AddedToken("river", lstrip=True, rstrip=True), AddedToken("old", single_word=True)]
    )
    for seed in range(5):
        same_as_whole(core, made_text(seed, 400, (*BITS, " old ", "older", "  river  ")))


FLAGS = [
    {"add_bos_token": True},
    {"add_eos_token": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": False, "add_eos_token": False},
    {"add_prefix_space": True},
    {"add_prefix_space": False, "legacy": False},
    {"legacy": True, "add_eos_token": True},
]


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ["bytes", "llama", "bpe-first"])
def test_flags_of_a_saved_folder(kind, flags, name, tmp_path):
    """What they mean differs between versions of transformers; what is encoded is what stock code
    encodes.
    """
    import json

    core = cutter(name, "bos")
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": kind, **flags})
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    stock = tokenizer("The old man went\n to the river")["input_ids"]
    start = row_start(tokenizer)
    text = encode(tokenizer, "The old man went\n to the river").ids.tolist()
    assert stock[: len(start) + len(text)] == start + text
    assert set(stock[len(start) + len(text) :]) <= {2}
    assert not {1, 2} & set(text)
    goes_on = encode(tokenizer, "river", continues=True).ids.tolist()
    assert not {1, 2} & set(goes_on)
    assert (
        encoder_of(tokenizer).prefixes
        or goes_on == tokenizer("river", add_special_tokens=False)["input_ids"]
    )
