"""What landmark models refuse: (name, call, what the message says). A call may take an empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import landmark
import models
from landmark.config import LandmarkConfig

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
    return models.landmark_model("llama", LandmarkConfig(block_size=5, **settings), dtype=torch.float32)


def ids(tokens: int = 12) -> torch.Tensor:
    return models.text(tokens)[None]


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


CASES = [
    ("convert something else", lambda: landmark.convert({"a": 1}), "expected a transformers model or a path"),
    ("convert a module", lambda: landmark.convert(torch.nn.Linear(2, 2)), "expected a transformers model or a path"),
    ("convert nothing there", lambda folder: landmark.convert(folder / "none"), "none.*(exist|found|no )"),
    ("convert an empty folder", lambda folder: landmark.convert(folder), "config.json"),
    ("convert a model with loading options", lambda: landmark.convert(llama(), dtype="float32"), "dtype.*from a path"),
    ("convert a landmark model", lambda: landmark.convert(ours()), "landmark model already"),
    ("convert without RoPE", lambda: landmark.convert(stock("GPT2")), "gpt2.*no RoPE"),
    ("convert an unknown architecture", lambda: landmark.convert(stock("Mamba")), "mamba.*supported: llama"),
    ("convert with a sliding window", lambda: landmark.convert(stock("Mistral", sliding_window=32)), "sliding window"),
    (
        "convert with some sliding layers",
        lambda: landmark.convert(stock("Gemma3Text", sliding_window=32, layer_types=["sliding_attention"] * 2)),
        "gemma3_text.*sliding",
    ),
    ("convert with softcap", lambda: landmark.convert(stock("Gemma2")), "gemma2.*soft-?cap"),
    ("convert with sinks", lambda: landmark.convert(stock("GptOss", num_local_experts=2)), "gpt_oss.*sinks"),
    ("convert with NoPE layers", lambda: landmark.convert(stock("SmolLM3")), "smollm3.*no RoPE"),
    ("convert with dropout", lambda: landmark.convert(stock("Llama", attention_dropout=0.1)), "attention_dropout"),
    ("block size 1", lambda: landmark.convert(llama(), block_size=1), "block_size: expected .* got 1"),
    ("block size 4.0", lambda: landmark.convert(llama(), block_size=4.0), "block_size: expected .* got 4.0"),
    ("top_k 0", lambda: landmark.convert(llama(), top_k=0), "top_k: expected .* got 0"),
    ("granularity word", lambda: landmark.convert(llama(), granularity="word"), "granularity.*token_head.*'word'"),
    ("positions near", lambda: landmark.convert(llama(), positions="near"), "positions.*stingy.*'near'"),
    ("mode sparse", lambda: landmark.convert(llama(), mode="sparse"), "mode.*retrieval.*'sparse'"),
    ("chunk 0", lambda: landmark.convert(llama(), chunk_tokens=0), "chunk_tokens: expected .* got 0"),
    ("layer beyond the last", lambda: landmark.convert(llama(), layers=(0, 7)), r"layers.*below 2, got \[7\]"),
    ("unknown setting", lambda: ours().configure_landmark(topk=3), "unknown.*topk.*top_k"),
    ("another block size", lambda: ours().configure_landmark(block_size=9), "block_size is fixed at 5, got 9"),
    ("load a stock model", load_stock_folder, "'llama'.*landmark.convert"),
    ("load nothing there", lambda folder: landmark.load(folder / "none"), "none.*(exist|found|no )"),
    ("load damaged weights", damaged_folder, "weights|safetensors"),
    ("load with a damaged config", config_beyond_its_range, "granularity.*'word'"),
    ("a cache for a stock model", lambda: landmark.LandmarkCache(llama().config), "landmark model's config"),
    ("a foreign cache", lambda: ours()(ids(), past_key_values=DynamicCache()), "LandmarkCache, got DynamicCache"),
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
    ("a mask of another length", lambda: ours()(ids(), attention_mask=torch.ones(1, 5)), r"\(1, 12\), got \(1, 5\)"),
    ("no ids and no embeddings", lambda: ours()(), "exactly one of input_ids and inputs_embeds"),
    ("attention weights", lambda: ours()(ids(), output_attentions=True), "no attention matrix.*retrievals"),
    ("load with another attention", load_with_another_attention, "'landmark' only, got .*'sdpa'; leave it out"),
    ("convert with another attention", convert_with_another_attention, "'landmark' only, got .*'eager'"),
    ("another attention in the config", attention_put_in_the_config, "'landmark' only, got .*'sdpa'"),
    ("another attention", lambda: ours().set_attn_implementation("sdpa"), "'landmark' only, got 'sdpa'"),
]
