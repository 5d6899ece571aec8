"""The check of a conversion.

Without landmarks the landmark model has to compute what the stock model computes. Generation with a
cache has to agree with one pass without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from landmark.hf.cache import LandmarkCache
from landmark.hf.columns import device_of
from landmark.hf.compat import NEWEST_TESTED, OLDEST_TESTED, installed_version
from landmark.hf.families import PREFIX, family
from landmark.hf.sharing import config_as, model_around

CHECKED_TOKENS = 24
# RoPE is relative: at shifted positions a model is the same function, with other rounding of keys.
SHIFTS = range(4, 100, 4)
PROMPT_TOKENS = 7
# Generation is checked with blocks of two tokens and a landmark: the prompt has three landmarks,
# and two more come among these tokens.
NEW_TOKENS = 5


class Limits(NamedTuple):
    """Largest relative errors of logits in one precision.

    Attributes:
        always: granted to rounding in any model.
        most: granted where the two attentions of the stock model differ as much.
        generated: between generation with a cache and one pass. A cache that is not read gives
            logits with nothing in common, so this bound may be wide.
    """

    always: float
    most: float
    generated: float


LIMITS = {
    torch.float64: Limits(always=1e-5, most=1e-5, generated=1e-5),
    torch.float32: Limits(always=1e-5, most=1e-3, generated=1e-3),
    torch.float16: Limits(always=4 * torch.finfo(torch.float16).eps, most=0.1, generated=0.3),
    torch.bfloat16: Limits(always=4 * torch.finfo(torch.bfloat16).eps, most=0.1, generated=0.3),
}


@torch.no_grad()
def check_conversion(model: Any, given: Any = None) -> float:
    """Checks that a landmark model computes what its stock model computes.

    The error allowed is four times the difference between the stock model's own two attentions
    (eager and SDPA), within bounds: 1e-5 in float64, 1e-5 to 1e-3 in float32, and four units of
    rounding to 0.1 in lower precision (quantized weights count as bfloat16). Generation with a
    cache may differ from one pass by 1e-5, 1e-3 and 0.3.

    Args:
        model: a landmark model.
        given: the stock model that it was made of; by default one around the modules of ``model``.

    Returns:
        the relative error of the logits without landmarks (Frobenius norms).

    Raises:
        ValueError: an error beyond these bounds, or generation with a cache fails.
    """
    given = _stock_around(model) if given is None else given
    with _undisturbed(given), _undisturbed(model):
        ids = _ids(model, CHECKED_TOKENS)
        _configure(model, block_size=CHECKED_TOKENS + 2, mode="all")
        expected = _logits(given, ids)
        error = _relative_error(_logits(model, ids), expected)
        precision = _precision(given, expected)
        limits = LIMITS[precision]
        bound = limits.always
        if not error <= bound:
            own_error = _error_between_attentions(given, ids, expected, precision)
            bound = max(limits.always, min(4 * own_error, limits.most))
        if not error <= bound:
            raise ValueError(
                f"{model.config.model_type} is not exact without landmarks: error {error:.1e} "
                f"above {bound:.0e}"
            )
        _check_generation(model, limits.generated)
    return error


def _stock_around(model: Any) -> Any:
    """Returns a stock model around the modules of a landmark model."""
    made = family(model.config.model_type.removeprefix(PREFIX))
    config = config_as(model.config, made.stock_config)
    config._attn_implementation = "eager"
    return model_around(model, made.stock_causal_lm, config)


def _precision(given: Any, logits: Tensor) -> torch.dtype:
    """Returns the lowest precision of a model; quantized weights count as bfloat16."""
    if getattr(given, "hf_quantizer", None) is not None:
        return torch.bfloat16
    found = {parameter.dtype for parameter in given.parameters()} & LIMITS.keys()
    return max(found | {logits.dtype}, key=lambda dtype: torch.finfo(dtype).eps)


def _error_between_attentions(
    given: Any, ids: Tensor, expected: Tensor, precision: torch.dtype
) -> float:
    """Returns the relative error between the logits of a stock model by eager and SDPA attention.

    In float32 both get the same keys, bit for bit, which hides the rounding of large keys. So the
    other attention also runs at shifted positions there.
    """
    shifts = torch.tensor(SHIFTS if precision == torch.float32 else [0], device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device) + shifts[:, None]
    with _other_attention(given):
        found = _logits(given, ids.expand(len(positions), -1), position_ids=positions)
    return max(_relative_error(row, expected[0]) for row in found)


def _logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True, **arguments).logits
    return logits


def _check_generation(model: Any, most: float) -> None:
    """Compares the logits of generation with a cache with those of one pass without a cache."""
    ids = _ids(model, PROMPT_TOKENS)
    _configure(model, block_size=3, mode="retrieval")
    version = (
        f"with transformers {installed_version()} (tested: {OLDEST_TESTED} to {NEWEST_TESTED})"
    )
    try:
        cache = LandmarkCache(model.config)
        mask = torch.ones_like(ids)
        generated = model.generate(ids, attention_mask=mask, past_key_values=cache)
    except Exception as problem:
        reason = str(problem).strip().splitlines() or [""]
        raise ValueError(
            f"generation with a memory fails {version}: {type(problem).__name__}: {reason[0]}; "
            "install a tested version"
        ) from problem
    _configure(model, block_size=3, mode="all")
    whole = _logits(model, generated.sequences[:, :-1])
    found = torch.stack(generated.logits, dim=1)
    error = _relative_error(found, whole[:, -found.shape[1] :].to(found.device))
    if not error <= most:
        raise ValueError(
            f"generation with a memory does not agree with one pass {version}: error {error:.1e} "
            f"above {most:.0e}; install a tested version"
        )


def _ids(model: Any, tokens: int) -> Tensor:
    device = device_of(model.get_input_embeddings())
    return torch.arange(tokens, device=device)[None] * 7 % int(model.config.vocab_size)


def _configure(model: Any, *, block_size: int, mode: str) -> None:
    """Sets the landmark settings of a check, under which queries read every block."""
    settings = model.landmark.replace(
        block_size=block_size,
        mode=mode,
        local_blocks=1,
        top_k=CHECKED_TOKENS,
        layers=None,
        max_blocks=None,
        local="blocks",
        trained_length=None,
        landmark_trained=True,
        position_span=None,
        retrieval_layers=None,
        retrieval_heads=None,
    )
    model.config.landmark = settings.to_dict()
    model.base_model._tables = None  # they are of the block size before


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Puts a model in eval mode with greedy generation, and restores it and the random state."""
    training = {module: module.training for module in model.modules()}
    settings = getattr(model.config, "landmark", None)
    generation = model.generation_config
    random = torch.get_rng_state()
    model.eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        model.generation_config = generation
        torch.set_rng_state(random)
        if settings is not None:
            model.config.landmark = settings
            model.base_model._tables = None


@contextmanager
def _other_attention(given: nn.Module) -> Iterator[None]:
    """Switches a stock model from eager attention to SDPA, or from any other to eager."""
    config: Any = given.config
    before = config._attn_implementation
    other = "eager"
    if before == "eager" and given._supports_sdpa:
        other = "sdpa"
    config._attn_implementation = other
    try:
        yield
    finally:
        config._attn_implementation = before


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected.to(found.device)).double().norm() / expected.double().norm())
