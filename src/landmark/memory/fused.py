"""Which calls the kernels of ``memory/triton`` take."""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.ops.choice import refusal
from landmark.ops.triton.configs import power_of_two

FUSED_BYTES = 2**15  # of the keys of a block, at most
FUSED_TOP_K = 16  # at most, for the choice: sorting more takes a compiler minutes
FEW_WIDTH = 16
# Of one row, and of those one key/value head, at most, for the kernels of decoding.
FEW_QUERIES = 64


def runs_fused(query: Tensor, config: LandmarkConfig) -> bool:
    """Whether the kernels of ``memory/triton`` compute a call: on an NVIDIA GPU, where no gradient
    is asked for.

    A block of keys has to fit one tile.
    """
    if not query.is_cuda or (torch.is_grad_enabled() and query.requires_grad):
        return False
    numbers = power_of_two(config.block_size) * power_of_two(query.shape[-1])
    if numbers * query.element_size() > FUSED_BYTES:
        return False
    return refusal(query, config.block_size, config.top_k) is None
