"""Reading texts: order, splits, titles, hashes, rows."""

import hashlib
import json
import sys
import types

import pytest

from landmark.data.text import Document, read_documents


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def test_folder_is_read_by_relative_path(tmp_path):
    write(tmp_path, b_txt="second", a__z_txt="first", c__a_txt="third", a__notes_md="no")
    documents = list(read_documents(tmp_path))
    assert [document.title for document in documents] == ["a/z.txt", "b.txt", "c/a.txt"]
    assert [document.text for document in documents] == ["first", "second", "third"]
    assert documents[0].sha256 == hashlib.sha256(b"first").hexdigest()


def test_splits_are_subfolders(tmp_path):
    write(tmp_path, train__a_txt="train text", validation__a_txt="held out")
    assert [document.text for document in read_documents(tmp_path)] == ["train text"]
    assert [document.text for document in read_documents(tmp_path, split="validation")] == ["held out"]
    with pytest.raises(FileNotFoundError, match=r"'test'.*validation"):
        read_documents(tmp_path, split="test")


def test_titles_come_from_a_manifest(tmp_path):
    write(tmp_path, train__a_txt="text", train__b_txt="text")
    (tmp_path / "MANIFEST.tsv").write_text("file\ttitle\tauthor\ntrain/a.txt\tThe Sea\tOne, A\n")
    assert [document.title for document in read_documents(tmp_path)] == ["The Sea (One, A)", "b.txt"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert next(read_documents(tmp_path / "a.txt")).text == "words"


def test_jsonl_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "body": "b"}) for text in ("one", " ", "two\u2028lines")))
    assert [document.text for document in read_documents(path)] == ["one", "two\u2028lines"]
    assert [document.text for document in read_documents(path, field="body")] == ["b", "b", "b"]


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": "row"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(read_documents("someone/texts:large", split="test")) == [
        Document("someone/texts:large, test row 0", "row", hashlib.sha256(b"row").hexdigest())
    ]
    assert asked == [("someone/texts", "large", "test")]
