"""Every command against odd files, folders, words and numbers: a right answer, or one line on
stderr and exit code 2.

All pairs run under the mark ``full``; without it one of ``EVERY``, each thing with some commands,
each command with some things.
"""

import json
import re
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_arguments import ASKED, NUMBERS, OPTIONS, OUTS, ROPES, WORDS, WRITING
from odd_inputs import OPENERS, READERS, REFUSING, TEXT, THINGS

from landmark import remember
from landmark.cli import app as cli
from tiny import save_models

LONGEST = 400
EVERY = 6
PLACES = {"MARKED": "marked", "PLAIN": "plain", "TEXT": "text.txt", "MEMORY": "memory"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    (root / "text.txt").write_text(TEXT * 5)
    remember([root / "text.txt"], root / "memory", str(root / "marked"))
    return root


@pytest.fixture
def run(models, tmp_path, capsys, monkeypatch):
    """Runs a command in an empty folder: (exit code, stdout); all that must hold of any run is
    checked.
    """
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(words, thing=None):
        given = {
            "THING": thing,
            "WORD": thing,
            **{name: str(models / place) for name, place in PLACES.items()},
        }
        return checked([given.get(word, word) for word in words], capsys)

    return call


def checked(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr()
    code = ended.value.code
    assert code in (0, 1, 2), (code, said.err)
    assert "Traceback" not in said.out + said.err
    if code == 2:
        assert re.fullmatch(r"(warning: .*\n)*error: \S.*\n", said.err), said.err
        assert len(said.err.splitlines()[-1]) <= LONGEST, said.err
    assert_shown_safely(said.out + said.err)
    return code, said.out


def assert_shown_safely(text):
    odd = {
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or "\u202a" <= c <= "\u202e"
        or c in "\u200e\u200f\u061c"
    }
    assert odd <= {"\n", "\t"}, ascii(text)


def pairs(first, second):
    """All pairs, most of them under the mark ``full``."""
    return [
        pytest.param(a, b, id=f"{a}-{b}", marks=() if (i + j) % EVERY == 0 else pytest.mark.full)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


@pytest.mark.parametrize(("name", "command"), pairs(THINGS, READERS))
def test_what_reads_texts(run, tmp_path, name, command):
    make, readable = THINGS[name]
    code, out = run(READERS[command].split(), make(tmp_path))
    assert code == (2 if readable is False else 0 if readable else code), out
    assert (code == 0) == (out != "")
    assert_whole_outputs(Path("out"), code)


def assert_whole_outputs(folder, code):
    """After a failure there is nothing, after success a whole page, whole rows, a whole memory."""
    files = sorted(each for each in folder.rglob("*") if each.is_file()) if folder.exists() else []
    if code == 2:
        assert files == []
    for file in files:
        text = file.read_bytes()
        assert not file.name.endswith((".new", ".unfinished"))
        if file.suffix == ".html":
            assert text.decode().endswith("</html>\n")
        if file.name == "rows.json":
            assert text.endswith(b"]\n}\n")


@pytest.mark.parametrize(("name", "command"), pairs(THINGS, REFUSING | OPENERS))
def test_what_refuses_them(run, tmp_path, name, command):
    code, out = run((REFUSING | OPENERS)[command].split(), THINGS[name][0](tmp_path))
    assert (code == 2 and out.count("\n") <= 1) or command == "memory verify", out


@pytest.mark.parametrize(("name", "command"), pairs(WORDS, ASKED))
def test_words(run, name, command):
    code, out = run(ASKED[command], WORDS[name])
    if (
        command in ("generate", "rank", "explain", "ask")
        and WORDS[name].strip()
        and not WORDS[name].startswith("-")
    ):
        assert code == 0 and out
    if command == "explain" and code == 0:
        assert Path("a.html").read_text(encoding="utf-8").endswith("</html>\n")


@pytest.mark.parametrize(("option", "number"), pairs(OPTIONS, NUMBERS))
def test_numbers(run, option, number):
    run([*OPTIONS[option], number])


LIMITED = {
    "--lengths": "eval passkey --model MARKED",
    "--landmarks": "eval index --model MARKED --data TEXT",
    "--queries": "eval index --model MARKED --data TEXT",
    "--passages": "eval rank --model MARKED --data TEXT",
    "--trials": "eval passkey --model MARKED",
    "--seed": "generate hi --model MARKED",
    "--max-new-tokens": "generate hi --model MARKED",
    "--temperature": "generate hi --model MARKED",
}


@pytest.mark.parametrize("option", LIMITED)
def test_numbers_without_end(models, capsys, option):
    places = {name: str(models / place) for name, place in PLACES.items()}
    words = [places.get(word, word) for word in LIMITED[option].split()]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, option, "9" * 20])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.match(f"error: .*{option}.*\\n$", said), said


@pytest.mark.parametrize("value", ROPES)
def test_scalings_that_are_none(run, value):
    assert (
        run(
            [
                "eval",
                "passkey",
                "--model",
                "PLAIN",
                "--lengths",
                "150",
                "--trials",
                "1",
                "--rope",
                value,
            ]
        )[0]
        == 2
    )


@pytest.mark.parametrize("value", ["1e-300", "nan", "inf", "1e300"])
def test_temperatures_that_are_none(run, value):
    assert run(["generate", "hi", "--model", "MARKED", "--temperature", value])[0] == 2


@pytest.mark.parametrize(("name", "command"), pairs(OUTS, WRITING))
def test_outputs(run, name, command):
    path, possible = OUTS[name]
    Path("folder").mkdir()
    Path("folder/book").write_text("mine")
    Path("file.txt").write_text("mine")
    Path("loop").symlink_to("loop")
    folder = command in ("remember", "convert", "train")  # which take a folder
    code, _ = run([*WRITING[command], path])
    assert (
        code == 2
        or possible is not False
        or (folder and name in ("a folder", "nothing", "a point"))
    )
    assert Path("folder/book").read_text() == Path("file.txt").read_text() == "mine"
    assert not list(Path().rglob("*.new"))


CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.text(st.characters(exclude_categories=()), max_size=200).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    st.lists(
        st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=()), max_size=90)}),
        max_size=3,
    ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["text", "x"]), inner, max_size=2)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)
