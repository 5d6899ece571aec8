"""The words of the house: what must not be said any more, and what may be called so once only.

CONTRIBUTING has the glossary.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "landmark"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [
    path
    for folder in ("src", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__).resolve()
]

# What was called so, and the standard word for it.
BANNED = {
    r"\bshel(f|ves)\b": "offload store",
    r"\barenas?\b": "kv sources",
    r"\bmeetings\b": "block lists",
    r"\bhot (frame|block)s?\b": "LRU cache",
    r"\bframes? of (a|the|this) (ring|call|block)": "physical block",
    r"\bring of frames\b": "window",
    r"\bmemory of the CPU\b": "host memory",
    r"\bthought to stand\b": "position assigned to a block",
    r"\bturned to (slot|where|there|a place)\b": "rotated",
    r"\b(SomeNear|AllNear|Shelf|RotationTables|Meetings|OnePass)\b": "the glossary's word",
    r"\b(make_plan|marks_at|choose_each|choose_indexed|at_slot_zero)\b": "the glossary's word",
    r"\b(landmark\.library|eval\.subjects|eval\.passages|eval\.heat)\b": "landmark.texts",
}
# Names of functions that stand for one thing each; classes always do.
ONCE = {"convert", "explain", "fingerprint", "insert_landmarks", "remember"}


@pytest.mark.parametrize("pattern", BANNED)
def test_no_private_words(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in (*CODE, *PAGES)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == [], f"write {BANNED[pattern]!r} instead:\n" + "\n".join(found)


def defined(kind):
    """Files that define each public name of a kind at their top."""
    found = defaultdict(list)
    for path in sorted(SRC.rglob("*.py")):
        if "bundled" not in path.relative_to(SRC).parts:
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, kind) and not node.name.startswith("_"):
                    found[node.name].append(str(path.relative_to(SRC)))
    return found


def test_a_class_has_a_name_of_its_own():
    twice = {name: files for name, files in defined(ast.ClassDef).items() if len(files) > 1}
    assert twice == {}


def test_names_that_stand_for_one_thing_are_defined_once():
    """Commands are named as what they call."""
    functions = {
        name: [file for file in files if not file.startswith("cli/")]
        for name, files in defined(ast.FunctionDef).items()
    }
    twice = {name: functions[name] for name in ONCE if len(functions[name]) > 1}
    assert twice == {}


def parallel_assignments(path):
    """Assignments ``a, b = x, y``: several values on one line."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]


def test_one_value_a_line():
    """At most 5 parallel assignments in 1,000 lines of every package."""
    lines = defaultdict(int)
    found = defaultdict(int)
    for path in CODE:
        lines[path.parent] += len(path.read_text().splitlines())
        found[path.parent] += len(parallel_assignments(path))
    packed = {
        str(folder.relative_to(ROOT)): found[folder]
        for folder in lines
        if 1000 * found[folder] > 5 * lines[folder]
    }
    assert packed == {}
