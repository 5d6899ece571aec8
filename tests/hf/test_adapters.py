"""Adapters of peft with the landmark embedding: trained, saved, and put on a model loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import landmark
import models
from landmark.data.tokenizer import train_tokenizer
from landmark.hf import pretrained
from landmark.texts import loading

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
def test_a_saved_adapter_gives_the_same_logits_on_a_model_loaded_again(
    family: str, tmp_path: Path
) -> None:
    base = landmark.convert(
        models.stock_model(family, dtype=torch.float32), block_size=5, top_k=2, mode="all"
    )
    base.configure_landmark(landmark_trained=True)
    base.save_pretrained(tmp_path / "base")
    ids = models.text(80).view(2, 40)
    adapted = trained(base, TARGETS[family], ids)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        landmark.load(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
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
    ("method", "own"),
    [("PromptTuningConfig", {}), ("PromptEncoderConfig", {"encoder_hidden_size": 8})],
)
def test_virtual_tokens_generate_as_on_the_stock_model(method: str, own: dict[str, Any]) -> None:
    """In one block both are the same function."""
    stock = models.family_model("llama")
    ids = models.text(20)[None]
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
    }
    expected = prompted(stock, getattr(peft, method), **own).generate(**options)
    found = prompted(
        landmark.convert(models.family_model("llama"), block_size=64), getattr(peft, method), **own
    )
    assert torch.equal(found.generate(**options), expected)


def test_prefix_tuning_is_refused() -> None:
    """Its keys have no text and no landmarks."""
    model = prompted(
        landmark.convert(models.family_model("llama"), block_size=5), peft.PrefixTuningConfig
    )
    ids = models.text(20)[None]
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"got DynamicCache|a DynamicCache as past_key_values"):
        model(**options)
    with pytest.raises(ValueError, match=r"got DynamicCache|a DynamicCache as past_key_values"):
        model.generate(**options, max_new_tokens=5)


def saved_adapter(root: Path, family: str = "llama", base: str | None = None) -> Any:
    """An adapter in ``root/adapter`` of a landmark model in ``root/base``, which it names as
    ``base``.
    """
    landmark.convert(
        models.family_model(family, dtype=torch.float32), block_size=5, mode="all"
    ).save_pretrained(root / "base")
    adapted = trained(landmark.load(root / "base"), "all-linear", models.text(80).view(2, 40))
    adapted.save_pretrained(root / "adapter")
    if base is not None:
        file = root / "adapter" / "adapter_config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base})
        )
    return adapted


@pytest.mark.parametrize(
    "family", [name for name in models.ALL_FAMILIES if name not in ("mixtral", "qwen3_moe")]
)
def test_the_folder_of_an_adapter_loads_as_the_auto_classes_open_it(
    family: str, tmp_path: Path
) -> None:
    models.require_stock_adapters()
    adapted = saved_adapter(tmp_path, family)
    ids = models.text(80).view(2, 40)
    if family == "gpt_neox" and transformers.__version__.startswith("5.0."):
        with pytest.raises(ValueError, match=r"tensors that are not in the model .*gpt_neox"):
            landmark.load(tmp_path / "adapter")
        pytest.skip(
            "transformers 5.0 reads no adapter of GPT-NeoX: its names are taken for other ones"
        )
    model = landmark.load(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted(input_ids=ids).logits)
        assert not torch.equal(model(ids).logits, landmark.load(tmp_path / "base")(ids).logits)
    assert model.active_adapters() == ["default"] and not model.training
    assert type(model) is type(adapted.get_base_model())


@pytest.mark.parametrize("base", ["base", "../base"])
def test_a_base_that_is_named_from_the_adapter(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = saved_adapter(tmp_path, base=base)
    ids = models.text(40)[None]
    expected = adapted(input_ids=ids).logits
    assert torch.equal(landmark.load(tmp_path / "adapter")(ids).logits, expected)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(landmark.load("adapter")(ids).logits, expected)
    assert torch.equal(landmark.load(tmp_path, subfolder="adapter")(ids).logits, expected)


def test_a_folder_without_a_model_is_not_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory has a folder of that name, too."""
    adapted = saved_adapter(tmp_path, base="../base")
    ids = models.text(40)[None]
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    (tmp_path / "elsewhere" / "base").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    assert torch.equal(
        landmark.load(tmp_path / "adapter")(ids).logits, adapted(input_ids=ids).logits
    )


def test_a_damaged_adapter_beside_its_model_is_named(tmp_path: Path) -> None:
    saved_adapter(tmp_path)
    for file in (tmp_path / "adapter").iterdir():
        file.rename(tmp_path / "base" / file.name)
    (tmp_path / "base" / "adapter_model.safetensors").write_bytes(b"\xff" * 500)
    with pytest.raises(ValueError, match=r"base/adapter_model.safetensors: .*damaged file"):
        landmark.load(tmp_path / "base")


def test_an_adapter_beside_its_model(tmp_path: Path) -> None:
    adapted = saved_adapter(tmp_path)
    ids = models.text(40)[None]
    for file in (tmp_path / "adapter").iterdir():
        file.rename(tmp_path / "base" / file.name)
    with torch.no_grad():
        assert torch.equal(
            landmark.load(tmp_path / "base")(ids).logits, adapted(input_ids=ids).logits
        )


