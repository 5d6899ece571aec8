"""Errors name parameters below the command line, and options on it."""

import pytest
import typer

from landmark.cli.app import app
from landmark.cli.parameters import CALLED, in_options


def parameters_of(*words):
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return command.params


@pytest.mark.parametrize(
    ("words", "message", "said"),
    [
        (["generate"], "top_k: expected 1; pass top_k=1", "top_k: expected 1; pass top_k=1"),
        (
            ["convert"],
            "top_k: expected 1, got top_k=0; pass top_k=1",
            "--top-k: expected 1, got top_k=0; pass --top-k 1",
        ),
        (
            ["train"],
            "out: a run is there; give resume=True, or out=FOLDER",
            "--out: a run is there; give --resume, or --out FOLDER",
        ),
        (["convert"], "model: expected a model", "MODEL: expected a model"),
        (["generate"], "model: expected a model", "--model: expected a model"),
        (["generate"], "./top_k: a file; its model is", "./top_k: a file; its model is"),
        (["eval", "passkey"], "fillers: expected a text", "--filler: expected a text"),
        (["remember"], "folder: expected a memory", "--out: expected a memory"),
        (["memory", "info"], "folder: expected a memory", "FOLDER: expected a memory"),
    ],
)
def test_a_message_names_options(words, message, said):
    assert in_options(message, parameters_of(*words)) == said


def test_other_names_are_of_functions():
    """What commands call otherwise is no option of any of them."""
    commands = [["eval", name] for name in ("passkey", "perplexity", "rank", "index")]
    options = {each.name for words in [*commands, ["remember"]] for each in parameters_of(*words)}
    assert not CALLED.keys() & options and set(CALLED.values()) <= options


def test_an_error_keeps_its_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^FILES: expected text files"):
        app(["explain", str(tmp_path / "a.txt"), "--question", "hi"], standalone_mode=False)
