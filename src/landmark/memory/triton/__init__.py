"""Reading from the memory as fused kernels for NVIDIA GPUs; ``docs/memory.md`` says what they
compute.
"""
