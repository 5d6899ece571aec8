"""Fused Triton kernels of landmark attention, forward and backward, in memory linear in the keys.

``primitives`` holds what all kernels share: one tile of queries against one tile of keys.
``forward`` and ``backward`` loop over tiles, ``select`` selects ``top_k`` blocks, and
``block_lists`` lists which tiles read which blocks. ``configs`` says how large tiles are on each
GPU, ``launch`` starts kernels, and ``op`` makes operators for autograd and ``torch.compile``.
"""
