"""Every family that is named as supported converts exactly; what cannot be exact is refused by
name.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import landmark
import models
from landmark.hf.check import check_conversion
from landmark.hf.families import FAMILIES, REFUSED, family

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SINGLE = ("qwen3_moe", "mixtral")  # checkpoints store their experts apart
SETTINGS = {"block_size": 5, "local_blocks": 1, "chunk_tokens": 20}


def tiny(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A model with weights as they are at the start of training, but larger."""
    given = {"max_position_embeddings": 512, "initializer_range": 0.3, **fields}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(models.family_config(name, **given)).to(dtype).eval()


def converted(stock: Any, **settings: Any) -> Any:
    model = landmark.convert(stock, **{**SETTINGS, **settings})
    model.configure_landmark(landmark_trained=True)
    return model


def test_the_installed_families() -> None:
    assert set(FAMILIES) - set(models.ALL_FAMILIES) <= {"gemma"}
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_retrieving_every_block_equals_one_pass(name: str) -> None:
    model = converted(tiny(name), top_k=30, trained_length=2048)
    assert check_conversion(model) < 1e-5
    ids = models.text(120).view(2, 60)
    with torch.no_grad():
        retrieved = model(ids).logits
        model.configure_landmark(top_k=1, trained_length=512)
        fewer = model(ids).logits
        model.configure_landmark(mode="all")
        whole = model(ids, use_cache=False).logits
    assert (retrieved - whole).abs().max() < 1e-4 < 0.05 < (fewer - whole).abs().max()


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_mode_top_k_sees_what_retrieval_retrieves(name: str) -> None:
    """In one pass with gradients: the same where no block is local and distances are kept."""
    model = converted(tiny(name), top_k=2, local_blocks=0, positions="exact", trained_length=2048)
    ids = models.text(120).view(2, 60)
    with torch.no_grad():
        retrieved = model(ids).logits
    model.configure_landmark(mode="top_k")
    selected = model(ids, use_cache=False).logits
    torch.testing.assert_close(selected.detach(), retrieved, rtol=0, atol=1e-5)
    selected.square().mean().backward()
    assert model.base_model.landmark_embedding.weight.grad.abs().sum() > 0
    model.configure_landmark(mode="all")
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - retrieved).abs().max() > 1e-4


def test_mode_top_k_is_of_one_pass() -> None:
    model = converted(tiny("llama"), mode="top_k")
    ids = models.text(20)[None]
    with pytest.raises(ValueError, match="expected no memory, got one; call configure_landmark"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="expected no memory, got one; call configure_landmark"):
        model.read(ids)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_without_landmarks_it_is_the_stock_model(name: str) -> None:
    stock = tiny(name, torch.float32)
    ids = models.text(48).view(2, 24)
    with torch.no_grad():
        expected = stock(ids).logits
        found = converted(stock, block_size=64)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_the_landmark_starts_in_distribution(name: str) -> None:
    """What the decoder gets for a landmark has the norm of what it gets for a typical token."""
    model = converted(tiny(name, torch.float32))
    seen: list[torch.Tensor] = []
    handle = model.base_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model.configure_landmark(mode="all")
    with torch.no_grad():
        model(torch.arange(3, 43)[None], use_cache=False)
    handle.remove()
    norms = seen[0][0].norm(dim=-1)
    landmarks = torch.arange(len(norms)) % 5 == 4
    assert landmarks.sum() == 10
    text = norms[~landmarks]
    assert (norms[landmarks] >= text.min()).all() and (norms[landmarks] <= text.max()).all()


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 128,
    },
}


def with_rope(kind: str) -> Any:
    return tiny("llama", rope_parameters={"rope_theta": 100.0, **ROPES[kind]})


