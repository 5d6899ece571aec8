"""Replaces what is no character: lone surrogates, bytes that are no UTF-8, control characters."""

from __future__ import annotations

import re
from pathlib import Path

REPLACEMENT = "\ufffd"
_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# C0 but for tab and line feed, C1, line and paragraph separators, and characters that change the
# direction of the text around them.
_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def without_surrogates(text: str) -> str:
    """Returns a text that can be encoded: each lone surrogate becomes U+FFFD."""
    return _SURROGATES.sub(REPLACEMENT, text)


def from_arguments(text: str) -> str:
    """Returns a word of the command line, or a file name, as text.

    Its bytes are read as UTF-8, whatever the locale; bytes that are no UTF-8 become U+FFFD. Python
    keeps bytes that are invalid in the encoding of the locale as lone surrogates.
    """
    raw = _NO_BYTES.sub(REPLACEMENT, text).encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace")


def require_utf8(path: str | Path, name: str) -> None:
    """Makes sure that the name of a model's folder is UTF-8; tokenizers cannot open others.

    Args:
        path: path of the folder.
        name: name of the parameter, for the message.

    Raises:
        ValueError: it is not.
    """
    if _SURROGATES.search(str(path)):
        raise ValueError(
            f"{name}: expected a folder with a name in UTF-8 for a model, got {path}; name another"
        )


def printable(text: str) -> str:
    """Returns a text of the same length that is safe to print on a terminal.

    Control characters become U+FFFD; tabs and line feeds stay.
    """
    return _CONTROLS.sub(REPLACEMENT, without_surrogates(text))
