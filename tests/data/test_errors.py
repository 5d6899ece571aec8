"""What an error says, in one line that names the file."""

import errno
import os

import pytest

from landmark.data.errors import first_line, names, one_line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", "ValueError"),
        ("\n\r\u2028", "ValueError"),
        ("\n  reason \nmore", "reason"),
        ("x" * 999, "x" * 200 + "..."),
    ],
)
def test_the_first_line_that_says_something(said, expected):
    assert first_line(ValueError(said)) == expected


def test_all_lines_in_one():
    assert one_line(KeyError("a\n b")) == r"KeyError: 'a\n b'"
    assert one_line(ValueError("a:\n  b\n")) == "ValueError: a: b"


def test_an_error_without_a_file_names_it():
    with pytest.raises(BrokenPipeError, match="Broken pipe: 'here'"), names("here"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(FileNotFoundError, match="'there'"), names("here"):
        os.stat("there")
