"""Prepares a run before its first step: tokenizer, token files, rows, model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from landmark.config import LandmarkConfig
from landmark.data.encoding import Progress
from landmark.data.episodes import Row
from landmark.data.errors import first_line, one_line
from landmark.data.rows import FixedRows, Rows, Share, Stage
from landmark.data.text import kind_of, read_documents
from landmark.data.tokenizer import (
    SMALLEST_VOCABULARY,
    load_tokenizer,
    require_savable,
    train_tokenizer,
)
from landmark.data.tokens import DocumentSpan
from landmark.hf.base import split_base
from landmark.hf.convert import convert, from_config, load
from landmark.hf.families import PREFIX
from landmark.hf.pretrained import read_config
from landmark.train.answers import TeacherAnswers
from landmark.train.corpora import corpora
from landmark.train.recipe import Recipe
from landmark.train.settings import NF4

STOCK = "stock"  # the teacher that is the given model without landmarks
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
SIZES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Attributes:
        train: the rows, in the order of training.
        held_out: ``text`` (windows of held-out text, where there is enough of it), ``episodes``
            (where the recipe has any), ``cloze``, ``conversations`` and
            ``questions``.
        documents: the documents of the training text.
        greatest_id: the greatest token id of the training text.
        has_answers: whether any rows have answers.
    """

    train: Rows
    held_out: dict[str, FixedRows]
    documents: list[DocumentSpan]
    greatest_id: int
    has_answers: bool


def find_tokenizer(
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    model: str | None,
    tokenizer: str | None,
    report: Callable[[str], None],
    progress: Progress | None = None,
) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a run.

    It is the given one, or that of the given model, or the one in ``out``, or else one that is
    trained on the texts.

    Args:
        data: the texts, as ``read_documents`` takes them.
        out: the folder of the run; a new tokenizer is saved there.
        recipe: the settings.
        model: folder or hub name of the model, ``None`` for a new one.
        tokenizer: folder or hub name of a tokenizer, if any.
        report: takes a line that says what is done.
        progress: called while a tokenizer is trained.

    Raises:
        ValueError: no tokenizer, and data that one cannot be trained on.
    """
    if model is not None or tokenizer is not None:
        found = load_tokenizer(split_base(str(tokenizer or model))[0])
        require_savable(found, str(tokenizer or model))
        return found
    if (out / "tokenizer.json").is_file():
        return load_tokenizer(out)
    kind = kind_of(data)
    if kind != "text":
        raise ValueError(
            f"tokenizer: expected texts to train a tokenizer on, got {kind} in {data}; give "
            "tokenizer=FOLDER, or model=NAME to train a model further"
        )
    report(f"training a tokenizer of {recipe.tokenizer.vocab_size} tokens")
    documents = read_documents(data, field=recipe.data.field)
    trained = train_tokenizer(
        (document.text for document in documents), recipe.tokenizer.vocab_size, progress
    )
    trained.save_pretrained(str(out))
    return trained


def prepare_rows(
    data: str,
    folder: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    block_size: int,
    answers: TeacherAnswers | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenises the texts, or finds them tokenised in ``folder``, and makes the rows of the run.

    Args:
        data: texts or conversations.
        folder: the folder of the token files.
        recipe: the settings.
        tokenizer: the tokenizer.
        block_size: positions of a block.
        answers: has a teacher answer conversations that end with what a user says.
        progress: called while texts are tokenised.

    Raises:
        ValueError: the texts are shorter than a row, a part of the schedule has rows that are not
            of whole blocks, or as ``corpora``.
    """
    for shorter in recipe.data.schedule:
        if shorter.length % block_size:
            raise ValueError(
                f"schedule: expected lengths that are multiples of block_size={block_size}, got "
                f"{shorter.length}; change it"
            )
    found = corpora(
        data,
        recipe,
        tokenizer,
        folder,
        block_size=block_size,
        answers=answers,
        progress=progress,
    )
    stages = []
    for part in recipe.parts():
        kinds = [
            Share(kind.make, share * kind.share)
            for corpus, share in found
            for kind in corpus.kinds(part.length)
        ]
        groups = part.steps * recipe.optimiser.batch
        stages.append(Stage(kinds, groups, rows=recipe.data.length // part.length))
    held_out: dict[str, list[Row]] = {}
    for corpus, _ in found:
        for kind, rows in corpus.held_out().items():
            held_out.setdefault(kind, []).extend(rows)
    return Prepared(
        train=Rows(stages, seed=recipe.run.seed),
        held_out={kind: FixedRows(rows) for kind, rows in held_out.items()},
        documents=[document for corpus, _ in found for document in corpus.documents],
        greatest_id=max(corpus.greatest_id for corpus, _ in found),
        has_answers=any(corpus.has_answers for corpus, _ in found),
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, plain: bool) -> Any:
    """Returns a randomly initialised model of a recipe, with landmarks unless ``plain``.

    Raises:
        ValueError: as ``require_model_settings``.
    """
    special = {name: getattr(tokenizer, name) for name in SPECIAL}
    return _built(recipe, {**special, "vocab_size": len(tokenizer)}, plain=plain)


def require_model_settings(recipe: Recipe, *, plain: bool, name: str = "model") -> None:
    """Makes sure, before anything is computed, that the model of a recipe can be built.

    Raises:
        ValueError: transformers cannot build it; the message begins with ``name``.
    """
    no_tokenizer = {**dict.fromkeys(SPECIAL), "vocab_size": SMALLEST_VOCABULARY}
    try:
        with torch.device("meta"):
            _built(recipe, no_tokenizer, plain=plain)
    except (MemoryError, ModuleNotFoundError):
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {first_line(error)}") from None
    except Exception as error:  # transformers and torch raise many kinds for such settings
        raise ValueError(
            f"{name}: expected the settings of a {recipe.model['model_type']} model, got some "
            f"that it cannot be built with ({one_line(error)}); mend them"
        ) from None


def _built(recipe: Recipe, more: dict[str, Any], *, plain: bool) -> Any:
    """Returns a model of a recipe; ``more`` holds the fields that depend on the tokenizer."""
    fields = dict(recipe.model)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type: expected one that transformers knows, such as llama, got {kind!r}"
        )
    _check_fields(kind, fields)
    config = AutoConfig.for_model(kind, **{**fields, **more})
    if plain:
        return AutoModelForCausalLM.from_config(config)
    return from_config(config, LandmarkConfig.from_dict(recipe.landmark))


def _check_fields(kind: str, fields: dict[str, Any]) -> None:
    """Raises ``ValueError`` for fields of a config that older transformers take unchecked."""
    for name in SIZES & fields.keys():
        value = fields[name]
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}; mend it")
    head_dim = fields.get("head_dim")
    if head_dim is not None and head_dim % 2:
        raise ValueError(
            f"head_dim: expected an even number, as RoPE turns pairs, got {head_dim}; mend it"
        )
    defaults = CONFIG_MAPPING[kind]()
    for name, value in fields.items():
        expected = type(getattr(defaults, name, None))
        if expected is bool and not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}; mend it")
        if expected is float and value is not None and not _is_not_negative(value):
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}; mend it")


