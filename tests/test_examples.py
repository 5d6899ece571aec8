"""Every script in examples/ runs, and prints what its case expects."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PRINTED = {
    "ask.py": (
        r"code of the north gate is 7312[^\d](.|\n)*read block 33:.*code of the north gate is "
        r"7312"
    ),
    "convert_model.py": (
        r"LandmarkQwen3ForCausalLM(.|\n)*read 2000 tokens(.|\n)*answered with 5 tokens"
    ),
    "merge_parts.py": r"the whole: \d\.\de-1[4-9]",
    "train_adapter.py": r"generated 5 tokens after 700",
}


def test_every_script_has_its_case() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PRINTED)
def test_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(PRINTED[name], printed), printed
