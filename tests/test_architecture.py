"""The shape of the house: who imports whom, what is public, how long things are, and what README
says of the tree.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "landmark"
FILES = sorted(
    path for path in SRC.rglob("*.py") if "bundled" not in path.parts
)  # a stub lies there

ROWS = {
    "config": 0,
    "blocks": 0,
    "rotary": 0,
    "versions": 0,
    "ops": 1,
    "memory": 2,
    "hf": 3,
    "data": 4,
    "train": 4,
    "texts": 5,
    "eval": 6,
    "cli": 7,
}
STRANGERS = {("texts", "train"), ("eval", "train")}
OPTIONAL = {"bm25s", "matplotlib", "datasets", "peft", "accelerate", "faiss", "triton", "gguf"}
# What a folder may import besides the standard library; optional packages only inside functions.
THIRD_PARTY = {
    "": set(),
    "config": set(),
    "blocks": {"torch"},
    "rotary": {"torch"},
    "versions": {"torch"},
    "ops": {"torch"},
    "ops/triton": {"torch", "triton"},
    "memory": {"torch", "faiss"},
    "memory/triton": {"torch", "triton"},
    "hf": {"torch", "transformers", "safetensors", "numpy", "peft", "gguf"},
    "data": {"torch", "transformers", "tokenizers", "numpy", "datasets"},
    "train": {
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "accelerate",
        "datasets",
        "peft",
        "safetensors",
    },
    "texts": {"torch", "transformers"},
    "eval": {"torch", "transformers", "matplotlib", "bm25s"},
    "cli": {"torch", "transformers", "typer", "rich", "click"},
}


def name_of(path):
    return str(path.relative_to(SRC.parent))


def part_of(path):
    """The row's name of a file: its folder, or its own name at the top; the empty string for the
    package itself.
    """
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports_of(path):
    """Every import of a file as (module, names, line, whether it runs when the file is
    imported).
    """
    found = []

    def visit(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, (), child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, (
                    f"{name_of(path)}:{child.lineno}: relative import; write the full name"
                )
                found.append(
                    (
                        child.module,
                        tuple(alias.name for alias in child.names),
                        child.lineno,
                        at_import,
                    )
                )
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                visit(child, False)
            else:
                visit(
                    child,
                    at_import
                    and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
                )

    visit(ast.parse(path.read_text()), True)
    return found


def own_modules(module, names):
    """The landmark modules that an import statement reaches; the package's public names come from
    up to row `hf`.
    """
    if module == "landmark":
        return list(names) if names else ["hf"]
    return [module.removeprefix("landmark.")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_from_its_own_row_or_the_rows_above(path):
    mine = part_of(path)
    if mine == "":
        return
    for module, names, line, _ in imports_of(path):
        if module.split(".")[0] != "landmark":
            continue
        for other in own_modules(module, names):
            part = other.split(".")[0]
            where = f"{name_of(path)}:{line} imports {other}"
            assert part in ROWS, f"{where}: import it from the file that defines it"
            assert ROWS[part] <= ROWS[mine], f"{where}: {part} is in a row below {mine}"
            assert (mine, part) not in STRANGERS, f"{where}: texts and eval do not import train"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_third_party_imports_are_where_they_belong(path):
    kernels = path.parent.name == "triton"  # imported only by the function that runs them
    part = f"{part_of(path)}/triton" if kernels else part_of(path)
    allowed = THIRD_PARTY[part]
    optional = OPTIONAL - {"triton"} if kernels else OPTIONAL
    for module, _, line, at_import in imports_of(path):
        package = module.split(".")[0]
        if package == "landmark" or package in sys.stdlib_module_names:
            continue
        where = f"{name_of(path)}:{line} imports {package}"
        assert package in allowed, f"{where}: {part or 'the package'} may import {sorted(allowed)}"
        assert not (at_import and package in optional), (
            f"{where} at import: move it into the function that needs it"
        )


def test_every_folder_has_its_row():
    folders = {part_of(path) for path in FILES} - {""}
    assert folders <= set(ROWS), f"no row for {sorted(folders - set(ROWS))}"


def modules_after(statement):
    code = (
        f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import landmark", OPTIONAL | {"torch", "transformers", "numpy", "typer"}),
        ("from landmark import LandmarkConfig", OPTIONAL | {"torch", "transformers", "numpy"}),
        ("from landmark import insert_landmarks", OPTIONAL | {"transformers"}),
        ("import landmark.ops", OPTIONAL | {"transformers"}),
        ("import landmark.cli.app", OPTIONAL | {"torch", "transformers"}),
    ],
)
def test_importing_brings_in_nothing_heavy(statement, absent):
    assert modules_after(statement) & absent == set()


def test_importing_leaves_transformers_as_it_is():
    code = (
        "from transformers import AutoConfig, CONFIG_MAPPING; import landmark;"
        "print(sorted(name for name in CONFIG_MAPPING if 'landmark' in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PUBLIC = {
    "landmark_attention": (
        "query, key, value, *, block_size, scale=None, top_k=None, query_start=None, starts=None, "
        "segments=None, landmarks=None, forced=None, impl='auto', return_lse=False"
    ),
    "insert_landmarks": "input_ids, *, block_size, landmark_id, starts=None",
    "strip_landmarks": "input_ids, *, block_size, starts=None",
    "convert": (
        "model_or_path, *, block_size=64, top_k=4, granularity='token_head', positions='stingy', "
        "local_blocks=2, max_blocks=None, "
    ),
    "load": "path=None, ",
    "explain": "model, tokenizer, text, question, *, max_new_tokens=16",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_fixed_signatures(name):
    import landmark

    parameters = inspect.signature(getattr(landmark, name)).parameters.values()
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    written = str(inspect.Signature(plain)).strip("()")
    expected = PUBLIC[name]
    assert written.startswith(expected) if expected.endswith(", ") else written == expected


def test_public_names_are_there():
    import landmark

    expected = {
        "LandmarkCache",
        "LandmarkConfig",
        "Library",
        "convert",
        "explain",
        "insert_landmarks",
    }
    expected |= {"landmark_attention", "load", "remember", "strip_landmarks", "__version__"}
    assert expected == set(landmark.__all__)
    for name in landmark.__all__:
        assert getattr(landmark, name) is not None
    assert re.search(
        rf'^version = "{re.escape(landmark.__version__)}"$',
        (ROOT / "pyproject.toml").read_text(),
        re.M,
    )


CLI = {
    "demo": {"--text"},
    "convert": {"--out"},
    "train": {"--data", "--out", "--model", "--config"},
    "generate": {"--model"},
    "chat": {"--model", "--max-new-tokens"},
    "info": set(),
    "explain": {"--question", "--out", "--model", "--max-new-tokens"},
    "eval passkey": {
        "--model",
        "--lengths",
        "--trials",
        "--top-k",
        "--granularity",
        "--filler",
        "--out",
    },
    "eval questions": {"--model", "--data", "--lengths", "--contexts", "--compare", "--out"},
    "eval recall": {"--model", "--lengths", "--trials", "--facts", "--out"},
    "rank": {"--model", "--top"},
    "eval rank": {"--model", "--data", "--passages", "--out"},
    "memory info": set(),
    "memory verify": set(),
    "memory compact": set(),
    "eval index": {"--model", "--data", "--landmarks", "--index", "--out"},
    "eval perplexity": {
        "--model",
        "--data",
        "--lengths",
        "--local",
        "--blocks",
        "--top-k",
        "--out",
    },
}


def cli_command(words):
    """The click command behind `landmark <words>`."""
    import typer

    from landmark.cli.app import app

    command = typer.main.get_command(app)
    for word in words.split():
        assert word in command.commands, (
            f"landmark {words}: no command {word!r} among {sorted(command.commands)}"
        )
        command = command.commands[word]
    return command


@pytest.mark.parametrize("words", CLI)
def test_fixed_command_line(words):
    options = {option for parameter in cli_command(words).params for option in parameter.opts}
    assert CLI[words] <= options, f"landmark {words} lacks {sorted(CLI[words] - options)}"


def functions_of(path):
    return [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_too_long(path):
    kernel = "triton" in path.parts
    lines = len(path.read_text().splitlines())
    assert lines <= (1000 if kernel else 600), (
        f"{name_of(path)} has {lines} lines: split it by meaning"
    )
    for function in functions_of(path):
        length = function.end_lineno - function.body[0].lineno + 1
        docstring = ast.get_docstring(function, clean=False)
        length -= len(docstring.splitlines()) if docstring else 0
        where = f"{name_of(path)}:{function.lineno} {function.name}"
        assert length <= (300 if kernel else 100), (
            f"{where} has {length} lines below its signature and docstring"
        )


def test_no_catch_all_names():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert [name_of(path) for path in FILES if path.stem in vague] == []


def test_one_word_for_landmark():
    found = [
        f"{name_of(path)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bmem(_\w+)?\b", line)
    ]
    assert found == [], f"write landmark or memory, not mem: {found}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if part_of(path) in {"texts", "eval"}], ids=name_of
)
def test_only_commands_name_options(path):
    """Below them a message names a parameter; `landmark.cli.parameters` makes an option of it."""
    found = re.findall(r"[^\w-](--[a-z][a-z-]+)", path.read_text())
    assert found == [], f"{name_of(path)} names {found}"


def map_of_the_tree():
    """Paths in the map of docs/architecture.md.

    A line `name  what it is` lies in the folder of the nearest less indented line before.
    """
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"## Map of the tree.*?```text\n(.*?)```", text, re.S)
    assert block, "docs/architecture.md has no map of the tree"
    paths = set()
    folders = []
    for line in block.group(1).splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split()
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        paths.update(parent + name for name in names)
        folders.append((indent, parent + names[0]))
    return paths


def tree():
    """Files and folders at the top, and the modules and folders of the package."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    found = set()
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ignored or path.name == "src":
            continue
        if path.is_file() or any(
            inner.is_file() and inner.suffix != ".pyc" for inner in path.rglob("*")
        ):
            found.add(path.name + "/" * path.is_dir())
    for path in FILES:
        if path.name != "__init__.py" or path.parent == SRC:
            found.add(str(path.relative_to(ROOT)))
        found.add(f"{path.parent.relative_to(ROOT)}/")
    return found


def test_the_map_equals_the_tree():
    written = map_of_the_tree()
    real = tree()
    missing = sorted(real - written)
    gone = sorted(path for path in written if not (ROOT / path).exists())
    assert not missing, f"not in the map: {missing}"
    assert not gone, f"in the map but not in the tree: {gone}"
