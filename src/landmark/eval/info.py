"""What is installed here, what would run, and what is known of the bundled model."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from landmark.eval.results import FIGURES, IndexRow, PerplexityRow, RankRow, Row, read
from landmark.eval.subjects import model_folder
from landmark.ops.choice import explain_impl
from landmark.versions import versions

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
    "datasets",
    "peft",
    "accelerate",
)


def version_lines() -> list[str]:
    """Returns a line for each package, missing optional ones included, and one for the commit of a checkout."""
    found = versions(*_PACKAGES)
    commit = found.pop("commit")
    lines = [f"{name} {version or 'not installed'}" for name, version in found.items()]
    return lines if commit is None else [*lines, f"commit {commit}"]


def device_lines() -> list[str]:
    """Returns a line for each device that torch can use."""
    lines = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        lines.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("cuda: not available (no GPU, or a torch built without CUDA)")
    return lines


def attention_lines() -> list[str]:
    """Returns which implementation ``impl="auto"`` chooses for bfloat16 here, and why none of the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = explain_impl(torch.empty(1, 1, 1, 64, device=device, dtype=torch.bfloat16))
    return [f"{choice.chosen}: chosen"] + [f"{name}: not chosen, {why}" for name, why in choice.refused.items()]


def bundled_lines() -> list[str]:
    """Returns where the bundled model lies and its recorded figures."""
    try:
        folder = Path(model_folder(None))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        return [str(error)]
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lines = [f"{folder} ({weights / 1e6:.1f} MB of weights)"]
    if not (folder / FIGURES).is_file():
        return [*lines, "no recorded figures"]
    return lines + [_line(row) for row in read(folder / FIGURES)]


def _line(row: Row) -> str:
    if isinstance(row, RankRow):
        asked = f"{row.passages} passages, {row.documents} documents, text {row.text}, {row.data}"
        return f"recall@1 {row.recall_at_1:.1%}, nDCG@10 {row.ndcg_at_10:.3f}: {row.ranker}, {asked}"
    if isinstance(row, IndexRow):
        among = f"{row.landmarks} landmarks, {row.recorded} of them recorded, {row.heads} heads of layer {row.layer}"
        return f"{row.step_ms} ms a step, recall {row.recall}: {row.index}, {among}, {row.data}"
    settings = f"{row.model}, {row.attention}" + ("" if row.top_k is None else f", k={row.top_k}")
    if isinstance(row, PerplexityRow):
        local = f"{row.scheme} local {row.local}"
        return f"perplexity {row.perplexity:.2f}: {row.length} tokens, {local}, {settings}, {row.data}"
    task = "pass key" if row.task == "passkey" else f"{row.facts} named facts"
    return f"{task} {row.accuracy:.1%}: {row.length} tokens, {row.trials} trials, filler {row.filler}, {settings}"
