"""The command ``landmark``: its commands, and errors as one line on stderr with exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, cast

import typer

from landmark.cli import memory
from landmark.cli.agreement import agreement
from landmark.cli.ask import ask
from landmark.cli.chat import chat
from landmark.cli.convert import convert
from landmark.cli.demo import demo
from landmark.cli.explain import explain
from landmark.cli.generate import generate
from landmark.cli.index import index
from landmark.cli.info import info
from landmark.cli.output import (
    flush,
    in_line,
    print_no_more,
    say,
    say_error,
    show_what_the_terminal_can,
)
from landmark.cli.parameters import Command
from landmark.cli.passkey import passkey
from landmark.cli.perplexity import perplexity
from landmark.cli.questions import questions
from landmark.cli.rank import rank
from landmark.cli.ranking import ranking
from landmark.cli.recall import recall
from landmark.cli.remember import remember
from landmark.cli.train import train
from landmark.data.errors import first_line
from landmark.versions import __version__

app = typer.Typer(
    name="landmark",
    help="Landmark attention: random access to an unbounded context for RoPE language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(
    help="Evaluate a model: pass key, named facts, recall, questions, agreement, perplexity, "
    "ranking, index.",
    add_completion=False,
)
app.add_typer(evaluation, name="eval")
memories = typer.Typer(
    help="Describe, check or clean up a saved memory: info, verify, compact.", add_completion=False
)
app.add_typer(memories, name="memory")


def _add(group: typer.Typer, *commands: Callable[..., object]) -> None:
    for command in commands:
        group.command(cls=Command)(command)


_add(app, demo, generate, chat, remember, ask, explain, convert, train, rank, info)
_add(memories, memory.info, memory.verify, memory.compact)
_add(evaluation, passkey, recall, questions, agreement, perplexity, index)
evaluation.command("rank", cls=Command)(ranking)

# ClickException, of whichever click typer stands on
_USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"landmark {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Landmark attention: random access to an unbounded context for RoPE language models."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits.

    Codes: 0 done, 1 the command says no or nobody reads what it says, 2 a wrong input, 130
    interrupted.
    """
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {in_line(str(message))}\n"
    show_what_the_terminal_can()
    try:
        code = app(arguments, standalone_mode=False)
        flush()
    except (
        BrokenPipeError,
        SystemExit,
    ) as error:  # typer and rich make the second of the first, with code 1
        if BrokenPipeError not in (type(error), type(error.__context__)):
            raise
        print_no_more()
        sys.exit(1)
    except OSError as error:
        _fail(_named(error))
    except IndexError as error:
        if "index out of range in self" not in str(error):  # of torch's embedding
            raise
        _fail(
            "expected token ids that the model's embedding has rows for, got a greater one; use "
            "the model's own tokenizer, or resize the embedding (resize_token_embeddings)"
        )
    except (ValueError, ModuleNotFoundError) as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        said = first_line(error)
        _fail(
            f"expected the run to fit the memory: {said}; pass less text, a smaller batch or "
            "--dtype bfloat16"
        )
    except _USAGE_ERROR as error:
        _fail(f"{error.format_message()} See landmark --help.")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _named(error: OSError) -> str:
    """Returns what the system says of a file, by the file's name, or our own message."""
    if error.strerror is None or error.filename is None:
        return str(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return f"{name}: {error.strerror}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Returns whether Python, a GPU or torch on the CPU has run out of memory."""
    # The CPU allocator of torch raises a plain RuntimeError.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _fail(message: str) -> None:
    try:
        flush()
    except OSError:
        print_no_more()
    say_error(message)
    sys.exit(2)


if __name__ == "__main__":
    main()
