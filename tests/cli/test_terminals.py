"""Commands as processes of their own: other locales, closed, full and unread streams, words that
are no UTF-8.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from landmark import remember
from landmark.cli import app as cli
from landmark.cli.progress import Shown
from landmark.data.text import read_documents
from tiny import save_models

TEXT = "The road went on. The pass key is 12345. Nobody was there.\n" * 6
NAME = "café \U0001f642 \udce9\x1b[31m.txt"  # a byte that is no UTF-8, and a control sequence
LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a terminal of ASCII": {"PYTHONIOENCODING": "ascii"},
    "a terminal of Latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "one column": {"COLUMNS": "1"},
    "no home": {"HOME": ""},
}
WORDS = {
    "info": ["memory", "info", "MEMORY"],
    "info of nothing": ["memory", "info", NAME],
    "no command": [NAME],
    "help": ["--help"],
    "no number": ["eval", "passkey", "--trials", NAME],
}
STREAMS = {
    "stdout closed": (">&-", 0),
    "stderr closed": ("2>&-", 0),
    "stdin closed": ("<&-", 0),
    "all closed": ("<&- >&- 2>&-", 0),
    "stderr full": ("2>/dev/full", 0),
    "stdout full": (">/dev/full", 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    (root / NAME).write_text(TEXT)
    remember([root / NAME], root / "memory", str(root / "marked"))
    return root


def started(words, models, folder, **options):
    places = {"MEMORY": "memory", "MARKED": "marked"}
    words = [str(models / places[word]) if word in places else word for word in words]
    before = options.pop("before", ())
    command = [*before, sys.executable, "-m", "landmark.cli.app", *words]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, **options)


def done(words, models, folder, stdin=b"", **options):
    options = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE, **options}
    process = started(words, models, folder, **options)
    out, err = process.communicate(stdin)
    assert b"Traceback" not in err and b"Exception ignored" not in err, err
    assert not {*(out or b""), *err} & {*range(9), *range(11, 32), 127}, (out, err)
    return process.returncode, out, err


def environment(locale):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **LOCALES[locale]}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("locale", LOCALES)
def test_locales(models, tmp_path, locale, name):
    code, out, err = done(WORDS[name], models, tmp_path, env=environment(locale))
    if name == "help":
        assert code == 0 and out and err == b""
    elif name == "info":
        assert code == 0 and err == b"" and b"source " in out
        assert (
            locale not in ("UTF-8", "C", "one column")
            or "café \U0001f642 \ufffd\ufffd[31m.txt".encode() in out
        )
    else:
        assert (
            code == 2
            and out == b""
            and err.startswith(b"error: ")
            and err.count(b"\n") == 1
            and len(err) <= 400
        )


@pytest.mark.parametrize("words", [["memory", "info", "MEMORY"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("name", STREAMS)
def test_streams(models, tmp_path, name, words):
    redirection, expected = STREAMS[name]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    code, _, err = done(words, models, tmp_path, before=shell, env=environment("UTF-8"))
    assert code == expected
    assert err == b"" if expected == 0 else err == b"error: stdout: No space left on device\n"


@pytest.mark.parametrize(
    "words", [["memory", "info", "MEMORY"], ["--help"], ["--version"]], ids=" ".join
)
def test_nobody_reads(models, tmp_path, words):
    read, written = os.pipe()
    os.close(read)
    code, _, err = done(words, models, tmp_path, stdout=written, env=environment("UTF-8"))
    os.close(written)
    assert (code, err) == (1, b"")


@pytest.mark.parametrize(
    "locale", ["C without UTF-8", pytest.param("a terminal of ASCII", marks=pytest.mark.full)]
)
def test_explain_a_name_that_is_no_text(models, tmp_path, locale):
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(name, "w") as file:
        file.write(TEXT)
    words = [
        "explain",
        name,
        "--question",
        "The café".encode(),
        "--model",
        "MARKED",
        "--max-new-tokens",
        "2",
    ]
    code, out, err = done([*words, "--out", "page.html"], models, tmp_path, env=environment(locale))
    assert code == 0 and b"Page: page.html" in out, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "caf\ufffd.txt" in page and "<h1>The café</h1>" in page


@pytest.mark.full
def test_a_text_from_a_pipe(models, tmp_path):
    words = ["generate", "hi", "--model", "MARKED", "--max-new-tokens", "2", "--file", "/dev/stdin"]
    code, out, err = done(words, models, tmp_path, stdin=TEXT.encode(), env=environment("UTF-8"))
    assert code == 0 and out, err


@pytest.mark.full
def test_questions_that_are_no_utf8(models, tmp_path):
    words = ["ask", "MEMORY", "--interactive", "--max-new-tokens", "2"]
    code, out, err = done(
        words, models, tmp_path, stdin=b"The caf\xe9\r\nThe road\n", env=environment("UTF-8")
    )
    assert code == 0 and "The caf\ufffd".encode() in out and b"\nThe road" in out, err


@pytest.mark.full
def test_a_table_on_a_narrow_terminal_of_ascii(models, tmp_path):
    (tmp_path / "é[bold].txt").write_text(TEXT, encoding="utf-8")
    environ = {**environment("a terminal of ASCII"), "COLUMNS": "1"}
    code, out, err = done(
        ["rank", "hi", "é[bold].txt", "--model", "MARKED"], models, tmp_path, env=environ
    )
    assert code == 0 and b"?[bold].txt" in out, err


@pytest.mark.full
def test_interrupted(models, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT * 2000)
    words = ["remember", "long.txt", "--out", "memory", "--model", "MARKED"]
    process = started(words, models, tmp_path, stdout=subprocess.PIPE, env=environment("UTF-8"))
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode in (0, 130) and b"Traceback" not in err, err


def test_a_memory_is_asked_from_another_folder(models, tmp_path, monkeypatch):
    """It was remembered by a model with a relative name."""
    from landmark.texts.library import model_of

    monkeypatch.chdir(models)
    remember([Path(NAME)], tmp_path / "memory", "marked")
    monkeypatch.chdir(tmp_path)
    assert model_of("memory") == str(models / "marked")


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("landmark.cli.progress.FIRST", 0.01)
    monkeypatch.setattr("landmark.cli.progress.EVERY", 0.01)
    monkeypatch.setattr("landmark.cli.progress.CHECKED", 0.01)


def test_progress_controls_no_terminal(capsys, at_once):
    with Shown() as progress:
        progress(f"{NAME} read", 1, 2)
        time.sleep(0.2)
    said = capsys.readouterr()
    assert said.out == "" and "\ufffd[31m.txt read: 1 of 2 (0 s)\n" in said.err
    assert "\x1b" not in said.err


def test_progress_without_stderr(capsys, at_once, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Shown() as progress:
        progress("tokens read", 1, 2)
        time.sleep(0.2)
    assert capsys.readouterr().out == ""


def test_an_error_that_nobody_reads_has_its_code(models, tmp_path):
    shell = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh"]
    assert (
        done(
            ["memory", "info", "nothing"], models, tmp_path, before=shell, env=environment("UTF-8")
        )[0]
        == 2
    )


EXPLAIN = [
    "explain",
    "a.txt",
    "--question",
    "hi",
    "--model",
    "MARKED",
    "--max-new-tokens",
    "2",
    "--out",
    "p.html",
]
PASSKEY = [
    "eval",
    "passkey",
    "--model",
    "MARKED",
    "--lengths",
    "150,200",
    "--trials",
    "1",
    "--out",
    "rows.json",
]
PERPLEXITY = [
    "eval",
    "perplexity",
    "--model",
    "MARKED",
    "--data",
    "a.txt",
    "--lengths",
    "20",
    "--max-tokens",
    "40",
]
TRAIN = [
    "train",
    "--data",
    "a.txt",
    "--out",
    "out",
    "--model",
    "MARKED",
    "--length",
    "64",
    "--steps",
    "3",
]
LOST = {
    "explain": (EXPLAIN, ["p.html"]),
    "passkey": ([*PASSKEY, "--plot", "p.png"], ["rows.json", "p.png"]),
    "perplexity": ([*PERPLEXITY, "--plot", "p.png"], ["p.png"]),
    "train": (
        [*TRAIN, "--batch", "2", "--workers", "0", "--log-every", "1"],
        ["out/model.safetensors"],
    ),
}
UNREAD = {">/dev/full": 2, "2>/dev/full": 0, "| true": 0}
QUICK = {
    ("explain", ">/dev/full"),
    ("passkey", "2>/dev/full"),
    ("perplexity", ">/dev/full"),
    ("train", "| true"),
}


@pytest.mark.parametrize(
    ("name", "redirection"),
    [
        pytest.param(
            name, redirection, marks=() if (name, redirection) in QUICK else pytest.mark.full
        )
        for name in LOST
        for redirection in UNREAD
    ],
)
def test_what_was_computed_is_written_wherever_nobody_reads(models, tmp_path, name, redirection):
    words, files = LOST[name]
    (tmp_path / "a.txt").write_text(TEXT * 5)
    shell = ["sh", "-c", f'"$@" {redirection}', "sh"]
    code, _, err = done(words, models, tmp_path, before=shell, env=environment("UTF-8"))
    assert code == UNREAD[redirection], err
    assert all((tmp_path / file).stat().st_size > 100 for file in files), err
    if name == "passkey":
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2


def test_interrupted_while_it_is_loaded(tmp_path):
    loading = """
import sys
from landmark.cli import main

class Interrupted:
    def find_spec(self, name, *rest):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", loading, "info"], capture_output=True, env=environment("UTF-8")
    )
    assert (ended.returncode, ended.stderr) == (130, b"")


@pytest.mark.parametrize("name", ["io.txt", "io.jsonl", "io.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    """This process's memory: it has a size, and no first byte."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(read_documents(tmp_path / name))
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("name", ["io.txt", "io.json"])
def test_reading_errors_are_one_line(models, tmp_path, capsys, name):
    (tmp_path / name).symlink_to("/proc/self/mem")
    file = str(tmp_path / name)
    marked = str(models / "marked")
    recipe = ["train", "--data", str(models / NAME), "--out", str(tmp_path / "o"), "--config", file]
    for words in (["rank", "hi", file, "--model", marked], recipe):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said == f"error: {tmp_path / name}: Input/output error\n"
