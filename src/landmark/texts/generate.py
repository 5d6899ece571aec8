"""Write on from a prompt, or answer it, after reading a text of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from landmark.data.chat import chat_ends, closing, first_turn, opening
from landmark.data.encoding import Progress
from landmark.data.tokenizer import continuation, row_start
from landmark.texts.explain import CHAT_NEW_TOKENS, uses_template
from landmark.texts.files import file_text
from landmark.texts.loading import LoadedModel
from landmark.texts.reading import READS, read_reporting, tokenize

NEW_TOKENS = 64
EMPTY_PROMPT = (
    "prompt: expected a text of at least one token, got an empty one; write where to go on from"
)
# Temperatures of sampling; beyond these, probabilities are no numbers.
COLDEST = 1e-4
HOTTEST = 1e4


def continue_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    file: Path | None = None,
    read: str = "local",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
    progress: Progress | None = None,
) -> str:
    """Returns what the model writes after the text of ``file`` and ``prompt``.

    Where the tokenizer has a chat template, text and prompt are what a user says, and what is
    written is the assistant's answer.

    Args:
        loaded: the model.
        prompt: text to go on from, or to answer, not empty.
        file: text of any length that comes before the prompt.
        read: ``local`` reads the file without retrieval, ``retrieve`` with; the prompt always
            retrieves.
        max_new_tokens: at most so many tokens; by default 64, 256 in a conversation.
        temperature: of sampling; 0 takes the most probable token.
        seed: of sampling.
        chat: whether to use the chat template; ``None`` for yes where there is one.
        progress: called while the file is tokenised and read.

    Raises:
        ValueError: nothing to go on from, a slow tokenizer, or a value outside its range.
        FileNotFoundError: no such file.
    """
    if read not in READS:
        raise ValueError(f"read: expected one of {', '.join(READS)}, got {read!r}; pass read=local")
    in_chat = uses_template(loaded.tokenizer, chat)
    if max_new_tokens is None:
        max_new_tokens = CHAT_NEW_TOKENS if in_chat else NEW_TOKENS
    if max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens: expected at least 1, got {max_new_tokens}; pass for example 64"
        )
    if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
        raise ValueError(
            f"temperature: expected at least 0, and for sampling {COLDEST:g} to {HOTTEST:g}, "
            f"got {temperature}; 0 takes the most probable token"
        )
    tokenizer = loaded.tokenizer
    document = torch.tensor(row_start(tokenizer), dtype=torch.long)
    said = prompt
    if in_chat:
        begin = "" if file is None else opening(tokenizer)
        document = tokenize(begin, tokenizer)
        words = required_prompt(prompt)
        said = first_turn(tokenizer, words) if file is None else closing(tokenizer, words)
    question = tokenize(said, tokenizer, continues=file is not None)
    if len(question) == 0 and (file is not None or len(document) == 0):
        raise ValueError(EMPTY_PROMPT)
    if file is not None:
        text = file_text(file, "file")
        continues = in_chat and len(document) > 0
        read_text = tokenize(text, tokenizer, continues=continues, progress=progress)
        document = torch.cat((document, read_text))
    ids = torch.cat((document, question))[None].to(loaded.device)
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments["temperature"] = temperature
    if in_chat:
        ends = loaded.model.generation_config.eos_token_id
        arguments["eos_token_id"] = chat_ends(tokenizer, ends)
        arguments["pad_token_id"] = arguments["eos_token_id"][0]
    if loaded.is_landmark and file is not None and len(document):
        document = ids[:, : len(document)]
        arguments["past_key_values"] = read_reporting(
            loaded.model, document, retrieve=read == "retrieve", progress=progress
        )
    if progress is not None and file is not None:
        progress("answering", 0, 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        written = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    row = written[0].tolist()
    return continuation(
        tokenizer, row[ids.shape[1] :], row[: ids.shape[1]], skip_special_tokens=True
    )


def required_prompt(prompt: str) -> str:
    """Returns a prompt without the space around it; raises ``ValueError`` for an empty one."""
    words = prompt.strip()
    if not words:
        raise ValueError(EMPTY_PROMPT)
    return words
