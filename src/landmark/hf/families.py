"""The architectures that can be landmark models, the classes made for them, and the refused ones.

Importing ``landmark.hf`` registers the classes with the Auto classes of transformers.
"""

from __future__ import annotations

import functools
import sys
import threading
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from landmark.config import LandmarkConfig
from landmark.hf.attention import claim_attention
from landmark.hf.causal import LandmarkCausalLMMixin, check_layers
from landmark.hf.compat import cache_by_installed_name, installed
from landmark.hf.model import LandmarkDecoderMixin
from landmark.hf.stub import LandmarkConfigMixin, auto_map

PREFIX = "landmark_"

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "gpt_neox",
    "phi",
    "phi3",
    "glm4",
    "granite",
    "helium",
    "starcoder2",
)

REFUSED = {
    "gpt2": "it has learned positions and no RoPE",
    "opt": "it has learned positions and no RoPE",
    "bloom": "it has ALiBi positions and no RoPE",
    "mpt": "it has ALiBi positions and no RoPE",
    "gpt_oss": "its attention has sinks",
    "gemma2": "its attention scores are soft-capped",
    "smollm3": "some of its layers have no RoPE (NoPE)",
    "cohere2": "some of its layers have no RoPE (NoPE) and others a sliding window",
    "llama4_text": "some of its layers have no RoPE (NoPE) and others attend in chunks",
    "hunyuan_v1_dense": "it normalises queries and keys after RoPE",
    "stablelm": "its layers drop the keyword arguments that carry the landmarks",
    "falcon": "it does not use the attention interface",
    "gptj": "it does not use the attention interface",
    "deepseek_v3": "its multi-head latent attention rotates only a part of queries and keys",
}

_building = threading.RLock()


@dataclass(frozen=True)
class Family:
    """The classes of one landmark architecture and of its stock architecture."""

    config: Any
    decoder: Any
    causal_lm: Any
    stock_config: Any
    stock_decoder: Any
    stock_causal_lm: Any


@functools.cache
def family(model_type: str) -> Family:
    """Returns the classes for a stock ``model_type``, registered with the Auto classes.

    Raises:
        ValueError: the architecture cannot be exact, has not been checked, or is not in the
            installed transformers.
    """
    if model_type not in FAMILIES:
        reason = REFUSED.get(model_type, "it has not been checked")
        raise ValueError(
            f"cannot make a landmark model of {model_type!r}: {reason}; supported: "
            f"{', '.join(FAMILIES)}"
        )
    if not installed(model_type):
        raise ValueError(
            f"cannot make a landmark model of {model_type!r} with this transformers: install a "
            "later one"
        )
    stock_config = CONFIG_MAPPING[model_type]
    stock_decoder = MODEL_MAPPING[stock_config]
    stock_causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    config: Any = type(
        f"Landmark{stock_config.__name__}",
        (LandmarkConfigMixin, stock_config),
        {
            "model_type": PREFIX + model_type,
            "__doc__": f"{stock_config.__name__} with landmark settings.",
            "landmark": None,
        },
    )
    # transformers decides this by the source of a class's module, which says nothing for classes
    # that are made here.
    experts = classmethod(lambda cls: stock_decoder._can_set_experts_implementation())
    decoder = type(
        f"Landmark{stock_decoder.__name__}",
        (LandmarkDecoderMixin, stock_decoder),
        {
            "config_class": config,
            "_can_set_experts_implementation": experts,
            "__doc__": f"{stock_decoder.__name__} that inserts landmarks.",
        },
    )

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        claim_attention(config)
        module = sys.modules[stock_causal_lm.__module__]
        with _building:
            setattr(module, stock_decoder.__name__, decoder)
            try:
                super(causal_lm, self).__init__(config, *args, **kwargs)
            finally:
                setattr(module, stock_decoder.__name__, stock_decoder)

    @functools.wraps(stock_causal_lm.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock_causal_lm.forward(self, *args, **cache_by_installed_name(kwargs))

    causal_lm: Any = type(
        f"Landmark{stock_causal_lm.__name__}",
        (LandmarkCausalLMMixin, stock_causal_lm),
        {
            "config_class": config,
            "__init__": initialise,
            "forward": forward,
            "_can_set_experts_implementation": experts,
            "__doc__": f"{stock_causal_lm.__name__} that attends by landmarks.",
        },
    )
    made = Family(
        config=config,
        decoder=decoder,
        causal_lm=causal_lm,
        stock_config=stock_config,
        stock_decoder=stock_decoder,
        stock_causal_lm=stock_causal_lm,
    )
    _register(made)
    return made


def _register(made: Family) -> None:
    """Registers classes under their names in this module and in transformers."""
    classes = (made.config, made.decoder, made.causal_lm)
    made.config.auto_map = auto_map(*(each.__name__ for each in classes))
    for each in classes:
        each.__module__ = __name__
        setattr(sys.modules[__name__], each.__name__, each)
    AutoConfig.register(made.config.model_type, made.config)
    AutoModel.register(made.config, made.decoder)
    AutoModelForCausalLM.register(made.config, made.causal_lm)
    # `transformers serve` looks for the class there.
    setattr(sys.modules["transformers"], made.causal_lm.__name__, made.causal_lm)
    _copy_conversion(made.stock_config.model_type, made.config.model_type)
    for stock, ours in ((made.stock_decoder, made.decoder), (made.stock_causal_lm, made.causal_lm)):
        _copy_conversion(stock.__name__, ours.__name__)


def _copy_conversion(stock: str, ours: str) -> None:
    """Registers how checkpoints are read and written: renamed heads, fused experts, ...

    It is the same as for the stock architecture.
    """
    mapping = get_checkpoint_conversion_mapping(stock)
    if mapping is not None:
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def register() -> None:
    """Registers every supported family that the installed transformers has."""
    for model_type in FAMILIES:
        if installed(model_type):
            family(model_type)


def check_landmark_config(config: Any) -> None:
    """Makes sure that ``landmark.convert`` could have made the config of a landmark model.

    Raises:
        ValueError: no landmark settings, settings that are refused, or as ``check_config``.
    """
    if not config.landmark:
        raise ValueError(
            "expected landmark settings in config.json, got none; save the model again"
        )
    try:
        settings = LandmarkConfig.from_dict(config.landmark)
        check_layers(settings, config.num_hidden_layers)
    except ValueError as error:
        raise ValueError(f"the landmark settings in config.json: {error}") from None
    check_config(config)


def check_config(config: Any) -> None:
    """Makes sure that landmark attention can be exact for a config.

    Args:
        config: of a stock model, or of a landmark model made of it.

    Raises:
        ValueError: it cannot; the message names the reason.
    """
    name = config.model_type.removeprefix(PREFIX)
    family(name)
    types = getattr(config, "layer_types", None)
    if types:
        other = sorted(set(types) - {"full_attention"})
        if other:
            raise ValueError(
                f"{name}: layers with {', '.join(other)} (a sliding window) cannot be exact; "
                "expected full_attention everywhere: set config.layer_types if the window is to go"
            )
    elif getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"{name}: an active sliding window ({config.sliding_window}) cannot be exact; "
            "set config.sliding_window = None if it is to go"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{name}: soft-capped attention scores (softcap) cannot be exact; expected none"
        )
    if getattr(config, "attention_dropout", 0):
        raise ValueError(
            f"{name}: expected attention_dropout 0, got {config.attention_dropout}; set it to 0"
        )
