"""Characters that are none: halves of a pair, bytes that were no UTF-8, and those that control a
terminal.
"""

from __future__ import annotations

import re
from pathlib import Path

REPLACEMENT = "\ufffd"
_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# C0 but for tab and line feed, C1, line and paragraph separators, and what turns the direction of
# the text around it
_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def without_surrogates(text: str) -> str:
    """Returns a text that can be encoded: each lone surrogate, half of a character, becomes
    U+FFFD.
    """
    return _SURROGATES.sub(REPLACEMENT, text)


def from_arguments(text: str) -> str:
    """Returns a word of the command line, or a file's name, as text: its bytes read as UTF-8,
    whatever the locale.

    Python keeps bytes that are none in the locale's encoding as lone surrogates; what is no UTF-8
    becomes U+FFFD.
    """
    return (
        _NO_BYTES.sub(REPLACEMENT, text)
        .encode("utf-8", "surrogateescape")
        .decode("utf-8", "replace")
    )


def require_utf8(path: str | Path, name: str) -> None:
    """Raises ``ValueError`` for the folder of a model whose name is no UTF-8, which tokenizers
    cannot open.

    Args:
        path: of the folder.
        name: of the parameter, for the message.
    """
    if _SURROGATES.search(str(path)):
        raise ValueError(
            f"{name}: expected a folder with a name in UTF-8 for a model, got {path}; name another"
        )


def printable(text: str) -> str:
    """Returns a text of the same length that does nothing to a terminal: control characters become
    U+FFFD.

    Tabs and line feeds stay.
    """
    return _CONTROLS.sub(REPLACEMENT, without_surrogates(text))
