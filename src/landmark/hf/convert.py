"""From a stock model to a landmark model, checked; and loading either kind of folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from landmark.config import LandmarkConfig
from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.bundled import model_path
from landmark.hf.causal import LandmarkCausalLMMixin, check_layers, warn_beyond_trained
from landmark.hf.columns import device_of
from landmark.hf.families import PREFIX, check_config, family
from landmark.hf.pretrained import read_config, read_weights

CHECKED_TOKENS = 24


def convert(
    model_or_path: Any,
    *,
    block_size: int = 64,
    top_k: int = 4,
    granularity: str = "token_head",
    positions: str = "stingy",
    local_blocks: int = 2,
    max_blocks: int | None = None,
    layers: tuple[int, ...] | None = None,
    local: str = "blocks",
    mode: str = "retrieval",
    chunk_tokens: int = 1008,
    trained_length: int | None = None,
    position_gap: int = 0,
    **loading: Any,
) -> Any:
    """Makes a landmark model of a stock causal language model.

    Args:
        model_or_path: a model instance (its weights are shared, not copied), or a hub name or folder.
        block_size, top_k, granularity, positions, local_blocks, max_blocks, layers, local, mode, chunk_tokens,
            position_gap: see ``LandmarkConfig``.
        trained_length: positions the model was trained on; by default ``config.max_position_embeddings``.
        **loading: for ``from_pretrained`` where a path is given (``dtype``, ``device_map``, ...).

    Returns:
        a model of class ``Landmark<Family>ForCausalLM``, a subclass of the stock class, in eval mode. Its landmark
        embedding is new: train it before relying on what is retrieved.

    Raises:
        ValueError: an architecture that cannot be exact, a model that is a landmark model already, or settings outside
            their ranges.
    """
    given = model_or_path if isinstance(model_or_path, nn.Module) else None
    if given is not None and not isinstance(given, PreTrainedModel):
        raise ValueError(f"expected a transformers model or a path, got {type(given).__name__}")
    if given is not None and loading:
        raise ValueError(f"{sorted(loading)} are for loading from a path, got a model: load it with them")
    stock_config = given.config if given is not None else read_config(model_or_path)
    if stock_config.model_type.startswith(PREFIX):
        raise ValueError("this is a landmark model already: use landmark.load and configure_landmark")
    check_config(stock_config)
    settings = LandmarkConfig(
        block_size=block_size,
        top_k=top_k,
        granularity=granularity,
        positions=positions,
        local_blocks=local_blocks,
        max_blocks=max_blocks,
        layers=layers,
        local=local,
        mode=mode,
        chunk_tokens=chunk_tokens,
        trained_length=trained_length or stock_config.max_position_embeddings,
        position_gap=position_gap,
    )
    config = landmark_config(stock_config, settings)
    made = family(stock_config.model_type)
    if given is None:
        model = read_weights(made.causal_lm, model_or_path, config=config, **loading)
    else:
        model = _share(given, config)
    _start_in_distribution(model)
    check_conversion(model)
    return model.eval()


def landmark_config(stock_config: Any, settings: LandmarkConfig) -> Any:
    """Returns the landmark family's config with the fields of ``stock_config``.

    Raises:
        ValueError: as ``convert``.
    """
    check_config(stock_config)
    check_layers(settings, stock_config.num_hidden_layers)
    warn_beyond_trained(settings)
    made = family(stock_config.model_type)
    fields = stock_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    config = made.config.from_dict(fields)
    config.landmark = settings.to_dict()
    config.architectures = [made.causal_lm.__name__]
    return config


def from_config(stock_config: Any, settings: LandmarkConfig) -> Any:
    """Returns a randomly initialised landmark model, to be trained from scratch.

    Raises:
        ValueError: as ``convert``.
    """
    config = landmark_config(stock_config, settings)
    model = family(stock_config.model_type).causal_lm(config)
    _start_in_distribution(model)
    return model


def load(path: Any = None, **loading: Any) -> Any:
    """Loads a landmark model.

    Args:
        path: a folder or hub name; by default the bundled model.
        **loading: for ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Raises:
        ValueError: the folder holds no landmark model, or damaged weights.
        FileNotFoundError: there is no model, or the bundled one is not installed.
    """
    path = model_path() if path is None else path
    config = read_config(path)
    if not config.model_type.startswith(PREFIX):
        raise ValueError(f"expected a landmark model, got model_type {config.model_type!r}: use landmark.convert")
    model = read_weights(AutoModelForCausalLM, path, **loading)
    assert isinstance(model, LandmarkCausalLMMixin)
    return model


def _share(given: PreTrainedModel, config: Any) -> Any:
    """Builds a landmark model around the parameters of ``given``."""
    if getattr(given, "hf_quantizer", None) is not None:
        raise ValueError("a quantized model cannot be converted in place: pass its path and quantization_config")
    made = family(given.config.model_type)
    if not isinstance(given, made.stock_causal_lm):
        raise ValueError(f"expected a {made.stock_causal_lm.__name__}, got {type(given).__name__}")
    with torch.device("meta"):
        model = made.causal_lm(config)
    weight = given.get_input_embeddings().weight
    decoder = model.base_model
    decoder.landmark_embedding = nn.Embedding(1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    stock = dict(given.named_modules())
    for name, module in model.named_modules():
        source = stock.get(name)
        if source is None:
            continue
        for key, parameter in source._parameters.items():
            module._parameters[key] = parameter
        for key, buffer in source._buffers.items():
            module._buffers[key] = buffer
    model.generation_config = given.generation_config
    return model


@torch.no_grad()
def _start_in_distribution(model: Any) -> None:
    """Sets the landmark embedding to the direction of the mean token embedding, at a typical token's norm.

    What the embedding module returns is typical, not its weight: some architectures scale in between.
    """
    decoder = model.base_model
    embedding = decoder.get_input_embeddings()
    if embedding.weight.is_meta and not hasattr(embedding, "_hf_hook"):
        return
    count = min(embedding.num_embeddings, 65536)
    rows = embedding(torch.arange(count, device=device_of(embedding)))
    if decoder.landmark_embedding.weight.is_meta:  # offloaded, and nothing of it lies on the disk yet
        decoder.landmark_embedding = nn.Embedding(1, rows.shape[1], device=rows.device, dtype=rows.dtype)
    target, rows = decoder.landmark_embedding.weight, rows.float()
    norms = rows.norm(dim=-1)
    mean = rows[norms > 0].mean(0) if bool((norms > 0).any()) else rows.mean(0)
    if float(mean.norm()) == 0:
        return
    target.copy_((mean / mean.norm() * norms[norms > 0].median())[None].to(target.device, target.dtype))


@torch.no_grad()
def check_conversion(model: Any) -> float:
    """Proves that without landmarks the model is the stock one: runs both on the same weights.

    Returns:
        the relative error of the last hidden states (Frobenius norms).

    Raises:
        ValueError: it exceeds 1e-5; in lower precision (quantized weights count as bfloat16), four units of rounding or
            four times what the stock model's own two attentions (eager and SDPA) lie apart, at most 0.1.
    """
    decoder, config = model.base_model, model.config
    made = family(config.model_type.removeprefix(PREFIX))
    ids = (torch.arange(CHECKED_TOKENS, device=device_of(decoder.get_input_embeddings())) * 7 % config.vocab_size)[None]
    settings, training = config.landmark, model.training
    model.eval()
    try:
        config.landmark = decoder.settings.replace(block_size=CHECKED_TOKENS + 2, mode="all", layers=None).to_dict()
        ours = decoder(input_ids=ids).last_hidden_state
        stock = []
        for config._attn_implementation in ("eager", "sdpa") if decoder._supports_sdpa else ("eager",):
            stock.append(made.stock_decoder.forward(decoder, input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        config._attn_implementation = IMPLEMENTATION
        config.landmark = settings
        model.train(training)
    error, bound = _relative_error(ours, stock[0]), 1e-5
    precision = torch.bfloat16 if getattr(model, "hf_quantizer", None) is not None else ours.dtype
    if precision in (torch.float16, torch.bfloat16):
        bound = max(4 * torch.finfo(precision).eps, min(4 * _relative_error(stock[-1], stock[0]), 0.1))
    if not error <= bound:
        raise ValueError(f"{config.model_type} is not exact without landmarks: error {error:.1e} above {bound:.0e}")
    return error


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())
