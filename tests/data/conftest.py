import numpy as np
import pytest

from landmark.data.tokenizer import backend, train_tokenizer
from small_text import sentences


@pytest.fixture(scope="session")
def text():
    return sentences(1500)


@pytest.fixture(scope="session")
def tokenizer(text):
    return train_tokenizer(
        [text, "What is the pass key? The pass key is 12. The code of the north gate is 3."], 600
    )


@pytest.fixture(scope="session")
def ids(text, tokenizer):
    return np.array(backend(tokenizer).encode(text).ids, dtype=np.uint16)
