import json

import pytest
from toy import silent, toy_recipe

from landmark.train.run import train
from small_text import write_books


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    return write_books(tmp_path_factory.mktemp("books"))


@pytest.fixture(scope="session")
def twin(books, tmp_path_factory):
    """A trained plain model's folder and its summary."""
    out = tmp_path_factory.mktemp("twin")
    summary = train(str(books), out, recipe=toy_recipe(), plain=True, report=silent)
    return out, summary


@pytest.fixture(scope="session")
def scratch(books, tmp_path_factory):
    """A trained landmark model's folder and its summary, saved in bf16 in small shards."""
    out = tmp_path_factory.mktemp("scratch")
    recipe = toy_recipe(evaluate_every=2, dtype="bfloat16", shard="30KB")
    summary = train(str(books), out, recipe=recipe, report=silent)
    assert summary == json.loads((out / "training_summary.json").read_text())
    return out, summary
