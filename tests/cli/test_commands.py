"""Every command on tiny models, as a person runs it."""

import io
import json
import re
import subprocess
import sys
import time

import pytest

from landmark.cli import app as cli
from tiny import save_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    save_models(root)
    return root


@pytest.fixture
def run(capsys, folder, tmp_path, monkeypatch):
    """Runs a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "landmark.cli.progress.FIRST", 600
    )  # however slow the machine is, stderr has errors alone

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def test_help_comes_at_once():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "landmark.cli.app", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - started < 3
    for command in ("demo", "generate", "convert", "train", "rank", "info", "eval", "memory"):
        assert command in done.stdout


def test_chat(run, folder, tmp_path, monkeypatch):
    """Questions line by line; on stdout are the answers, and passages where they are asked for."""
    (tmp_path / "a.txt").write_text("The grass is green. The pass key is 12345.\n" * 20)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("/passages\nWhat is it?\n/passages\nAnd then?\n/quit\nno\n")
    )
    words = ("chat", "a.txt", "--model", folder / "talking", "--max-new-tokens", 3)
    code, out, err = run(*words)
    assert code == 0 and re.match(r"\d+ tokens read\. Ask about the texts; /passages shows", err)
    assert len(err.splitlines()) == 1
    assert re.search(r"^ +\d+\.\d%  a\.txt:\d+  ", out, re.M)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    code, again, _ = run(*words)
    assert code == 0 and out.startswith(again)


def test_a_memory_is_asked_in_turns(run, folder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("The grass is green. The pass key is 12345.\n" * 20)
    code, _, _ = run("remember", "a.txt", "--out", "memory", "--model", folder / "talking")
    assert code == 0
    words = ("ask", "memory", "--interactive", "--max-new-tokens", 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nWhat is it?\n"))
    code, both, _ = run(*words)
    assert code == 0 and both.startswith("What is it?\n") and both.count("What is it?\n") == 2
    _, alone, _ = run("ask", "memory", "What is it?", "--max-new-tokens", 3)
    assert both.startswith(alone) and both != 2 * alone
    code, out, _ = run("generate", "hi", "--model", folder / "talking", "--max-new-tokens", 3)
    assert code == 0
    code, raw, _ = run(
        "generate", "hi", "--model", folder / "talking", "--max-new-tokens", 3, "--no-chat"
    )
    assert code == 0 and raw != out


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"landmark \d+\.\d+\.\d+\n", out)


def test_errors_are_one_line_with_code_2(run, folder):
    code, out, err = run("demo", "--model", folder / "plain")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")


def test_convert_then_generate(run, folder, tmp_path):
    code, out, _ = run(
        "convert",
        folder / "plain",
        "--out",
        "mine",
        "--block-size",
        16,
        "--top-k",
        2,
        "--layers",
        "0,1",
    )
    assert code == 0
    assert "LandmarkLlamaForCausalLM saved in mine with its tokenizer" in out
    settings = json.loads((tmp_path / "mine" / "config.json").read_text())["landmark"]
    assert (settings["block_size"], settings["top_k"], settings["layers"]) == (16, 2, [0, 1])
    with pytest.warns(UserWarning, match="landmark that was never trained"):
        code, out, err = run(
            "generate", "The pass key is", "--model", "mine", "--max-new-tokens", 60
        )
    assert (code, err) == (0, "")
    assert len(out) > 10


def test_generate_reads_a_file_first(run, folder, tmp_path):
    (tmp_path / "long.txt").write_text("The grass is green. " * 60)
    shown = {}
    for name, extra in {
        "alone": (),
        "local": ("--file", "long.txt"),
        "retrieve": ("--file", "long.txt", "--read", "retrieve"),
        "sampled": ("--temperature", "1.5", "--seed", "1"),
        "again": ("--temperature", "1.5", "--seed", "1"),
    }.items():
        code, shown[name], _ = run(
            "generate", "The code", "--model", folder / "marked", "--max-new-tokens", 20, *extra
        )
        assert code == 0
    assert shown["sampled"] == shown["again"]
    assert len({shown["alone"], shown["local"], shown["retrieve"], shown["sampled"]}) > 2


def test_explain(run, folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.txt").write_text("What is the pass key?\n" * 40)
    (tmp_path / "a.py").write_text("# The grass is green.\n" * 40)
    code, out, err = run(
        *("explain", "a.py", "notes", "--question", " What is", "--model", folder / "marked"),
        *("--max-new-tokens", 4, "--out", "pages/a.html"),
    )
    assert code == 0, err
    answer, *passages, page = out.splitlines()
    assert answer.startswith("What is") and len(answer) > len("What is")
    assert passages and page == "Page: pages/a.html"
    for passage in passages:
        share, place, text = re.fullmatch(r" +([\d.]+)%  (\S+:\d+)  (.*)", passage).groups()
        name, line = place.split(":")
        assert name in ("a.py", "notes/b.txt") and 1 <= int(line) <= 40 and 0 < float(share) < 100
        assert text.removesuffix(" ...") in " ".join((tmp_path / name).read_text().split())
    written = (tmp_path / "pages" / "a.html").read_text()
    assert "What is the pass key?" in written and "# The grass is green." in written


def test_remember_and_ask(run, folder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("What is the pass key?\n" * 40)
    (tmp_path / "b.txt").write_text("The grass is green.\n" * 30)
    code, out, err = run("remember", "a.txt", "--out", "memory", "--model", folder / "marked")
    assert code == 0, err
    first, last = out.splitlines()
    assert re.match(r"([\d,]+) of \1 tokens  [\d,]+ tokens/s  device \d+ MiB", first)
    assert last.endswith("tokens of 1 texts are remembered in memory")
    code, out, err = run(
        "remember", "a.txt", "b.txt", "--out", "memory", "--model", folder / "marked"
    )
    assert code == 0 and out.endswith("tokens of 2 texts are remembered in memory\n"), err
    code, out, err = run(
        "ask", "memory", " What is", "--max-new-tokens", 4, "--tier", "host"
    )  # by the model it names
    assert code == 0, err
    answer, *passages = out.splitlines()
    assert answer.startswith("What is") and passages
    assert all(re.fullmatch(r" +[\d.]+%  [ab]\.txt:\d+  .*", passage) for passage in passages)
    monkeypatch.setattr("sys.stdin", io.StringIO(" What is\n The grass\n\n"))
    code, out, err = run("ask", "memory", "--interactive", "--max-new-tokens", 4)
    assert code == 0 and out.startswith(answer) and "\nThe grass" in out, err


def test_an_error_in_one_question_does_not_end_the_session(run, folder, tmp_path, monkeypatch):
    from landmark.texts.library import Library

    (tmp_path / "a.txt").write_text("What is the pass key?\n" * 40)
    assert run("remember", "a.txt", "--out", "memory", "--model", folder / "marked")[0] == 0
    stock = Library.ask

    def ask(self, question, **more):
        if question == "odd":
            raise ValueError("question: expected another")
        return stock(self, question, **more)

    monkeypatch.setattr(Library, "ask", ask)
    monkeypatch.setattr("sys.stdin", io.StringIO("odd\nThe grass\n\n"))
    code, out, err = run("ask", "memory", "--interactive", "--max-new-tokens", 2)
    assert (
        code == 0 and out.startswith("The grass") and err == "error: question: expected another\n"
    )
    assert run("ask", "memory", "odd")[0] == 2


def test_eval_passkey(run, folder, tmp_path):
    code, out, err = run(
        *(
            "eval",
            "passkey",
            "--model",
            folder / "marked",
            "--compare",
            folder / "plain",
            "--lengths",
            "200,300",
        ),
        *(
            "--trials",
            2,
            "--top-k",
            "1,2",
            "--filler",
            "paper,pydoc",
            "--window",
            40,
            "--rope",
            "dynamic",
        ),
        *("--out", "r/rows.json", "--plot", "r/picture.png"),
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "r" / "rows.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 + 3 * 2 * 2
    assert {row["attention"] for row in rows} == {"landmark", "full", "window", "dynamic"}
    assert all(row["accuracy"] == 0 and row["seed"] == 0 and "settings" in row for row in rows)
    assert (tmp_path / "r" / "picture.png").stat().st_size > 1000
    assert out.count("0/2") == len(rows)
    assert "beyond the trained length" in out


def test_eval_facts(run, folder, tmp_path):
    code, out, _ = run(
        *(
            "eval",
            "passkey",
            "--model",
            folder / "marked",
            "--lengths",
            400,
            "--trials",
            2,
            "--facts",
            "1,4",
            "--out",
            "f.json",
        )
    )
    assert code == 0
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["task"], row["facts"], row["asked"]) for row in rows] == [
        ("facts", 1, 2),
        ("facts", 4, 8),
    ]
    assert "Named facts" in out


def test_eval_perplexity(run, folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("The north gate is green and the sky is blue. " * 200)
    code, out, err = run(
        *(
            "eval",
            "perplexity",
            "--model",
            folder / "marked",
            "--compare",
            folder / "plain",
            "--data",
            "data",
        ),
        *(
            "--lengths",
            "60,240",
            "--local",
            30,
            "--blocks",
            4,
            "--top-k",
            "2,0",
            "--max-tokens",
            960,
        ),
        *("--out", "p.json", "--plot", "p.png"),
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [(row["length"], row["top_k"]) for row in rows] == [
        (60, 2),
        (60, 0),
        (240, 2),
        (240, 0),
        (60, None),
        (240, None),
    ]
    assert all(row["perplexity"] > 1 for row in rows)
    assert "attention size" in out
    assert "no retrieval" in out
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_rank(run, folder, tmp_path):
    for name, text in {
        "a": "The grass is green. ",
        "b": "The [red] code. ",
        "c": "A north gate. ",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text * 9)
    code, out, err = run(
        "rank", "The code", "a.txt", "b.txt", "c.txt", "--model", folder / "marked", "--top", 2
    )
    assert code == 0, err
    lines = re.findall(r"│ +(\d) │ ([abc])\.txt │ +(-?\d+\.\d+) │ (\S.*\S) +│\n", out)
    assert [place for place, *_ in lines] == ["1", "2"]
    assert float(lines[0][2]) >= float(lines[1][2])
    assert all(len(passage) <= 80 for *_, passage in lines)
    code, all_of_them, _ = run(
        "rank", "The code", "a.txt", "b.txt", "c.txt", "--model", folder / "marked"
    )
    assert "[red]" in all_of_them
    words = ("rank", "The code", "a.txt", "b.txt", "c.txt", "--model", folder / "talking")
    code, in_chat, _ = run(*words)
    assert code == 0 and in_chat != all_of_them
    assert run(*words, "--no-chat")[1] == all_of_them


def test_eval_rank(run, folder, tmp_path):
    for split, files in {"test": "ab", "train": "c"}.items():
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in files:
            (tmp_path / "data" / split / f"{name}.txt").write_text(
                f"The gate {name * 5} is green. " * 60
            )
    code, out, err = run(
        *(
            "eval",
            "rank",
            "--model",
            folder / "marked",
            "--data",
            "data",
            "--among",
            "train",
            "--passages",
            4,
        ),
        *("--passage-tokens", 20, "--max-tokens", 300, "--seed", 3, "--out", "r.json"),
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["ranker"], row["text"], row["documents"], row["seed"]) for row in rows] == [
        ("landmark", "cut", 3, 3),
        ("bm25", "cut", 3, 3),
        ("landmark", "whole", 3, 3),
        ("bm25", "whole", 3, 3),
    ]
    assert all(row["data"] == "data, test, among train" and row["passages"] == 4 for row in rows)
    assert rows[1]["settings"]["bm25s"]
    assert "recall@1" in out and "nDCG@10" in out
    words = ("eval", "rank", "--model", folder / "talking", "--data", "data", "--passages", 2)
    for extra, in_chat in (((), True), (("--no-chat",), False)):
        code, _, err = run(*words, "--passage-tokens", 20, "--out", "chat.json", *extra)
        assert code == 0, err
        rows = json.loads((tmp_path / "chat.json").read_text())["rows"]
        assert [row["chat"] for row in rows] == [in_chat, False] * 2


def test_demo_says_no_for_a_model_that_finds_nothing(run, folder, tmp_path, monkeypatch):
    from landmark.eval import demo

    monkeypatch.setattr(demo, "LENGTHS", (400, 500, 600))
    code, out, _ = run("demo", "--model", folder / "marked", "--out", "o/demo.png")
    assert code == 1
    assert "0 of 3 right" in out
    assert "read without retrieval" in out
    assert len(re.findall(r"^  . block +\d+ +\d+%  \S", out, re.M)) >= 3
    assert "dense (every token" in out
    assert re.search(
        r"Saved and opened again: \d MiB on the disk in .* s, opened in [\d,]+ ms without reading",
        out,
    )
    assert (
        len(
            re.findall(
                r"Asked on a fork: .* \(the same answer\) in .* s, \d MiB of blocks read", out
            )
        )
        == 1
    )
    assert (tmp_path / "o" / "demo.png").stat().st_size > 1000


def test_demo_says_yes_for_one_that_finds_all(run, folder, monkeypatch):
    from landmark.eval import demo

    monkeypatch.setattr(demo, "LENGTHS", (400, 500))
    monkeypatch.setattr(
        demo,
        "_write",
        lambda model, ids, cache, count: model(ids, past_key_values=cache) and [1] * count,
    )
    monkeypatch.setattr(demo, "build_document", answered_by_ones(demo.build_document))
    code, out, _ = run("demo", "--model", folder / "marked", "--no-dense")
    assert code == 0
    assert "2 of 2 right" in out
    assert "dense" not in out and out.count("the same answer") == 1
    wrong = demo.Reopened(9, 1.0, 1.0, "[2]", same=False, answer_seconds=1.0, fetched_bytes=9)
    monkeypatch.setattr(demo, "reopened", lambda *_: wrong)
    code, out, _ = run("demo", "--model", folder / "marked", "--no-dense")
    assert code == 1 and "2 of 2 right" in out and "[2] (another answer than before)" in out


def test_an_answer_full_of_brackets_is_printed_as_it_is(capsys):
    from rich.console import Console

    from landmark.cli.demo import _print_trial
    from landmark.eval.demo import BlockRead, Trial

    block = BlockRead(3, 0.5, 0.25, "x " * 100 + "[/key] 12345 " + "y " * 100, True)
    trial = Trial(1000, 10, "12345", "[/bold]", False, (block,), 1.0, 0.1, None, 0, 100)
    _print_trial(Console(soft_wrap=True, highlight=False), 1, trial)
    out = capsys.readouterr().out
    assert "What is the pass key? [/bold] (wrong, the key is 12345)" in out
    assert re.search(r"\* block    3  25%  \.\.\. .*\[/key\] 12345.* \.\.\.\n", out)


def answered_by_ones(build):
    import dataclasses

    def changed(*arguments):
        episode = build(*arguments)
        (question,) = episode.questions
        ids = question.ids[: -question.answered] + [1] * question.answered
        return dataclasses.replace(episode, questions=(dataclasses.replace(question, ids=ids),))

    return changed


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    for part in (
        "Versions",
        "torch ",
        "Devices",
        "cpu: ",
        "Attention",
        ": chosen",
        ": not chosen, ",
        "Bundled model",
    ):
        assert part in out
    table = [line for line in out.split("Bundled model")[1].splitlines() if line.startswith("│")]
    names = [line.split("│")[1].strip() for line in table]
    assert names == [
        *(
            "model",
            "folder",
            "weights",
            "trained length",
            "pass key",
            "named facts",
            "perplexity",
            "all figures",
        )
    ]
    assert (
        "65 of 65 right at 1,048,576 tokens" in out
        and "20.54 at 4,096 tokens" in out
        and "README.md" in out
    )


def test_memory_info_verify_compact(run, folder, tmp_path):
    import torch

    import landmark

    path = tmp_path / "memory"
    model = landmark.load(folder / "marked")
    cache = model.read(torch.arange(1, 101)[None])
    sources = [{"name": "book.txt", "characters": 300}]
    cache.save(path, notes={"sources": sources, "tokenizer": "fedcba9876543210"})
    code, out, _ = run("memory", "verify", path)
    assert (code, out) == (0, "all is as it was written\n")
    (path / "layer-00.blocks").open("ab").write(b"half a block")
    (path / "tail-2").write_bytes(b"half a tail")
    code, out, _ = run("memory", "info", path)
    assert code == 0
    model_line = "model landmark_llama [0-9a-f]{12}, float32; tokenizer fedcba987654\n"
    assert re.search(model_line, out) and "block_size 16" in out
    assert (
        out.startswith("100 tokens, saved 1 times, ") and "source book.txt: 300 characters\n" in out
    )
    assert f"layer-00.blocks: {6 * 2 * 2 * 16 * 8 * 4:,} bytes\n" in out
    assert (
        "layer-00.blocks: 12 bytes that do not count\ntail-2: 11 bytes that do not count\n" in out
    )
    assert out.endswith("see landmark memory compact\n")
    assert run("memory", "verify", path)[0] == 0
    code, out, _ = run("memory", "compact", path)
    assert (code, out) == (0, "23 bytes removed, layer-00.blocks, tail-2\n")
    assert run("memory", "compact", path)[1] == "0 bytes removed\n"
    data = bytearray((path / "layer-01.blocks").read_bytes())
    data[2500] ^= 4
    (path / "layer-01.blocks").write_bytes(data)
    code, out, _ = run("memory", "verify", path)
    assert code == 1 and out.count("\n") == 2 and out.endswith("1 damaged\n")
    assert (
        "layer-01.blocks: block 0, key/value head 1 (bytes 1024-2048)" in out
        or "layer-01.blocks: block 1" in out
    )
