"""LoRA adapters, trained together with the landmark embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ADAPTER = "adapter"
ATTENTION = "attention"


def add_lora(model: Any, rank: int, layers: str = ATTENTION) -> Any:
    """Wraps a landmark model so that only adapters and its landmark embedding are trained.

    Args:
        model: the landmark model.
        rank: rank of the adapters.
        layers: ``attention`` for adapters on the projections of attention, ``all`` on every linear
            layer but the output layer; then the norms are trained, too.

    Returns:
        the model of peft; what it trains is in float32.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: ``rank`` below 1, or no linear layer inside the attention.
    """
    if rank < 1:
        raise ValueError(f"lora: expected a rank of at least 1, got {rank}; 8 is usual")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModuleNotFoundError(
            "lora needs the package peft: pip install landmark-attention[peft]"
        ) from None
    whole = ["landmark_embedding"]
    targets: list[str] | str = "all-linear"
    if layers == ATTENTION:
        targets = attention_projections(model)
    else:
        whole += norms(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        modules_to_save=whole,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)
    return adapted


def attention_projections(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers inside attention modules, such as ``q_proj``.

    Raises:
        ValueError: there is none.
    """
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "attention" in name)
    }
    if not names:
        raise ValueError(
            f"lora: {type(model).__name__} has no linear layer inside a module named attention; "
            "train it whole"
        )
    return sorted(names)


def norms(model: nn.Module) -> list[str]:
    """Returns the names of the norms of a model, such as ``input_layernorm``."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
    }
    return sorted(names)


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Returns a model like the given one, adapted or not, whose weights are those tensors.

    Args:
        model: a model that may have no weights itself, or parts of them.
        weights: all weights by name.
    """
    base = base_of(model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(base.config)
        made.generation_config = base.generation_config
        if base is not model:
            from peft import get_peft_model

            made.name_or_path = base.name_or_path
            made = get_peft_model(made, model.peft_config["default"])
    made.load_state_dict(weights, assign=True)
    base_of(made).tie_weights()
    return made


def merged(model: Any, folder: Path) -> Any:
    """Returns the landmark model inside an adapted one, with its adapter merged into the weights.

    Weights of 4 bits are dequantized before, as the sums would be rounded to 4 bits.

    Args:
        model: the model of peft, which is not to be used any more.
        folder: where its adapter was saved.
    """
    if getattr(base_of(model), "hf_quantizer", None) is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model.unload().dequantize(), str(folder))
    return model.merge_and_unload()


def base_of(model: Any) -> Any:
    """Returns the landmark model inside an adapted one; any other model as it is."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model
