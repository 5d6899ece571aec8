"""A tiny random landmark model with a tiny tokenizer, and with one that has a chat template."""

import pytest

from landmark.texts.loading import LoadedModel
from tiny import talking_tokenizer, tiny_landmark, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def marked(tokenizer):
    return LoadedModel("tiny-landmark", tiny_landmark(), tokenizer)


@pytest.fixture(scope="module")
def talking():
    return LoadedModel("talking", tiny_landmark(), talking_tokenizer())
