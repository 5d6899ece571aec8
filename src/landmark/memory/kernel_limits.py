"""Limits of the Triton kernels: which calls they take."""

from __future__ import annotations

FUSED_BYTES = 2**15  # keys of one block, which has to fit one tile
FUSED_TOP_K = 16  # selected blocks: sorting more takes a compiler minutes
FEW_WIDTH = 16  # slots of a row that the decode kernels take
FEW_QUERIES = 64  # queries of one row and key/value head that the decode kernels take
