"""Runs a training: from texts to a saved model and its summary."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import IntervalStrategy

from landmark.blocks import slots_for, tokens_for
from landmark.config import LandmarkConfig
from landmark.data import encoding, outputs
from landmark.data.characters import require_utf8
from landmark.data.conversations import read_conversations
from landmark.data.questions import read_question_sets
from landmark.data.text import kind_of, read_documents
from landmark.data.tokenizer import require_rows
from landmark.hf.bundled import model_folder
from landmark.train.answers import TeacherAnswers
from landmark.train.checkpoints import (
    FOLDER,
    last_checkpoint,
    refuse_overwriting,
    require_same_recipe,
    save_recipe,
)
from landmark.train.corpora import LEAST_ROWS
from landmark.train.lora import ADAPTER, add_lora, base_of, merged, with_weights
from landmark.train.prepare import (
    STOCK,
    Prepared,
    compute_dtype,
    find_tokenizer,
    given_model,
    load_teacher,
    new_model,
    prepare_rows,
    require_model_settings,
    stored_dtype,
)
from landmark.train.progress import Progress
from landmark.train.recipe import Recipe, RunArguments
from landmark.train.settings import NF4
from landmark.train.summary import summarise, write_summary
from landmark.train.trainer import LandmarkTrainer

Report = Callable[[str], None]
GRAPHS = 64  # compiled for a layer at most: lengths of a schedule, modes, evaluations


def train(
    data: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    model: str | None = None,
    plain: bool = False,
    tokenizer: str | None = None,
    tokens: str | Path | None = None,
    lora: int | None = None,
    resume: bool = False,
    max_seconds: float | None = None,
    report: Report = print,
    progress: encoding.Progress | None = None,
) -> dict[str, Any]:
    """Trains a model, from scratch or further, and saves it.

    Queries see all past blocks in training (mode ``all``), or in a share of the steps their best
    few (mode ``top_k``). The saved model retrieves, and knows the length that it was trained on.
    Its tokenizer and ``training_summary.json`` are saved beside it.

    Args:
        data: texts, as ``read_documents`` takes them; conversations, as ``read_conversations``
            does; or documents with questions, as ``read_question_sets`` does.
        out: folder of the result; checkpoints go to its subfolder ``checkpoints``.
        recipe: the settings; by default those of ``Recipe()``.
        model: a landmark model, or a stock model that gets landmarks first, or the bundled
            ``landmark`` or ``smollm2``; ``None`` to start from scratch with the recipe's model.
        plain: whether to train without landmarks on the same rows (the plain-attention twin).
        tokenizer: folder of a tokenizer for a model from scratch; by default one is trained on the
            texts.
        tokens: folder of the token files, ``out/tokens`` by default.
        lora: rank of LoRA adapters, trained with the landmark embedding; on the attention's
            projections unless the recipe says ``lora_layers="all"``. The adapter is saved in
            ``out/adapter``, the merged model in ``out``.
        resume: whether to continue from the last checkpoint in ``out``.
        max_seconds: seconds of steps after which to stop, wherever the schedule is.
        report: takes the lines of progress.
        progress: called while texts are tokenised, and before every step.

    Returns:
        the contents of ``training_summary.json``.

    Raises:
        FileNotFoundError: texts, model or checkpoint are missing.
        ModuleNotFoundError: an optional package is missing.
        ValueError: settings or files that do not fit, see the message.
    """
    recipe = recipe or Recipe()
    out = Path(out)
    arguments = RunArguments(data=str(data), model=model, plain=plain, lora=lora)
    path = None if model is None else model_folder(model)
    store = Path(tokens or out / "tokens")
    checkpoint = _check(out, recipe, arguments, resume=resume)
    args = _arguments(out, recipe)
    if args.should_save:
        _check_folders({"out": out, "tokens": store, "model": path, "tokenizer": tokenizer})
    else:
        report = _silent
        progress = None
    set_seed(recipe.run.seed)
    with args.main_process_first(local=False):
        cutter = find_tokenizer(
            data, out, recipe, model=path, tokenizer=tokenizer, report=report, progress=progress
        )
        if path:
            made = given_model(path, recipe, plain=plain)
        else:
            made = new_model(recipe, cutter, plain=plain)
        dtype = recipe.save.dtype or stored_dtype(path)
        require_rows(cutter, made, path or "model")
        if args.should_save:
            outputs.require_room(out, made.num_parameters() * getattr(torch, dtype).itemsize, "out")
        settings = LandmarkConfig.from_dict(recipe.landmark) if plain else made.landmark
        _require_choosers(recipe, settings)
        row_tokens = tokens_for(recipe.data.length, settings.block_size)
        teacher = load_teacher(recipe, path, cutter)
        answers = None
        if teacher is not None:
            teacher = teacher.to(args.device)
            name = str(recipe.distillation.teacher)
            if name == STOCK:
                name = str(path)
            answers = TeacherAnswers(teacher, name, cutter, store, recipe.run.seed)
        rows = prepare_rows(
            data,
            store,
            recipe,
            cutter,
            block_size=settings.block_size,
            answers=answers,
            progress=progress,
        )
    require_rows(cutter, made, path or "model", rows.greatest_id)
    if recipe.run.evaluate_every and not rows.held_out:
        args.eval_strategy = IntervalStrategy.NO
        if recipe.data.held_out:
            report(
                f"nothing is evaluated: the text has fewer than {LEAST_ROWS} rows, and no folder "
                "validation"
            )
    if lora is not None:
        made = add_lora(made, lora, recipe.adapter.lora_layers)
    if not plain:
        base_of(made).configure_landmark(mode="all")
    compiled = torch.cuda.is_available() if recipe.run.compile is None else recipe.run.compile
    if compiled:
        compile_layers(made)
    trainer = _trainer(
        made,
        args,
        recipe,
        rows,
        compiled=compiled,
        plain=plain,
        teacher=teacher,
        row_tokens=row_tokens,
        progress=Progress(report, max_seconds, progress),
    )
    if args.should_save and not resume:
        save_recipe(out, recipe, arguments)
    report(_opening(trainer, recipe, row_tokens))
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - begin
    if rows.held_out and trainer.evaluated != trainer.state.global_step:
        trainer.evaluate()
    final = base_of(trainer.accelerator.unwrap_model(trainer.model))
    final.config.use_cache = True
    if not plain:
        length = int(slots_for(row_tokens, settings.block_size))
        final.configure_landmark(mode="retrieval", landmark_trained=True, trained_length=length)
        if recipe.retrieval.named_heads:
            heads = trainer.best_heads(recipe.retrieval.named_heads)
            if heads is not None:
                final.configure_landmark(retrieval_heads=heads)
    summary = summarise(trainer, recipe, arguments, rows.documents, seconds=seconds)
    if progress is not None:
        progress("saving", 0, 0)
    _save(trainer, cutter, out, dtype=dtype, shard=recipe.save.shard, lora=lora is not None)
    if args.should_save:
        write_summary(out, summary)
    return summary


def _require_choosers(recipe: Recipe, settings: LandmarkConfig) -> None:
    """Raises ``ValueError`` where a contrast has no layers or heads to train."""
    for loss, name, example in (
        ("joint_contrast", "retrieval_layers", "[8, 9, 10]"),
        ("text_contrast", "retrieval_heads", "[[8, 0], [9, 2]]"),
    ):
        if getattr(recipe.retrieval, loss) and not getattr(settings, name):
            raise ValueError(
                f"{loss}: expected a model with {name}, got none; name some in the recipe's "
                f'"landmark", such as {name}={example}'
            )


def _check(out: Path, recipe: Recipe, arguments: RunArguments, *, resume: bool) -> Path | None:
    """Checks what can be checked before any work, and returns the checkpoint to resume from."""
    if arguments.lora is not None and (arguments.model is None or arguments.plain):
        raise ValueError(
            "lora: expected a landmark model to adapt, got none or a plain one; give model=NAME"
        )
    if recipe.run.weights == NF4:
        _require_quantizer(arguments)
    if importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError(
            "training needs the package accelerate: pip install landmark-attention[train]"
        )
    _check_reports(recipe.run.report_to)
    if arguments.model is None:
        require_model_settings(recipe, plain=arguments.plain)
    for source in (arguments.data, *(part.source for part in recipe.data.mixture)):
        _check_source(source, recipe.data.field)
    if not resume:
        refuse_overwriting(out)
        return None
    require_same_recipe(out, recipe, arguments)
    return last_checkpoint(out)


def _require_quantizer(arguments: RunArguments) -> None:
    """Makes sure that weights of 4 bits can be trained on.

    Raises:
        ValueError: without adapters, or with FSDP.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    if arguments.lora is None:
        raise ValueError(
            f"weights: expected adapters to train beside weights of 4 bits ({NF4}), got none; give "
            "lora=8, or weights=bfloat16"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            f"weights: expected weights that FSDP can shard, got {NF4}; give weights=bfloat16, or "
            "launch without FSDP"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"weights: {NF4} needs the package bitsandbytes: pip install bitsandbytes"
        )


