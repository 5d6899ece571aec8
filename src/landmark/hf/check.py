"""The proof of a conversion: without landmarks it is the given model, and with a memory it is
itself without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from landmark.hf.cache import LandmarkCache
from landmark.hf.columns import device_of
from landmark.hf.compat import NEWEST_TESTED, OLDEST_TESTED, installed_version
from landmark.hf.families import PREFIX, family
from landmark.hf.sharing import config_as, model_around

CHECKED_TOKENS = 24
SHIFTS = range(
    4, 100, 4
)  # RoPE is relative: another place is the same function, whose keys are rounded independently
PROMPT_TOKENS = 7
# With blocks of two tokens and a landmark: three landmarks in the prompt, two more on the way.
NEW_TOKENS = 5

# Relative errors: what is always granted to rounding; the most, where the model itself is as
# inexact; and between a memory and one pass, where a memory that is not read makes the logits
# others altogether.
LIMITS = {
    torch.float64: (1e-5, 1e-5, 1e-5),
    torch.float32: (1e-5, 1e-3, 1e-3),
    torch.float16: (4 * torch.finfo(torch.float16).eps, 0.1, 0.3),
    torch.bfloat16: (4 * torch.finfo(torch.bfloat16).eps, 0.1, 0.3),
}


@torch.no_grad()
def check_conversion(model: Any, given: Any = None) -> float:
    """Proves that without landmarks ``model`` is the ``given`` one, and that it generates with a
    memory.

    Args:
        model: a landmark model.
        given: the stock model that it was made of, as it stands; by default one around the modules
            of ``model``.

    Returns:
        the relative error of the logits without landmarks (Frobenius norms).

    Raises:
        ValueError: it exceeds 1e-5 in float64; in float32, four times what the given model's own
            two attentions (eager and SDPA) lie apart, at least 1e-5 and at most 1e-3; in lower
            precision (quantized weights count as bfloat16) the same, at least four units of
            rounding and at most 0.1. Or generation with a memory fails, or differs from one pass:
            by more than 1e-5, 1e-3 or 0.3.
    """
    given = _stock_around(model) if given is None else given
    with _undisturbed(given), _undisturbed(model):
        ids = _ids(model, CHECKED_TOKENS)
        _configure(model, block_size=CHECKED_TOKENS + 2, mode="all")
        expected = _logits(given, ids)
        error = _relative_error(_logits(model, ids), expected)
        precision = _precision(given, expected)
        least, most, generated = LIMITS[precision]
        bound = (
            least
            if error <= least
            else max(least, min(4 * _apart(given, ids, expected, precision), most))
        )
        if not error <= bound:
            raise ValueError(
                f"{model.config.model_type} is not exact without landmarks: error {error:.1e} "
                f"above {bound:.0e}"
            )
        _check_generation(model, generated)
    return error


def _stock_around(model: Any) -> Any:
    made = family(model.config.model_type.removeprefix(PREFIX))
    config = config_as(model.config, made.stock_config)
    config._attn_implementation = "eager"
    return model_around(model, made.stock_causal_lm, config)


def _precision(given: Any, logits: Tensor) -> torch.dtype:
    """Returns the lowest precision that a model computes in; quantized weights count as
    bfloat16.
    """
    if getattr(given, "hf_quantizer", None) is not None:
        return torch.bfloat16
    found = {parameter.dtype for parameter in given.parameters()} & LIMITS.keys()
    return max(found | {logits.dtype}, key=lambda dtype: torch.finfo(dtype).eps)


def _apart(given: Any, ids: Tensor, expected: Tensor, precision: torch.dtype) -> float:
    """Returns how far the logits of a stock model by eager and by SDPA attention lie apart.

    In float32 both get the same keys, bit for bit, unless one of them stands elsewhere: large keys
    show there.
    """
    shifts = torch.tensor(SHIFTS if precision == torch.float32 else [0], device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device) + shifts[:, None]
    with _other_attention(given):
        found = _logits(given, ids.expand(len(places), -1), position_ids=places)
    return max(_relative_error(row, expected[0]) for row in found)


def _logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True, **arguments).logits
    return logits


def _check_generation(model: Any, most: float) -> None:
    """Generates a few tokens with a memory and compares their logits with those of one pass without
    a cache.
    """
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
    """Sets the landmark settings of a check: nothing is left out."""
    changes = {
        "block_size": block_size,
        "mode": mode,
        "local_blocks": 1,
        "top_k": CHECKED_TOKENS,
        "layers": None,
    }
    rest = {"max_blocks": None, "local": "blocks", "trained_length": None, "landmark_trained": True}
    model.config.landmark = model.landmark.replace(**changes, **rest).to_dict()
    model.base_model._tables = None  # of the block size before


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """While open, a model is in eval mode and generates plainly; afterwards it and the random state
    are as before.
    """
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
    """While open, a stock model attends by eager where it did by SDPA or a kernel, and by SDPA
    where by eager.
    """
    config: Any = given.config
    before = config._attn_implementation
    config._attn_implementation = "sdpa" if before == "eager" and given._supports_sdpa else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected.to(found.device)).double().norm() / expected.double().norm())
