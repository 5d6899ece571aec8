"""Every bad input ends in one line that says what was expected, what was got and the remedy.

The cases stand in the ``bad_inputs.py`` beside the tests of what refuses them, as (name, call,
regular expression); a call may take an empty folder. On the command line: the arguments instead of
a call.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
ERRORS = (ValueError, FileNotFoundError, ModuleNotFoundError)


def cases() -> list[Any]:
    found = []
    for file in sorted(TESTS.rglob("bad_inputs.py")):
        spec = importlib.util.spec_from_file_location(f"bad_inputs_{file.parent.name}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [
            pytest.param(*case[1:], id=f"{file.parent.name}: {case[0]}") for case in module.CASES
        ]
    return found


CASES = cases()


def refused(call: Callable[..., object], folder: Path) -> str:
    with pytest.raises(ERRORS) as caught:
        call(folder) if inspect.signature(call).parameters else call()
    return str(caught.value)


@pytest.mark.parametrize(("call", "message"), CASES)
def test_is_refused_in_one_line(
    call: Callable[..., object] | list[str], message: str, tmp_path: Path
) -> None:
    said = refused(call, tmp_path) if callable(call) else refused_by_command(call)
    assert re.search(message, said), said
    assert "\n" not in said.strip() and len(said) < 400, said


def refused_by_command(arguments: list[str]) -> str:
    code = (
        "import sys; from landmark.cli import app, progress; progress.FIRST = 3600.0; "
        "app.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 30
