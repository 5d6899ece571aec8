"""What README and the pages of docs/ say runs: Python blocks, commands, make targets, links."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from landmark.config import CHOICES
from landmark.memory import policies
from landmark.train.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?P<before>[^\n]*)\n(?:[ \t]*\n)?```(?P<language>\w+)\n(?P<body>.*?)\n```", re.S
)
NO_RUN = re.compile(r"<!-- no-run: \S.* -->")
HUB = "Qwen/Qwen3-0.6B"  # the one model of the hub that blocks load; here a tiny one of its kind
WIDTH = 100


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """Fenced blocks of a page as (line, body, whether it runs: no `<!-- no-run: reason -->` above
    it).
    """
    text = page.read_text()
    for match in FENCE.finditer("\n" + text):
        if match["language"] in languages:
            runs = not NO_RUN.search(match["before"])
            yield text.count("\n", 0, match.start("body") - 1) + 1, match["body"], runs


def shell_lines(page, program):
    """Lines of a page's shell blocks that call `program`, as (where, words after it)."""
    for line, body, _ in blocks(page, "bash", "sh"):
        for offset, command in enumerate(body.replace("\\\n", "  ").splitlines()):
            words = shlex.split(command.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == program:
                yield f"{page.name}:{line + offset}", words[1:]


@pytest.mark.parametrize("name", ["training.md", "your-model.md"])
def test_json_blocks_are_recipes(name):
    found = [json.loads(body) for _, body, _ in blocks(ROOT / "docs" / name, "json")]
    assert found
    for fields in found:
        assert Recipe.from_dict(fields) != Recipe()


def with_python(pages):
    return [page for page in pages if any(runs for _, _, runs in blocks(page, "python"))]


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory):
    """The folder of a tiny Qwen3 with random weights and the bundled tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from landmark.hf.bundled import model_path

    folder = tmp_path_factory.mktemp("hub") / "qwen3"
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40_960,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policies_as_before():
    """Takes the selectors that a page registers out of the registries again."""
    selectors = dict(policies.SELECTORS)
    names = list(CHOICES["granularity"])
    yield
    policies.SELECTORS.clear()
    policies.SELECTORS.update(selectors)
    CHOICES["granularity"][:] = names


@pytest.mark.parametrize("page", with_python(PAGES), ids=name_of)
def test_python_blocks_run(page, hub_model, tmp_path, monkeypatch, capsys, policies_as_before):
    """The blocks of one page run in order, in one namespace, and print what a comment behind
    `print(...)` says.
    """
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, body, runs in blocks(page, "python"):
        body = body.replace(HUB, hub_model)
        code = compile("\n" * (line - 1) + body, str(page), "exec")
        if runs:
            exec(code, namespace)
            printed = capsys.readouterr().out
            for said in re.findall(r"^ *print\(.*\)  # (.*)$", body, re.M):
                assert said.strip(".") in printed, f"{page.name}:{line}: {printed!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_exist(page):
    import typer

    from landmark.cli.app import app

    for where, words in shell_lines(page, "landmark"):
        command = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), f"{where}: no such command: {words}"
        try:
            values, extra, _ = command.make_parser(command.context_class(command)).parse_args(words)
        except Exception as error:
            pytest.fail(f"{where}: {error}")
        needed = {
            each.name
            for each in command.params
            if each.param_type_name == "argument" and each.required
        }
        missing = sorted(name for name in needed if values.get(name) is None)
        assert not extra and not missing, f"{where}: too many arguments {extra}, missing {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for _, words in shell_lines(page, "make") for word in words if "=" not in word}
    named |= set(re.findall(r"`make ([\w-]+)`", page.read_text()))
    assert named <= targets, (
        f"{page.name} names {sorted(named - targets)}, the Makefile has {sorted(targets)}"
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:|mailto:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), (
                f"{page.name}: [{text}] leads to {target}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    """Paths of this repository that a page names in backquotes."""
    tops = "src|tests|docs|examples|benchmarks|recipes"
    for path in re.findall(rf"`((?:{tops})/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\(([\w-]+\.md)\)", index))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_is_at_most_100_columns_wide(page):
    """Tables, blocks of code and HTML may be wider."""
    text = re.sub(
        r"```.*?```", lambda block: "\n" * block.group().count("\n"), page.read_text(), flags=re.S
    )
    wide = [
        number
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > WIDTH and not line.lstrip().startswith(("|", "<"))
    ]
    assert wide == [], f"{page.name}: lines {wide}"


def test_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_pages_hold_no_machine_paths():
    home = os.sep + "work" + os.sep
    for page in PAGES:
        assert home not in page.read_text(), f"{page.name} names a path of one machine"
