"""Converts stock models to landmark models, and loads landmark models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from landmark.config import LandmarkConfig
from landmark.hf.attention import IMPLEMENTATION
from landmark.hf.bundled import model_folder, model_path
from landmark.hf.causal import LandmarkCausalLMMixin, check_layers, warn_beyond_trained
from landmark.hf.check import check_conversion
from landmark.hf.columns import device_of
from landmark.hf.compat import warn_untested
from landmark.hf.families import PREFIX, check_config, family
from landmark.hf.pretrained import ModelSource, find, read_weights
from landmark.hf.rope import trained_positions
from landmark.hf.sharing import config_as, model_around


def convert(
    model_or_path: Any,
    *,
    block_size: int = LandmarkConfig.block_size,
    top_k: int = LandmarkConfig.top_k,
    granularity: str = LandmarkConfig.granularity,
    positions: str = LandmarkConfig.positions,
    local_blocks: int = LandmarkConfig.local_blocks,
    max_blocks: int | None = LandmarkConfig.max_blocks,
    layers: tuple[int, ...] | None = LandmarkConfig.layers,
    local: str = LandmarkConfig.local,
    mode: str = LandmarkConfig.mode,
    chunk_tokens: int = LandmarkConfig.chunk_tokens,
    trained_length: int | None = None,
    position_gap: int = LandmarkConfig.position_gap,
    position_span: int | None = LandmarkConfig.position_span,
    retrieval_layers: tuple[int, ...] | None = LandmarkConfig.retrieval_layers,
    retrieval_heads: tuple[tuple[int, int], ...] | None = LandmarkConfig.retrieval_heads,
    **loading: Any,
) -> Any:
    """Makes a landmark model of a stock causal language model.

    The result is checked: without landmarks it computes what the stock model computes, and
    generation with a cache agrees with one pass.

    Args:
        model_or_path: a model instance (its weights are shared, not copied), or a hub name or
            folder.
        block_size, top_k, granularity, positions, local_blocks, max_blocks, layers, local, mode,
            chunk_tokens, position_gap, position_span, retrieval_layers, retrieval_heads: see
            ``LandmarkConfig``.
        trained_length: positions the model was trained on; by default
            ``config.max_position_embeddings``; under longrope, those up to which its frequencies
            for short texts were trained.
        **loading: for ``from_pretrained`` where a path is given (``dtype``, ``device_map``, ...).

    Returns:
        a model of class ``Landmark<Family>ForCausalLM``, a subclass of the stock class, in eval
        mode. Its landmark embedding is new: train it before relying on what is retrieved. Where
        ``output_loading_info`` is asked for, the model and that info.

    Raises:
        ValueError: an architecture that cannot be exact, a model that is a landmark model already,
            settings outside their ranges, or damaged weights.
        FileNotFoundError: there is no model at this path.
    """
    warn_untested()
    settings = {
        "block_size": block_size,
        "top_k": top_k,
        "granularity": granularity,
        "positions": positions,
        "local_blocks": local_blocks,
        "max_blocks": max_blocks,
        "layers": layers,
        "local": local,
        "mode": mode,
        "chunk_tokens": chunk_tokens,
        "trained_length": trained_length,
        "position_gap": position_gap,
        "position_span": position_span,
        "retrieval_layers": retrieval_layers,
        "retrieval_heads": retrieval_heads,
    }
    if not isinstance(model_or_path, nn.Module):
        return _converted_folder(find(model_or_path, **loading), settings)
    if loading:
        raise ValueError(
            f"{sorted(loading)} are for loading from a path, got a model: load it with them"
        )
    return _converted(model_or_path, settings)


def _converted_folder(source: ModelSource, settings: dict[str, Any]) -> Any:
    """Loads a stock model and converts it; also returns the loading info if it was asked for."""
    _settings(source.config, settings)  # refuses before the weights are read
    if source.adapter is not None:
        raise ValueError(
            f"{source.adapter.path} is an adapter of the plain model {source.path}: convert that "
            "one and train an adapter on the landmark model, or merge both first "
            "(PeftModel.from_pretrained(...).merge_and_unload())"
        )
    given, info = read_weights(source)
    model = _converted(given, settings)
    return (model, info) if source.wants_info else model


def _settings(stock_config: Any, settings: dict[str, Any]) -> LandmarkConfig:
    """Returns the landmark settings for a stock model; raises ``ValueError`` as ``convert``."""
    if stock_config.model_type.startswith(PREFIX):
        raise ValueError(
            "this is a landmark model already: use landmark.load and configure_landmark"
        )
    check_config(stock_config)
    found = LandmarkConfig(**settings)
    if found.trained_length is None:
        found = found.replace(trained_length=trained_positions(stock_config))
    check_layers(found, stock_config.num_hidden_layers)
    return found


def landmark_config(stock_config: Any, settings: LandmarkConfig) -> Any:
    """Returns the landmark family's config with the fields of ``stock_config``.

    Raises:
        ValueError: as ``convert``.
    """
    check_config(stock_config)
    check_layers(settings, stock_config.num_hidden_layers)
    warn_beyond_trained(settings)
    made = family(stock_config.model_type)
    config = config_as(stock_config, made.config)
    config._attn_implementation = IMPLEMENTATION
    config.landmark = settings.to_dict()
    config.architectures = [made.causal_lm.__name__]
    return config


def from_config(stock_config: Any, settings: LandmarkConfig) -> Any:
    """Returns a randomly initialised landmark model, for training from scratch.

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
        path: a folder, a hub name, or a bundled model: ``landmark``, which is the default, or
            ``smollm2``. ``smollm2@BASE`` is that on the weights in another folder or hub name.
        **loading: for ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Returns:
        the model; where ``output_loading_info`` is asked for, the model and that info.

    Raises:
        ValueError: the folder holds no landmark model, settings or a config that ``convert`` would
            refuse, or damaged weights.
        FileNotFoundError: there is no model, or the bundled one is not installed.
        ModuleNotFoundError: a package that it needs is not installed, as that with the weights of
            ``smollm2``.
    """
    warn_untested()
    if "landmark" in loading:
        raise ValueError(
            "landmark= is no loading argument: load the model, then "
            "model.configure_landmark(top_k=...)"
        )
    if path is None:
        path = model_path()
    elif isinstance(path, str):
        path = model_folder(path)
    source = find(path, **loading)
    kind = source.config.model_type
    if not kind.startswith(PREFIX):
        where = source.path
        if source.adapter is not None:
            where = f"{source.adapter.path}: its base {source.path}"
        raise ValueError(
            f"{where}: expected a landmark model, got model_type {kind!r}: use landmark.convert"
        )
    model, info = read_weights(source)
    assert isinstance(model, LandmarkCausalLMMixin)
    return (model, info) if source.wants_info else model


def _converted(given: Any, settings: dict[str, Any]) -> Any:
    """Returns a checked landmark model around the modules of the stock model ``given``."""
    _check_given(given)
    config = landmark_config(given.config, _settings(given.config, settings))
    model = model_around(given, family(given.config.model_type).causal_lm, config)
    decoder = model.base_model
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        embedding = decoder.get_input_embeddings()
        row = embedding(torch.zeros(1, dtype=torch.long, device=device_of(embedding)))
        decoder.landmark_embedding = nn.Embedding(
            1, row.shape[1], device=row.device, dtype=row.dtype
        )
    _start_in_distribution(model)
    check_conversion(model, given)
    return model.eval()


def _check_given(given: Any) -> None:
    """Makes sure that a model in memory is a plain one of a supported family.

    Raises:
        ValueError: it is not, or its weights are not loaded.
    """
    if not isinstance(given, PreTrainedModel):
        raise ValueError(
            f"expected a transformers model or a path, got {type(given).__name__}; pass the model "
            "inside it (compile, wrap or adapt what comes out; merge an adapter of peft first, by "
            "merge_and_unload)"
        )
    if given.config.model_type.startswith(PREFIX):
        return  # its config is refused later
    made = family(given.config.model_type)
    for module, expected in ((given, made.stock_causal_lm), (given.base_model, made.stock_decoder)):
        if type(module) is not expected:
            raise ValueError(
                f"expected a {expected.__name__}, got {type(module).__name__}: what it adds would "
                f"be lost; load the weights as {expected.__name__}"
            )
        if module._forward_pre_hooks:
            raise ValueError(
                f"{expected.__name__} has a forward pre-hook, which model.read would not run: "
                "remove it, or register it on a module inside"
            )
    if getattr(given, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has an adapter of peft loaded: convert it without, then load or train "
            "adapters on the landmark model; or merge it first "
            "(PeftModel.from_pretrained(...).merge_and_unload())"
        )
    embedding = given.get_input_embeddings()
    offloaded = any(hasattr(module, "_hf_hook") for module in embedding.modules())
    if any(weight.is_meta for weight in embedding.parameters()) and not offloaded:
        raise ValueError(
            "the weights are on the device meta, where nothing can be computed: load them first"
        )


@torch.no_grad()
def _start_in_distribution(model: Any) -> None:
    """Sets the landmark embedding to the mean token embedding, scaled to the median norm.

    Token embeddings are taken from the output of the embedding module, not from its weight: some
    architectures scale in between.
    """
    decoder = model.base_model
    embedding = decoder.get_input_embeddings()
    if decoder.landmark_embedding.weight.is_meta:
        return
    count = min(getattr(embedding, "num_embeddings", model.config.vocab_size), 65536)
    rows = embedding(torch.arange(count, device=device_of(embedding)))
    target = decoder.landmark_embedding.weight
    rows = rows.float()
    norms = rows.norm(dim=-1)
    used = norms > 0
    if not bool(used.any()):
        return
    mean = rows[used].mean(0)
    if float(mean.norm()) == 0:
        return
    start = mean / mean.norm() * norms[used].median()
    target.copy_(start[None].to(target.device, target.dtype))
