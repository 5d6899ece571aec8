"""Choice of the implementation that runs, with the reasons against the others."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.ops.metadata import AttentionMetadata

IMPLS = ("auto", "reference", "chunked", "triton")
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSED_DIMS = (32, 256)
FUSED_BLOCKS = (16, 256)
MOST_TOP_K = 64
LEAST_CAPABILITY = (8, 0)
LEAST_SHARED = 96 * 1024  # bytes; the largest tiles for GPUs other than Hopper
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Choice(NamedTuple):
    """What ``impl="auto"`` runs for a call, and why nothing else.

    Attributes:
        chosen: name of the implementation that runs.
        refused: reason against each of the others, by name.
    """

    chosen: str
    refused: dict[str, str]


def explain_impl(
    query: Tensor,
    *,
    block_size: int = LandmarkConfig.block_size,
    top_k: int | None = None,
    irregular: bool = False,
) -> Choice:
    """Returns which implementation ``impl="auto"`` chooses for a call, with reasons.

    Args:
        query: (B, H, T, D), or any tensor of that dtype, device and head dim.
        block_size: slots of a block, landmark included.
        top_k: as for ``landmark_attention``.
        irregular: whether the call passes ``landmarks``.
    """
    refused = {
        "reference": "the definition: exact, but its memory grows with T x S; only when asked for"
    }
    reason = refusal(query, block_size, top_k, irregular=irregular)
    if reason is None and query.is_cuda:
        return Choice("triton", {**refused, "chunked": "slower where the fused kernels run"})
    return Choice(
        "chunked",
        {**refused, "triton": reason or "interpreted on a CPU it is slow; only when asked for"},
    )


def pick_implementation(impl: str, query: Tensor, metadata: AttentionMetadata) -> str:
    """Returns the name of the implementation that runs a call.

    Args:
        impl: what the caller asked for, one of ``IMPLS``.
        query: (B, H, T, D).
        metadata: the other arguments of the call.

    Raises:
        ValueError: an unknown ``impl``, or ``triton`` where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(
            f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}; pass impl='auto'"
        )
    irregular = metadata.landmarks is not None
    if impl == "auto":
        return explain_impl(
            query,
            block_size=metadata.block_size,
            top_k=metadata.top_k,
            irregular=irregular,
        ).chosen
    if impl == "triton":
        reason = refusal(query, metadata.block_size, metadata.top_k, irregular=irregular)
        if reason is not None:
            raise ValueError(f"impl='triton': {reason}; pass impl='auto' for what can run here")
    return impl


def refusal(
    query: Tensor,
    block_size: int,
    top_k: int | None,
    *,
    irregular: bool = False,
) -> str | None:
    """Returns why the fused kernels cannot run a call; ``None`` if they can.

    Arguments as for ``explain_impl``.
    """
    dim = query.shape[-1]
    if not _INSTALLED:
        return "expected the package triton, which is not installed (pip install triton)"
    if query.dtype not in FUSED_DTYPES:
        return f"expected float16, bfloat16 or float32, got {query.dtype}"
    if not FUSED_DIMS[0] <= dim <= FUSED_DIMS[1] or dim % 8:
        least, most = FUSED_DIMS
        return f"expected a head dim from {least} to {most}, a multiple of 8, got {dim}"
    if not FUSED_BLOCKS[0] <= block_size <= FUSED_BLOCKS[1]:
        return (
            f"expected a block_size from {FUSED_BLOCKS[0]} to {FUSED_BLOCKS[1]}, got {block_size}"
        )
    if irregular:
        return "expected a landmark at every block_size-th slot, got the argument landmarks"
    if top_k is not None and top_k > MOST_TOP_K:
        return f"expected top_k of at most {MOST_TOP_K}, got {top_k}"
    if _INTERPRETED:
        return (
            "Triton's interpreter has no arithmetic in bfloat16"
            if query.dtype == torch.bfloat16
            else None
        )
    reason: str | None = _known_refusal(query.device)
    return reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known_refusal(device: torch.device) -> str | None:
    return _refusal_of_device(device)


@cache
def _refusal_of_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"expected tensors on an NVIDIA GPU, got {device.type}"
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < LEAST_CAPABILITY:
        major, minor = capability
        return f"expected a GPU of compute capability 8.0 or later, got {major}.{minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED)
    if shared < LEAST_SHARED:
        return (
            f"expected {LEAST_SHARED} bytes of shared memory for a block of threads, got {shared}"
        )
    return None
