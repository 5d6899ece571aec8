"""The windowed plain model against stock attention with a mask, and against stock runs on what a
query sees.
"""

import pytest
import torch

from landmark.eval.variants import RopeScaling, Variant, plain_variants
from landmark.eval.window import SINK
from tiny import tiny_llama


def windowed(model, tokenizer, size):
    return Variant("tiny", model, tokenizer, window=size)


def test_window_over_everything_is_stock_attention(plain, tokenizer):
    ids = torch.randint(0, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    expected = plain.model(ids).logits
    assert torch.allclose(windowed(plain.model, tokenizer, 100).logits(ids), expected, atol=1e-10)
    assert torch.equal(plain.model(ids).logits, expected), "stock attention is back"


@pytest.mark.parametrize("queries", [7, 512])
def test_window_is_a_mask_while_distances_fit(plain, tokenizer, monkeypatch, queries):
    monkeypatch.setattr("landmark.eval.window._QUERIES", queries)
    length = SINK + 30
    window = 30
    ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(1))
    i = torch.arange(length)[:, None]
    j = torch.arange(length)[None]
    seen = (j <= i) & ((j < SINK) | (j > i - window))
    mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    expected = plain.model(ids, attention_mask=mask[None, None].expand(2, 1, -1, -1)).logits
    assert torch.allclose(
        windowed(plain.model, tokenizer, window).logits(ids), expected, atol=1e-10
    )


def test_far_queries_see_the_first_block_right_before_the_window(tokenizer):
    """With one layer, each logit is a stock run on the first block and the window, moved
    together.
    """
    model = tiny_llama(layers=1)
    window = 20
    ids = torch.randint(0, 300, (1, 600), generator=torch.Generator().manual_seed(2))
    got = windowed(model, tokenizer, window).logits(ids)
    for query in (SINK + window, 200, 511, 512, 599):
        joined = torch.cat((ids[:, :SINK], ids[:, query - window + 1 : query + 1]), dim=1)
        # transformers computes the angles in float32: at position 600 they are known to 2e-5
        assert torch.allclose(got[0, query], model(joined).logits[0, -1], atol=1e-4)


def test_variants_of_a_plain_model(saved):
    from landmark.texts.loading import load

    plain = load(str(saved / "plain"), "cpu")
    full, window, dynamic = plain_variants(plain, 40, RopeScaling("dynamic", 2.0))
    assert [each.attention for each in (full, window, dynamic)] == ["full", "window", "dynamic"]
    assert window.settings() == {"sink": SINK, "window": 40}
    assert dynamic.settings() == {"rope_factor": 2.0}
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(3))
    short = ids[:, :100]
    assert torch.allclose(dynamic.logits(short), full.logits(short), atol=1e-4)
    assert not torch.allclose(dynamic.logits(ids), full.logits(ids), atol=1e-2)
    assert window.beyond_trained(10_000) is False
    assert full.beyond_trained(10_000) is True


def test_yarn_is_that_of_transformers(saved):
    from landmark.texts.loading import load

    plain = load(str(saved / "plain"), "cpu")
    *_, yarn = plain_variants(plain, None, RopeScaling("yarn", 4.0))
    assert yarn.attention == "yarn" and yarn.settings() == {"rope_factor": 4.0}
    config = type(plain.model.config).from_pretrained(saved / "plain")
    config.rope_parameters = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": config.rope_parameters["rope_theta"],
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    stock = type(plain.model).from_pretrained(saved / "plain", config=config)
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(yarn.logits(ids), stock(ids).logits, atol=1e-5)
        assert not torch.allclose(yarn.logits(ids), Variant.of(plain).logits(ids), atol=1e-2)
