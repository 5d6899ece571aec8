"""A recipe that trains in a second."""

from __future__ import annotations

import dataclasses
from typing import Any

from landmark.train.recipe import Recipe

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
    "tie_word_embeddings": True,
}


def toy_recipe(**changes: Any) -> Recipe:
    """Rows of 150 text tokens in 10 blocks of 15 + 1, half of them episodes."""
    recipe = dataclasses.replace(
        Recipe(
            model=MODEL,
            landmark={"block_size": 16, "top_k": 4, "local_blocks": 1, "position_gap": 8},
        ),
    )
    defaults = {
        "vocab_size": 400,
        "length": 160,
        "episodes": 0.5,
        "steps": 4,
        "batch": 4,
        "warmup": 1,
        "workers": 0,
        "log_every": 1,
        "evaluate_every": 0,
        "seed": 5,
    }
    return recipe.override(**{**defaults, **changes})


def silent(line: str) -> None:
    """Takes a line of progress."""
