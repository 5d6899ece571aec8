"""LoRA with the landmark embedding: trains, saves, reloads."""

import pytest
import torch
from safetensors.torch import load_file
from toy import silent, toy_recipe
from transformers import AutoTokenizer

import landmark
from landmark.train.lora import attention_projections
from landmark.train.run import train
from models import FAMILIES, stock_model

peft = pytest.importorskip("peft")


def test_trains_saves_and_reloads(twin, books, tmp_path):
    folder, _ = twin
    recipe = toy_recipe(steps=6, lr=3e-2, save_every=3)
    train(str(books), tmp_path, recipe=recipe, model=str(folder), lora=4, report=silent)
    before = landmark.convert(str(folder), block_size=16, top_k=4, local_blocks=1)
    start = before.model.landmark_embedding.weight.clone()
    merged = landmark.load(tmp_path)
    adapted = peft.PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path)(
        "The old man said the river was long. " * 20, return_tensors="pt"
    )
    with torch.no_grad():
        ours = merged(**ids).logits
        theirs = adapted(**ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged.model.landmark_embedding.weight, start)
    assert merged.landmark.landmark_trained

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved if "lora_A" in name} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert any("landmark_embedding" in name for name in saved)
    stock = landmark.convert(str(folder), block_size=16)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(merged.get_parameter(name), stock.get_parameter(name))
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight,
        stock.model.layers[0].self_attn.q_proj.weight,
    )


def test_resumed_adapter_has_the_same_losses(twin, books, tmp_path):
    import shutil

    options = {
        "recipe": toy_recipe(steps=4, save_every=2),
        "model": str(twin[0]),
        "lora": 2,
        "report": silent,
    }
    expected = train(str(books), tmp_path / "whole", **options)
    halted = tmp_path / "halted" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-2", halted / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "recipe.json", tmp_path / "halted")
    assert (
        train(str(books), tmp_path / "halted", resume=True, **options)["losses"]
        == expected["losses"]
    )


def test_adapters_on_all_linear_layers(twin, books, tmp_path):
    """And the norms are trained; merged weights compute what the adapter does."""
    folder, _ = twin
    recipe = toy_recipe(steps=4, lr=3e-2, lora_layers="all")
    train(str(books), tmp_path, recipe=recipe, model=str(folder), lora=4, report=silent)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-3] for name in saved if "lora_A" in name} == attention | mlp
    stock = landmark.convert(str(folder), block_size=16, top_k=4, local_blocks=1)
    merged = landmark.load(tmp_path)
    adapted = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path)("The old man. " * 40, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**ids).logits, adapted(**ids).logits, rtol=1e-4, atol=1e-5
        )
    stock = landmark.convert(str(folder), block_size=16)
    changed = {
        name
        for name, weight in merged.named_parameters()
        if not torch.equal(weight, stock.get_parameter(name))
    }
    assert {name.split(".")[-2] for name in changed} == {
        *attention,
        *mlp,
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "landmark_embedding",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_those_of_the_attention(family):
    names = attention_projections(stock_model(family))
    assert names and not any(
        "gate" in name or "up" in name or "down" in name or "4h" in name for name in names
    )
