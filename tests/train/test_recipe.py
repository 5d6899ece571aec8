"""Recipes: the shipped files, overriding, round trips."""

import json
from pathlib import Path

import pytest

from landmark.blocks import tokens_for
from landmark.data.tokenizer import train_tokenizer
from landmark.train.prepare import new_model
from landmark.train.recipe import Recipe, load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    recipe = load_recipe(path)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_bundled_recipe_is_what_the_model_card_says():
    recipe = load_recipe(RECIPES / "bundled.json")
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.__class__ = type(
        "Sized", (type(tokenizer),), {"__len__": lambda self: recipe.tokenizer.vocab_size}
    )
    plain = new_model(recipe, tokenizer, plain=True)
    marked = new_model(recipe, tokenizer, plain=False)
    weights = sum(weight.numel() for weight in plain.parameters())
    assert 12.0e6 < weights < 12.4e6
    assert (
        sum(weight.numel() for weight in marked.parameters())
        == weights + recipe.model["hidden_size"]
    )
    first, *_, last = recipe.parts()
    assert tokens_for(first.length, marked.landmark.block_size) == 504
    assert last.length == recipe.model["max_position_embeddings"]
    assert recipe.warmup == 200 and recipe.decay == 3200


@pytest.mark.parametrize(
    ("length", "block_size"), [(512, 64), (500, 64), (512, 51), (63, 64), (20, 2)]
)
def test_text_tokens_fill_the_positions(length, block_size):
    """Counted one by one: every ``block_size``-th position is a landmark."""
    assert tokens_for(length, block_size) == sum(
        p % block_size != block_size - 1 for p in range(length)
    )


def test_override_finds_the_section():
    recipe = Recipe().override(
        steps=10, episodes=0.25, top_k=2, vocab_size=300, dtype="bfloat16", seed=None
    )
    assert (recipe.optimiser.steps, recipe.data.episodes, recipe.landmark["top_k"]) == (10, 0.25, 2)
    assert (recipe.tokenizer.vocab_size, recipe.save.dtype, recipe.run.seed) == (300, "bfloat16", 1)


def test_a_schedule_divides_the_steps():
    schedule = [{"length": 64, "until": 0.5}, {"length": 256, "until": 0.8}]
    recipe = Recipe.from_dict({"data": {"length": 512, "schedule": schedule}}).override(steps=11)
    assert [tuple(part) for part in recipe.parts()] == [(64, 6), (256, 3), (512, 2)]
    assert json.loads(json.dumps(recipe.to_dict()))["data"]["schedule"] == schedule
    assert [tuple(part) for part in Recipe().parts()] == [(512, 4800)]


def test_short_runs_still_warm_up_and_decay():
    recipe = Recipe().override(steps=10)
    assert (recipe.warmup, recipe.decay) == (6, 4)


def test_config_of_a_model_is_a_recipe(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3", "hidden_size": 64}))
    assert load_recipe(path) == Recipe(model={"model_type": "qwen3", "hidden_size": 64})
