"""Times a training step of a landmark model beside the same stock model with cuDNN attention.

    python benchmarks/step.py --out benchmarks/results/step.json

A Llama of 1.2B random weights in bfloat16, one row of 8,192 positions (for the landmark model these
are 8,064 text tokens and 128 landmarks), layers compiled, AdamW. Both take their steps
alternately in one run; the medians, their ratio and the peak memory of each are written.
``first_seconds`` is the first step, compilation included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import record
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import landmark
from landmark.blocks import tokens_for
from landmark.train.run import compile_layers
from landmark.versions import made_with

BLOCK_SIZE = 64
LARGE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
}


def stock_model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Returns a Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, attn_implementation="sdpa", use_cache=False)
    return LlamaForCausalLM(config).to(device, dtype)


def landmark_model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Returns the same with landmarks."""
    model = landmark.convert(stock_model(shape, "cpu", torch.float32), block_size=BLOCK_SIZE)
    model.configure_landmark(mode="all")
    return model.to(device, dtype)


def stepper(
    model: Any, tokens: int, *, compiled: bool, backend: SDPBackend | None
) -> Callable[[], None]:
    """Returns a function that takes one training step on a row of ``tokens`` text tokens."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    if compiled:
        compile_layers(model)
    model.train()

    def step() -> None:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Returns the median milliseconds, seconds of the first step and peak bytes of each model.

    The models take their steps alternately.
    """
    found: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        first = _seconds(step)
        _seconds(step)
        found[name] = {
            "first_seconds": first,
            "peak_bytes": torch.cuda.max_memory_allocated() - held,
        }
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(1e3 * _seconds(step))
    for name, each in times.items():
        found[name]["milliseconds"] = statistics.median(each)
    return found


def _seconds(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; replaced")
    parser.add_argument(
        "--positions", type=int, default=8192, help="of the row, landmarks included"
    )
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, got none; run it on a machine that has one")
    made = made_with("cuda", "torch", "triton", "transformers")
    dense = stepper(
        stock_model(LARGE, "cuda", torch.bfloat16),
        options.positions,
        compiled=True,
        backend=SDPBackend.CUDNN_ATTENTION,
    )
    ours = stepper(
        landmark_model(LARGE, "cuda", torch.bfloat16),
        tokens_for(options.positions, BLOCK_SIZE),
        compiled=True,
        backend=None,
    )
    found = measure({"stock, cuDNN": dense, "landmark": ours}, options.repeats)
    ratios = {
        name: found["landmark"][name] / found["stock, cuDNN"][name]
        for name in ("milliseconds", "peak_bytes")
    }
    settings = {
        "shape": LARGE,
        "positions": options.positions,
        "block_size": BLOCK_SIZE,
        "repeats": options.repeats,
    }
    results = {"settings": settings, "steps": found, "landmark to stock": ratios}
    record.write(options.out, made, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
