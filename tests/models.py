"""Tiny random models of seven families, with weights large enough that every part of them shows in the logits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from landmark.config import LandmarkConfig

FAMILIES = ("llama", "qwen3", "mistral", "gpt_neox", "olmo2", "phi3", "gemma3")
VOCAB = 61
HEADS = 4

_NAMES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gpt_neox": "GPTNeoX",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "gemma3": "Gemma3",
}


def stock_model(
    family: str, *, kv_heads: int = 2, layers: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """Returns a stock model in eval mode; norm weights and biases are random too. GPT-NeoX always has 4 key heads."""
    config_class = getattr(transformers, _NAMES[family] + ("TextConfig" if family == "gemma3" else "Config"))
    model_class = getattr(transformers, _NAMES[family] + "ForCausalLM")
    model = model_class(config_class(**_fields(family, kv_heads, layers)))
    random = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else 0.22 * noise)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def _fields(family: str, kv_heads: int, layers: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "initializer_range": 0.22,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if family != "gpt_neox":
        fields["num_key_value_heads"] = kv_heads
    if family in ("gpt_neox", "phi3"):
        rope["partial_rotary_factor"] = 0.5
    if family in ("qwen3", "gemma3"):
        fields["head_dim"] = 12
    if family == "llama":
        fields["attention_bias"] = True
    if family == "mistral":
        fields["sliding_window"] = None
    if family == "gemma3":
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": dict(rope)}
        fields["layer_types"] = ["full_attention"] * layers
        fields["query_pre_attn_scalar"] = 7
    return fields


@functools.cache
def oracle_model(family: str, kv_heads: int = 2, layers: int = 2) -> PreTrainedModel:
    """Returns the stock float64 model that ``oracle.logits`` runs; its weights are those of ``landmark_model``."""
    return stock_model(family, kv_heads=kv_heads, layers=layers)


@functools.cache
def _converted(family: str, kv_heads: int, layers: int, dtype: torch.dtype, block_size: int) -> Any:
    import landmark

    base = stock_model(family, kv_heads=kv_heads, layers=layers, dtype=dtype)
    model = landmark.convert(base, block_size=block_size).eval()
    with torch.no_grad():
        model.base_model.landmark_embedding.weight.copy_(landmark_vector())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def landmark_vector() -> torch.Tensor:
    """Returns the embedding (hidden,) that every landmark of these tests has, float64."""
    return torch.randn(32, generator=torch.Generator().manual_seed(5)).double()


def landmark_model(
    family: str,
    settings: LandmarkConfig,
    *,
    kv_heads: int = 2,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Returns a converted model under ``settings``; it is shared, so that the next call may change its settings."""
    model = _converted(family, kv_heads, layers, dtype, settings.block_size)
    changes = {**settings.to_dict(), "landmark_trained": True, "trained_length": 4096}
    model.configure_landmark(**changes)
    return model.eval()


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    """Returns random text ids (tokens,), none of them the padding's."""
    return torch.randint(1, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids (B, T) and mask (B, T) of rows of any length, padded on the ``left`` or the ``right``."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask


@contextlib.contextmanager
def wide_norms() -> Iterator[None]:
    """While open, root-mean-square norms of float64 models compute in float64.

    The stock ones pass through float32, where two results that differ in the last bit of float64 can part by 6e-8.
    """
    norms = {
        type(module)
        for family in FAMILIES
        for module in stock_model(family).modules()
        if "RMSNorm" in str(type(module))
    }
    before = {norm: norm.forward for norm in norms}
    for norm in norms:
        norm.forward = _widened(norm, before[norm])
    try:
        yield
    finally:
        for norm in norms:
            norm.forward = before[norm]


def _widened(norm: type, narrow: Any) -> Any:
    plus_one = norm.__name__.startswith("Gemma")

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype != torch.float64:
            return narrow(self, hidden)
        epsilon = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        unit = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
        return unit * (1.0 + self.weight if plus_one else self.weight)

    return forward