def _is_not_negative(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def given_model(path: str, recipe: Recipe, *, plain: bool) -> Any:
    """Loads a model to train further; one without landmarks gets them unless ``plain``.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: ``plain`` with a landmark model, or an architecture that cannot be converted.
    """
    loading = _loading(recipe)
    settings = LandmarkConfig.from_dict(recipe.landmark)
    try:
        config = read_config(path)
        if config.model_type.startswith(PREFIX):
            if plain:
                raise ValueError(
                    f"{path}: expected a model without landmarks to train plain, got "
                    f"{config.model_type}"
                )
            model = load(path, **loading)
            model.configure_landmark(**{name: getattr(settings, name) for name in recipe.landmark})
            return model
        if plain:
            return AutoModelForCausalLM.from_pretrained(path, **loading)
        fields = settings.to_dict()
        fields.pop("landmark_trained")
        return convert(path, **loading, **fields)
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: no model there ({first_line(error)}); pass a model's folder or name"
        ) from None


def _loading(recipe: Recipe) -> dict[str, Any]:
    """Returns the loading arguments that say how weights are kept."""
    weights = recipe.run.weights
    if weights == NF4:
        dtype = compute_dtype(recipe.run.precision)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_compute_dtype=dtype
        )
        return {"dtype": dtype, "quantization_config": quantization}
    return {"dtype": weights if weights == "auto" else getattr(torch, weights)}


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the dtype that a run computes in.

    Args:
        precision: ``auto``, ``bf16`` or ``fp32``.
    """
    is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    is_bf16 = precision == "bf16" or (precision == "auto" and is_fast)
    return torch.bfloat16 if is_bf16 else torch.float32


def load_teacher(recipe: Recipe, path: str | None, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Returns the teacher of a run in eval mode, without gradients; ``None`` where it has none.

    Args:
        recipe: the settings.
        path: folder or hub name of the model that is trained further, ``None`` for a new one.
        tokenizer: the tokenizer of the run.

    Raises:
        ValueError: ``stock`` without a model or for a landmark model, or a teacher with another
            vocabulary.
        FileNotFoundError: there is no such model.
    """
    name = recipe.distillation.teacher
    if name is None:
        return None
    if name == STOCK:
        if path is None:
            raise ValueError(
                "teacher: expected the model that is trained further, got none; give model=NAME, "
                "or name a teacher"
            )
        name = path
        if read_config(path).model_type.startswith(PREFIX):
            raise ValueError(
                f"teacher: expected a model without landmarks as stock, got {path}; name the model "
                "that it was made of"
            )
    theirs = load_tokenizer(name)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher: expected the vocabulary of the trained model, got another one in {name}; "
            "name a teacher with the same tokenizer"
        )
    try:
        teacher = AutoModelForCausalLM.from_pretrained(name, dtype=compute_dtype("auto"))
    except OSError as error:
        raise FileNotFoundError(
            f"teacher: no model in {name} ({first_line(error)}); pass a model's folder or name"
        ) from None
    return teacher.requires_grad_(False).eval()


def stored_dtype(path: str | None) -> str:
    """Returns the name of the dtype of a model's weights, by its config.

    Args:
        path: folder or hub name of the model; ``None`` for a new one, which is in float32.
    """
    dtype = None if path is None else AutoConfig.from_pretrained(split_base(path)[0]).dtype
    return str(dtype or torch.float32).removeprefix("torch.")
