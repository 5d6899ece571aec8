"""Token files: what they hold, when they are used again, what a damaged one says."""

import json
import pickle
import shutil

import numpy as np
import pytest

from landmark.data import tokens as module
from landmark.data.text import Document
from landmark.data.tokenizer import backend, train_tokenizer
from landmark.data.tokens import open_tokens, tokenize

DOCUMENTS = [
    Document("first", "The river was long. " * 30, "a1"),
    Document("second", "She saw a house.", "b2"),
]


def made(tokenizer, folder, documents=DOCUMENTS, progress=None):
    return tokenize(lambda: documents, tokenizer, folder, "train", progress)


def test_stream_is_the_documents_with_eos_between(tokenizer, tmp_path):
    file = made(tokenizer, tmp_path)
    expected = [tokenizer(document.text)["input_ids"] for document in DOCUMENTS]
    assert file.ids.tolist() == [
        *expected[0],
        tokenizer.eos_token_id,
        *expected[1],
        tokenizer.eos_token_id,
    ]
    assert file.ids.dtype == np.uint16
    for place, ids in zip(file.documents, expected, strict=True):
        assert file.ids[place.start : place.start + place.tokens].tolist() == ids
    assert [(place.title, place.sha256) for place in file.documents] == [
        ("first", "a1"),
        ("second", "b2"),
    ]


def test_same_texts_are_tokenised_once(tokenizer, tmp_path, monkeypatch):
    first = made(tokenizer, tmp_path)
    monkeypatch.setattr(module, "_write", None)
    again = made(tokenizer, tmp_path)
    assert np.array_equal(again.ids, first.ids) and again.documents == first.documents


@pytest.mark.parametrize("change", ["text", "order", "tokenizer"])
def test_other_texts_or_tokenizer_are_tokenised_anew(tokenizer, tmp_path, change):
    made(tokenizer, tmp_path)
    documents = DOCUMENTS[::-1] if change == "order" else DOCUMENTS
    documents = [Document("third", "He read.", "c3")] if change == "text" else documents
    cutter = (
        train_tokenizer(["He read the book again."], 300) if change == "tokenizer" else tokenizer
    )
    file = made(cutter, tmp_path, documents)
    assert file.ids[: file.documents[0].tokens].tolist() == cutter(documents[0].text)["input_ids"]
    assert [place.sha256 for place in file.documents] == [document.sha256 for document in documents]


def test_files_can_be_moved(tokenizer, tmp_path):
    ids = made(tokenizer, tmp_path / "here").ids.tolist()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert open_tokens(tmp_path / "there" / "train.json").ids.tolist() == ids


def test_pickled_by_path(tokenizer, tmp_path):
    documents = [Document("long", "The river was long. " * 5000, "d4")]
    file = made(tokenizer, tmp_path, documents)
    packed = pickle.dumps(file)
    assert len(packed) < file.ids.nbytes / 10
    assert np.array_equal(pickle.loads(packed).ids, file.ids)


def test_long_texts_are_cut(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 40)
    monkeypatch.setattr("landmark.data.encoding.PIECE", 40)
    monkeypatch.setattr("landmark.data.encoding.OVERLAP", 32)
    text = "The river was long and dark.\n" * 20 + "And then"
    seen = []
    file = made(
        tokenizer, tmp_path, [Document("lines", text, "e5")], lambda *found: seen.append(found)
    )
    assert file.ids[: file.documents[0].tokens].tolist() == backend(tokenizer).encode(text).ids
    assert len(seen) > 5


@pytest.mark.parametrize("damage", ["shorter", "longer", "changed", "header", "format", "missing"])
def test_damage_is_found(tokenizer, tmp_path, damage):
    binary = made(tokenizer, tmp_path).path
    header = binary.with_suffix(".json")
    raw = binary.read_bytes()
    if damage == "shorter":
        binary.write_bytes(raw[:-2])
    elif damage == "longer":
        binary.write_bytes(raw + b"\0\0")
    elif damage == "changed":
        binary.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "header":
        header.write_text("{")
    elif damage == "format":
        header.write_text(json.dumps({"model": {}}))
    else:
        binary.unlink()
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"train\.(bin|json).*(delete|another folder)"
    ):
        made(tokenizer, tmp_path)


def test_many_ids_take_four_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 70_000)
    file = made(tokenizer, tmp_path)
    assert file.ids.dtype == np.uint32
    assert (
        file.ids[: file.documents[0].tokens].tolist() == tokenizer(DOCUMENTS[0].text)["input_ids"]
    )
