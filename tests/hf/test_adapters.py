"""Adapters of peft with the landmark embedding: trained, saved, and put on a model loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import landmark
import models

peft = pytest.importorskip("peft")

TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gemma3": "all-linear",
    "phi3": "all-linear",
}


def trained(model: Any, targets: Any, ids: torch.Tensor) -> Any:
    config = peft.LoraConfig(
        r=4,
        target_modules=targets,
        modules_to_save=["landmark_embedding"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize("family", TARGETS)
def test_a_saved_adapter_gives_the_same_logits_on_a_model_loaded_again(family: str, tmp_path: Path) -> None:
    base = landmark.convert(models.stock_model(family, dtype=torch.float32), block_size=5, top_k=2, mode="all")
    base.configure_landmark(landmark_trained=True)
    base.save_pretrained(tmp_path / "base")
    ids = models.text(80).view(2, 40)
    adapted = trained(base, TARGETS[family], ids)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(landmark.load(tmp_path / "base"), tmp_path / "adapter").eval()
    plain = landmark.load(tmp_path / "base")
    with torch.no_grad():
        for mode in ("all", "retrieval"):
            for model in (adapted.get_base_model(), again.get_base_model(), plain):
                model.configure_landmark(mode=mode)
            ours = adapted(input_ids=ids).logits
            assert torch.equal(again(input_ids=ids).logits, ours)
            assert not torch.equal(plain(ids).logits, ours)
    before, after = (each.base_model.landmark_embedding for each in (plain, again.get_base_model()))
    moved = after.modules_to_save["default"].weight - before.weight
    assert moved.abs().min() > 0

    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    alone = landmark.load(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, merged(ids).logits)
        torch.testing.assert_close(alone(ids).logits, ours, rtol=0, atol=1e-4)


def test_peft_asks_for_target_modules_by_name() -> None:
    """It knows defaults by model_type only, and landmark ones are not in its table."""
    base = landmark.convert(models.stock_model("llama", dtype=torch.float32), block_size=5)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))


def prompted(base: Any, method: Any, **own: Any) -> Any:
    """A model with three virtual tokens in front of every text, the same for every base."""
    torch.manual_seed(0)
    config = method(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        num_layers=2,
        num_attention_heads=models.HEADS,
        token_dim=32,
        num_transformer_submodules=1,
        **own,
    )
    return peft.get_peft_model(base, config).double().eval()


@pytest.mark.parametrize(
    ("method", "own"), [("PromptTuningConfig", {}), ("PromptEncoderConfig", {"encoder_hidden_size": 8})]
)
def test_virtual_tokens_generate_as_on_the_stock_model(method: str, own: dict[str, Any]) -> None:
    """In one block both are the same function."""
    stock = models.family_model("llama")
    ids = models.text(20)[None]
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    expected = prompted(stock, getattr(peft, method), **own).generate(**options)
    found = prompted(landmark.convert(models.family_model("llama"), block_size=64), getattr(peft, method), **own)
    assert torch.equal(found.generate(**options), expected)


def test_prefix_tuning_is_refused() -> None:
    """Its keys have no text and no landmarks."""
    model = prompted(landmark.convert(models.family_model("llama"), block_size=5), peft.PrefixTuningConfig)
    ids = models.text(20)[None]
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"got DynamicCache|a DynamicCache as past_key_values"):
        model(**options)
    with pytest.raises(ValueError, match=r"got DynamicCache|a DynamicCache as past_key_values"):
        model.generate(**options, max_new_tokens=5)
