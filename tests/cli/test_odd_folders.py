"""Folders of models and memories that are damaged, incomplete or named oddly: one line, and nothing
half-written.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import landmark
from landmark.cli import app as cli
from landmark.memory.archive.log import _file_of
from tiny import save_models

TEXT = "The road went on. The pass key is 12345. Nobody was there.\n" * 30
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """An empty working directory but for a text and copies of the models."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "marked"):
        shutil.copytree(models / name, name)
    Path("text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs a command: (exit code, stdout, the error's line)."""

    def call(line):
        with pytest.raises(SystemExit) as ended:
            cli.main(line.split())
        said = capsys.readouterr()
        error = said.err.splitlines()[-1] if ended.value.code == 2 else ""
        assert ended.value.code != 2 or (error.startswith("error: ") and len(error) <= 400), (
            said.err
        )
        return ended.value.code, said.out, error

    return call


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_memory_of_the_bundled_model_is_asked_beside_something_of_its_name(run, kind):
    Path("short.txt").write_text(TEXT[:200])
    assert run("remember short.txt --out memory")[0] == 0
    Path("landmark").mkdir() if kind == "folder" else Path("landmark").write_text("mine")
    for line in (
        "ask memory hi --max-new-tokens 1",
        "generate hi --model landmark --max-new-tokens 1",
    ):
        code, out, error = run(line)
        assert code == 0 and out, error


def test_a_model_that_is_called_as_the_bundled_one_comes_first(run):
    Path("marked").rename("landmark")
    assert run("remember text.txt --out memory --model landmark")[0] == 0
    assert run("memory info memory")[1] and landmark.texts.library.model_of(
        "memory"
    ) == os.path.abspath("landmark")


def test_the_bundled_model_is_not_converted_again(run):
    assert "landmark model already" in run("convert landmark --out c")[2]


TOKENIZERS = {
    "deep": ("tokenizer.json", DEEP),
    "null": ("tokenizer.json", "null"),
    "a list": ("tokenizer.json", "[1]"),
    "empty": ("tokenizer.json", ""),
    "cut": ("tokenizer.json", '{"version": "1'),
    "deep config": ("tokenizer_config.json", DEEP),
    "null config": ("tokenizer_config.json", "null"),
    "UTF-16 config": ("tokenizer_config.json", "{}".encode("utf-16")),
    "half an emoji in the config": ("tokenizer_config.json", r'{"note": "\ud83d"}'),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_before_anything_is_written(run, name):
    file, content = TOKENIZERS[name]
    Path("plain", file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for line in (
        "convert plain --out c",
        "train --data text.txt --out c --model plain --steps 1 --length 64",
    ):
        code, _, error = run(line)
        assert code == 2 and "tokenizer" in error and "plain" in error
        assert not Path("c").exists()


def test_a_model_without_a_tokenizer_is_converted_without(run):
    for file in Path("plain").glob("tokenizer*"):
        file.unlink()
    code, out, _ = run("convert plain --out c")
    assert code == 0 and "without a tokenizer: the source has none" in out


def with_tokens(folder, *, special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [f"<extra{number}>" for number in range(60)]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": names}
    ) if special else tokenizer.add_tokens(names)
    tokenizer.save_pretrained(folder)


TAKING_TEXT = [
    "generate hi --file text.txt",
    "remember text.txt --out out",
    "explain text.txt --question hi --out out.html",
    "rank hi text.txt",
    "eval perplexity --data text.txt --lengths 20",
    "train --data text.txt --out out --steps 1 --length 64",
]


@pytest.mark.parametrize("line", TAKING_TEXT)
def test_a_token_that_the_model_has_no_embedding_for_is_refused(run, line):
    with_tokens("marked", special=False)
    Path("text.txt").write_text("<extra59>" + TEXT)
    code, _, error = run(f"{line} --model marked")
    wanted = (
        "up to 354"
        if line.startswith("train")
        else "expected token ids from 0 to 319, got .* to 354"
    )
    assert code == 2 and re.search(wanted, error)


@pytest.mark.parametrize("special", [False, True])
def test_further_tokens_of_a_tokenizer_do_not_matter_where_no_text_has_them(run, special):
    with_tokens("marked", special=special)
    assert run("generate hi --model marked --max-new-tokens 1")[0] == 0
    Path("named.txt").write_text("<extra59>" + TEXT)
    assert "got " in run("generate hi --file named.txt --model marked")[2]


def test_a_plain_model_says_so_too(run):
    with_tokens("plain", special=False)
    Path("named.txt").write_text("<extra59>" + TEXT)
    code, _, error = run("eval perplexity --data named.txt --lengths 20 --model plain")
    assert code == 2 and "expected token ids that the model's embedding has rows for" in error


def remembered(**changes):
    model = landmark.load("marked")
    model.read(torch.arange(1, 101)[None]).save("memory", **changes)


@pytest.mark.parametrize(
    "notes", [None, {"tokenizer": 5, "sources": 3}, {"sources": [{"name": 1}], "model": "x"}]
)
def test_a_memory_with_other_notes_is_shown_and_not_asked(run, notes):
    remembered(notes=notes)
    for line in (
        "ask memory hi",
        "ask memory hi --model marked",
        "remember text.txt --out memory --model marked",
    ):
        assert "expected a memory with its texts in 'memory', got one without" in run(line)[2]
    assert (
        run("memory info memory")[0]
        == run("memory verify memory")[0]
        == run("memory compact memory")[0]
        == 0
    )


def changed(path, value):
    def change(state):
        *parents, last = path.split(".")
        inside = state
        for name in parents:
            inside = inside[name]
        if value is None:
            del inside[last]
        else:
            inside[last] = value
        return state

    return change


STATES = {
    "a list": lambda state: [],
    "a word": lambda state: "state",
    "no manifest": changed("manifest", None),
    "an empty manifest": changed("manifest", {}),
    "a manifest that is a list": changed("manifest", []),
    "streams that are a list": changed("streams", []),
    "no streams": changed("streams", None),
    "empty streams": changed("streams", {}),
    "a stream of half a byte": changed("streams.text-ids.bytes", 0.5),
    "no commits": changed("commits", None),
    "layers that are a number": changed("manifest.layers", 5),
    "layers of words": changed("manifest.layers", [["a", "b", "c"]] * 2),
    "a model that is a word": changed("manifest.model", "x"),
    "a tail of no tensors": changed("manifest.tail.tensors", []),
    "a tail of numbers": changed("manifest.tail.tensors", [1]),
    "tokens that are a word": changed("manifest.tokens", "many"),
    "notes that are a list": changed("manifest.notes", []),
}


@pytest.mark.parametrize("name", STATES)
def test_a_whole_file_of_another_shape_is_damaged(run, name):
    remembered()
    path = Path("memory/memory.json")
    path.write_bytes(_file_of(STATES[name](json.loads(path.read_text())["state"])))
    before = {file.name: file.stat().st_size for file in Path("memory").iterdir()}
    code, _, error = run("ask memory hi --model marked")
    assert code == 2 and ("memory.json" in error or "texts" in error)
    if name != "a tail of no tensors":  # which only the model knows
        assert run("memory info memory")[0] == 2
        code, out, _ = run("memory verify memory")
        assert code == 1 and out.endswith("1 damaged\n")
        assert run("memory compact memory")[0] == 2
    else:
        with pytest.raises(ValueError, match="names no tensor"):
            landmark.LandmarkCache.open("memory", landmark.load("marked"))
    assert {file.name: file.stat().st_size for file in Path("memory").iterdir()} == before


def test_a_pipe_in_place_of_blocks_is_not_waited_for(run):
    remembered()
    Path("memory/layer-01.blocks").unlink()
    os.mkfifo("memory/layer-01.blocks")
    code, out, _ = run("memory verify memory")
    assert code == 1 and "layer-01.blocks" in out


def test_a_pipe_in_a_folder_of_texts_is_not_waited_for(run):
    Path("texts").mkdir()
    os.mkfifo("texts/pipe.txt")
    assert "expected .txt files, found none" in run("generate hi --model marked --file texts")[2]
    shutil.copy("text.txt", "texts/a.txt")
    assert run("generate hi --model marked --file texts --max-new-tokens 1")[0] == 0


@pytest.mark.parametrize(
    "line",
    ["convert plain --out new/c", "train --data text.txt --out new/c --model plain --length 64"],
)
def test_a_full_disk(here, line):
    shell = [
        "sh",
        "-c",
        'ulimit -f 20; exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "landmark.cli.app",
        *line.split(),
    ]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        "error: .*new/c.* got none .*make room there or name another", done.stderr.splitlines()[-1]
    )
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "line",
    [
        "generate hi --model caf\udce9",
        "convert caf\udce9 --out c",
        "train --data text.txt --out c --model caf\udce9",
        "train --data text.txt --out c --tokenizer caf\udce9",
    ],
)
def test_a_model_in_a_folder_that_is_no_utf8(run, line):
    shutil.copytree("marked", "caf\udce9")
    assert "expected a folder with a name in UTF-8 for a model" in run(line)[2]


def test_what_is_no_folder_is_said_to_be_none(run):
    error = run("train --data text.txt --out c --model plain --tokens /dev/null")[2]
    assert "tokens: expected a folder, got /dev/null (it is none)" in error
    error = run("remember text.txt --out m --model marked --spill-folder /proc")[2]
    assert "no file can be made for blocks in '/proc'" in error
