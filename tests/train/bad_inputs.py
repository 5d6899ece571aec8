"""What training refuses: (name, call or command line, what the message says)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from toy import silent, toy_recipe  # noqa: E402

from landmark.hf.bundled import model_path  # noqa: E402
from landmark.train.checkpoints import RECIPE  # noqa: E402
from landmark.train.recipe import Recipe, load_recipe  # noqa: E402
from landmark.train.run import train  # noqa: E402
from small_text import write_books  # noqa: E402


def run(folder: Path, out: str = "out", **options: Any) -> object:
    books = write_books(folder / "books", files=1, count=200)
    return train(str(books), folder / out, **{"recipe": toy_recipe(), "report": silent, **options})


def chats(folder: Path, row: str | None = None) -> str:
    """Writes conversations and returns their file."""
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    path = folder / "chats.jsonl"
    path.write_text((row or json.dumps({"messages": messages})) + "\n")
    return str(path)


def bundled() -> str:
    return str(model_path())


def setting(**changes: Any) -> Callable[[], object]:
    return lambda: Recipe().override(**changes)


def recipe_file(content: str) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / "recipe.json").write_text(content)
        return load_recipe(folder / "recipe.json")

    return call


def halted(folder: Path, damage: Callable[[Path], object], **changes: Any) -> object:
    run(folder, recipe=toy_recipe(steps=2, save_every=1), plain=True)
    damage(folder / "out" / "checkpoints" / "checkpoint-2")
    return run(folder, recipe=toy_recipe(steps=2, save_every=1, **changes), resume=True, plain=True)


def a_run_is_there(folder: Path) -> object:
    (folder / "out" / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    return run(folder)


def no_checkpoint(folder: Path) -> object:
    run(folder, recipe=toy_recipe(steps=1), plain=True)
    return run(folder, recipe=toy_recipe(steps=1), resume=True, plain=True)


def without(package: str, **options: Any) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        run(folder, out="twin", plain=True, recipe=toy_recipe(steps=1))
        with mock.patch.dict(sys.modules, {package: None}):
            return run(folder, **{"model": str(folder / "twin"), **options})

    return call


def with_fsdp(folder: Path) -> object:
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"}):
        return run(folder, model=bundled(), lora=4, recipe=toy_recipe(weights="nf4"))


def plain_landmark(folder: Path) -> object:
    run(folder, out="model", recipe=toy_recipe(steps=1))
    return run(folder, model=str(folder / "model"), plain=True)


def another_block_size(folder: Path) -> object:
    run(folder, out="model", recipe=toy_recipe(steps=1))
    return run(folder, model=str(folder / "model"), recipe=toy_recipe(block_size=8))


def foreign_model(folder: Path) -> object:
    run(folder, out="twin", plain=True, recipe=toy_recipe(steps=1))
    (folder / "twin" / "config.json").unlink()
    return run(folder, model=str(folder / "twin"))


def tear(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


CASES = [
    ("no steps", setting(steps=0), "steps: expected an integer from 1 to .*, got 0"),
    ("half a batch", setting(batch=2.5), r"batch: expected an integer from 1 to .*, got 2\.5"),
    (
        "more episodes than rows",
        setting(episodes=1.5),
        r"episodes: expected a number from 0 to 1, got 1\.5",
    ),
    (
        "unknown precision",
        setting(precision="int4"),
        "precision: expected one of auto, bf16, fp32, got 'int4'",
    ),
    (
        "a schedule that is a number",
        recipe_file('{"data": {"schedule": 512}}'),
        r"recipe\.json: schedule: expected a list such as .*, got 512; mend it",
    ),
    (
        "a schedule of numbers",
        recipe_file('{"data": {"schedule": [512]}}'),
        r"schedule: expected objects such as .*, got 512; mend it",
    ),
    (
        "a schedule of other things",
        recipe_file('{"data": {"schedule": [{"length": 64, "steps": 3}]}}'),
        r"schedule: expected objects such as .*'steps': 3",
    ),
    (
        "a schedule of half a position",
        recipe_file('{"data": {"schedule": [{"length": 64.5, "until": 0.5}]}}'),
        r"schedule: length: expected an integer from 2 to .*, got 64\.5",
    ),
    (
        "a schedule of lengths that do not divide",
        recipe_file('{"data": {"schedule": [{"length": 100, "until": 0.5}]}}'),
        "schedule: expected lengths that divide length=512, got 100",
    ),
    (
        "a schedule without a last part",
        recipe_file('{"data": {"schedule": [{"length": 64, "until": 1}]}}'),
        "schedule: expected until to rise between 0 and 1, got 1; order the parts",
    ),
    (
        "a schedule that falls",
        recipe_file(
            '{"data": {"schedule": [{"length": 64, "until": 0.5}, {"length": 256, "until": 0.4}]}}'
        ),
        r"schedule: expected until to rise between 0\.5 and 1, got 0\.4",
    ),
    (
        "a schedule of broken blocks",
        lambda folder: run(folder, recipe=toy_recipe(schedule=[{"length": 40, "until": 0.5}])),
        "schedule: expected lengths that are multiples of block_size=16, got 40",
    ),
    (
        "a mixture of more than all",
        setting(mixture=[{"source": "a", "share": 0.7}, {"source": "b", "share": 0.4}]),
        r"mixture: expected shares of 1 together at most, got 1\.1",
    ),
    (
        "a mixture of nameless sources",
        setting(mixture=[{"source": 3, "share": 0.7}]),
        "mixture: source: expected a string, got 3",
    ),
    (
        "a mixture with a share above 1",
        setting(mixture=[{"source": "a", "share": 2}]),
        "mixture: share: expected a number from 0 to 1, got 2",
    ),
    (
        "a mixture with a source that is not there",
        lambda folder: run(
            folder, recipe=toy_recipe(mixture=[{"source": "none.jsonl", "share": 0.5}])
        ),
        r"none\.jsonl: no such file",
    ),
    (
        "a tokenizer of conversations",
        lambda folder: train(chats(folder), folder / "out", recipe=toy_recipe(), report=silent),
        r"tokenizer: expected texts to train a tokenizer on, got messages in .*; give tokenizer=",
    ),
    (
        "episodes of conversations",
        lambda folder: train(
            chats(folder),
            folder / "out",
            recipe=toy_recipe(),
            tokenizer=bundled(),
            report=silent,
        ),
        "episodes: expected texts to make episodes of, got other rows only; give episodes=0",
    ),
    (
        "conversations without a role",
        lambda folder: train(
            chats(folder, '{"messages": [{"content": "hi"}]}'), folder / "out", report=silent
        ),
        r"chats\.jsonl, line 1: expected role and content.*got content of type str; write both",
    ),
    (
        "a stock teacher of a model from scratch",
        lambda folder: run(folder, recipe=toy_recipe(teacher="stock")),
        "teacher: expected the model that is trained further, got none; give model=",
    ),
    (
        "a stock teacher of a landmark model",
        lambda folder: run(
            folder, recipe=toy_recipe(teacher="stock", block_size=64), model=bundled()
        ),
        "teacher: expected a model without landmarks as stock, got",
    ),
    (
        "a teacher with another vocabulary",
        lambda folder: run(folder, recipe=toy_recipe(teacher=bundled())),
        "teacher: expected the vocabulary of the trained model, got another one in",
    ),
    (
        "a teacher that is not there",
        lambda folder: run(folder, recipe=toy_recipe(teacher=str(folder / "none"))),
        "none: no tokenizer there",
    ),
    ("a teacher that is a number", setting(teacher=3), "teacher: expected a string, got 3"),
    (
        "no heads to contrast",
        setting(contrast_heads=0),
        "contrast_heads: expected an integer from 1",
    ),
    (
        "no tokens to contrast at",
        setting(contrast_queries=0),
        "contrast_queries: expected an integer from 1",
    ),
    (
        "a weight below 0",
        setting(joint_contrast=-1.0),
        "joint_contrast: expected a number from 0",
    ),
    (
        "adapters on some layers",
        setting(lora_layers="mlp"),
        "lora_layers: expected one of attention, all, got 'mlp'",
    ),
    (
        "more kinds of rows than rows",
        setting(episodes=0.7, cloze=0.4),
        r"episodes, cloze: expected shares of 1 together at most, got 1\.1",
    ),
    ("no facts", setting(facts=0), "facts: expected an integer from 1 to .*, got 0"),
    ("no questions", setting(questions=0), "questions: expected an integer from 1 to .*, got 0"),
    ("minus one code", setting(distractors=-1), "distractors: expected an integer from 0 to"),
    ("minus one row", setting(held_out=-1), "held_out: expected an integer from 0 to"),
    ("half a block", setting(position_span=40), "position_span: expected a multiple of block_size"),
    ("half again", setting(all_blocks=1.5), r"all_blocks: expected a number from 0 to 1, got 1\.5"),
    ("too much force", setting(forced=-0.1), r"forced: expected a number from 0 to 1, got -0\.1"),
    (
        "force until later",
        setting(forced_until=-1),
        r"forced_until: expected a number from 0 to 1e\+06, got -1",
    ),
    ("unknown setting", setting(learning_rate=1.0), "unknown landmark settings.*learning_rate"),
    ("block size 1", setting(block_size=1), "block_size: expected an integer of at least 2, got 1"),
    (
        "recipe that is no JSON",
        recipe_file("steps: 3"),
        r"recipe\.json: expected JSON, got something else",
    ),
    (
        "recipe that is deep",
        recipe_file("[" * 100_000),
        r"recipe\.json: expected JSON that Python can read",
    ),
    (
        "recipe with a list for a name",
        recipe_file('{"data": {"field": []}}'),
        r"field: expected a string, got \[\]",
    ),
    (
        "recipe with a word for a rate",
        recipe_file('{"optimiser": {"beta1": "x"}}'),
        r"recipe\.json: beta1: expected a number.*'x'",
    ),
    (
        "recipe with a word for a size",
        recipe_file('{"tokenizer": {"vocab_size": "x"}}'),
        "vocab_size: expected an integer",
    ),
    (
        "recipe with a number for layers",
        recipe_file('{"landmark": {"layers": 5}}'),
        "layers: expected a list.*got 5",
    ),
    (
        "recipe of endless steps",
        lambda: Recipe().override(steps=10**20),
        "steps: expected an integer from 1 to 2147483647",
    ),
    ("recipe that is a list", recipe_file("[]"), "expected a JSON object with sections, got list"),
    (
        "recipe with an unknown section",
        recipe_file('{"optimizer": {}}'),
        r"recipe\.json: unknown section \['optimizer'\]",
    ),
    (
        "recipe with an unknown setting",
        recipe_file('{"data": {"shares": 1}}'),
        r"unknown setting of data \['shares'\]",
    ),
    (
        "recipe with a number for a section",
        recipe_file('{"data": 3}'),
        "data: expected an object with settings, got 3",
    ),
    (
        "no recipe there",
        lambda folder: load_recipe(folder / "none.json"),
        r"none\.json: no such recipe; pass",
    ),
    (
        "unknown model type",
        lambda folder: run(folder, recipe=Recipe.from_dict({"model": {"model_type": "lama"}})),
        "model_type: .*such as llama, got 'lama'",
    ),
    (
        "a batch that cannot be cut",
        lambda folder: run(folder, recipe=toy_recipe(micro_batch=3)),
        r"batch: expected a multiple of micro_batch x devices \(3 x 1\), got 4",
    ),
    (
        "text shorter than a row",
        lambda folder: run(folder, recipe=toy_recipe(length=100_000, episodes=0.0)),
        "one row.*add text",
    ),
    (
        "a run is there already",
        a_run_is_there,
        "expected no run with checkpoints, got one; give resume=True .* or another out=",
    ),
    (
        "resume without a run",
        lambda folder: run(folder, resume=True),
        rf"{RECIPE}: .*no readable file; train anew",
    ),
    (
        "resume without a checkpoint",
        no_checkpoint,
        "expected a checkpoint to resume from, got none; train without resume=True",
    ),
    (
        "damaged checkpoint",
        lambda folder: halted(folder, tear),
        r"checkpoint-2: expected a complete.*delete checkpoint-2",
    ),
    (
        "checkpoint without its optimizer",
        lambda folder: halted(folder, lambda checkpoint: (checkpoint / "optimizer.pt").unlink()),
        r"checkpoint-2: expected a complete checkpoint.*optimizer\.pt",
    ),
    (
        "checkpoint in parts without what they are",
        lambda folder: halted(
            folder, lambda checkpoint: (checkpoint / "pytorch_model_fsdp_0").mkdir()
        ),
        r"checkpoint-2: expected a complete checkpoint.*metadata: No such file.*delete",
    ),
    (
        "resume with other settings",
        lambda folder: halted(folder, lambda _: None, lr=1.0),
        r"other \['optimiser\.lr'\]",
    ),
    (
        "LoRA without a model",
        lambda folder: run(folder, lora=4),
        "lora: expected a landmark model to adapt.*give model=",
    ),
    ("LoRA of rank 0", without("wandb", lora=0), "lora: expected a rank of at least 1, got 0"),
    ("LoRA without peft", without("peft", lora=4), r"pip install landmark-attention\[peft\]"),
    (
        "weights of 4 bits without adapters",
        lambda folder: run(folder, recipe=toy_recipe(weights="nf4")),
        r"weights: expected adapters to train beside weights of 4 bits.*give lora=8, or weights=",
    ),
    (
        "weights of 4 bits in shards",
        with_fsdp,
        "weights: expected weights that FSDP can shard, got nf4; give weights=bfloat16, or launch",
    ),
    (
        "weights of 4 bits without bitsandbytes",
        without("bitsandbytes", lora=4, recipe=toy_recipe(weights="nf4")),
        "weights: nf4 needs the package bitsandbytes: pip install bitsandbytes",
    ),
    (
        "a landmark model trained plain",
        plain_landmark,
        "expected a model without landmarks.*landmark_llama",
    ),
    ("another block size", another_block_size, "block_size is fixed at 16, got 8; convert anew"),
    ("a model folder without a config", foreign_model, "config.json|no model there|model_type"),
    (
        "no model there",
        lambda folder: run(folder, model=str(folder / "none")),
        "none: no tokenizer there|none.*no model",
    ),
    (
        "train without text",
        ["train", "--data", "none.txt", "--out", "never"],
        r"none\.txt: no such file",
    ),
    (
        "train with a bad option",
        ["train", "--data", "x", "--out", "y", "--steps", "many"],
        "'--steps'.*integer",
    ),
    ("train without --out", ["train", "--data", "x"], "--out"),
]
