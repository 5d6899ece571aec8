"""What a run needs before its first step: tokenizer, token files, rows, model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from landmark.config import LandmarkConfig
from landmark.data.encoding import Progress
from landmark.data.episodes import Episodes
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
from landmark.data.tokens import Ids, Place, tokenize
from landmark.hf.convert import convert, from_config, load
from landmark.hf.families import PREFIX
from landmark.hf.pretrained import read_config
from landmark.train.recipe import Recipe

HELD_OUT_ROWS = 64
LEAST_ROWS = 40
EVALUATION_SEED = 1 << 32
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
        held_out: ``text`` (windows of unseen text, where there is enough of it) and ``episodes``
            (where there are any).
        documents: what the training text was made of.
        greatest: of its token ids.
    """

    train: Rows
    held_out: dict[str, FixedRows]
    documents: list[Place]
    greatest: int


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
    """Returns the given model's tokenizer, or the given one, or that of ``out``, or one trained on
    the texts.
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
    """Tokenises the texts (or finds them tokenised in ``folder``) and lays out the rows of the run.

    Held-out text is the ``validation`` split, or else the last twentieth of the text, which is then
    not trained on.

    Args:
        data: the texts.
        folder: of the token files.
        recipe: the settings.
        tokenizer: cuts the texts.
        tokens: text tokens of a row.
        progress: called while texts are tokenised.

    Raises:
        ValueError: the texts are shorter than a row.
    """
    field = recipe.data.field
    stream = tokenize(
        lambda: read_documents(data, field=field), tokenizer, folder, "train", progress
    )
    ids = stream.ids
    unseen = stream.ids[:0]
    if has_split(data, "validation"):
        validation = lambda: read_documents(data, split="validation", field=field)  # noqa: E731
        unseen = tokenize(validation, tokenizer, folder, "validation", progress).ids
    elif len(ids) >= LEAST_ROWS * tokens:
        cut = len(ids) - max(len(ids) // 20, 2 * tokens)
        ids, unseen = ids[:cut], ids[cut:]
    seed = recipe.run.seed
    share = recipe.data.episodes
    prefix = row_start(tokenizer)
    core = backend(tokenizer)
    episodes = Episodes(core, ids, tokens=tokens, seed=seed, prefix=prefix) if share else None
    rows = Rows(
        Windows(ids, tokens=tokens, seed=seed, prefix=prefix),
        episodes,
        share=share,
        count=recipe.optimiser.steps * recipe.optimiser.batch,
        seed=seed,
    )
    held_out = {}
    if len(unseen) > tokens:
        held_out["text"] = FixedRows(_spaced(unseen, tokens, prefix))
    if share:
        filler = unseen if len(unseen) > tokens else ids
        asked = Episodes(core, filler, tokens=tokens, seed=seed + EVALUATION_SEED, prefix=prefix)
        held_out["episodes"] = FixedRows(asked(index) for index in range(HELD_OUT_ROWS))
    return Prepared(rows, held_out, stream.documents, int(stream.ids.max(initial=0)))


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, plain: bool) -> Any:
    """Returns a randomly initialised model: the recipe's, with landmarks unless ``plain``.

    Raises:
        ValueError: as ``require_model_settings``.
    """
    special = {name: getattr(tokenizer, name) for name in SPECIAL}
    return _built(recipe, {**special, "vocab_size": len(tokenizer)}, plain=plain)


def require_model_settings(recipe: Recipe, *, plain: bool, name: str = "model") -> None:
    """Builds a model without weights of the recipe's settings, before anything is computed.

    Raises:
        ValueError: transformers cannot build it; the message begins with ``name``.
    """
    try:
        with torch.device("meta"):
            _built(
                recipe, {**dict.fromkeys(SPECIAL), "vocab_size": SMALLEST_VOCABULARY}, plain=plain
            )
    except (MemoryError, ModuleNotFoundError):
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {first_line(error)}") from None
    except Exception as error:  # transformers and torch raise many kinds for odd settings
        raise ValueError(
            f"{name}: expected the settings of a {recipe.model['model_type']} model, got some "
            f"that it cannot be built with ({one_line(error)}); mend them"
        ) from None


def _built(recipe: Recipe, more: dict[str, Any], *, plain: bool) -> Any:
    fields = dict(recipe.model)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type: expected one that transformers knows, such as llama, got {kind!r}"
        )
    for name in SIZES & fields.keys():
        if fields[name] is not None and (type(fields[name]) is not int or fields[name] < 1):
            raise ValueError(
                f"{name}: expected an integer of at least 1, got {fields[name]!r}; mend it"
            )
    if (fields.get("head_dim") or 0) % 2:
        raise ValueError(
            f"head_dim: expected an even number, as RoPE turns pairs, got {fields['head_dim']}; "
            "mend it"
        )
    usual = CONFIG_MAPPING[kind]()
    for name, value in fields.items():  # older transformers take anything here
        kind_of = type(getattr(usual, name, None))
        if kind_of is bool and not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}; mend it")
        if (
            kind_of is float
            and value is not None
            and not (type(value) in (int, float) and value >= 0)
        ):
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}; mend it")
    config = AutoConfig.for_model(kind, **{**fields, **more})
    if plain:
        return AutoModelForCausalLM.from_config(config)
    return from_config(config, LandmarkConfig.from_dict(recipe.landmark))


def given_model(path: str, recipe: Recipe, *, plain: bool) -> Any:
    """Loads a model to train further; one without landmarks gets them unless ``plain``.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: ``plain`` with a landmark model, or an architecture that cannot be converted.
    """
    dtype = (
        recipe.run.weights if recipe.run.weights == "auto" else getattr(torch, recipe.run.weights)
    )
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
    """Returns the dtype that a given model's folder names for its weights; float32 for a new
    model.
    """
    dtype = None if path is None else AutoConfig.from_pretrained(path).dtype
    return str(dtype or torch.float32).removeprefix("torch.")


def _spaced(ids: Ids, tokens: int, prefix: list[int]) -> list[Any]:
    width = tokens - len(prefix)
    count = min(HELD_OUT_ROWS, len(ids) // width)
    step = (len(ids) - width) // max(1, count - 1) if count > 1 else 0
    return [
        plain_row(ids[number * step : number * step + width], prefix) for number in range(count)
    ]
