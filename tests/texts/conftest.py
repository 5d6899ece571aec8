"""A tiny random landmark model with a tiny tokenizer."""

import pytest

from landmark.texts.loading import LoadedModel
from tiny import tiny_landmark, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def marked(tokenizer):
    return LoadedModel("tiny-landmark", tiny_landmark(), tokenizer)
