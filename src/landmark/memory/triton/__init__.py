"""The memory's kernels for NVIDIA GPUs, each beside its launcher; see ``docs/decoding.md``."""
