"""Recipes: all settings of a training run, read from and written to a JSON file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from landmark.config import GREATEST, LandmarkConfig
from landmark.data.text import read_json
from landmark.train.settings import (
    NF4,
    AdapterSettings,
    DataSettings,
    OptimiserSettings,
    RetrievalSettings,
    RunSettings,
    SaveSettings,
    Section,
    TeacherSettings,
    TokenizerSettings,
)

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

SECTIONS = (
    "tokenizer",
    "data",
    "retrieval",
    "distillation",
    "adapter",
    "optimiser",
    "run",
    "save",
)
DTYPES = ("float32", "bfloat16", "float16")


class IntegerSetting(NamedTuple):
    """An integer setting and its lowest value."""

    name: str
    value: Any
    least: int


class NumberSetting(NamedTuple):
    """A setting that is a number, and its range."""

    name: str
    value: Any
    low: float
    high: float


class ChoiceSetting(NamedTuple):
    """A setting and the values that it may have."""

    name: str
    value: Any
    choices: tuple[Any, ...]


class LengthPart(NamedTuple):
    """A part of a training: positions of its rows, and its steps."""

    length: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a run; ``to_dict`` and ``from_dict`` are the JSON file.

    Attributes:
        model: fields of the transformers config of a model from scratch, ``model_type`` included.
        landmark: fields of ``LandmarkConfig``; the others keep their defaults.
        tokenizer: the tokenizer of a model from scratch.
        data: the rows.
        retrieval: what queries see, and losses on the gate.
        distillation: the teacher.
        adapter: what LoRA adapters are put on.
        optimiser: steps and learning rate.
        run: how the run is computed.
        save: how the model is saved.

    Raises:
        ValueError: a value outside its range.
    """

    model: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SMALL_LLAMA))
    landmark: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    retrieval: RetrievalSettings = dataclasses.field(default_factory=RetrievalSettings)
    distillation: TeacherSettings = dataclasses.field(default_factory=TeacherSettings)
    adapter: AdapterSettings = dataclasses.field(default_factory=AdapterSettings)
    optimiser: OptimiserSettings = dataclasses.field(default_factory=OptimiserSettings)
    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    save: SaveSettings = dataclasses.field(default_factory=SaveSettings)

    def __post_init__(self) -> None:
        LandmarkConfig.from_dict(self.landmark)
        for each in self._integers():
            _require_integer(each)
        for number in self._numbers():
            _require_number(number)
        for setting in self._choices():
            if setting.value not in setting.choices:
                choices = ", ".join(map(str, setting.choices))
                raise ValueError(
                    f"{setting.name}: expected one of {choices}, got {setting.value!r}"
                )
        _require_schedule(self.data)
        _require_mixture(self.data)
        if self.data.episodes + self.data.cloze > 1 + 1e-9:
            raise ValueError(
                "episodes, cloze: expected shares of 1 together at most, got "
                f"{self.data.episodes + self.data.cloze:g}; lower one of them"
            )
        words = {
            "field": self.data.field,
            "teacher": self.distillation.teacher or "",
            "report_to": self.run.report_to,
            "shard": self.save.shard,
        }
        for name, word in words.items():
            if not isinstance(word, str):
                raise ValueError(f"{name}: expected a string, got {word!r}")

    def _integers(self) -> list[IntegerSetting]:
        run = self.run
        found = [
            IntegerSetting("vocab_size", self.tokenizer.vocab_size, least=1),
            IntegerSetting("length", self.data.length, least=2),
            IntegerSetting("facts", self.data.facts, least=1),
            IntegerSetting("questions", self.data.questions, least=1),
            IntegerSetting("distractors", self.data.distractors, least=0),
            IntegerSetting("held_out", self.data.held_out, least=0),
            IntegerSetting("contrast_heads", self.retrieval.contrast_heads, least=1),
            IntegerSetting("contrast_queries", self.retrieval.contrast_queries, least=1),
            IntegerSetting("named_heads", self.retrieval.named_heads, least=0),
            IntegerSetting("steps", self.optimiser.steps, least=1),
            IntegerSetting("batch", self.optimiser.batch, least=1),
            IntegerSetting("warmup", self.optimiser.warmup, least=0),
            IntegerSetting("log_every", run.log_every, least=1),
            IntegerSetting("evaluate_every", run.evaluate_every, least=0),
            IntegerSetting("save_every", run.save_every, least=0),
            IntegerSetting("seed", run.seed, least=0),
        ]
        if run.micro_batch is not None:
            found.append(IntegerSetting("micro_batch", run.micro_batch, least=1))
        if run.workers is not None:
            found.append(IntegerSetting("workers", run.workers, least=0))
        return found

    def _numbers(self) -> list[NumberSetting]:
        data = self.data
        optimiser = self.optimiser
        return [
            NumberSetting("episodes", data.episodes, low=0.0, high=1.0),
            NumberSetting("cloze", data.cloze, low=0.0, high=1.0),
            NumberSetting("answer_weight", data.answer_weight, low=0.0, high=1e6),
            NumberSetting("all_blocks", self.retrieval.all_blocks, low=0.0, high=1.0),
            NumberSetting("forced", self.retrieval.forced, low=0.0, high=1.0),
            NumberSetting("forced_until", self.retrieval.forced_until, low=0.0, high=1e6),
            NumberSetting("contrast", self.retrieval.contrast, low=0.0, high=1e6),
            NumberSetting("joint_contrast", self.retrieval.joint_contrast, low=0.0, high=1e6),
            NumberSetting("text_contrast", self.retrieval.text_contrast, low=0.0, high=1e6),
            NumberSetting("block_mass", self.retrieval.block_mass, low=0.0, high=1e6),
            NumberSetting("teacher_weight", self.distillation.teacher_weight, low=0.0, high=1e6),
            NumberSetting("teacher_share", self.distillation.teacher_share, low=0.0, high=1.0),
            NumberSetting("decay_share", optimiser.decay_share, low=0.0, high=1.0),
            NumberSetting("weight_decay", optimiser.weight_decay, low=0.0, high=1e6),
            NumberSetting("clip", optimiser.clip, low=0.0, high=1e6),
            NumberSetting("lr", optimiser.lr, low=0.0, high=1e6),
            NumberSetting("beta1", optimiser.beta1, low=0.0, high=0.999999),
            NumberSetting("beta2", optimiser.beta2, low=0.0, high=0.999999),
        ]

    def _choices(self) -> list[ChoiceSetting]:
        run = self.run
        return [
            ChoiceSetting("precision", run.precision, ("auto", "bf16", "fp32")),
            ChoiceSetting("lora_layers", self.adapter.lora_layers, ("attention", "all")),
            ChoiceSetting("weights", run.weights, ("float32", "bfloat16", "auto", NF4)),
            ChoiceSetting("dtype", self.save.dtype, (None, *DTYPES)),
            ChoiceSetting("compile", run.compile, (None, True, False)),
            ChoiceSetting("gradient_checkpointing", run.gradient_checkpointing, (True, False)),
        ]

    @property
    def warmup(self) -> int:
        """Warm-up steps: fewer than set in a run that is too short for them."""
        return min(self.optimiser.warmup, self.optimiser.steps - self.decay)

    @property
    def decay(self) -> int:
        """Steps over which the learning rate falls to 0."""
        return round(self.optimiser.decay_share * self.optimiser.steps)

    def parts(self) -> list[LengthPart]:
        """Returns the parts of the training, those of the schedule and the last one."""
        done = 0
        parts = []
        for length, until in [
            *((part.length, part.until) for part in self.data.schedule),
            (self.data.length, 1.0),
        ]:
            end = round(until * self.optimiser.steps)
            parts.append(LengthPart(length, end - done))
            done = end
        return parts

    def override(self, **flags: Any) -> Recipe:
        """Returns a copy with single settings changed.

        Args:
            **flags: values by the name of a setting, in whatever section it is; ``None`` leaves a
                setting as it is. A name of no section is one of ``landmark``.

        Raises:
            ValueError: no section has such a setting, or a value is outside its range.
        """
        changes = {name: value for name, value in flags.items() if value is not None}
        recipe = self
        for section in SECTIONS:
            current = getattr(recipe, section)
            known = {field.name for field in dataclasses.fields(current)}
            here = {name: changes.pop(name) for name in list(changes) if name in known}
            if here:
                changed = dataclasses.replace(current, **here)
                recipe = dataclasses.replace(recipe, **{section: changed})
        if changes:
            recipe = dataclasses.replace(recipe, landmark={**recipe.landmark, **changes})
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON types."""
        fields = dataclasses.asdict(self)
        for name in ("schedule", "mixture"):
            fields["data"][name] = list(fields["data"][name])
        return fields

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
        default = cls()
        sections: dict[str, Any] = {}
        for name, value in fields.items():
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected an object with settings, got {value!r}")
            if name in SECTIONS:
                sections[name] = _section(type(getattr(default, name)), name, value)
            else:
                sections[name] = value
        return cls(**sections)


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """What a run is asked for beside its recipe.

    Attributes:
        data: the texts.
        model: the model that is trained further, ``None`` for one from scratch.
        plain: whether to train without landmarks.
        lora: rank of LoRA adapters, ``None`` to train the whole model.
    """

    data: str
    model: str | None
    plain: bool
    lora: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments as JSON types."""
        return dataclasses.asdict(self)


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


