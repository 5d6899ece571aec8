"""Reading texts: order, splits, titles, hashes, rows."""

import hashlib
import json
import os
import sys
import threading
import types

import pytest

from landmark.data.sources import Source
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
    assert [document.text for document in read_documents(tmp_path, split="validation")] == [
        "held out"
    ]
    with pytest.raises(FileNotFoundError, match=r"'test'.*validation"):
        read_documents(tmp_path, split="test")


def test_titles_come_from_a_manifest(tmp_path):
    write(tmp_path, train__a_txt="text", train__b_txt="text")
    (tmp_path / "MANIFEST.tsv").write_text("file\ttitle\tauthor\ntrain/a.txt\tThe Sea\tOne, A\n")
    assert [document.title for document in read_documents(tmp_path)] == [
        "The Sea (One, A)",
        "b.txt",
    ]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert next(read_documents(tmp_path / "a.txt")).text == "words"


def test_jsonl_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"text": text, "body": "b"}) for text in ("one", " ", "two\u2028lines")
        )
    )
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


def rows(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(document.title, document.text) for document in read_documents(path)]


def test_half_a_character_in_a_row_becomes_one(tmp_path):
    content = (
        json.dumps({"text": "cut \ud83d off"}) + "\n" + json.dumps({"text": "whole \U0001f642"})
    )
    assert [text for _, text in rows(tmp_path / "a.jsonl", content)] == [
        "cut \ufffd off",
        "whole \U0001f642",
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_end_in_any_line_end(tmp_path, end):
    content = end.join(['{"text": "one"}', "", '{"text": "two"}', ""])
    assert rows(tmp_path / "a.jsonl", content) == [
        ("a.jsonl, line 1", "one"),
        ("a.jsonl, line 3", "two"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_at_any_line_end(end):
    source = Source("a", end.join(["one", "two", "", "four"]))
    starts = [source.text.index("one"), source.text.index("two"), source.text.index("four")]
    assert [source.line(start) for start in starts] == [1, 2, 4]
    ends = [place for place in range(len(source.text)) if source.text[place] in "\r\n"]
    assert [source.line(place) for place in ends[: len(end)]] == [1] * len(end)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "value", [{"text": "one"}, [{"text": "one"}], [{"text": "one"}, {"x": 1, "text": "two"}]]
)
def test_a_json_file_is_one_value(tmp_path, value, indent):
    texts = [row["text"] for row in (value if isinstance(value, list) else [value])]
    found = rows(tmp_path / "a.json", json.dumps(value, indent=indent))
    assert found == [(f"a.json, row {number}", text) for number, text in enumerate(texts, 1)]


def test_a_json_file_of_rows_is_read_as_rows(tmp_path):
    assert rows(tmp_path / "a.json", '{"text": "one"}\n{"text": "two"}') == [
        ("a.json, line 1", "one"),
        ("a.json, line 2", "two"),
    ]


def test_numbers_that_json_has_not_are_no_matter(tmp_path):
    assert (
        rows(tmp_path / "a.jsonl", '{"x": NaN, "y": -Infinity, "text": 1, "text": "one"}')[0][1]
        == "one"
    )


def test_a_name_that_is_no_utf8_is_a_title(tmp_path):
    path = tmp_path / "caf\udce9.txt"
    assert rows(path, "words") == [("caf\ufffd.txt", "words")]


def test_a_folder_named_as_a_text_is_a_folder(tmp_path):
    write(tmp_path, b__a_txt="inside")
    (tmp_path / "b").rename(tmp_path / "b.txt")
    assert [document.title for document in read_documents(tmp_path)] == ["b.txt/a.txt"]


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("words",))
    writer.start()
    assert [document.text for document in read_documents(tmp_path / "pipe")] == ["words"]
    writer.join()
