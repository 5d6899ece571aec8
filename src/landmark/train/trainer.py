"""A Trainer of transformers with a loss on answers, which logs tokens per second."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from landmark.data import encoding
from landmark.data.episodes import IGNORED, Row
from landmark.data.errors import first_line
from landmark.data.outputs import is_of_the_disk
from landmark.data.rows import stack
from landmark.train.loss import answer_weighted_loss, answers_right, text_loss, token_losses


class StepCounts(NamedTuple):
    """What the loss of a step is divided by, as this device's share of all devices.

    Attributes:
        labels: tokens with a label; ``None`` to count those of the batch.
        answers: tokens of answers; ``None`` likewise.
    """

    labels: Tensor | None = None
    answers: Tensor | None = None


class LandmarkTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for rows of a fixed number of text tokens.

    It differs from the stock Trainer in three things: rows with answers have a loss of their own,
    rows come in the order of their index, and weights other than matrices are not decayed. Without
    answers the loss is the model's own.

    Args:
        model: the model.
        args: the arguments of the Trainer.
        train_dataset: the ``Rows``.
        eval_dataset: ``FixedRows`` by name.
        answer_weight: weight of the mean loss over answers; ``None`` when no row has answers.
        row_tokens: text tokens of a row.
        compiled: whether to compile the loss.
        callbacks: callbacks of the Trainer.

    Attributes:
        step_tokens: text tokens of a step, over all devices.
        evaluated: the step of the last evaluation.
        evaluation_seconds: seconds of all evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Row],
        eval_dataset: Mapping[str, Dataset[Row]] | None,
        answer_weight: float | None,
        row_tokens: int,
        compiled: bool,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(stack, answers=answer_weight is not None),
            train_dataset=train_dataset,
            eval_dataset=dict(eval_dataset) if eval_dataset else None,
            compute_metrics=_accuracy,
            callbacks=callbacks,
        )
        self.answer_weight = answer_weight or 0.0
        self._counts = StepCounts()
        if answer_weight is not None:
            # The loss is divided by the step's counts, not by its batches.
            self.model_accepts_loss_kwargs = True
        self.step_tokens = row_tokens * self.get_total_train_batch_size(args)
        self._loss = torch.compile(answer_weighted_loss) if compiled else answer_weighted_loss
        self.evaluated = 0
        self.evaluation_seconds = 0.0
        # Tokens per second are counted since this step and time, without pauses for evaluations.
        self._counted_step = 0
        self._counted_at = time.perf_counter()
        self._paused = 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Returns the answer-weighted loss for rows with answers, otherwise the model's own."""
        if "answers" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"])
        loss = self._loss(
            outputs.logits,
            inputs["labels"],
            inputs["answers"],
            weight=self.answer_weight,
            items=self._counts.labels,
            asked=self._counts.answers,
        )
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Returns the batches of a step, and counts their labels and answers on all devices."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if samples and "answers" in samples[0]:
            labels = sum(batch["labels"].ne(IGNORED).sum() for batch in samples)
            answers = sum(batch["answers"].sum() for batch in samples)
            self._counts = StepCounts(self._share(labels), self._share(answers))
        return samples, items

    def _share(self, count: Tensor) -> Tensor:
        """Returns the count over all devices, divided by their number.

        Gradients are averaged over devices, so this gives the loss of the whole step.
        """
        count = count.to(self.args.device)
        if self.args.world_size == 1:
            return count
        share: Tensor = self.accelerator.gather(count).sum() / self.args.world_size
        return share

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the mean loss over text, and for each row the right and all answer tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"]).logits
            loss = text_loss(token_losses(logits, inputs["labels"]), inputs["labels"])
            if "answers" not in inputs:
                return loss, None, None
            right, asked = answers_right(logits, inputs["labels"], inputs["answers"])
        return loss, right, asked

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as the stock Trainer does; tokens per second leave its time out."""
        start = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        # The stock Trainer calls this once for all data sets, and inside for each of them by name.
        if not isinstance(kwargs.get("eval_dataset"), str):
            seconds = time.perf_counter() - start
            self._paused += seconds
            self.evaluation_seconds += seconds
            self.evaluated = self.state.global_step
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint; a run without room for it goes on with a warning."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            warnings.warn(
                f"{folder}: no checkpoint, as it cannot be written ({first_line(error)})",
                stacklevel=2,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ``tokens_per_second`` to log entries of training.

        These are text tokens of all devices since the last entry.
        """
        if "loss" in logs:
            tokens = (self.state.global_step - self._counted_step) * self.step_tokens
            seconds = time.perf_counter() - self._counted_at - self._paused
            logs["tokens_per_second"] = tokens / seconds
            self.start_clock()
        super().log(logs, start_time)

    def start_clock(self) -> None:
        """Begins to count tokens and seconds from here."""
        self._counted_step = self.state.global_step
        self._counted_at = time.perf_counter()
        self._paused = 0.0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the matrices that are decayed, all but the landmark embedding."""
        return [
            name
            for name, weight in model.named_parameters()
            if weight.ndim >= 2 and "landmark_embedding" not in name
        ]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: not counted."""
        return 0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Returns a loader without worker processes: the rows are made once and kept."""
        rows = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        loader: DataLoader[Any] = DataLoader(
            rows, self.args.per_device_eval_batch_size, collate_fn=self.data_collator
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


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
    LoggedValue("tokens_per_second", "tokens/s", ",.0f"),
    LoggedValue("eval_text_loss", "held-out text loss", ".4f"),
    LoggedValue("eval_episodes_loss", "held-out episodes loss", ".4f"),
    LoggedValue("eval_episodes_accuracy", "answers right", ".1%"),
)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of answer tokens that were right, if any were asked for."""
    asked = int(prediction.label_ids.sum())
    if asked == 0:
        return {}
    return {"accuracy": float(prediction.predictions.sum()) / asked}
