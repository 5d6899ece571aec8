"""Finds and checks the checkpoint that a run continues from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader

from landmark.data import outputs
from landmark.data.errors import first_line
from landmark.train.recipe import Recipe, RunArguments

RECIPE = "recipe.json"
FOLDER = "checkpoints"
# Settings that a run may be resumed with other values of.
FREE = ("log_every", "evaluate_every", "save_every", "workers", "report_to", "compile")


def last_checkpoint(out: Path) -> Path:
    """Returns the latest checkpoint of a run, after checking that its files can be read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file of it is missing or damaged.
    """
    found = {
        int(match[1]): path
        for path in _checkpoints(out)
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if not found:
        raise FileNotFoundError(
            f"{out / FOLDER}: expected a checkpoint to resume from, got none; train without "
            "resume=True, with save_every=100"
        )
    path = found[max(found)]
    remedy = f"delete {path.name} to resume from an earlier one"
    state = path / "trainer_state.json"
    weights = sorted(path.glob("*.safetensors"))
    # FSDP writes folders to which every process adds its part, or else one file.
    parts = [path / name for name in ("pytorch_model_fsdp_0", "optimizer_0")]
    is_sharded = parts[0].is_dir()
    is_of_fsdp = (path / "pytorch_model_fsdp.bin").is_file()
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
        for file in weights:
            with safe_open(file, framework="pt") as tensors:
                list(tensors.keys())
        if is_sharded:
            for part in parts:
                FileSystemReader(part).read_metadata()
        else:
            optimizer = path / ("optimizer.bin" if is_of_fsdp else "optimizer.pt")
            torch.load(optimizer, map_location="meta", weights_only=True)
    except Exception as error:  # json, safetensors and torch raise many kinds
        raise ValueError(
            f"{path}: expected a complete checkpoint, got a damaged one ({_line(error)}); {remedy}"
        ) from None
    if not weights and not is_sharded:
        raise ValueError(
            f"{path}: expected a checkpoint with weights (*.safetensors), found none; {remedy}"
        )
    return path


def refuse_overwriting(out: Path) -> None:
    """Makes sure that a folder holds no run with checkpoints.

    Raises:
        ValueError: it does.
    """
    if _checkpoints(out):
        raise ValueError(
            f"{out}: expected no run with checkpoints, got one; give resume=True to continue it, "
            "or another out=FOLDER"
        )


def save_recipe(out: Path, recipe: Recipe, arguments: RunArguments) -> None:
    """Writes the settings of a run to ``recipe.json``.

    Args:
        out: folder of the run.
        recipe: the settings.
        arguments: what the run is asked for beside them.
    """
    fields = _run_settings(recipe, arguments)
    outputs.write(out / RECIPE, (json.dumps(fields, indent=1) + "\n").encode())


def require_same_recipe(out: Path, recipe: Recipe, arguments: RunArguments) -> None:
    """Makes sure that a run is resumed with the settings that it began with.

    Settings that do not change its losses are free.

    Args:
        out: folder of the run.
        recipe: the settings.
        arguments: what the run is asked for beside them.

    Raises:
        ValueError: others differ, or ``recipe.json`` cannot be read.
    """
    path = out / RECIPE
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{path}: expected the settings of the run to resume, got no readable file; train anew"
        ) from None
    new = json.loads(json.dumps(_run_settings(recipe, arguments)))
    changed: list[str] = []
    for section in new.keys() - {"tokenizer", "save"}:
        before = old.get(section, {})
        now = new[section]
        changed += [
            f"{section}.{name}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name) and name not in FREE
        ]
    if changed:
        raise ValueError(
            f"{out}: expected the settings the run began with, got other {sorted(changed)}; leave "
            "out resume=True or those"
        )


def _run_settings(recipe: Recipe, arguments: RunArguments) -> dict[str, Any]:
    return {**recipe.to_dict(), "arguments": arguments.to_dict()}


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("checkpoint-*"))


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    return first_line(error)