def test_a_model_with_its_adapter_is_saved_as_one(tmp_path: Path) -> None:
    models.require_stock_adapters()
    saved_adapter(tmp_path)
    model = landmark.load(tmp_path / "adapter", dtype=torch.float32)
    ids = models.text(40)[None]
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").is_file()
    with torch.no_grad():
        assert torch.equal(landmark.load(tmp_path / "again")(ids).logits, model(ids).logits)


def lost_base(root: Path) -> None:
    shutil.rmtree(root / "base")


def plain_base(root: Path) -> None:
    lost_base(root)
    models.family_model("llama", dtype=torch.float32).save_pretrained(root / "base")


def other_base(root: Path) -> None:
    lost_base(root)
    landmark.convert(models.family_model("llama", layers=1, dtype=torch.float32)).save_pretrained(
        root / "base"
    )


def no_weights(root: Path) -> None:
    (root / "adapter" / "adapter_model.safetensors").unlink()


def pickled_garbage(root: Path) -> None:
    no_weights(root)
    (root / "adapter" / "adapter_model.bin").write_bytes(b"text")


def damaged_base(root: Path) -> None:
    (root / "base" / "model.safetensors").write_bytes(b"\xff" * 500)


def damaged(name: str, content: bytes) -> Any:
    return lambda root: (root / "adapter" / name).write_bytes(content)


def without(part: str) -> Any:
    def damage(root: Path) -> None:
        file = root / "adapter" / "adapter_model.safetensors"
        weights = {name: value for name, value in load_file(file).items() if part not in name}
        save_file(weights, file, metadata={"format": "pt"})

    return damage


ADAPTER_DAMAGES = {
    "the base is gone": (lost_base, "adapter .an adapter of .*base"),
    "the base is plain": (
        plain_base,
        "adapter: its base .*base: expected a landmark model, got model_type 'llama'",
    ),
    "the base has fewer layers": (other_base, "tensors that are not in the model .*layers.1"),
    "no weights": (
        no_weights,
        "adapter: expected an adapter with weights, found none of adapter_model",
    ),
    "weights of garbage": (
        damaged("adapter_model.safetensors", b"\xff" * 500),
        "adapter_model.safetensors: .*damaged file",
    ),
    "no bytes of weights": (
        damaged("adapter_model.safetensors", b""),
        "adapter_model.safetensors: .*no bytes",
    ),
    "pickled weights of garbage": (pickled_garbage, "adapter_model.bin: .*damaged file"),
    "a config of garbage": (
        damaged("adapter_config.json", b"{"),
        "adapter_config.json: .* no JSON",
    ),
    "a config of a list": (
        damaged("adapter_config.json", b"[]"),
        "adapter_config.json: expected a JSON object",
    ),
    "a config without a base": (damaged("adapter_config.json", b"{}"), "names no base model"),
    "an unknown kind": (
        damaged("adapter_config.json", b'{"base_model_name_or_path": "base", "peft_type": "NONE"}'),
        "adapter_config.json: expected a peft_type that this peft knows, such as LORA, got "
        "'NONE'; update peft",
    ),
    "the base has damaged weights": (damaged_base, "base/model.safetensors: .*damaged file"),
    "a tensor is missing": (
        without("layers.1.self_attn.q_proj.lora_A"),
        "got none for 1 of its tensors .*layers.1",
    ),
    "the landmark is missing": (
        without("landmark_embedding"),
        "got none for 1 of its tensors .*landmark_embedding",
    ),
}


@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    damage, message = ADAPTER_DAMAGES[name]
    saved_adapter(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        landmark.load(tmp_path / "adapter")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("base", ["landmark", "plain"])
def test_an_adapter_is_not_converted(base: str, tmp_path: Path) -> None:
    if base == "landmark":
        saved_adapter(tmp_path)
    else:
        stock = models.family_model("llama", dtype=torch.float32)
        stock.save_pretrained(tmp_path / "base")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        peft.get_peft_model(stock, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
            tmp_path / "adapter"
        )
    message = (
        "landmark model already"
        if base == "landmark"
        else "an adapter of the plain model .*merge_and_unload"
    )
    with pytest.raises(ValueError, match=message):
        landmark.convert(tmp_path / "adapter")


def test_without_peft_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_adapter(tmp_path)
    monkeypatch.setattr(pretrained, "_has_peft", lambda: False)
    with pytest.raises(
        ModuleNotFoundError, match=r"it is an adapter: pip install 'landmark-attention\[peft\]'"
    ):
        landmark.load(tmp_path / "adapter")


def test_the_command_line_takes_an_adapter(tmp_path: Path) -> None:
    """With the tokenizer of its base, or its own."""
    adapted = saved_adapter(tmp_path)
    ids = models.text(40)[None]
    tokenizer = train_tokenizer(["The grass is green."], 300)
    tokenizer.save_pretrained(tmp_path / "base")
    for place in ("base", "adapter"):
        tokenizer.save_pretrained(tmp_path / place)
        loaded = loading.load(str(tmp_path / "adapter"), "cpu", "float32")
        assert loaded.is_landmark and len(loaded.tokenizer) == len(tokenizer)
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, adapted(input_ids=ids).logits)
    plain_base(tmp_path)
    with pytest.raises(
        ValueError, match=r"^model: expected an adapter of a landmark model, got .*the plain llama"
    ):
        loading.load(str(tmp_path / "adapter"), "cpu", "float32")
