"""Printing for all commands.

This is the one place that makes output safe for a terminal, whatever names, texts and models say.
"""

from __future__ import annotations

import os
import sys

import typer

from landmark.data.characters import printable
from landmark.data.errors import names

LONGEST = 390  # characters of an error message


def say(line: str, *, err: bool = False) -> None:
    """Prints one line."""
    with names("stderr" if err else "stdout"):
        typer.echo(in_line(line), err=err)


def note(line: str) -> None:
    """Prints one line on stderr beside the work, which goes on where nobody takes it."""
    try:
        say(line, err=True)
    except OSError:
        print_no_more(2)


def say_text(text: str) -> None:
    """Prints a text of any number of lines, which end in LF whatever they ended in."""
    with names("stdout"):
        typer.echo(printable(text.replace("\r\n", "\n").replace("\r", "\n")))


def say_part(text: str) -> None:
    """Prints a part of a text at once, without a line end behind it."""
    with names("stdout"):
        typer.echo(printable(text.replace("\r\n", "\n").replace("\r", "\n")), nl=False)
        sys.stdout.flush()


def in_line(text: str) -> str:
    """Returns a text as it is shown within a line: printable, and without line feeds and tabs."""
    return printable(text).replace("\n", " ").replace("\t", " ")


def say_error(message: str) -> None:
    """Prints an error message in one line on stderr, its middle left out where it is too long."""
    line = in_line(" ".join(message.split()))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 2 // 3]} ... {line[-(LONGEST // 3 - 5) :]}"
    note(f"error: {line}")


def show_what_the_terminal_can() -> None:
    """Sets what standard streams do with characters that their encoding lacks.

    stdout and stderr replace them; stdin keeps bytes that are no text.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def flush() -> None:
    """Brings what was printed out; raises ``OSError`` where nobody takes what is on stdout."""
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except OSError:
            print_no_more(2)
    if sys.stdout is not None:
        with names("stdout"):
            sys.stdout.flush()


def print_no_more(stream: int = 1) -> None:
    """Drops what could not be brought out, so that Python does not try it again when it ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream)
    os.close(nothing)
