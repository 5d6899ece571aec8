"""Long work says how far it is: soon, often, on stderr only; short work says nothing."""

import functools
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

import landmark
import landmark.texts.library
from landmark.cli import app as cli
from landmark.cli import progress as module
from landmark.cli.progress import CHECKED, EVERY, FIRST, Shown
from landmark.memory.archive.layer import ArchivedLayer
from landmark.memory.archive.log import STATE
from small_text import sentences, write_books
from tiny import save_models


@pytest.fixture
def quick(monkeypatch):
    """Seconds become hundredths."""
    monkeypatch.setattr(module, "FIRST", 0.02)
    monkeypatch.setattr(module, "EVERY", 0.03)
    monkeypatch.setattr(module, "CHECKED", 0.01)


def test_the_first_line_comes_in_time_and_the_others_often_enough():
    assert FIRST + CHECKED < 3
    assert EVERY + CHECKED < 3
    assert landmark.texts.library.SAVE_SECONDS <= 10


def test_short_work_says_nothing(capsys):
    with Shown() as shown:
        shown("tokens read", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_one_long_step_is_shown_again_and_again(quick, capsys):
    with Shown() as shown:
        shown("tokens read", 4032, 65536)
        time.sleep(0.3)  # nothing is reported meanwhile
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) >= 3
    assert all(re.fullmatch(r"tokens read: 4,032 of 65,536 \(\d+ s\)", line) for line in lines)


def test_what_is_not_known_is_left_out(quick, capsys):
    with Shown() as shown:
        shown("answering")
        time.sleep(0.2)
        shown("tokens, of 3 documents", 1000)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("answering (") and lines[-1].startswith(
        "tokens, of 3 documents: 1,000 ("
    )


