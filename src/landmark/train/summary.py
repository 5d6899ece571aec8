"""The summary of a training run as JSON: settings, texts, speed and losses."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from landmark.data import outputs
from landmark.data.characters import without_surrogates
from landmark.data.tokens import DocumentSpan
from landmark.train.recipe import Recipe, RunArguments
from landmark.train.trainer import LandmarkTrainer
from landmark.versions import versions

SUMMARY = "training_summary.json"
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "numpy")


def summarise(
    trainer: LandmarkTrainer,
    recipe: Recipe,
    arguments: RunArguments,
    documents: list[DocumentSpan],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Returns the summary of a run.

    Args:
        trainer: the trainer after the last evaluation.
        recipe: the settings.
        arguments: what the run was asked for beside them.
        documents: the documents of the training text.
        seconds: seconds of training, compilation and evaluations included.
    """
    log = trainer.state.log_history
    started = getattr(trainer, "_initial_global_step", 0)
    steps = trainer.state.global_step
    speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    mean_speed = None
    if seconds:
        mean_speed = round((steps - started) * trainer.step_tokens / seconds)
    return {
        "steps": steps,
        "tokens": steps * trainer.step_tokens,
        "seconds": round(seconds, 2),
        "evaluation_seconds": round(trainer.evaluation_seconds, 2),
        "tokens_per_second": mean_speed,
        "tokens_per_second_median": round(statistics.median(speeds)) if speeds else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "losses": [
            {"step": entry["step"], "loss": entry["loss"]} for entry in log if "loss" in entry
        ],
        "evaluations": _evaluations(log),
        "recipe": recipe.to_dict(),
        "arguments": arguments.to_dict(),
        "landmark": getattr(trainer.model.config, "landmark", None),
        "versions": {**versions(*PACKAGES), "device": _device()},
        "texts": [
            {"title": span.title, "sha256": span.sha256, "tokens": span.tokens}
            for span in documents
        ],
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Writes ``training_summary.json``."""
    # File names that are no UTF-8 have lone surrogates.
    text = without_surrogates(json.dumps(summary, indent=1, ensure_ascii=False))
    outputs.write(out / SUMMARY, (text + "\n").encode())


def _evaluations(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the held-out losses, accuracies and recall of each step that was evaluated."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in log:
        kept = {
            key.removeprefix("eval_"): value
            for key, value in entry.items()
            if key.startswith("eval_") and key.endswith(("_loss", "_accuracy", "_recall"))
        }
        if kept:
            by_step.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return list(by_step.values())
