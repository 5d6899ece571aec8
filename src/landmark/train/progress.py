"""Prints the log of a run, and stops it after a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from landmark.data import encoding

if TYPE_CHECKING:
    from landmark.train.trainer import LandmarkTrainer


class Progress(TrainerCallback):  # type: ignore[misc]
    """Prints one line for each log entry, and stops the run after ``max_seconds`` of training.

    Args:
        report: takes a line.
        max_seconds: seconds from the first step on, ``None`` for no limit.
        watch: called before every step and every batch of held-out rows.

    Attributes:
        trainer: the trainer, set when it is made.
    """

    def __init__(
        self, report: Any, max_seconds: float | None, watch: encoding.Progress | None = None
    ) -> None:
        self.report = report
        self.max_seconds = max_seconds
        self.watch = watch
        self._held_out = 0  # batches of held-out rows that were evaluated
        self.start = time.perf_counter()
        self.trainer: LandmarkTrainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the clocks."""
        self.start = time.perf_counter()
        self._tell_steps(state)
        if self.trainer is not None:
            self.trainer.start_clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for a stop when the time is over; several processes agree every ten steps."""
        self._tell_steps(state)
        if self.max_seconds is None or (args.world_size > 1 and state.global_step % 10):
            return
        over = time.perf_counter() - self.start > self.max_seconds
        if args.world_size > 1:
            flag = torch.tensor(int(over), device=args.device)
            torch.distributed.broadcast(flag, src=0)
            over = bool(flag.item())
        if over:
            control.should_training_stop = True
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Prints the entry, on the first process."""
        if not state.is_world_process_zero or not logs:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        for shown in _SHOWN:
            if shown.key in logs:
                parts.append(f"{shown.label} {logs[shown.key]:{shown.format}}")
        if len(parts) > 1:
            self.report("  ".join([*parts, f"{time.perf_counter() - self.start:.0f} s"]))
            self._tell_steps(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts the batches of held-out rows."""
        self._held_out += 1
        if self.watch is not None:
            self.watch("batches of held-out rows", self._held_out, 0)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts the batches of held-out rows from 0 again."""
        self._held_out = 0
        self._tell_steps(state)

    def _tell_steps(self, state: TrainerState) -> None:
        if self.watch is not None:
            self.watch("steps trained", state.global_step, state.max_steps)


class LoggedValue(NamedTuple):
    """A number of a log entry that is printed: its key, its label and its format."""

    key: str
    label: str
    format: str


_SHOWN = (
    LoggedValue("loss", "loss", ".4f"),
    LoggedValue("learning_rate", "lr", ".2e"),
    LoggedValue("grad_norm", "grad", ".2f"),
    LoggedValue("contrast_loss", "contrast", ".4f"),
    LoggedValue("joint_contrast_loss", "joint contrast", ".4f"),
    LoggedValue("text_contrast_loss", "text contrast", ".4f"),
    LoggedValue("block_mass_loss", "block mass", ".4f"),
    LoggedValue("teacher_loss", "from the teacher", ".4f"),
    LoggedValue("tokens_per_second", "tokens/s", ",.0f"),
    LoggedValue("eval_text_loss", "held-out text loss", ".4f"),
    LoggedValue("eval_conversations_loss", "held-out conversations loss", ".4f"),
    LoggedValue("eval_episodes_loss", "held-out episodes loss", ".4f"),
    LoggedValue("eval_episodes_accuracy", "answers right", ".1%"),
    LoggedValue(
        "eval_episodes_recall_best_head", "episodes: evidence retrieved by the best head", ".1%"
    ),
    LoggedValue("eval_cloze_loss", "held-out cloze loss", ".4f"),
    LoggedValue("eval_cloze_accuracy", "answer tokens right", ".1%"),
    LoggedValue("eval_cloze_recall_best_head", "cloze: evidence retrieved by the best head", ".1%"),
    LoggedValue("eval_questions_loss", "held-out questions loss", ".4f"),
    LoggedValue("eval_questions_accuracy", "answer tokens right", ".1%"),
    LoggedValue(
        "eval_questions_recall_best_head", "questions: evidence retrieved by the best head", ".1%"
    ),
)
