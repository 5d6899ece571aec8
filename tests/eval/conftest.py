"""Tiny random models with a tiny tokenizer."""

import pytest

from landmark.eval.subjects import Subject
from tiny import save_models, tiny_landmark, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def plain(tokenizer):
    return Subject("tiny", tiny_llama(), tokenizer, "full")


@pytest.fixture
def marked(tokenizer):
    return Subject("tiny-landmark", tiny_landmark(), tokenizer, "landmark")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root
