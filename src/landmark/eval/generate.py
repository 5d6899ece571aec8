"""A text of any length, a prompt, and what the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from landmark.data.encoding import Progress
from landmark.data.tokenizer import continuation, row_start
from landmark.eval.fillers import file_text, tokenize
from landmark.eval.passkey import READS
from landmark.eval.reading import read_reporting
from landmark.eval.subjects import Subject

COLDEST = 1e-4
HOTTEST = 1e4  # of sampling; beyond, probabilities are no numbers


def continue_text(
    subject: Subject,
    prompt: str,
    *,
    file: Path | None = None,
    read: str = "local",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> str:
    """Returns what the model writes after the text of ``file`` and ``prompt``.

    Args:
        subject: the model.
        prompt: text to go on from, not empty.
        file: text of any length that comes before the prompt.
        read: ``local`` reads the file without retrieval, ``retrieve`` with; the prompt always
            retrieves.
        max_new_tokens: at most so many tokens.
        temperature: of sampling; 0 takes the most probable token.
        seed: of sampling.
        progress: called while the file is tokenised and read.

    Raises:
        ValueError: nothing to go on from, a slow tokenizer, or a value outside its range.
        FileNotFoundError: no such file.
    """
    if read not in READS:
        raise ValueError(
            f"--read: expected one of {', '.join(READS)}, got {read!r}; pass --read local"
        )
    if max_new_tokens < 1:
        raise ValueError(
            f"--max-new-tokens: expected at least 1, got {max_new_tokens}; pass for example 64"
        )
    if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
        raise ValueError(
            f"--temperature: expected at least 0, and for sampling {COLDEST:g} to {HOTTEST:g}, "
            f"got {temperature}; 0 takes the most probable token"
        )
    tokenizer = subject.tokenizer
    document = torch.tensor(row_start(tokenizer), dtype=torch.long)
    question = tokenize(prompt, tokenizer, continues=file is not None)
    if len(question) == 0 and (file is not None or len(document) == 0):
        raise ValueError(
            "PROMPT: expected a text of at least one token, got an empty one; write where to go "
            "on from"
        )
    if file is not None:
        document = torch.cat(
            (document, tokenize(file_text(file, "--file"), tokenizer, progress=progress))
        )
    ids = torch.cat((document, question))[None].to(subject.device)
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments["temperature"] = temperature
    if subject.attention == "landmark" and file is not None and len(document):
        document = ids[:, : len(document)]
        arguments["past_key_values"] = read_reporting(
            subject.model, document, retrieve=read == "retrieve", progress=progress
        )
    if progress is not None and file is not None:
        progress("answering", 0, 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        written = subject.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    row = written[0].tolist()
    return continuation(
        tokenizer, row[ids.shape[1] :], row[: ids.shape[1]], skip_special_tokens=True
    )
