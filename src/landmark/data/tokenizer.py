"""Trains, loads and checks tokenizers, and encodes texts with them.

A tokenizer that is trained here is a byte-level BPE in which every digit is a token of its own, so
that codes are read and written digit by digit.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from landmark.data.encoding import Encoded, Progress, TextEncoder
from landmark.data.errors import first_line

END = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 258
LONGEST_SAMPLE = 200_000_000  # characters that merges are learnt from
CONTEXT = 16  # tokens that are decoded in front of a continuation


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, progress: Progress | None = None
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; no token holds two digits, or a digit and anything else.

    ``<|endoftext|>`` begins and ends documents (bos and eos), ``<|pad|>`` pads; encoding adds
    neither.

    Args:
        texts: the texts to learn merges from; the first 200 million characters are used.
        vocab_size: the largest number of tokens, special tokens included; short texts give fewer.
        progress: called after every text.

    Raises:
        ValueError: ``vocab_size`` below 258 (the 256 bytes and the two special tokens).
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size: expected at least {SMALLEST_VOCABULARY} (bytes, special tokens), got "
            f"{vocab_size}; raise it"
        )
    core = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_sample(texts, progress), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a folder or hub model.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it is not a fast one, which knows the characters of each token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises many kinds for what is missing or damaged
        raise FileNotFoundError(
            f"{path}: no tokenizer there ({first_line(error)}); pass a folder or model with one"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{path}: expected a fast tokenizer, got {type(tokenizer).__name__}; save it with "
            "tokenizer.json"
        )
    return tokenizer


def require_savable(tokenizer: Any, name: str) -> None:
    """Makes sure, before long work, that a tokenizer can be saved, by saving it elsewhere.

    Raises:
        ValueError: it cannot be saved; the message begins with ``name``.
    """
    with tempfile.TemporaryDirectory(prefix="landmark-") as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # raised by json, tokenizers or transformers
            raise ValueError(
                f"{name}: expected a tokenizer that can be saved, got one that cannot "
                f"({first_line(error)}); mend its tokenizer_config.json"
            ) from None


def require_rows(tokenizer: Any, model: Any, name: str, used: int = 0) -> None:
    """Makes sure that the embedding of a model has a row for every token of texts.

    Special tokens that no text has by name do no harm: many tokenizers have one for padding.

    Args:
        tokenizer: a tokenizer of transformers; a slow one is not checked.
        model: a model of transformers.
        name: name of the model, for the message.
        used: the greatest token id in a text.

    Raises:
        ValueError: the embedding has fewer rows.
    """
    if not getattr(tokenizer, "is_fast", False):
        return
    rows = model.get_input_embeddings().weight.shape[0]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = special - {*row_start(tokenizer), tokenizer.eos_token_id}
    greatest = max(
        (number for number in tokenizer.get_vocab().values() if number not in unused), default=0
    )
    greatest = max(greatest, used)
    if greatest >= rows:
        raise ValueError(
            f"{name}: expected an embedding with a row for each token of the tokenizer, got "
            f"{rows} rows and token ids up to {greatest}; use the model's own tokenizer, or "
            "resize the embedding (resize_token_embeddings)"
        )


def backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Returns the tokenizer of the ``tokenizers`` package inside."""
    core = tokenizer.backend_tokenizer
    assert isinstance(core, Tokenizer)
    return core


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns a SHA-256 of everything that decides how text is cut into tokens."""
    return hashlib.sha256(backend(tokenizer).to_str().encode()).hexdigest()


def require_fast(tokenizer: Any) -> None:
    """Raises ``ValueError`` for a tokenizer that does not know the characters of its tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: expected a fast one, which knows the characters of its tokens, "
            f"got {type(tokenizer).__name__}; load it with AutoTokenizer from a folder with "
            "tokenizer.json"
        )


def row_start(tokenizer: Any) -> list[int]:
    """Returns the ids that the tokenizer puts before every text, such as its bos token.

    Raises:
        ValueError: as ``require_fast``.
    """
    require_fast(tokenizer)
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return []
    any_text = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    whole = processor.process(any_text, None, True)
    return list(whole.ids[: whole.special_tokens_mask.index(0)])


def continuation(tokenizer: Any, ids: Sequence[int], before: Sequence[int], **options: Any) -> str:
    """Decodes ids that continue other ids.

    Decoded alone they might lose a space: many tokenizers leave out the one that a text begins
    with.

    Args:
        tokenizer: a tokenizer of transformers.
        ids: the ids to decode.
        before: the ids that they continue; the last of them are used.
        **options: arguments of ``decode``.
    """
    options = {"clean_up_tokenization_spaces": False, **options}
    context = list(before[-CONTEXT:])
    begin: str = tokenizer.decode(context, **options)
    whole: str = tokenizer.decode([*context, *ids], **options)
    return whole[len(begin) :]


def encoder_of(tokenizer: Any) -> TextEncoder:
    """Returns the encoder of a tokenizer of transformers, for texts of any length.

    Raises:
        ValueError: as ``require_fast``.
    """
    require_fast(tokenizer)
    core = backend(tokenizer)
    core.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return TextEncoder(core)


def encode(
    tokenizer: Any, text: str, *, continues: bool = False, progress: Progress | None = None
) -> Encoded:
    """Encodes a text as ``TextEncoder.encode`` does; raises as ``encoder_of``."""
    return encoder_of(tokenizer).encode(text, continues=continues, progress=progress)


def _sample(texts: Iterable[str], progress: Progress | None) -> Iterator[str]:
    """Yields texts of ``LONGEST_SAMPLE`` characters in all."""
    left = LONGEST_SAMPLE
    for text in texts:
        yield text[:left]
        left -= len(text)
        if progress is not None:
            progress("characters learnt from", LONGEST_SAMPLE - max(0, left), 0)
        if left <= 0:
            return