def _require_integer(setting: IntegerSetting) -> None:
    value = setting.value
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not setting.least <= value <= GREATEST:
        raise ValueError(
            f"{setting.name}: expected an integer from {setting.least} to {GREATEST}, got {value!r}"
        )


def _require_number(setting: NumberSetting) -> None:
    value = setting.value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not setting.low <= value <= setting.high:
        raise ValueError(
            f"{setting.name}: expected a number from {setting.low:g} to {setting.high:g}, got "
            f"{value!r}"
        )


def _require_mixture(data: DataSettings) -> None:
    """Raises ``ValueError`` for a mixture that is more than a whole."""
    for part in data.mixture:
        if not isinstance(part.source, str):
            raise ValueError(f"mixture: source: expected a string, got {part.source!r}")
        _require_number(NumberSetting("mixture: share", part.share, low=0.0, high=1.0))
    total = sum(part.share for part in data.mixture)
    if total > 1 + 1e-9:
        raise ValueError(
            f"mixture: expected shares of 1 together at most, got {total:g}; what is left is made "
            "of the texts that the run is given"
        )


def _require_schedule(data: DataSettings) -> None:
    """Raises ``ValueError`` for a schedule whose parts do not follow each other."""
    before = 0.0
    for part in data.schedule:
        _require_integer(IntegerSetting("schedule: length", part.length, least=2))
        _require_number(NumberSetting("schedule: until", part.until, low=0.0, high=1.0))
        if data.length % part.length:
            raise ValueError(
                f"schedule: expected lengths that divide length={data.length}, got {part.length}; "
                "change one of them"
            )
        if part.until <= before or part.until >= 1:
            raise ValueError(
                f"schedule: expected until to rise between {before:g} and 1, got {part.until:g}; "
                "order the parts, and leave the last one out: it has the rows of length"
            )
        before = part.until


def _section(kind: type[Section], name: str, fields: dict[str, Any]) -> Section:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _require_known(f"setting of {name}", set(fields), known)
    return kind(**fields)


def _require_known(what: str, given: set[str], known: set[str]) -> None:
    if given - known:
        raise ValueError(
            f"unknown {what} {sorted(given - known)}: expected some of {sorted(known)}"
        )
