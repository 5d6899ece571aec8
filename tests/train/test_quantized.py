"""Adapters beside weights of 4 bits: trained, merged into dequantized weights, resumed."""

import json
import shutil

import pytest
import torch
from toy import silent, toy_recipe
from transformers import AutoTokenizer, BitsAndBytesConfig

import landmark
from landmark.train.run import train

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")


def test_adapters_beside_weights_of_4_bits(twin, books, tmp_path):
    folder, _ = twin
    recipe = toy_recipe(steps=4, lr=3e-2, save_every=2, weights="nf4", precision="fp32")
    options = {"recipe": recipe, "model": str(folder), "lora": 4, "report": silent}
    expected = train(str(books), tmp_path / "out", **options)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    settings = {"block_size": 16, "top_k": 4, "local_blocks": 1}
    base = landmark.convert(
        str(folder), quantization_config=quantization, dtype=torch.float32, **settings
    )
    assert isinstance(base.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    start = base.model.landmark_embedding.weight.clone()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    merged = landmark.load(tmp_path / "out")
    assert merged.dtype == torch.float32 and merged.landmark.landmark_trained
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(
        "The old man said the river was long. " * 20, return_tensors="pt"
    ).to(base.device)
    merged = merged.to(base.device)
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**ids).logits, adapted(**ids).logits, rtol=1e-4, atol=1e-5
        )
    assert not torch.equal(merged.model.landmark_embedding.weight, start)
    stock = landmark.convert(str(folder), **settings).to(base.device)
    assert torch.equal(merged.model.embed_tokens.weight, stock.model.embed_tokens.weight)
    name = "model.layers.0.mlp.up_proj.weight"  # has no adapter, and was rounded to 4 bits
    apart = (merged.get_parameter(name) - stock.get_parameter(name)).abs()
    assert 0 < apart.max() < 0.2 * stock.get_parameter(name).abs().max()

    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    again = train(str(books), tmp_path / "out", resume=True, **options)
    assert again["losses"] == expected["losses"]
