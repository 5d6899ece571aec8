"""The tokenizer of models from scratch: digits alone, texts kept, folders that load."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cutters import CUTTERS, cutter
from landmark.data.tokenizer import (
    END,
    PAD,
    continuation,
    encode,
    fingerprint,
    load_tokenizer,
    row_start,
    train_tokenizer,
)

NUMBERS = "Room 71432 has 1900 books; 12 of them, 007 and 3.14, are new. 88888"


def test_every_digit_is_its_own_token(tokenizer):
    trained_on_numbers = train_tokenizer(["1900 1900 1900 12 12 12 " * 50, NUMBERS * 20], 400)
    for each in (tokenizer, trained_on_numbers):
        tokens = each.tokenize(NUMBERS)
        assert [token for token in tokens if any(c.isdigit() for c in token)] == [
            c for c in NUMBERS if c.isdigit()
        ]


@pytest.mark.parametrize(
    "words", [NUMBERS, "  two  spaces\n\nand lines\t\n", "naïve – 漢字 🙂", ""]
)
def test_texts_come_back(tokenizer, words):
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words


def test_saved_folder_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(NUMBERS)["input_ids"] == tokenizer(NUMBERS)["input_ids"]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (END, END, PAD)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)


def test_vocabulary_size(text, tokenizer):
    assert len(tokenizer) <= 600
    assert len(train_tokenizer([text], 300)) == 300
    assert fingerprint(train_tokenizer([text], 300)) != fingerprint(tokenizer)


def test_rows_begin_with_bos_only_where_the_tokenizer_adds_it(tokenizer):
    from tokenizers import processors

    assert row_start(tokenizer) == []
    adding = train_tokenizer(["some text"], 300)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, adding.bos_token_id)]
    )
    assert row_start(adding) == [adding.bos_token_id]


@pytest.mark.parametrize("name", CUTTERS)
def test_a_continuation_keeps_the_space_it_begins_with(name):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cutter(name), clean_up_tokenization_spaces=False
    )
    ids = encode(tokenizer, "the old man went down to the river").ids.tolist()
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + continuation(tokenizer, ids[cut:], ids[:cut]) == whole
