"""A text from a file begins as the tokenizer begins every text."""

import copy

import pytest
from tokenizers import processors

from landmark.data.tokenizer import END
from landmark.texts.generate import continue_text
from landmark.texts.loading import LoadedModel


def adding(tokenizer):
    """The same tokenizer, putting its bos before every text."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.bos_token_id)]
    )
    return other


@pytest.mark.parametrize("adds", [False, True])
def test_a_file_begins_with_bos_where_the_tokenizer_adds_it(
    marked, tokenizer, tmp_path, monkeypatch, adds
):
    text = "The grass is green. " * 20
    read = []
    (tmp_path / "a.txt").write_text(text)
    stock = type(marked.model).read

    def heard(self, ids, **more):
        read.extend(ids[0].tolist())
        return stock(self, ids, **more)

    monkeypatch.setattr(type(marked.model), "read", heard)
    loaded = LoadedModel("tiny", marked.model, adding(tokenizer) if adds else tokenizer)
    continue_text(loaded, " What is", file=tmp_path / "a.txt", max_new_tokens=1)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert read == ([tokenizer.bos_token_id] if adds else []) + expected