def test_it_begins_with_loading(quick, capsys):
    """Packages, models and slow pipes take seconds before there is anything to count."""
    with Shown():
        time.sleep(0.2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("loading (0 s)\n")


@pytest.mark.full
def test_a_slow_pipe_is_not_waited_for_in_silence(folder, tmp_path):
    words = ["remember", "/dev/stdin", "--out", "m", "--model", str(folder / "marked")]
    slow = [
        "sh",
        "-c",
        '(sleep 9; echo "The road went on.") | "$@"',
        "sh",
        sys.executable,
        "-m",
        "landmark.cli.app",
    ]
    begun = time.monotonic()
    process = subprocess.Popen([*slow, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    times = []
    lines = []
    for line in process.stderr:
        times.append(time.monotonic() - begun)
        lines.append(line)
    assert process.wait() == 0 and times[0] < 3 and len(times) >= 3
    assert any(
        line.startswith("texts read: 0 of 1") or line.startswith("texts read (") for line in lines
    )


def test_nothing_is_shown_while_it_rests(quick, capsys):
    with Shown() as shown:
        shown.rest()
        time.sleep(0.15)
        assert capsys.readouterr().err == ""
        shown("tokens read", 1, 2)
        time.sleep(0.15)
        assert "tokens read: 1 of 2" in capsys.readouterr().err


def test_an_error_ends_it(quick, capsys):
    with pytest.raises(ValueError, match="wrong"), Shown():
        raise ValueError("wrong")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_closed_stderr_does_not_stop_the_work(quick, monkeypatch):
    closed = io.StringIO()
    closed.close()
    with Shown() as shown:
        monkeypatch.setattr(sys, "stderr", closed)
        shown("tokens read", 1, 2)
        time.sleep(0.1)


def eventually(true):
    """Waits for what another thread does."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_terminal_gets_a_bar_that_goes_away(quick, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, legacy_windows=False)
    monkeypatch.setattr(module, "_terminal", lambda: console)
    with Shown() as shown:
        eventually(lambda: "loading" in screen.getvalue())
        shown("tokens read", 4032, 65536)
        eventually(lambda: "tokens read: 4,032 of 65,536" in screen.getvalue())
        shown.rest()
        drawn = screen.getvalue()
        assert "━" in drawn
        assert drawn.rstrip("\n").endswith(("\x1b[2K", "\x1b[?25h"))  # the line is cleared
        time.sleep(0.1)
        assert screen.getvalue() == drawn
        shown("[bold]", 1, 2)  # no markup
        eventually(lambda: "[bold]: 1 of 2" in screen.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


COMMANDS = {
    "generate": (["generate", "The", "--file", "a.txt", "--max-new-tokens", "1"], "tokens read"),
    "explain": (
        ["explain", "a.txt", "--question", " What is", "--max-new-tokens", "1"],
        "tokens read",
    ),
    "remember": (["remember", "a.txt", "--out", "memory"], "tokens read"),
    "ask": (["ask", "memory", " What is", "--max-new-tokens", "1"], "answering"),
    "rank": (["rank", "river", "a.txt"], "tokens read"),
    "eval passkey": (["eval", "passkey", "--lengths", "400", "--trials", "2"], "tokens read"),
    "eval recall": (["eval", "recall", "--lengths", "400", "--trials", "2"], "tokens read"),
    "eval perplexity": (
        ["eval", "perplexity", "--data", "a.txt", "--lengths", "100", "--local", "30"],
        "measuring",
    ),
    "eval rank": (
        ["eval", "rank", "--data", "a.txt", "--passages", "2", "--passage-tokens", "20"],
        "tokens read",
    ),
    "memory verify": (["memory", "verify", "memory"], "layers verified"),
    "convert": (["convert", "PLAIN", "--out", "converted"], "converting"),
    "eval index": (
        [
            "eval",
            "index",
            "--data",
            "a.txt",
            "--landmarks",
            "5",
            "--queries",
            "4",
            "--index",
            "exact",
        ],
        "tokens read",
    ),
}


def run(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_a_document_says_how_far_it_is(
    command, folder, tmp_path, monkeypatch, capsys, quick
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(sentences(20))
    words, expected = COMMANDS[command]
    if command in ("memory verify", "convert"):
        words = [str(folder / "plain") if word == "PLAIN" else word for word in words]
    else:
        words = [*words, "--model", str(folder / "marked")]
    if command in ("ask", "memory verify"):
        run([*COMMANDS["remember"][0], "--model", str(folder / "marked")], capsys)
    kind = type(landmark.load(folder / "marked"))
    for name in ("read", "forward"):
        slow_down(kind, name, monkeypatch)
    slow_down(ArchivedLayer, "verify", monkeypatch)
    slow_down(LlamaForCausalLM, "forward", monkeypatch)
    said = run(words, capsys)
    assert expected in said.err
    assert expected not in said.out


def slow_down(kind, name, monkeypatch):
    stock = getattr(kind, name)

    @functools.wraps(stock)
    def slow(*arguments, **more):
        time.sleep(0.1)
        return stock(*arguments, **more)

    monkeypatch.setattr(kind, name, slow)


def test_training_says_at_which_step_it_is(folder, tmp_path, monkeypatch, capsys, quick):
    """Between two log lines, and while held-out rows are measured."""
    from landmark.train.trainer import LandmarkTrainer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(sentences(400))
    slow_down(LandmarkTrainer, "training_step", monkeypatch)
    slow_down(LandmarkTrainer, "prediction_step", monkeypatch)
    said = run(
        [
            "train",
            "--data",
            "a.txt",
            "--out",
            "o",
            "--model",
            str(folder / "marked"),
            "--length",
            "64",
            "--steps",
            "4",
            "--batch",
            "2",
            "--workers",
            "0",
            "--log-every",
            "2",
        ],
        capsys,
    )
    assert re.search(r"^steps trained: [123] of 4 \(", said.err, re.M)
    assert re.search(r"^batches of held-out rows: \d+ \(", said.err, re.M)
    assert "steps trained" not in said.out and "step 4/4" in said.out


@pytest.mark.parametrize("command", ["generate", "explain", "rank", "eval perplexity"])
def test_tokenising_is_shown_too(command, folder, tmp_path, monkeypatch, capsys, quick):
    from landmark.data import encoding

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(sentences(20))
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "OVERLAP", 32)
    stock = encoding.TextEncoder._batch

    def slow(self, texts):
        time.sleep(0.02)
        return stock(self, texts)

    monkeypatch.setattr(encoding.TextEncoder, "_batch", slow)
    said = run([*COMMANDS[command][0], "--model", str(folder / "marked")], capsys)
    assert re.search(r"characters tokenised: [\d,]+ of [\d,]+ \(", said.err)


def test_training_says_how_far_its_data_is(tmp_path, monkeypatch, capsys, quick):
    from landmark.data import tokens

    monkeypatch.chdir(tmp_path)
    books = write_books(tmp_path / "books", files=4, count=200)
    monkeypatch.setattr(tokens, "BATCH", 1)
    stock = tokens.TextEncoder

    class Slow(stock):
        def __init__(self, core):
            time.sleep(0.1)
            super().__init__(core)

    monkeypatch.setattr(tokens, "TextEncoder", Slow)
    seen = []
    from landmark.data.text import read_documents
    from landmark.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        (each.text for each in read_documents(books)), 300, lambda *step: seen.append(step)
    )  # its own sample
    assert seen[-1][0] == "characters learnt from" and len(seen) == 4
    tokens.tokenize(
        lambda: read_documents(books),
        tokenizer,
        tmp_path / "made",
        "train",
        lambda *s: seen.append(s),
    )
    assert [step[0] for step in seen[4:]] == [
        f"tokens, of {number} documents" for number in (1, 2, 3, 4)
    ]


WRITER = """
import sys, time
import landmark.texts.library
from landmark.cli import app
from landmark.hf.causal import LandmarkCausalLMMixin
landmark.texts.library.SAVE_SECONDS = 0.2
stock = LandmarkCausalLMMixin.read
def slow(self, *arguments, **more):
    time.sleep(0.05)
    return stock(self, *arguments, **more)
LandmarkCausalLMMixin.read = slow
app.main(sys.argv[1:])
"""


def test_killed_in_its_first_tokens_it_goes_on_to_the_same_memory(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(sentences(60))
    words = ["a.txt", "--model", str(folder / "marked")]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, "remember", *words, "--out", "killed"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = writer.stdout.readline()  # a save
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    done, total = re.match(r"([\d,]+) of ([\d,]+) tokens", first).groups()
    done = int(done.replace(",", ""))
    total = int(total.replace(",", ""))
    assert (
        tmp_path / "killed" / STATE
    ).exists() and 0 < done < total < landmark.texts.library.SAVE_TOKENS
    said = run(["remember", *words, "--out", "killed"], capsys)
    assert f"{total:,} of {total:,} tokens" in said.out
    run(["remember", *words, "--out", "whole"], capsys)
    streams = {
        file.name
        for file in (tmp_path / "whole").iterdir()
        if not file.name.startswith(("tail", STATE))
    }
    assert len(streams) > 4
    for name in streams:
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name
    model = landmark.load(folder / "marked")
    ids = torch.arange(1, 40)[None]
    killed, whole = (
        landmark.LandmarkCache.open(name, model, "device") for name in ("killed", "whole")
    )
    assert killed.tokens == whole.tokens == [total]
    assert torch.equal(*(model(ids, past_key_values=cache).logits for cache in (killed, whole)))
