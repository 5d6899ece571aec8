"""The tables of README and of the model cards say what was recorded, and nothing else."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import model_cards  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))  # its ops.py is not tests/ops

PAGES = model_cards.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_is_made_from_the_recorded_figures(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run python benchmarks/model_cards.py"


def test_readme_has_every_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("passkey", "facts", "perplexity", "kernels"):
        table = readme.split(f"<!-- figures: {name} -->")[1].split(f"<!-- end: {name} -->")[0]
        assert table.count("|") > 20
