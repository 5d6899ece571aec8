"""A resumed run has the losses of the uninterrupted one."""

import shutil

import pytest
from safetensors.torch import load_file
from toy import silent, toy_recipe

from landmark.train.run import train


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "landmark"])
def test_resumed_equals_uninterrupted(books, scratch, tmp_path, plain):
    whole = tmp_path / "whole"
    halted = tmp_path / "halted"
    options = {
        "recipe": toy_recipe(steps=6, save_every=3),
        "plain": plain,
        "tokenizer": str(scratch[0]),
        "tokens": tmp_path / "tokens",
        "report": silent,
    }
    expected = train(str(books), whole, **options)
    halted.mkdir()
    shutil.copy(whole / "recipe.json", halted)
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", halted / "checkpoints" / "checkpoint-3")
    resumed = train(str(books), halted, resume=True, **options)
    assert resumed["losses"] == expected["losses"]
    assert resumed["steps"] == 6
    weights = load_file(whole / "model.safetensors")
    others = load_file(halted / "model.safetensors")
    assert all(weights[name].equal(others[name]) for name in weights)
