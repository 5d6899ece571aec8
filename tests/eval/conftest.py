"""Tiny random models with a tiny tokenizer."""

import pytest
import torch
from tiny import BLOCK, tiny_llama

import landmark
from landmark.data.tokenizer import train_tokenizer
from landmark.eval.subjects import Subject


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(
        ["The grass is green. What is the pass key? The pass key is 12345. The code of the north gate"], 300
    )


@pytest.fixture
def plain(tokenizer):
    return Subject("tiny", tiny_llama(), tokenizer, "full")


@pytest.fixture
def marked(tokenizer):
    model = landmark.convert(tiny_llama(), block_size=BLOCK, top_k=2, local_blocks=2, chunk_tokens=60)
    model.config.landmark["landmark_trained"] = True
    return Subject("tiny-landmark", model, tokenizer, "landmark")


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """Folders of a plain model and of the landmark model made of it, both with their tokenizer."""
    root = tmp_path_factory.mktemp("models")
    stock = tiny_llama(torch.float32)
    stock.save_pretrained(root / "plain")
    model = landmark.convert(stock, block_size=BLOCK, top_k=2, local_blocks=2, chunk_tokens=60)
    model.config.landmark["landmark_trained"] = True
    model.save_pretrained(root / "marked")
    for name in ("plain", "marked"):
        tokenizer.save_pretrained(root / name)
    return root
