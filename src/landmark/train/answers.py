"""Answers that a teacher writes to conversations which end with what a user says.

They are sampled once and kept beside the token files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from landmark.data import outputs
from landmark.data.chat import ASSISTANT, USER, Message, chat_ends, prompt_of
from landmark.data.conversations import Conversation
from landmark.data.encoding import Progress
from landmark.data.text import read_json
from landmark.data.tokenizer import encode

NEW_TOKENS = 256  # of an answer, at most
TEMPERATURE = 0.7
# Of prompts and answers that are computed at once: a step of many rows takes as long as one of few.
BATCH_TOKENS = 1 << 14
GPU_BATCH_TOKENS = 1 << 19


class TeacherAnswers:
    """Has a teacher answer conversations, or finds its answers.

    Args:
        teacher: a causal language model of transformers, in eval mode.
        name: its name, which the file of its answers depends on.
        tokenizer: the tokenizer of both models.
        folder: where answers are kept, as ``answers-HASH.json``.
        seed: of sampling.
    """

    def __init__(
        self, teacher: Any, name: str, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int
    ) -> None:
        self.teacher = teacher
        self.name = name
        self.tokenizer = tokenizer
        self.folder = folder
        self.seed = seed

    def __call__(
        self, conversations: Sequence[Conversation], progress: Progress | None = None
    ) -> list[Conversation]:
        """Returns the conversations; those that end with a user's message have an answer.

        Args:
            conversations: the conversations.
            progress: called after each batch of answers.

        Raises:
            ValueError: a prompt that the chat template fails on.
        """
        asked = [each for each in conversations if each.messages[-1].role == USER]
        if not asked:
            return list(conversations)
        path = self.folder / f"answers-{self._hash(asked)}.json"
        if path.is_file():
            answers = read_json(path)
        else:
            answers = self._sampled(asked, progress)
            outputs.write(path, json.dumps(answers, ensure_ascii=False).encode())
        given = iter(answers)
        return [_with_answer(each, given) for each in conversations]

    def _hash(self, asked: Sequence[Conversation]) -> str:
        """Returns a hash of all that answers depend on but rounding and how many fit at once."""
        settings = [self.name, self.seed, NEW_TOKENS, TEMPERATURE]
        content = json.dumps([settings, [each.messages for each in asked]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @torch.no_grad()
    def _sampled(self, asked: Sequence[Conversation], progress: Progress | None) -> list[str]:
        """Samples an answer to each conversation, those of about one length at once."""
        texts = [prompt_of(self.tokenizer, each.messages, each.where) for each in asked]
        prompts = [encode(self.tokenizer, text).ids.tolist() for text in texts]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
        ends = chat_ends(self.tokenizer, self.teacher.generation_config.eos_token_id)
        device = next(self.teacher.parameters()).device
        answers = [""] * len(prompts)
        done = 0
        at_once = GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            while done < len(order):
                width = len(prompts[order[done]])
                count = max(1, at_once // (width + NEW_TOKENS))
                batch = order[done : done + count]
                written = None
                try:
                    written = self._write([prompts[number] for number in batch], ends, device)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                if written is None:  # outside of `except`, which holds the tensors of the call
                    at_once = len(batch) * (width + NEW_TOKENS) // 2
                    torch.cuda.empty_cache()
                    continue
                for number, row in zip(batch, written, strict=True):
                    end = next((at for at, token in enumerate(row) if token in ends), len(row))
                    text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
                    answers[number] = text.strip()
                done += len(batch)
                if progress is not None:
                    progress("prompts answered by the teacher", done, len(order))
        return answers

    def _write(
        self, prompts: Sequence[list[int]], ends: list[int], device: torch.device
    ) -> list[list[int]]:
        """Samples how each prompt goes on, all at once; the first is the longest."""
        width = len(prompts[0])
        padding = [width - len(prompt) for prompt in prompts]
        rows = [[ends[0]] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        columns = torch.arange(width, device=device)
        mask = (columns >= torch.tensor(padding, device=device)[:, None]).long()
        written: Tensor = self.teacher.generate(
            torch.tensor(rows, device=device),
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=TEMPERATURE,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        found: list[list[int]] = written[:, width:].tolist()
        return found


def _with_answer(conversation: Conversation, answers: Iterator[str]) -> Conversation:
    """Returns a conversation with the next answer, where it ends with a user's message.

    It stays as it is where the teacher wrote nothing.
    """
    if conversation.messages[-1].role != USER:
        return conversation
    answer = next(answers)
    if not answer:
        return conversation
    messages = (*conversation.messages, Message(ASSISTANT, answer))
    return replace(conversation, messages=messages)
