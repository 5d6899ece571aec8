"""Texts longer than the trained length are nothing special to ``generate``."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers.generation import stopping_criteria

import models
from landmark.config import LandmarkConfig

TRAINED = 64


@pytest.fixture
def model(monkeypatch):
    found = models.landmark_model("llama", LandmarkConfig(block_size=8, top_k=2))
    monkeypatch.setattr(found.config, "max_position_embeddings", TRAINED)
    return found


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_the_default_length_counts_new_tokens(model, options) -> None:
    ids = models.text(3 * TRAINED)[None]
    assert model.generate(ids, do_sample=False, **options).shape[1] == 3 * TRAINED + 20


@pytest.mark.parametrize(("asked", "given"), [({"max_length": 200}, 200), ({"max_new_tokens": 7}, 3 * TRAINED + 7)])
def test_a_length_that_was_asked_for_is_kept(model, asked, given) -> None:
    ids = models.text(3 * TRAINED)[None]
    assert model.generate(ids, do_sample=False, **asked).shape[1] == given


def test_no_reminder_of_the_trained_length(model) -> None:
    with mock.patch.object(stopping_criteria.logger, "warning_once") as said:
        model.generate(torch.ones(1, TRAINED + 5, dtype=torch.long), max_new_tokens=3, do_sample=False)
    said.assert_not_called()