def _check_source(source: str, field: str) -> None:
    """Reads the first text, conversation or set of questions of a source.

    Raises:
        ValueError: a pipe, or as the functions that read them.
        FileNotFoundError: there is none.
    """
    if Path(source).is_fifo():
        raise ValueError(
            f"data: expected texts that can be read again, got the pipe {source}; write a file of "
            "it"
        )
    kind = kind_of(source)
    if kind == "messages":
        next(read_conversations(source), None)
    elif kind == "questions":
        next(read_question_sets(source), None)
    else:
        next(read_documents(source, field=field), None)


def _check_reports(name: str) -> None:
    """Makes sure that transformers' Trainer can report to what is named.

    Raises:
        ValueError: it knows nothing of that name.
        ModuleNotFoundError: the package for it is not installed.
    """
    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(
            f"report_to: expected none or one of {', '.join(INTEGRATION_TO_CALLBACK)}, got {name!r}"
        )
    if name not in get_available_reporting_integrations():
        raise ModuleNotFoundError(
            f"report_to: {name} needs a package that is not here: pip install {name}, or pass none"
        )


def _check_folders(folders: dict[str, Any]) -> None:
    """Raises ``ValueError`` for a folder that cannot be written, or has a name that is no UTF-8."""
    for name, folder in folders.items():
        if folder is not None:
            require_utf8(folder, name)
        if name in ("out", "tokens"):
            outputs.require_folder(folder, name)


