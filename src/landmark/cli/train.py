"""``landmark train``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from landmark.cli.output import say
from landmark.cli.progress import Shown
from landmark.config import GREATEST

OF_THE_RUN = (
    "data",
    "out",
    "model",
    "config",
    "plain",
    "tokenizer",
    "tokens",
    "lora",
    "resume",
    "max_seconds",
)


def _setting(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Settings of the recipe")


def _computation(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Computation")


Data = Annotated[
    str,
    typer.Option(
        help="Texts, conversations or documents with questions: folder of .txt files, .txt, .jsonl "
        "or .json file, or hub data set (name:config)."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the trained model.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model to train further: folder, hub name, landmark or smollm2. A plain one is "
        "converted."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="Path of a recipe (JSON), or of the config.json of a model from scratch."),
]
Plain = Annotated[bool, typer.Option("--plain", help="Train without landmarks, on the same rows.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer of a model from scratch. By default one is trained.")
]
Tokens = Annotated[
    Path | None, typer.Option(help="Folder of the token files. By default OUT/tokens.")
]
Lora = Annotated[
    int | None,
    typer.Option(max=GREATEST, help="Rank of LoRA adapters, trained with the landmark embedding."),
]
LoraLayers = Annotated[
    str | None, _setting("Linear layers that LoRA adapters are put on: attention or all.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.")]
MaxSeconds = Annotated[float | None, typer.Option(help="Seconds of training to stop after.")]
Steps = Annotated[int | None, _setting("Optimiser steps.")]
Batch = Annotated[int | None, _setting("Rows of a step, over all devices.")]
Lr = Annotated[float | None, _setting("Peak learning rate.")]
Warmup = Annotated[int | None, _setting("Warm-up steps.")]
Seed = Annotated[int | None, _setting("Random seed of weights and rows.")]
Length = Annotated[int | None, _setting("Positions of a row, landmarks included.")]
Episodes = Annotated[float | None, _setting("Share of synthetic retrieval episodes, 0 to 1.")]
Facts = Annotated[int | None, _setting("Largest number of named facts in an episode.")]
Questions = Annotated[int | None, _setting("Largest number of them that are asked for.")]
Distractors = Annotated[int | None, _setting("Largest number of named codes beside a pass key.")]
HeldOut = Annotated[
    int | None, _setting("Largest number of rows of each kind that are held out; 0 for none.")
]
AllBlocks = Annotated[
    float | None,
    _setting("Share of steps in which queries see all past blocks, not the best few."),
]
Forced = Annotated[
    float | None,
    _setting("Share of questions whose evidence is kept by every query; it falls to 0."),
]
Contrast = Annotated[
    float | None, _setting("Weight of the contrast of the evidence's landmarks with others.")
]
BlockMass = Annotated[
    float | None, _setting("Weight of fitting the gate to dense attention's mass of each block.")
]
Teacher = Annotated[
    str | None,
    _setting("Model whose distribution is kept: folder, hub name, or stock for the given model."),
]
TeacherWeight = Annotated[float | None, _setting("Weight of the divergence from the teacher.")]
TeacherShare = Annotated[float | None, _setting("Share of positions at which that is taken.")]
ClozeShare = Annotated[float | None, _setting("Share of inverse cloze, 0 to 1.")]
AnswerWeight = Annotated[float | None, _setting("Weight of the mean loss on answers.")]
Field = Annotated[str | None, _setting("Key of the text in rows.")]
VocabSize = Annotated[int | None, _setting("Tokens of a new tokenizer.")]
BlockSize = Annotated[int | None, _setting("Positions of a block, its landmark included.")]
TopK = Annotated[int | None, _setting("Blocks that a query of the trained model retrieves.")]
LocalBlocks = Annotated[
    int | None, _setting("Finished blocks before its own that a query always sees.")
]
PositionGap = Annotated[int | None, _setting("Largest random jump of positions after a landmark.")]
MicroBatch = Annotated[int | None, _computation("Rows that a device computes at once.")]
Precision = Annotated[str | None, _computation("Precision of training: auto, bf16 or fp32.")]
Weights = Annotated[
    str | None,
    _computation(
        "Dtype that the model is loaded in: float32, bfloat16, auto, or nf4 (4 bits, with --lora)."
    ),
]
Compile = Annotated[bool | None, _computation("Use torch.compile. By default on a GPU.")]
GradientCheckpointing = Annotated[
    bool | None, _computation("Recompute activations in the backward pass.")
]
Workers = Annotated[int | None, _computation("Worker processes that make rows.")]
LogEvery = Annotated[int | None, _computation("Steps between log lines.")]
EvaluateEvery = Annotated[int | None, _computation("Steps between evaluations; 0 for none.")]
SaveEvery = Annotated[int | None, _computation("Steps between checkpoints; 0 for none.")]
ReportTo = Annotated[
    str | None, _computation("Where metrics are sent: none, tensorboard, wandb, trackio, ...")
]


def train(
    data: Data,
    out: Out,
    model: Model = None,
    config: Config = None,
    plain: Plain = False,
    tokenizer: Tokenizer = None,
    tokens: Tokens = None,
    lora: Lora = None,
    resume: Resume = False,
    max_seconds: MaxSeconds = None,
    steps: Steps = None,
    batch: Batch = None,
    lr: Lr = None,
    warmup: Warmup = None,
    seed: Seed = None,
    length: Length = None,
    episodes: Episodes = None,
    cloze: ClozeShare = None,
    facts: Facts = None,
    questions: Questions = None,
    distractors: Distractors = None,
    held_out: HeldOut = None,
    answer_weight: AnswerWeight = None,
    all_blocks: AllBlocks = None,
    forced: Forced = None,
    contrast: Contrast = None,
    block_mass: BlockMass = None,
    lora_layers: LoraLayers = None,
    teacher: Teacher = None,
    teacher_weight: TeacherWeight = None,
    teacher_share: TeacherShare = None,
    field: Field = None,
    vocab_size: VocabSize = None,
    block_size: BlockSize = None,
    top_k: TopK = None,
    local_blocks: LocalBlocks = None,
    position_gap: PositionGap = None,
    micro_batch: MicroBatch = None,
    precision: Precision = None,
    weights: Weights = None,
    compile: Compile = None,
    gradient_checkpointing: GradientCheckpointing = None,
    workers: Workers = None,
    log_every: LogEvery = None,
    evaluate_every: EvaluateEvery = None,
    save_every: SaveEvery = None,
    report_to: ReportTo = None,
) -> None:
    """Train a landmark model on texts: from scratch, or from a model."""
    given = dict(locals())
    with Shown() as progress:
        from landmark.texts.loading import quiet
        from landmark.train.prepare import require_model_settings
        from landmark.train.recipe import Recipe, fine_tuning, load_recipe
        from landmark.train.run import is_first_process
        from landmark.train.run import train as run

        def tell(line: str) -> None:
            progress.rest()
            with contextlib.suppress(
                OSError
            ):  # the run goes on where nobody reads; the last line tells
                say(line)

        quiet()
        base = load_recipe(config) if config else fine_tuning() if model else Recipe()
        if config and not model:
            require_model_settings(base, plain=plain, name=f"{config}: model")
        recipe = base.override(
            **{name: value for name, value in given.items() if name not in OF_THE_RUN}
        )
        where = {name: given[name] for name in OF_THE_RUN if name != "config"}
        summary = run(**where, recipe=recipe, report=tell, progress=progress)
    if not is_first_process():
        return
    speed = summary["tokens_per_second"] or 0
    say(f"saved {out}: {summary['steps']} steps, {summary['tokens']:,} tokens, {speed:,} tokens/s")
