"""A Trainer of transformers with a loss on answers, which logs tokens per second."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
    TrainingArguments,
)

from landmark.data.episodes import IGNORED, Row
from landmark.data.errors import first_line
from landmark.data.outputs import is_of_the_disk
from landmark.data.rows import Group, stack
from landmark.hf.cache import LandmarkCache
from landmark.hf.recall import EvidenceRecall
from landmark.hf.rope import trained_positions
from landmark.train.gate import (
    GateLosses,
    evidence_queries,
    forced_blocks,
    gate_losses,
    restart_positions,
)
from landmark.train.heads import best_heads
from landmark.train.lora import base_of
from landmark.train.loss import (
    answer_weighted_loss,
    answers_right,
    divergence,
    text_loss,
    token_losses,
)
from landmark.train.settings import RetrievalSettings, TeacherSettings

# Tokens that are read at once to count recall; the selections of all their queries are kept.
RECALL_TOKENS = 1 << 13
GPU_RECALL_TOKENS = 1 << 16
HEAD_ROWS = 48  # held-out rows by which heads are chosen, at most


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

    It differs from the stock Trainer in this: rows with answers have a loss of their own, losses on
    the gate and from a teacher are added, rows come in the order of their index, weights other than
    matrices are not decayed, and a landmark model changes its mode from step to step. Without
    answers the loss is the model's own.

    Args:
        model: the model.
        args: the arguments of the Trainer.
        train_dataset: the ``Rows``.
        eval_dataset: ``FixedRows`` by name.
        answer_weight: weight of the mean loss over answers; ``None`` when no row has answers.
        retrieval: what queries see, and losses on the gate; ``None`` for a model without landmarks.
            Evaluations are in mode ``top_k`` unless all steps are in mode ``all``. A model with
            ``position_span`` retrieves in them: it was not trained to find answers at the distances
            of a long row.
        teacher: the teacher on the device of the run, ``None`` for none.
        distillation: how the model learns from the teacher.
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
        train_dataset: Dataset[Group],
        eval_dataset: Mapping[str, Dataset[Group]] | None,
        answer_weight: float | None,
        retrieval: RetrievalSettings | None,
        teacher: Any,
        distillation: TeacherSettings,
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
        self.retrieval = retrieval
        self._unwrapped = base_of(model)
        self.distillation = distillation
        self._teacher = teacher
        self._noted: dict[str, list[Tensor]] = {}
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
        """Returns the answer-weighted loss for rows with answers, otherwise the model's own.

        Losses on the gate are added to it.
        """
        gate = self._gate_losses(inputs)
        more: dict[str, Any] = {"gate_loss": gate} if gate else {}
        forced = self._forced_blocks(inputs)
        if forced is not None:
            more["forced_blocks"] = forced
        if "restarts" in inputs:
            more["restarts"] = inputs["restarts"]
        if "answers" in inputs:
            outputs = model(**texts_of(inputs), **more)
            loss = self._loss(
                outputs.logits,
                inputs["labels"],
                inputs["answers"],
                weight=self.answer_weight,
                items=self._counts.labels,
                asked=self._counts.answers,
            )
        else:
            loss, outputs = super().compute_loss(
                model, {**inputs, **more}, True, num_items_in_batch
            )
        if gate:
            loss = loss + self._gate_total(gate)
        if self._teacher is not None:
            loss = loss + self._divergence(inputs, outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def _gate_losses(self, inputs: dict[str, Any]) -> GateLosses | None:
        """Returns the losses on the gate that a batch is trained with."""
        if self.retrieval is None:
            return None
        return gate_losses(
            inputs,
            self.retrieval,
            self._unwrapped.landmark,
            draw=f"{self.args.seed}/mass/{self.state.global_step}",
        )

    def _forced_blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        """Returns the blocks that tokens of a batch keep whatever their score."""
        if self.retrieval is None or self._unwrapped.landmark.mode != "top_k":
            return None
        return forced_blocks(
            inputs,
            self.retrieval,
            self._unwrapped.landmark,
            done=self.state.global_step / self.state.max_steps,
            draw=f"{self.args.seed}/forced/{self.state.global_step}",
        )

    def _gate_total(self, gate: GateLosses) -> Tensor:
        """Returns the weighted losses on the gate, as the share of one batch of the step."""
        total = torch.zeros((), device=self.args.device)
        for name, loss, weight in gate.totals():
            self._note(name, loss)
            total = total + weight * loss
        share: Tensor = total / self.args.gradient_accumulation_steps
        return share

    def _divergence(self, inputs: dict[str, Any], logits: Tensor) -> Tensor:
        """Returns the weighted divergence from the teacher, as the share of one batch of the step.

        It is taken at the same columns of all rows, drawn by the seed, but not of rows whose
        positions start again: the teacher reads others.
        """
        text = texts_of(inputs)
        rows = torch.arange(len(logits), device=logits.device)
        if "restarts" in inputs:
            rows = rows[inputs["restarts"] < 0]
        if len(rows) == 0:
            return logits.new_zeros(())
        tokens = min(text["input_ids"].shape[1], trained_positions(self._teacher.config))
        count = max(1, round(self.distillation.teacher_share * tokens))
        rng = random.Random(f"{self.args.seed}/teacher/{self.state.global_step}")
        columns = torch.tensor(sorted(rng.sample(range(tokens), count)), device=logits.device)
        with torch.no_grad():
            theirs = self._teacher(
                **{name: tensor[rows, :tokens] for name, tensor in text.items()},
                use_cache=False,
                logits_to_keep=columns,
            ).logits
        kept = torch.ones(len(rows), count, dtype=torch.bool, device=logits.device)
        if "answers" in inputs:
            predicts_answer = inputs["answers"].roll(-1, dims=1)
            kept = ~predicts_answer[rows[:, None], columns]
        found = divergence(logits[rows[:, None], columns], theirs, kept)
        self._note("teacher_loss", found)
        share: Tensor = found / self.args.gradient_accumulation_steps
        return self.distillation.teacher_weight * share

    def _note(self, name: str, loss: Tensor) -> None:
        """Keeps a loss for the next entry of the log, which has the mean."""
        self._noted.setdefault(name, []).append(loss.detach())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on a batch, in the mode that is drawn for its step."""
        if self.retrieval is not None:
            rng = random.Random(f"{self.args.seed}/mode/{self.state.global_step}")
            self._set_mode("all" if rng.random() < self.retrieval.all_blocks else "top_k")
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _set_mode(self, mode: str) -> None:
        if self._unwrapped.landmark.mode != mode:
            self._unwrapped.configure_landmark(mode=mode)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Returns the batches of a step, and counts their labels and answers on all devices."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.retrieval is not None:
            for number, batch in enumerate(samples):
                step = f"{self.state.global_step}/{self.args.process_index}/{number}"
                draw = f"{self.args.seed}/restarts/{step}"
                restart_positions(batch, self._unwrapped.landmark, draw=draw)
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
        mode = None
        if self.retrieval is not None:
            mode = self._evaluated_mode(is_packed="position_ids" in inputs)
            self._set_mode(mode)
        with torch.no_grad(), _reading() if mode == "retrieval" else nullcontext():
            logits = model(**texts_of(inputs)).logits
            loss = text_loss(token_losses(logits, inputs["labels"]), inputs["labels"])
            if "answers" not in inputs:
                return loss, None, None
            right, asked = answers_right(logits, inputs["labels"], inputs["answers"])
        return loss, right, asked

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as the stock Trainer does; tokens per second leave its time out."""
        start = time.perf_counter()
        # The stock Trainer calls this once for all data sets, and inside for each of them by name.
        is_outermost = not isinstance(kwargs.get("eval_dataset"), str)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if is_outermost:
            self._log_recall()
            seconds = time.perf_counter() - start
            self._paused += seconds
            self.evaluation_seconds += seconds
            self.evaluated = self.state.global_step
        return metrics

    def _evaluated_mode(self, *, is_packed: bool) -> str:
        """Returns the mode that a batch is evaluated in.

        Where positions start again in training, rows are read with retrieval. Those of packed
        conversations never do; and under FSDP no process has the weights to retrieve.
        """
        starts_again = self._unwrapped.landmark.position_span is not None and not is_packed
        if starts_again and not self.is_fsdp_enabled:
            return "retrieval"
        all_blocks = self.retrieval is not None and self.retrieval.all_blocks == 1
        return "all" if all_blocks else "top_k"

    def _log_recall(self) -> None:
        """Logs how often the evidence for held-out questions is retrieved.

        These are reads with retrieval, as the trained model does them. Not under FSDP, where no
        process has all weights.
        """
        if self.retrieval is None or self.is_fsdp_enabled or not self.is_world_process_zero():
            return
        for name, groups in (self.eval_dataset or {}).items():
            rows = [row for group in groups for row in group if row.questions]
            layers = self._recall(rows).layers()
            if not layers:
                continue
            key = f"eval_{name}_recall"
            best = {f"{key}_layer_{found.layer}": max(found.heads) for found in layers}
            self.log({f"{key}_best_head": max(best.values()), **best})
            self.state.log_history.append(
                {
                    "step": self.state.global_step,
                    key: [{**dataclasses.asdict(each), "heads": [*each.heads]} for each in layers],
                }
            )

    @torch.no_grad()
    def _recall(self, rows: list[Row]) -> EvidenceRecall:
        """Reads rows with retrieval and counts where their questions find the evidence."""
        model = self._unwrapped
        recall = EvidenceRecall(model.landmark)
        longest = max((len(row.input_ids) for row in rows), default=1)
        on_gpu = self.args.device.type == "cuda"
        at_once = max(1, (GPU_RECALL_TOKENS if on_gpu else RECALL_TOKENS) // longest)
        with self._retrieving():
            for begin in range(0, len(rows), at_once):
                batch = rows[begin : begin + at_once]
                ids = stack([(row,) for row in batch], answers=False)["input_ids"]
                cache = LandmarkCache(model.config)
                cache.record = True
                model.read(ids.to(self.args.device), cache=cache)
                recall.add(cache.retrievals, evidence_queries([row.questions for row in batch]))
                # Counted in the progress as batches of an evaluation are.
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return recall

    def best_heads(self, count: int) -> tuple[tuple[int, int], ...] | None:
        """Returns the heads that find the evidence for held-out questions best.

        Not under FSDP, where no process has all weights.

        Args:
            count: how many at most.

        Returns:
            layer and head of each; ``None`` where no held-out row asks for what is old.
        """
        if self.is_fsdp_enabled:
            return None
        held_out = (self.eval_dataset or {}).values()
        rows = [row for groups in held_out for group in groups for row in group if row.questions]
        with self._retrieving():
            every = max(1, -(-len(rows) // HEAD_ROWS))
            return best_heads(self._unwrapped, rows[::every], count)

    @contextmanager
    def _retrieving(self) -> Iterator[None]:
        """A context in which the model retrieves."""
        model = self._unwrapped
        mode = model.landmark.mode
        model.eval()
        model.configure_landmark(mode="retrieval")
        try:
            with _reading(), self.accelerator.autocast():
                yield
        finally:
            model.configure_landmark(mode=mode)

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
            for name, losses in self._noted.items():
                logs[name] = float(torch.stack(losses).mean())
            self._noted = {}
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


@contextmanager
def _reading() -> Iterator[None]:
    """A context for retrieval in a run: without compiled layers, which are made for rows.

    A landmark model in training does not say yet that it is trained, and is warned of.
    """
    with warnings.catch_warnings(action="ignore"), torch.compiler.set_stance("force_eager"):
        yield


def texts_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns what a model is given of a batch: all but labels, answers and questions."""
    return {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of answer tokens that were right, if any were asked for."""
    asked = int(prediction.label_ids.sum())
    if asked == 0:
        return {}
    return {"accuracy": float(prediction.predictions.sum()) / asked}