def compile_layers(model: nn.Module, backend: Any = "inductor") -> None:
    """Compiles the decoder layers of a model in place.

    They share one graph for each shape of rows and each mode, so that depth costs no time at the
    first step.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend, dynamic=False)


def _trainer(
    model: Any,
    args: TrainingArguments,
    recipe: Recipe,
    rows: Prepared,
    *,
    compiled: bool,
    plain: bool,
    teacher: Any,
    row_tokens: int,
    progress: Progress,
) -> LandmarkTrainer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trainer = LandmarkTrainer(
        model,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out or None,
        answer_weight=recipe.data.answer_weight if rows.has_answers else None,
        retrieval=None if plain else recipe.retrieval,
        teacher=teacher,
        distillation=recipe.distillation,
        row_tokens=row_tokens,
        compiled=compiled,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    return trainer


def is_first_process() -> bool:
    """Returns whether this is the first of a run's processes, or the only one."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _silent(line: str) -> None:
    """Drops a line of progress: only the first process prints."""


def _arguments(out: Path, recipe: Recipe) -> TrainingArguments:
    run = recipe.run
    optimiser = recipe.optimiser
    gpu = torch.cuda.is_available()
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    micro = run.micro_batch or max(1, optimiser.batch // devices)
    if optimiser.batch % (micro * devices):
        raise ValueError(
            f"batch: expected a multiple of micro_batch x devices ({micro} x {devices}), got "
            f"{optimiser.batch}; change one of them"
        )
    if run.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        raise ValueError("precision: expected one that this GPU has, got bf16; give precision=fp32")
    workers = run.workers
    if workers is None:
        workers = min(12, max(1, _cores() - 1))
    arguments = TrainingArguments(
        output_dir=str(out / FOLDER),
        max_steps=optimiser.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=min(micro, 32),
        gradient_accumulation_steps=optimiser.batch // (micro * devices),
        learning_rate=optimiser.lr,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay, "decay_type": "linear"},
        warmup_steps=recipe.warmup,
        weight_decay=optimiser.weight_decay,
        adam_beta1=optimiser.beta1,
        adam_beta2=optimiser.beta2,
        max_grad_norm=optimiser.clip,
        bf16=compute_dtype(run.precision) == torch.bfloat16,
        **({"gradient_checkpointing": True} if run.gradient_checkpointing else {}),
        seed=run.seed,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        eval_strategy="steps" if run.evaluate_every else "no",
        eval_steps=run.evaluate_every or None,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        report_to=run.report_to,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=workers,
        dataloader_pin_memory=gpu,
        # A run is one epoch. Workers kept for a next one make the end wait 5 seconds for each.
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=4 if workers else None,
        ddp_find_unused_parameters=False,
    )
    if devices == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _cores() -> int:
    """Returns how many cores this process may run on, which a container or a scheduler limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _opening(trainer: LandmarkTrainer, recipe: Recipe, row_tokens: int) -> str:
    weights = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    return (
        f"training {weights / 1e6:.1f}M weights for {recipe.optimiser.steps} steps of "
        f"{recipe.optimiser.batch} rows of {row_tokens} text tokens, {recipe.data.episodes:.0%} "
        f"of them episodes, on {trainer.args.device}"
    )


def _save(
    trainer: LandmarkTrainer,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    dtype: str,
    shard: str,
    lora: bool,
) -> None:
    """Saves the model and its tokenizer, of an adapter also the adapter alone."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = None
    if trainer.is_fsdp_enabled:
        # Every process has a part of each; the first one gets them all.
        weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.args.should_save:
        return
    if weights is not None:
        model = with_weights(model, weights)
    if lora:
        _put(out / ADAPTER, model.save_pretrained)
        model = merged(model, out / ADAPTER)
    model = model.to(getattr(torch, dtype))

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(str(folder))
        model.save_pretrained(str(folder), max_shard_size=shard)

    _put(out, save)


def _put(folder: Path, save: Callable[[Path], object]) -> None:
    """Saves what was trained; where that fails, in a temporary folder, so that it is not lost.

    Raises:
        ValueError: it was saved in the temporary folder, which the message names, or nowhere.
    """
    try:
        outputs.write_folder(folder, save)
    except ValueError as error:
        kept = Path(tempfile.mkdtemp(prefix="landmark-"))
        outputs.write_folder(kept, save)
        raise ValueError(f"{error}; what was trained is in {kept}") from None
