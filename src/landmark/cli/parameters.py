"""Error messages that name a function's parameters, said with the options of the command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

# Parameters of functions that commands know by another name.
CALLED = {
    "documents": "data",
    "fillers": "filler",
    "folder": "out",
    "kinds": "index",
    "texts": "data",
}


class Command(TyperCommand):
    """A command whose errors name its options and arguments where a function names parameters."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; raises what it raises, in its own words."""
        try:
            return super().invoke(ctx)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (in_options(error.args[0], self.params),)
            raise


def in_options(message: str, parameters: Sequence[Any]) -> str:
    """Returns a message with the options of a command in place of parameters.

    A message that begins with ``top_k:`` begins with ``--top-k:``, and a remedy, behind the last
    semicolon, says ``--top-k 4`` for ``top_k=4`` and ``--resume`` for ``resume=True``. Arguments
    are written in capitals.

    Args:
        message: what was expected, what was got; the remedy.
        parameters: those of the command.
    """
    options = {each.name: each.opts[0] for each in parameters if each.param_type_name == "option"}
    arguments = {
        each.name: each.name.upper() for each in parameters if each.param_type_name == "argument"
    }
    words = {**options, **arguments}
    for parameter, here in CALLED.items():
        if here in words:
            words.setdefault(parameter, words[here])
    name, colon, rest = message.partition(":")
    if colon and name in words:
        message = f"{words[name]}:{rest}"
    before, semicolon, remedy = message.rpartition(";")
    if not semicolon:
        return message
    for parameter, option in options.items():
        remedy = re.sub(rf"\b{parameter}=True\b", option, remedy)
        remedy = re.sub(rf"\b{parameter}=", f"{option} ", remedy)
    return f"{before};{remedy}"
