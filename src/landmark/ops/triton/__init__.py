"""Landmark attention as fused Triton kernels: forward and backward in memory linear in the keys.

``primitives`` is one tile of queries against one tile of keys, ``forward`` and ``backward`` are the
loops around it, ``configs`` says how large the tiles are on which card, ``op`` makes operators of
them that autograd and ``torch.compile`` know.
"""
