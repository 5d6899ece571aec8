"""Mistakes that a user of a memory may make: each is refused in one line, and the memory stays as
it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from memory_state import Memory
from transformers import DynamicCache

import models
from machine import as_tensors

Call = Callable[[], Any]


def ids(memory: Memory, rows: int, tokens: int) -> torch.Tensor:
    return torch.ones(rows, tokens, dtype=torch.long)


def generated(memory: Memory, tokens: int = 1, model: Any = None, **options: Any) -> Call:
    """Generates behind the memory, or its last token again."""
    text, mask = as_tensors(
        memory.rows, memory.columns(tokens, 0) if tokens else [[] for _ in memory.rows], whole=True
    )
    options = {
        "attention_mask": mask,
        "past_key_values": memory.cache,
        "max_new_tokens": 2,
        **options,
    }
    return lambda: (model or memory.model).generate(options.pop("ids", text), **options)


def another_text(memory: Memory, **options: Any) -> Call | None:
    """Generates behind ids that differ in the last column that tells its token."""
    places = [
        place for place, column in enumerate(memory.rows[0]) if column.text and not column.unknown
    ]
    if not places:
        return None
    text, _ = as_tensors(memory.rows, memory.columns(1, 0), whole=True)
    text[0, places[-1]] = 1 + text[0, places[-1]] % (models.VOCAB - 1)
    return generated(memory, ids=text, **options)


def a_beginning(memory: Memory) -> Call | None:
    text, mask = as_tensors(memory.rows, memory.rows, whole=False)
    return (
        generated(memory, ids=text[:, :-1], attention_mask=mask[:, :-1])
        if memory.past() > 1
        else None
    )


def turned_round(memory: Memory, text: bool) -> torch.Tensor | None:
    """The memory's mask, with a token in the middle hidden, or with padding shown."""
    _, mask = as_tensors(memory.rows, memory.rows, whole=False)
    found = mask[0] if text else mask[-1]
    places = (found == int(text)).nonzero()[:, 0].tolist()
    if len(places) < (2 if text else 1):
        return None
    found[places[0]] = int(not text)
    return mask


def with_mask(memory: Memory, *, text: bool, tokens: int = 1, **options: Any) -> Call | None:
    """Goes on with a mask that cannot be; where options are given, or there is no new token, by
    generate.
    """
    mask = turned_round(memory, text)
    if mask is None:
        return None
    mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
    if options or not tokens:  # generate leaves a mask of ones out
        seen = memory.pending is None and not mask.all()
        return generated(memory, tokens, attention_mask=mask, **options) if seen else None
    return lambda: memory.model(
        ids(memory, len(memory.rows), tokens), attention_mask=mask, past_key_values=memory.cache
    )


def in_train_mode(memory: Memory) -> Call:
    """Also where the mask takes tokens back."""
    _, mask = as_tensors(memory.rows, [[]] * len(memory.rows), whole=True)
    mask[0] = 0
    mask = torch.nn.functional.pad(mask, (0, 2), value=1)

    def call() -> None:
        memory.model.train()
        try:
            memory.model(
                ids(memory, len(memory.rows), 2), attention_mask=mask, past_key_values=memory.cache
            )
        finally:
            memory.model.eval()

    return call


def beyond_trained(memory: Memory) -> Call | None:
    """Exact positions reach beyond the trained length; the mask takes tokens back."""
    if memory.model.landmark.positions != "exact" or memory.model.landmark.mode != "retrieval":
        return None
    _, mask = as_tensors(memory.rows, [[]] * len(memory.rows), whole=True)
    mask[0] = 0
    mask = torch.nn.functional.pad(mask, (0, 30), value=1)

    def call() -> None:
        memory.model.configure_landmark(trained_length=10)
        try:
            memory.model(
                ids(memory, len(memory.rows), 30), attention_mask=mask, past_key_values=memory.cache
            )
        finally:
            memory.model.configure_landmark(trained_length=4096)

    return call


def another_setting(memory: Memory, tokens: int = 1, **options: Any) -> Call:
    """The model's top_k has changed since."""
    top_k = memory.model.landmark.top_k

    def call() -> None:
        memory.model.configure_landmark(top_k=top_k + 1)
        try:
            generated(memory, tokens, **options)()
        finally:
            memory.model.configure_landmark(top_k=top_k)

    return call


def stock_cache(memory: Memory) -> DynamicCache:
    return DynamicCache(config=memory.model.config)


def when(condition: bool, call: Call | None) -> Call | None:
    return call if condition else None


MISTAKES: dict[str, Callable[[Memory], Call | None]] = {
    "too many rows": lambda m: lambda: m.model(ids(m, len(m.rows) + 1, 2), past_key_values=m.cache),
    "too many rows to read": lambda m: (
        lambda: m.model.read(ids(m, len(m.rows) + 1, 2), cache=m.cache)
    ),
    "too many rows to generate": lambda m: (
        lambda: m.model.generate(ids(m, len(m.rows) + 1, 60), past_key_values=m.cache)
    ),
    "no text": lambda m: lambda: m.model(ids(m, len(m.rows), 0), past_key_values=m.cache),
    "no text to read": lambda m: lambda: m.model.read(ids(m, len(m.rows), 0), cache=m.cache),
    "a mask too long": lambda m: (
        lambda: m.model(
            ids(m, len(m.rows), 2),
            attention_mask=ids(m, len(m.rows), m.past() + 3),
            past_key_values=m.cache,
        )
    ),
    "a crop too far": lambda m: lambda: m.cache.crop(-m.past() - 1),
    "a row that is not there": lambda m: (
        lambda: m.cache.batch_select_indices(torch.tensor([0, len(m.rows)]))
    ),
    "several rows saved": lambda m: when(len(m.rows) > 1, lambda: m.cache.save(m.new_folder())),
    "the question alone": lambda m: when(
        m.past() > 2,
        lambda: m.model.generate(ids(m, len(m.rows), 2), past_key_values=m.cache, max_new_tokens=2),
    ),
    "a beginning": a_beginning,
    "a hidden token in the middle": lambda m: with_mask(m, text=True),
    "a hidden token, no new one": lambda m: with_mask(m, text=True, tokens=0),
    "a hidden token, two beams": lambda m: with_mask(m, text=True, num_beams=2),
    "shown padding": lambda m: with_mask(m, text=False),
    "shown padding, no new token": lambda m: with_mask(m, text=False, tokens=0),
    "train mode": in_train_mode,
    "beyond the trained length": beyond_trained,
    "a stock cache": lambda m: (
        lambda: m.model(ids(m, len(m.rows), 2), past_key_values=stock_cache(m))
    ),
    "a stock cache to generate": lambda m: generated(m, past_key_values=stock_cache(m)),
    "another model": lambda m: generated(m, model=m.other),
    "another model, no new token": lambda m: (
        when(  # of one token, computed again, nothing would be left of the first
            m.pending is None and m.past() > 1, generated(m, 0, m.other)
        )
    ),
    "another model, two beams": lambda m: generated(m, model=m.other, num_beams=2),
    "another setting": another_setting,
    "another setting, no new token": lambda m: when(m.pending is None, another_setting(m, 0)),
    "another setting, two beams": lambda m: another_setting(m, num_beams=2),
    "a static cache": lambda m: generated(m, cache_implementation="static"),
}