@pytest.mark.parametrize("kind", ROPES)
def test_rope_types(kind: str) -> None:
    stock = with_rope(kind)
    plain = tiny("llama", rope_parameters={"rope_theta": 100.0, "rope_type": "default"})
    model = converted(stock, top_k=30, trained_length=2048)
    ids = models.text(120).view(2, 60)
    with torch.no_grad():
        if kind != "dynamic":  # which is the default rotation up to the trained length
            assert (stock(ids).logits - plain(ids).logits).abs().max() > 0.01
        retrieved = model(ids).logits
        model.configure_landmark(mode="all")
        torch.testing.assert_close(retrieved, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)
        short = ids[:, :50]
        found = converted(stock, block_size=64)(short).logits
        torch.testing.assert_close(found, stock(short).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_do_not_depend_on_the_length_of_a_call(kind: str) -> None:
    stock = with_rope(kind)
    model = converted(stock, top_k=2, chunk_tokens=700)
    ids = models.text(700)[None]
    model.configure_landmark(mode="all")
    with torch.no_grad():
        begun = model(ids[:, :40], use_cache=False).logits
        torch.testing.assert_close(
            model(ids, use_cache=False).logits[:, :40], begun, rtol=0, atol=1e-10
        )
        stocks = (stock(ids[:, :40]).logits, stock(ids).logits[:, :40])
    assert (stocks[0] - stocks[1]).abs().max() > 0.01


BY_NAME = {
    "GPT2": (dict(n_embd=32, n_head=4, n_layer=2), "gpt2.*no RoPE"),
    "OPT": (dict(ffn_dim=48, word_embed_proj_dim=32), "opt.*no RoPE"),
    "Bloom": ({}, "bloom.*ALiBi"),
    "Mpt": (dict(d_model=32, n_heads=4, n_layers=2), "mpt.*ALiBi"),
    "GptOss": (dict(num_local_experts=2), "gpt_oss.*sinks"),
    "Gemma2": ({}, "gemma2.*soft-?cap"),
    "SmolLM3": ({}, "smollm3.*NoPE"),
    "Cohere2": ({}, "cohere2.*NoPE"),
    "HunYuanDenseV1": ({}, "hunyuan_v1_dense.*after RoPE"),
    "StableLm": ({}, "stablelm.*drop the keyword"),
    "Falcon": ({}, "falcon.*attention interface"),
    "GPTJ": (dict(n_embd=32, n_head=4, n_layer=2, rotary_dim=4), "gptj.*attention interface"),
    "Mistral": (dict(sliding_window=32), r"mistral.*active sliding window \(32\)"),
    "Starcoder2": (dict(sliding_window=32), r"starcoder2.*active sliding window"),
    "Olmo3": (
        dict(layer_types=["sliding_attention", "full_attention"]),
        "olmo3.*sliding_attention",
    ),
    "Gemma3Text": ({}, "gemma3_text.*sliding_attention"),
    "Qwen2": (
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=0),
        "qwen2.*sliding",
    ),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_what_cannot_be_exact_is_refused_by_name(name: str) -> None:
    import transformers

    fields, message = BY_NAME[name]
    given = {**TINY, **fields}
    if name == "Falcon":
        given.pop("head_dim")
    config = getattr(transformers, f"{name}Config")(**given)
    with pytest.raises(ValueError, match=message):
        landmark.convert(AutoModelForCausalLM.from_config(config))


def rotated_backwards(function: Any) -> Any:
    return lambda q, k, cos, sin, *args, **kwargs: function(q, k, cos, -sin, *args, **kwargs)


def scaled_beside(function: Any) -> Any:
    return lambda q, k, cos, sin, *args, **kwargs: tuple(
        1.5 * each for each in function(q, k, cos, sin, *args, **kwargs)
    )


def only_queries_rotated(function: Any) -> Any:
    return lambda q, k, cos, sin, *args, **kwargs: (function(q, k, cos, sin, *args, **kwargs)[0], k)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text", "phi3"])
@pytest.mark.parametrize("tamper", [scaled_beside, only_queries_rotated])
def test_the_self_check_refuses_another_rotation(name: str, tamper: Any, monkeypatch) -> None:
    stock = tiny(name, torch.float32)
    module = sys.modules[family(name).stock_decoder.__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", tamper(module.apply_rotary_pos_emb))
    with pytest.raises(
        ValueError, match=r"is not exact without landmarks|could not be reproduced|not supported"
    ):
        landmark.convert(stock, block_size=5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_a_rotation_of_another_sense_is_read_as_it_is(name: str, monkeypatch) -> None:
    """The rotation is read from the architecture, not assumed: turned the other way, it is still
    exact.
    """
    stock = tiny(name, torch.float32)
    module = sys.modules[family(name).stock_decoder.__module__]
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", rotated_backwards(module.apply_rotary_pos_emb)
    )
    assert check_conversion(landmark.convert(stock, block_size=5)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_layers_in_lower_precision_are_accepted(dtype: torch.dtype) -> None:
    error = check_conversion(
        landmark.convert(
            tiny("llama", dtype, num_hidden_layers=24, initializer_range=0.06), block_size=5
        )
    )
    assert error > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_hides_no_other_rotation(dtype: torch.dtype, monkeypatch) -> None:
    stock = tiny("llama", dtype)
    module = sys.modules[family("llama").stock_decoder.__module__]
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", only_queries_rotated(module.apply_rotary_pos_emb)
    )
    with pytest.raises(ValueError, match="is not exact without landmarks"):
        landmark.convert(stock, block_size=5)


def test_a_saved_config_of_experts_is_read_as_the_stock_one(tmp_path) -> None:
    """Families whose checkpoints are stored in another form than they run in (experts apart,
    here).
    """
    for name in SINGLE:
        stock = tiny(name, torch.float32)
        stock.save_pretrained(tmp_path / name)
        ours = converted(tmp_path / name)
        ours.save_pretrained(tmp_path / f"landmark-{name}")
        again = landmark.load(tmp_path / f"landmark-{name}")
        ids = models.text(40)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, ours(ids).logits)
            expected = converted(stock)
            # The place of weights in memory decides how some processors round their products.
            torch.testing.assert_close(expected(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
        weights = ours.state_dict()
        assert expected.state_dict().keys() == weights.keys()
        assert all(torch.equal(weights[key], w) for key, w in expected.state_dict().items())
