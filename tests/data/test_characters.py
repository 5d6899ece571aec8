"""Characters that are none, and those that control a terminal."""

import pytest

from landmark.data.characters import from_arguments, printable, without_surrogates


def test_lone_surrogates_are_replaced_and_nothing_else():
    assert (
        without_surrogates("a\ud83d b\udce9 \U0001f642\n\x1b") == "a\ufffd b\ufffd \U0001f642\n\x1b"
    )


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "caf\ufffd"),
        ("café \U0001f642".encode().decode("ascii", "surrogateescape"), "café \U0001f642"),
        ("café \U0001f642", "café \U0001f642"),
        ("half \ud83d", "half \ufffd"),
    ],
)
def test_words_are_read_as_utf8_whatever_the_locale(word, text):
    assert from_arguments(word) == text


def test_what_is_printed_controls_no_terminal():
    text = "a\tb\n\x1b[31m\x07\r\0\x7f\x9b2J\u2028\u202e\u2066é\udce9"
    shown = printable(text)
    assert len(shown) == len(text)
    assert shown == "a\tb\n\ufffd[31m" + "\ufffd" * 5 + "2J" + "\ufffd" * 3 + "é\ufffd"
