"""A training run described by a JSON file: model, landmarks, tokenizer, data, optimiser, run,
save.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from landmark.config import GREATEST, LandmarkConfig
from landmark.data.text import read_json

SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "intermediate_size": 1024,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """``vocab_size``: tokens of the byte-level BPE trained on the texts (from scratch only)."""

    vocab_size: int = 4096


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What the rows hold.

    Attributes:
        length: positions of a row, landmarks included (512 at ``block_size`` 64 are 504 text
            tokens).
        episodes: share of synthetic retrieval episodes, the other rows are windows of the texts.
        answer_weight: what the mean loss over answers counts beside the mean over all text.
        field: key of the text in JSONL rows and hub data sets.
    """

    length: int = 512
    episodes: float = 0.0
    answer_weight: float = 0.5
    field: str = "text"


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, decay on matrices only; the rate rises over ``warmup`` steps, falls to 0 over the last
    ``decay_share``.
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
    """How it is computed.

    Attributes:
        seed: decides weights, rows and their order.
        micro_batch: rows of a device at once; ``None`` for all of its share of the batch.
        precision: ``auto`` (bf16 where the device has it), ``bf16`` (autocast) or ``fp32``.
        weights: dtype in which a given model is loaded and trained: ``float32``, ``bfloat16`` or
            ``auto``.
        compile: ``torch.compile``, layer by layer; ``None`` for yes on a GPU.
        gradient_checkpointing: recompute activations in the backward pass.
        workers: processes that make rows; ``None`` for one less than the cores, 12 at most.
        log_every: steps between log lines.
        evaluate_every: steps between evaluations, 0 for none.
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
    """``dtype`` of the saved weights (``None``: that of the loaded model) and the size of their
    ``shard`` files.
    """

    dtype: str | None = None
    shard: str = "5GB"


Section = TypeVar("Section")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a run; ``to_dict`` and ``from_dict`` are the JSON file.

    Attributes:
        model: the transformers config of a model from scratch, ``model_type`` included.
        landmark: fields of ``LandmarkConfig``; what is not named keeps its default.

    Raises:
        ValueError: a value outside its range.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SMALL_LLAMA))
    landmark: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    run: RunSettings = RunSettings()
    save: SaveSettings = SaveSettings()

    def __post_init__(self) -> None:
        LandmarkConfig.from_dict(self.landmark)
        data = self.data
        optimiser = self.optimiser
        run = self.run
        for name, value, least in (
            ("vocab_size", self.tokenizer.vocab_size, 1),
            ("length", data.length, 2),
            ("steps", optimiser.steps, 1),
            ("batch", optimiser.batch, 1),
            ("warmup", optimiser.warmup, 0),
            ("micro_batch", 1 if run.micro_batch is None else run.micro_batch, 1),
            ("workers", 0 if run.workers is None else run.workers, 0),
            ("log_every", run.log_every, 1),
            ("evaluate_every", run.evaluate_every, 0),
            ("save_every", run.save_every, 0),
            ("seed", run.seed, 0),
        ):
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not least <= value <= GREATEST
            ):
                raise ValueError(
                    f"{name}: expected an integer from {least} to {GREATEST}, got {value!r}"
                )
        for name, number, low, high in (
            ("episodes", data.episodes, 0.0, 1.0),
            ("answer_weight", data.answer_weight, 0.0, 1e6),
            ("decay_share", optimiser.decay_share, 0.0, 1.0),
            ("weight_decay", optimiser.weight_decay, 0.0, 1e6),
            ("clip", optimiser.clip, 0.0, 1e6),
            ("lr", optimiser.lr, 0.0, 1e6),
            ("beta1", optimiser.beta1, 0.0, 0.999999),
            ("beta2", optimiser.beta2, 0.0, 0.999999),
        ):
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not low <= number <= high
            ):
                raise ValueError(
                    f"{name}: expected a number from {low:g} to {high:g}, got {number!r}"
                )
        self._check_words()

    def _check_words(self) -> None:
        run = self.run
        save = self.save
        for name, choice, choices in (
            ("precision", run.precision, ("auto", "bf16", "fp32")),
            ("weights", run.weights, ("float32", "bfloat16", "auto")),
            ("dtype", save.dtype, (None, *DTYPES)),
            ("compile", run.compile, (None, True, False)),
            ("gradient_checkpointing", run.gradient_checkpointing, (True, False)),
        ):
            if choice not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(str, choices))}, got {choice!r}"
                )
        for name, word in (
            ("field", self.data.field),
            ("report_to", run.report_to),
            ("shard", save.shard),
        ):
            if not isinstance(word, str):
                raise ValueError(f"{name}: expected a string, got {word!r}")

    @property
    def warmup(self) -> int:
        """Warm-up steps, cut to what a short run leaves before the decay."""
        return min(self.optimiser.warmup, self.optimiser.steps - self.decay)

    @property
    def decay(self) -> int:
        """Steps over which the learning rate falls to 0."""
        return round(self.optimiser.decay_share * self.optimiser.steps)

    def override(self, **flags: Any) -> Recipe:
        """Returns a copy with single settings changed, whatever section they are in; ``None``
        changes nothing.

        Raises:
            ValueError: no section has such a setting, or a value is outside its range.
        """
        changes = {name: value for name, value in flags.items() if value is not None}
        recipe = self
        for section in ("tokenizer", "data", "optimiser", "run", "save"):
            current = getattr(recipe, section)
            known = {field.name for field in dataclasses.fields(current)}
            here = {name: changes.pop(name) for name in list(changes) if name in known}
            if here:
                recipe = dataclasses.replace(
                    recipe, **{section: dataclasses.replace(current, **here)}
                )
        return (
            dataclasses.replace(recipe, landmark={**recipe.landmark, **changes})
            if changes
            else recipe
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """Builds a recipe from ``to_dict``'s result, or from the config of a transformers model.

        Raises:
            ValueError: an unknown section or setting, or a value outside its range.
        """
        if "model_type" in fields:
            return cls(model=fields)
        known = {field.name: field for field in dataclasses.fields(cls)}
        _require_known("section", set(fields), set(known))
        sections: dict[str, Any] = {}
        for name, value in fields.items():
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected an object with settings, got {value!r}")
            default = getattr(cls, name, None)
            sections[name] = (
                _section(type(default), name, value) if dataclasses.is_dataclass(default) else value
            )
        return cls(**sections)


def fine_tuning() -> Recipe:
    """Returns the default settings for training a given model further."""
    return Recipe(optimiser=OptimiserSettings(steps=1000, batch=32, lr=1e-4, warmup=50))


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe, or the config.json of a model, from a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not a recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such recipe; pass a JSON file such as recipes/bundled.json"
        )
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path}: expected a JSON object with sections, got {type(fields).__name__}"
        )
    try:
        return Recipe.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _section(kind: type[Section], name: str, fields: dict[str, Any]) -> Section:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _require_known(f"setting of {name}", set(fields), known)
    return kind(**fields)


def _require_known(what: str, given: set[str], known: set[str]) -> None:
    if given - known:
        raise ValueError(
            f"unknown {what} {sorted(given - known)}: expected some of {sorted(known)}"
        )
