"""Tiny random models with a tiny tokenizer."""

import pytest

from landmark.eval.variants import Variant
from tiny import save_models, tiny_landmark, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def plain(tokenizer):
    return Variant("tiny", tiny_llama(), tokenizer)


@pytest.fixture
def marked(tokenizer):
    return Variant("tiny-landmark", tiny_landmark(), tokenizer)


@pytest.fixture
def choosing(tokenizer):
    """Some layers choose for all."""
    model = tiny_landmark(layers=3)
    model.configure_landmark(retrieval_layers=[1, 2])
    return Variant("tiny-choosing", model, tokenizer)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root
