"""Prepares a run before its first step: tokenizer, token files, rows, model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from landmark.config import LandmarkConfig
from landmark.data.encoding import Progress
from landmark.data.episodes import Episodes, Row
from landmark.data.errors import first_line, one_line
from landmark.data.rows import FixedRows, Rows, Windows, plain_row
from landmark.data.text import has_split, read_documents
from landmark.data.tokenizer import (
    SMALLEST_VOCABULARY,
    backend,
    load_tokenizer,
    require_savable,
    row_start,
    train_tokenizer,
)
from landmark.data.tokens import DocumentSpan, Ids, TokenFile, tokenize
from landmark.hf.convert import convert, from_config, load
from landmark.hf.families import PREFIX
from landmark.hf.pretrained import read_config
from landmark.train.recipe import Recipe

HELD_OUT_ROWS = 64
LEAST_ROWS = 40  # of text, from which on a part of it is held out
EVALUATION_SEED = 1 << 32  # added to the seed of a run for held-out episodes
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
        held_out: ``text`` (windows of held-out text, where there is enough of it) and ``episodes``
            (where the recipe has any).
        documents: the documents of the training text.
        greatest_id: the greatest token id of the training text.
    """

    train: Rows
    held_out: dict[str, FixedRows]
    documents: list[DocumentSpan]
    greatest_id: int


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
    """
    if model is not None or tokenizer is not None:
        found = load_tokenizer(str(tokenizer or model))
        require_savable(found, str(tokenizer or model))
        return found
    if (out / "tokenizer.json").is_file():
        return load_tokenizer(out)
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
    tokens: int,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenises the texts, or finds them tokenised in ``folder``, and makes the rows of the run.

    Held-out text is the ``validation`` split, or else the last twentieth of the text, which is then
    not trained on.

    Args:
        data: the texts, as ``read_documents`` takes them.
        folder: the folder of the token files.
        recipe: the settings.
        tokenizer: the tokenizer.
        tokens: text tokens of a row.
        progress: called while texts are tokenised.

    Raises:
        ValueError: the texts are shorter than a row.
    """

    def token_file(split: str) -> TokenFile:
        read = partial(read_documents, data, split=split, field=recipe.data.field)
        return tokenize(read, tokenizer, folder, split, progress)

    text = token_file("train")
    ids = text.ids
    held_out_ids = text.ids[:0]
    if has_split(data, "validation"):
        held_out_ids = token_file("validation").ids
    elif len(ids) >= LEAST_ROWS * tokens:
        cut = len(ids) - max(len(ids) // 20, 2 * tokens)
        held_out_ids = ids[cut:]
        ids = ids[:cut]
    seed = recipe.run.seed
    share = recipe.data.episodes
    prefix = row_start(tokenizer)
    core = backend(tokenizer)
    episodes = None
    if share:
        episodes = Episodes(core, ids, tokens=tokens, seed=seed, prefix=prefix)
    rows = Rows(
        Windows(ids, tokens=tokens, seed=seed, prefix=prefix),
        episodes,
        share=share,
        count=recipe.optimiser.steps * recipe.optimiser.batch,
        seed=seed,
    )
    held_out = {}
    has_held_out_text = len(held_out_ids) > tokens
    if has_held_out_text:
        held_out["text"] = FixedRows(_spaced_rows(held_out_ids, tokens, prefix))
    if share:
        filler = held_out_ids if has_held_out_text else ids
        asked = Episodes(core, filler, tokens=tokens, seed=seed + EVALUATION_SEED, prefix=prefix)
        held_out["episodes"] = FixedRows(asked(index) for index in range(HELD_OUT_ROWS))
    return Prepared(
        train=rows,
        held_out=held_out,
        documents=text.documents,
        greatest_id=int(text.ids.max(initial=0)),
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
    dtype: Any = recipe.run.weights
    if dtype != "auto":
        dtype = getattr(torch, dtype)
    settings = LandmarkConfig.from_dict(recipe.landmark)
    try:
        config = read_config(path)
        if config.model_type.startswith(PREFIX):
            if plain:
                raise ValueError(
                    f"{path}: expected a model without landmarks to train plain, got "
                    f"{config.model_type}"
                )
            model = load(path, dtype=dtype)
            model.configure_landmark(**{name: getattr(settings, name) for name in recipe.landmark})
            return model
        if plain:
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        fields = settings.to_dict()
        fields.pop("landmark_trained")
        return convert(path, dtype=dtype, **fields)
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: no model there ({first_line(error)}); pass a model's folder or name"
        ) from None


def stored_dtype(path: str | None) -> str:
    """Returns the name of the dtype of a model's weights, by its config.

    Args:
        path: folder or hub name of the model; ``None`` for a new one, which is in float32.
    """
    dtype = None if path is None else AutoConfig.from_pretrained(path).dtype
    return str(dtype or torch.float32).removeprefix("torch.")


def _spaced_rows(ids: Ids, tokens: int, prefix: list[int]) -> list[Row]:
    """Returns at most ``HELD_OUT_ROWS`` rows at equal distances over a text."""
    width = tokens - len(prefix)
    count = min(HELD_OUT_ROWS, len(ids) // width)
    step = (len(ids) - width) // (count - 1) if count > 1 else 0
    starts = [number * step for number in range(count)]
    return [plain_row(ids[start : start + width], prefix) for start in starts]
