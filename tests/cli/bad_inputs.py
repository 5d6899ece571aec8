"""What the commands refuse: (name, arguments of a whole run or a call, what the message says)."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from landmark.cli.app import app
from landmark.memory.archive.log import Archive
from tiny import save_models


@functools.cache
def models() -> Path:
    root = Path(tempfile.mkdtemp())
    save_models(root)
    return root


def run(line: str, write: bytes | None = None, named: str = "text.txt") -> Callable[[Path], None]:
    """A call that runs a command line; FOLDER is an empty folder, FILE a file in it with the bytes
    ``write``.
    """

    def call(folder: Path) -> None:
        if write is not None:
            (folder / named).write_bytes(write)
        places = {
            "FOLDER": folder,
            "FILE": folder / named,
            "MARKED": models() / "marked",
            "PLAIN": models() / "plain",
        }
        words = [
            functools.reduce(lambda w, name: w.replace(name, str(places[name])), places, word)
            for word in line.split()
        ]
        app(words, standalone_mode=False)

    return call


def damaged(folder: Path) -> None:
    save_models(folder)
    (folder / "marked" / "model.safetensors").write_bytes(b"no weights")
    run(f"generate hello --model {folder}/marked")(folder)


def memory_without_its_model(folder: Path) -> None:
    save_models(folder)
    run(f"remember FILE --out {folder}/memory --model {folder}/marked", b"text")(folder)
    (folder / "marked").rename(folder / "moved")
    run(f"ask {folder}/memory hi")(folder)


def without_bm25s(folder: Path) -> None:
    with mock.patch.dict(sys.modules, {"bm25s": None}):
        run("eval rank --data FILE --model MARKED", b"word " * 900)(folder)


def ranked_by_no_layer(folder: Path) -> None:
    save_models(folder)
    config = folder / "marked" / "config.json"
    fields = json.loads(config.read_text())
    fields["landmark"]["layers"] = [0]
    config.write_text(json.dumps(fields))
    run(f"rank hi FILE --model {folder}/marked", b"word " * 9)(folder)


def compacted_while_it_is_written(folder: Path) -> None:
    run("remember FILE --out FOLDER/memory --model MARKED", b"text")(folder)
    writer = Archive.open(folder / "memory")
    writer.lock()
    run("memory compact FOLDER/memory")(folder)


def without_matplotlib(folder: Path) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        run("eval passkey --model MARKED --lengths 200 --trials 1 --plot FOLDER/a.png")(folder)


SOME_QUESTIONS = b'{"documents": ["It is red."], "questions": ["What?"], "answers": ["red"]}'
CASES = [
    ("no command", [], "Missing command. See landmark --help"),
    ("unknown command", ["fly"], "No such command 'fly'"),
    ("unknown option", ["demo", "--txet", "a"], "No such option: --txet"),
    (
        "text instead of a number",
        ["eval", "passkey", "--trials", "many"],
        "Invalid value for '--trials'",
    ),
    (
        "lengths that are no numbers",
        ["eval", "passkey", "--lengths", "8k"],
        "--lengths: expected integers.*'8k'.*write",
    ),
    ("perplexity without data", ["eval", "perplexity"], "Missing option '--data'"),
    (
        "a model that is not there",
        ["generate", "hi", "--model", "./none"],
        "--model: expected a folder.*got ./none",
    ),
    (
        "a device that is not there",
        run("generate hi --model MARKED --device cuda:77"),
        "--device: expected.*'cuda:77'",
    ),
    (
        "an unknown dtype",
        run("generate hi --model MARKED --dtype int4"),
        "--dtype: expected one of auto.*'int4'",
    ),
    (
        "an empty folder as model",
        run("demo --model FOLDER"),
        "--model: expected a folder with a config.json",
    ),
    ("a damaged checkpoint", damaged, "--model: expected weights and a tokenizer.*marked"),
    (
        "a demo of a plain model",
        run("demo --model PLAIN"),
        "--model: expected a landmark model, got the plain Llama",
    ),
    (
        "a demo of no text",
        run("demo --model MARKED --text FOLDER/a.txt"),
        "--text: expected a text file.*a.txt",
    ),
    ("a demo of an empty text", run("demo --model MARKED --text FILE", b""), "empty file"),
    (
        "a demo of a short text",
        run("demo --model MARKED --text FILE", b"word " * 9),
        "at least 1024 tokens",
    ),
    (
        "explain no file",
        run("explain FOLDER/a.txt --question hi --model MARKED"),
        "FILES: expected text files.*a.txt",
    ),
    (
        "explain an empty folder",
        run("explain FOLDER --question hi --model MARKED"),
        "expected .txt files, found none",
    ),
    (
        "explain an image",
        run("explain FILE --question hi --model MARKED", b"\x89PNG\0\1"),
        "binary data",
    ),
    (
        "explain a plain model",
        run("explain FILE --question hi --model PLAIN", b"text"),
        "--model: expected a landmark",
    ),
    (
        "explain in no token",
        run("explain FILE --question hi --model MARKED --max-new-tokens 0", b"text"),
        "got 0; pass",
    ),
    (
        "remember no file",
        run("remember FOLDER/a.txt --out FOLDER/m --model MARKED"),
        "FILES: expected text files.*a.txt",
    ),
    (
        "remember with files in no folder",
        run("remember FILE --out FOLDER/m --model MARKED --spill-folder FOLDER/none", b"text"),
        "--spill-folder: expected a folder that exists, got .*none'; make it first",
    ),
    (
        "remember on no tier",
        run("remember FILE --out FOLDER/m --model MARKED --tier tape", b"text"),
        "--tier: .*'tape'",
    ),
    (
        "remember by a plain model",
        run("remember FILE --out FOLDER/m --model PLAIN", b"text"),
        "--model: expected a landmark",
    ),
    (
        "ask no memory",
        run("ask FOLDER hi --model MARKED"),
        "expected a memory with a file memory.json",
    ),
    (
        "ask nothing",
        run("ask FOLDER --model MARKED"),
        "QUESTION: expected a question or --interactive, got neither",
    ),
    ("a binary text", run("generate hi --model MARKED --file FILE", b"\x89PNG\0\1"), "binary data"),
    (
        "a text in another encoding",
        run("generate hi --model MARKED --file FILE", b"caf\xe9"),
        "UTF-8.*0xe9",
    ),
    (
        "nothing to go on from",
        lambda folder: app(
            ["generate", "", "--model", str(models() / "marked")], standalone_mode=False
        ),
        "PROMPT: expected",
    ),
    (
        "no new tokens",
        run("generate hi --model MARKED --max-new-tokens 0"),
        "--max-new-tokens: expected at least 1, got 0",
    ),
    (
        "a negative temperature",
        run("generate hi --model MARKED --temperature -1"),
        "--temperature: expected at least 0",
    ),
    (
        "an unknown way to read",
        run("eval passkey --model MARKED --read fast"),
        "--read: expected one of local, retrieve",
    ),
    (
        "no trials",
        run("eval passkey --model MARKED --trials 0"),
        "--trials: expected integers of at least 1",
    ),
    (
        "lengths that measure other text",
        run("eval perplexity --model MARKED --data FILE --lengths 500,2048"),
        r"--lengths: expected lengths that divide the greatest, 2048.*got \[500\]; pass",
    ),
    (
        "an endless top_k",
        run(f"eval passkey --model MARKED --lengths 200 --trials 1 --top-k {10**20}"),
        "--top-k: expected integers of at most 2147483647, got '1000.*pass smaller",
    ),
    (
        "an endless window",
        run(f"eval passkey --model PLAIN --window {10**20}"),
        "--window: expected 1 to 2147483647",
    ),
    (
        "no filler",
        run("eval passkey --model MARKED --filler ,"),
        "--filler: expected some, with commas, got none",
    ),
    (
        "a page over a folder",
        run("explain FILE --question hi --out FOLDER", b"text"),
        "--out: .*it is a folder.*another",
    ),
    (
        "a page in a file",
        run("explain FILE --question hi --out FILE/a", b"text"),
        "--out: expected a file that can be",
    ),
    (
        "a picture of no format",
        run("eval passkey --model MARKED --lengths 200 --plot FOLDER/a.html"),
        "--plot: expected a picture named with .png, or .*; rename it",
    ),
    (
        "convert into a file",
        run("convert PLAIN --out FILE", b"text"),
        "--out: expected a folder, got .*; name another",
    ),
    (
        "remember in a file",
        run("remember FILE --out FILE --model MARKED", b"text"),
        "--out: expected a folder",
    ),
    (
        "a memory whose model is gone",
        memory_without_its_model,
        "^--model: expected the one that made the memory .* got nothing there; pass its new "
        "folder: --model FOLDER",
    ),
    (
        "top_k 0",
        run("eval passkey --model MARKED --lengths 200 --trials 1 --top-k 0"),
        "^--top-k: expected.*got 0; pass --top-k 1",
    ),
    (
        "an unknown granularity",
        run("eval passkey --model MARKED --lengths 200 --granularity word"),
        "granularity.*'word'",
    ),
    (
        "an unknown filler",
        run("eval passkey --model MARKED --filler FOLDER/x"),
        "--filler: expected paper, pydoc",
    ),
    (
        "facts that do not fit",
        run("eval passkey --model MARKED --lengths 100 --facts 9"),
        "--lengths: expected at least",
    ),
    (
        "more facts than names",
        run("eval passkey --model MARKED --lengths 100 --facts 999"),
        "at most 256.*got 999",
    ),
    (
        "a window without a plain model",
        run("eval passkey --model MARKED --window 9"),
        "--window: expected a plain model",
    ),
    (
        "an unknown scaling",
        run("eval passkey --model PLAIN --rope linear"),
        "--rope: expected dynamic or yarn.*'linear'",
    ),
    (
        "pictures without matplotlib",
        without_matplotlib,
        r"expected matplotlib.*landmark-attention\[viz\]",
    ),
    (
        "data that are not there",
        run("eval perplexity --model MARKED --data FOLDER/a.txt"),
        "a.txt: no such file",
    ),
    (
        "data without text",
        run("eval perplexity --model MARKED --data FOLDER"),
        "expected .txt files, found none",
    ),
    (
        "documents that are too short",
        run("eval perplexity --model MARKED --data FILE --lengths 500", b"a few words"),
        "expected documents of at least 500 tokens",
    ),
    (
        "an unknown scheme",
        run("eval perplexity --data FILE --scheme flat", b"a"),
        "--scheme: expected one of paper, blocks",
    ),
    (
        "no memory blocks",
        run("eval perplexity --data FILE --blocks 0", b"a"),
        "--blocks: expected at least 1 block, got 0",
    ),
    (
        "less text than a segment",
        run("eval perplexity --data FILE --max-tokens 9", b"a"),
        "--max-tokens: expected at least",
    ),
    (
        "convert nothing",
        run("convert FOLDER/none --out FOLDER/out"),
        "MODEL: expected a folder with a config.json",
    ),
    ("convert twice", run("convert MARKED --out FOLDER/out"), "landmark model already"),
    (
        "convert with a block of 1",
        run("convert PLAIN --out FOLDER/out --block-size 1"),
        "^--block-size: expected.*got 1; pass --block-size 2",
    ),
    (
        "layers that are no numbers",
        run("convert PLAIN --out FOLDER/out --layers all"),
        "--layers: expected integers.*'all'",
    ),
    ("show no memory", run("memory info FOLDER"), "expected a memory with a file memory.json in"),
    (
        "verify a text",
        run("memory verify FILE", b"text"),
        "expected a memory with a file memory.json in .*text.txt",
    ),
    (
        "compact what is written",
        compacted_while_it_is_written,
        "is being written by another process; wait for it",
    ),
    ("a memory without a folder", ["memory", "info"], "Missing argument 'folder'"),
    ("rank without files", ["rank", "hello"], "Missing argument 'files'"),
    (
        "rank a file that is not there",
        run("rank hi FOLDER/none.txt --model MARKED"),
        "FILES: expected.*does not exist",
    ),
    (
        "rank a folder",
        run("rank hi FOLDER --model MARKED"),
        r"FILES: expected text files.*a folder.*/\*\.txt",
    ),
    (
        "rank an empty file",
        run("rank hi FILE --model MARKED", b" \n"),
        "text.txt: expected text, got an empty file",
    ),
    (
        "rank by a plain model",
        run("rank hi FILE --model PLAIN", b"a"),
        "--model: expected a landmark model",
    ),
    (
        "rank by a model that cannot",
        ranked_by_no_layer,
        "--model: expected a model that retrieves in some layer but",
    ),
    (
        "rank none",
        run("rank hi FILE --model MARKED --top 0", b"a"),
        "--top: expected at least 1, got 0",
    ),
    (
        "rank for nothing",
        lambda folder: app(
            ["rank", "", __file__, "--model", str(models() / "marked")], standalone_mode=False
        ),
        "QUERY: expected a text of at least one token",
    ),
    ("rank passages without bm25s", without_bm25s, r"BM25: expected.*landmark-attention\[rank\]"),
    (
        "a chat without a template",
        run("chat --model MARKED"),
        "chat: expected a model whose tokenizer has a chat template, got one without; use an",
    ),
    (
        "a memory by a template that is not there",
        run("remember FILE --out FOLDER/memory --model MARKED --chat", b"word " * 90),
        "--chat: expected a model whose tokenizer has a chat template, got one without",
    ),
    (
        "a chat with a plain model",
        run("chat --model PLAIN"),
        "--model: expected a landmark model",
    ),
    (
        "a chat about no file",
        run("chat FOLDER/a.txt --model MARKED"),
        "FILES: expected text files.*a.txt",
    ),
    (
        "questions in no context",
        run("eval questions --data FILE --contexts all --model MARKED", b"{}"),
        "--contexts: expected some of evidence, nothing, bm25, haystack, got all",
    ),
    (
        "questions that are texts",
        run("eval questions --data FILE --model MARKED", b"words"),
        "expected one JSON object per line",
    ),
    (
        "no questions",
        run("eval questions --data FILE --questions 0 --model MARKED", SOME_QUESTIONS),
        "--questions: expected at least 1, got 0",
    ),
    (
        "recall of a plain model",
        run("eval recall --model PLAIN --lengths 200 --trials 1"),
        "--model: expected a landmark model, got .*, which retrieves nothing",
    ),
    (
        "recall of no facts",
        run("eval recall --model MARKED --facts 0"),
        "--facts: expected integers of at least 1",
    ),
    (
        "rank passages by a plain model",
        run("eval rank --data FILE --model PLAIN", b"word " * 900),
        "--model: expected a landmark model",
    ),
    (
        "no passages",
        run("eval rank --data FILE --passages 0", b"a"),
        "--passages: expected at least 1, got 0",
    ),
    (
        "passages of nothing",
        run("eval rank --data FILE --passage-tokens 0", b"a"),
        "--passage-tokens: expected.*got 0",
    ),
    (
        "documents of nothing",
        run("eval rank --data FILE --max-tokens 0", b"a"),
        "--max-tokens: expected.*got 0",
    ),
    (
        "more passages than text",
        run("eval rank --data FILE --model MARKED", b"word " * 90),
        "--passages: expected documents of at least 50400 tokens for 200 passages of 126.*pass "
        "fewer",
    ),
    (
        "documents without words",
        run("eval rank --data FILE --model MARKED --passages 1 --passage-tokens 2", b". , ! " * 40),
        "BM25: expected documents with words, got 1 without",
    ),
    (
        "an index that is none",
        ["eval", "index", "--index", "exact,annoy"],
        "--index: expected some of exact, .*annoy",
    ),
    (
        "no landmarks to index",
        ["eval", "index", "--landmarks", "0"],
        "--landmarks: expected .* at least 1, got .0",
    ),
    (
        "an index of the first layer",
        run("eval index --data FILE --model MARKED --layer 0", b"word " * 900),
        "--layer: expected 1 to 1, got 0; the landmarks of layer 0 are all equal",
    ),
    (
        "an index over too short a text",
        run("eval index --data FILE --model MARKED", b"word " * 40),
        "--data: expected a text longer than the 256 queries .* pass a longer text",
    ),
    (
        "an index of a plain model",
        run("eval index --data FILE --model PLAIN", b"word " * 900),
        "--model: expected a landmark model, got the plain LlamaForCausalLM",
    ),
]
