"""The sections of a recipe: what each setting of a training run is, and its default."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

NF4 = "nf4"  # weights of 4 bits, as bitsandbytes keeps them
Section = TypeVar("Section")

EXAMPLES = {
    "schedule": '{"length": 512, "until": 0.5}',
    "mixture": '{"source": "chats.jsonl", "share": 0.3}',
}


def _objects(name: str, value: Any, kind: type[Section]) -> tuple[Section, ...]:
    """Returns a setting that is a list of objects, given as JSON or as objects of their class."""
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{name}: expected a list such as [{EXAMPLES[name]}], got {value!r}; mend it"
        )
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    found = []
    for each in value:
        if isinstance(each, kind):
            found.append(each)
        elif isinstance(each, dict) and each.keys() == known:
            found.append(kind(**each))
        else:
            raise ValueError(
                f"{name}: expected objects such as {EXAMPLES[name]}, got {each!r}; mend it"
            )
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer of a model from scratch.

    Attributes:
        vocab_size: tokens of the byte-level BPE that is trained on the texts.
    """

    vocab_size: int = 4096


@dataclasses.dataclass(frozen=True)
class Shorter:
    """A part of a training with shorter rows.

    Attributes:
        length: positions of a row. The length of the last rows is a multiple of it.
        until: share of the steps that are done when the part ends.
    """

    length: int
    until: float


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """A source of a mixture.

    Attributes:
        source: texts or conversations, as ``--data`` takes them.
        share: share of the rows that are made of it.
    """

    source: str
    share: float


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The rows that are trained on.

    Attributes:
        length: positions of a row, landmarks included (512 positions at ``block_size`` 64 are 504
            text tokens); with a schedule, of the last and longest rows.
        schedule: parts with shorter rows at the beginning, by rising ``until``. In place of one
            row of ``length`` positions, a step then has several with as many positions together.
        mixture: sources beside the texts that a run is given, which make the other rows.
        episodes: share of synthetic retrieval episodes among the rows that are made of texts; the
            others are windows of these texts.
        cloze: share of inverse cloze among the same rows: a text with questions for what follows a
            sentence that was taken out of it.
        facts: largest number of named facts in an episode. This number, ``questions`` and
            ``distractors`` are for rows of ``length`` positions; shorter rows have as many in
            proportion.
        questions: largest number of facts that are asked for.
        distractors: largest number of named codes beside a pass key.
        held_out: largest number of rows of each kind and source that are held out for evaluations;
            0 for none.
        answer_weight: weight of the mean loss over answers, beside 1 for the mean over all text.
        field: key of the text in JSON rows and hub data sets.
    """

    length: int = 512
    schedule: tuple[Shorter, ...] = ()
    mixture: tuple[MixtureSource, ...] = ()
    episodes: float = 0.0
    cloze: float = 0.0
    facts: int = 8
    questions: int = 4
    distractors: int = 4
    held_out: int = 64
    answer_weight: float = 0.5
    field: str = "text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", _objects("schedule", self.schedule, Shorter))
        object.__setattr__(self, "mixture", _objects("mixture", self.mixture, MixtureSource))


@dataclasses.dataclass(frozen=True)
class RetrievalSettings:
    """What queries see while a landmark model is trained, and losses on the gate.

    Attributes:
        all_blocks: share of the steps in which each query sees all past blocks (mode ``all``). In
            the others it keeps its best ``top_k + local_blocks``, about as many as it sees when the
            model retrieves (mode ``top_k``).
        forced: share of the questions, at the first step, whose evidence the tokens that predict
            the answer keep in mode ``top_k`` whatever its score, and those before them. It falls
            evenly to 0.
        forced_until: share of the steps after which ``forced`` is 0; above 1 it has not fallen to 0
            at the end.
        contrast: weight of the contrast of the evidence's landmarks with all others, at the tokens
            before and in answers (``landmark.hf.gate_loss.GateContrast``); 0 for none.
        contrast_heads: so many heads of all layers, those that do best, are trained by it.
        contrast_queries: tokens of a row at which it is taken, on average over a batch.
        joint_contrast: weight of the contrast of the ``retrieval_layers``, whose heads score
            together for a whole question (``landmark.hf.gate_loss.JointContrast``); 0 for none.
        text_contrast: weight of the contrast of blocks by their text, by the ``retrieval_heads``
            together (``landmark.hf.gate_loss.TextContrast``); 0 for none.
        named_heads: so many heads at most become the saved model's ``retrieval_heads``: those whose
            scores of old blocks' text find the evidence best for the held-out questions
            (``landmark.train.heads``); 0 for none.
        block_mass: weight of fitting the gate to the mass that dense attention gives each block
            (``landmark.hf.gate_loss.GateBlockMass``), in rows that hold one text; 0 for none.
    """

    all_blocks: float = 1.0
    forced: float = 0.0
    forced_until: float = 0.5
    contrast: float = 0.0
    contrast_heads: int = 32
    contrast_queries: int = 8
    joint_contrast: float = 0.0
    text_contrast: float = 0.0
    named_heads: int = 0
    block_mass: float = 0.0


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """A model whose distribution the trained one is to keep.

    Attributes:
        teacher: folder or hub name of a model with the same vocabulary; ``stock`` for the given
            model as it was before the training, with its own attention; ``None`` for none.
        teacher_weight: weight of the mean Kullback-Leibler divergence from its distribution.
        teacher_share: share of the positions at which that is taken. Those that predict a token of
            an answer in episodes or to questions are left out, and those beyond the length that the
            teacher was trained on.
    """

    teacher: str | None = None
    teacher_weight: float = 0.5
    teacher_share: float = 0.1


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What LoRA adapters are put on, where a run is asked for them.

    Attributes:
        lora_layers: ``attention`` (the projections of attention) or ``all`` (every linear layer but
            the output layer, and the norms are trained whole).
    """

    lora_layers: str = "attention"


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with a learning rate that rises, stays, and falls to 0.

    Attributes:
        steps: optimiser steps.
        batch: rows of a step, over all devices.
        lr: the highest learning rate.
        weight_decay: decay of matrices; vectors and the landmark embedding have none.
        clip: largest norm of gradients.
        warmup: steps over which the learning rate rises.
        decay_share: share of the steps, the last ones, over which it falls to 0.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
    """

    steps: int = 4800
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 200
    decay_share: float = 0.4
    beta1: float = 0.9
    beta2: float = 0.95


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How a run is computed.

    Attributes:
        seed: decides weights, rows and their order.
        micro_batch: rows of a device at once; ``None`` for its whole share of the batch.
        precision: ``auto`` (bf16 where the device has it), ``bf16`` (autocast) or ``fp32``.
        weights: dtype in which a given model is loaded and trained: ``float32``, ``bfloat16`` or
            ``auto``; or ``nf4``, its linear layers in 4 bits, beside which adapters are trained.
        compile: whether to use ``torch.compile`` layer by layer; ``None`` for yes on a GPU.
        gradient_checkpointing: whether to recompute activations in the backward pass.
        workers: processes that make rows; ``None`` for one less than the cores that the run may
            use, 12 at most.
        log_every: steps between log lines.
        evaluate_every: steps between evaluations, 0 for one at the end alone.
        save_every: steps between checkpoints, 0 for none.
        report_to: what transformers' Trainer reports to (``none``, ``tensorboard``, ``wandb``,
            ``trackio``, ...).
    """

    seed: int = 1
    micro_batch: int | None = None
    precision: str = "auto"
    weights: str = "float32"
    compile: bool | None = None
    gradient_checkpointing: bool = False
    workers: int | None = None
    log_every: int = 50
    evaluate_every: int = 500
    save_every: int = 0
    report_to: str = "none"


@dataclasses.dataclass(frozen=True)
class SaveSettings:
    """How the model is saved.

    Attributes:
        dtype: dtype of the saved weights, ``None`` for that of the loaded model.
        shard: largest size of a file of weights.
    """

    dtype: str | None = None
    shard: str = "5GB"