COMMANDS = {
    **{name: line.split() for name, line in (READERS | REFUSING | OPENERS).items()},
    **ASKED,
    **{name: [*words, "WORD"] for name, words in OPTIONS.items()},
}


def is_work_without_end(word):
    """Whether a word is a number of tokens, texts or blocks that is valid and takes hours."""
    try:
        return 1000 < int(word) < 2**31
    except ValueError:
        return False


def some_runs(test):
    drawn = given(
        st.sampled_from(sorted(COMMANDS)),
        st.sampled_from(["a.txt", "a.jsonl", "a.json", "é [b] $x_{.txt", "-a"]),
        CONTENTS,
        (
            st.text(st.characters(exclude_categories=()), max_size=12)
            | st.integers().map(str)
            | st.floats().map(str)
        ).filter(lambda word: not is_work_without_end(word)),
    )
    return drawn(test)


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@some_runs
def test_drawn(models, capsys, monkeypatch, command, name, content, word):
    runs_well(models, capsys, monkeypatch, command, name, content, word)


@pytest.mark.full
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@some_runs
def test_drawn_many(models, capsys, monkeypatch, command, name, content, word):
    runs_well(models, capsys, monkeypatch, command, name, content, word)


def runs_well(models, capsys, monkeypatch, command, name, content, word):
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as here:
        here.chdir(folder)
        Path(name).write_bytes(content)
        words = {
            "THING": name,
            "WORD": word,
            **{key: str(models / place) for key, place in PLACES.items()},
        }
        checked([words.get(each, each) for each in COMMANDS[command]], capsys)
