"""Tiny random models with weights large enough that every part of them shows in the logits.

``stock_model`` has the seven families that the oracle computes, ``family_model`` all that can be
landmark models.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from landmark.config import LandmarkConfig
from landmark.hf import compat, families

FAMILIES = ("llama", "qwen3", "mistral", "gpt_neox", "olmo2", "phi3", "gemma3")
VOCAB = 61
HEADS = 4

# Before 5.13 stock code raises for early exit, and for prompt lookup where nothing ends a text.
OLD_ASSISTED = Version(transformers.__version__) < Version("5.13")

_NAMES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gpt_neox": "GPTNeoX",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "gemma3": "Gemma3",
}

ALL_FAMILIES = tuple(name for name in families.FAMILIES if compat.installed(name))
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
}
_WITHOUT = {
    "gpt_neox": ("num_key_value_heads", "head_dim"),
    "phi": ("head_dim",),
    "starcoder2": ("head_dim",),
}


def stock_model(
    family: str,
    *,
    kv_heads: int = 2,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PreTrainedModel:
    """Returns a stock model in eval mode; norm weights and biases are random too. GPT-NeoX always
    has 4 key heads.
    """
    config_class = getattr(
        transformers, _NAMES[family] + ("TextConfig" if family == "gemma3" else "Config")
    )
    model_class = getattr(transformers, _NAMES[family] + "ForCausalLM")
    return _randomised(model_class(config_class(**_fields(family, kv_heads, layers))), dtype, seed)


def _randomised(model: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    random = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else 0.22 * noise)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def family_model(
    model_type: str,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Returns a stock model of any of ``ALL_FAMILIES`` in eval mode, randomised as ``stock_model``
    is.

    Args:
        model_type: as in the config: ``gemma3_text``, where ``stock_model`` says ``gemma3``.
        layers: how many layers.
        dtype: of all weights.
        seed: of the weights.
        **fields: of the config, in place of the tiny ones.
    """
    config = family_config(model_type, layers, **fields)
    return _randomised(AutoModelForCausalLM.from_config(config), dtype, seed)


def family_config(model_type: str, layers: int = 2, **fields: Any) -> Any:
    """Returns the config of ``family_model``; its experts compute one by one: their grouped product
    has no float64.
    """
    given: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **_OWN.get(model_type, {}),
    }
    if model_type in ("gemma3_text", "olmo3"):
        given["layer_types"] = ["full_attention"] * layers
    for field in _WITHOUT.get(model_type, ()):
        given.pop(field)
    config = CONFIG_MAPPING[model_type](**{**given, **fields})
    if model_type in ("qwen3_moe", "mixtral"):
        config._experts_implementation = "eager"
    return config


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
    """Returns the stock float64 model that ``oracle.logits`` runs; its weights are those of
    ``landmark_model``.
    """
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


@functools.cache
def converted_family(
    model_type: str, block_size: int, dtype: torch.dtype = torch.float64, **fields: Any
) -> Any:
    """Returns a landmark model of ``family_model``, trained as far as its settings say; it is
    shared.
    """
    import landmark

    model = landmark.convert(
        family_model(model_type, dtype=dtype, **fields), block_size=block_size, trained_length=4096
    )
    model.configure_landmark(landmark_trained=True, top_k=2, local_blocks=1, chunk_tokens=13)
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
    """Returns a converted model under ``settings``; it is shared, so that the next call may change
    its settings.
    """
    model = _converted(family, kv_heads, layers, dtype, settings.block_size)
    changes = {**settings.to_dict(), "landmark_trained": True, "trained_length": 4096}
    model.configure_landmark(**changes)
    return model.eval()


def require_stock_adapters() -> None:
    """Skips a test where transformers itself refuses the installed peft (5.24 wants 0.22)."""
    peft = pytest.importorskip("peft")
    from transformers.integrations import peft as integration

    least = Version(str(getattr(integration, "MIN_PEFT_VERSION", "0")))
    if Version(peft.__version__) < least:
        pytest.skip(
            f"transformers {transformers.__version__} loads no adapter by peft {peft.__version__}"
        )


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    """Returns random text ids (tokens,), none of them the padding's."""
    return torch.randint(1, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids (B, T) and mask (B, T) of rows of any length, padded on the ``left`` or the
    ``right``.
    """
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

    The stock ones pass through float32, where two results that differ in the last bit of float64
    can part by 6e-8.
    """
    before = {norm: norm.forward for norm in _norms()}
    for norm in before:
        norm.forward = _widened(norm, before[norm])
    try:
        yield
    finally:
        for norm in before:
            norm.forward = before[norm]


@functools.cache
def _norms() -> frozenset[type]:
    made = [stock_model(family) for family in FAMILIES] + [
        family_model(name) for name in ALL_FAMILIES
    ]
    return frozenset(
        type(each) for model in made for each in model.modules() if "RMSNorm" in str(type(each))
    )


def _widened(norm: type, narrow: Any) -> Any:
    plus_one = norm.__name__.startswith("Gemma")

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype != torch.float64:
            return narrow(self, hidden)
        epsilon = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        unit = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
        return unit * (1.0 + self.weight if plus_one else self.weight)

    return forward
