"""Measure what a model has kept of another one: its greedy answers, and conversations.

Both models get the same tokens in one pass, so one wrong token does not make the next ones wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from landmark.data.chat import ASSISTANT, chat_ends, prompt_of
from landmark.data.conversations import Conversation, encode_conversations
from landmark.data.encoding import Progress
from landmark.data.episodes import IGNORED
from landmark.data.tokenizer import encode
from landmark.eval.measure import measured
from landmark.eval.results import AgreementRow
from landmark.eval.variants import Variant


@dataclass(frozen=True)
class _Said:
    """A conversation as tokens.

    Attributes:
        ids: all tokens, ``(T,)``.
        is_compared: for each of them, whether it is compared, ``(T,)``.
    """

    ids: torch.Tensor
    is_compared: torch.Tensor


def run(
    variants: Sequence[Variant],
    reference: Variant,
    conversations: Sequence[Conversation],
    report: Callable[[AgreementRow], None],
    *,
    data: str,
    max_new_tokens: int = 128,
    progress: Progress | None = None,
) -> list[AgreementRow]:
    """Compares models with a reference.

    Conversations that end with what a user says are answered by the reference, greedily; a model
    agrees at a token of the answer if it is its most probable one. On the others the perplexity of
    what the assistant says is measured, the sign that ends it included.

    Args:
        variants: the models.
        reference: the model that answers; it is measured first, like the others.
        conversations: the conversations.
        report: called with each row as soon as it is there.
        data: name of the conversations, for the rows.
        max_new_tokens: tokens of an answer of the reference, at most.
        progress: called for each conversation.

    Raises:
        ValueError: there is no conversation, a template that fails, another vocabulary, or no
            token to write.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens: expected at least 1, got {max_new_tokens}; pass for example 128"
        )
    if not conversations:
        raise ValueError("conversations: expected some, got none; give other data")
    ends_with_answer = [each for each in conversations if each.messages[-1].role == ASSISTANT]
    prompts = [each for each in conversations if each.messages[-1].role != ASSISTANT]
    size = len(reference.tokenizer)
    for variant in variants:
        if variant.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            raise ValueError(
                f"reference: expected the vocabulary of {variant.name}, got another one of {size} "
                f"tokens in {reference.name}; name a model with the same tokenizer"
            )
    answers = [
        _answer(reference, each, max_new_tokens, number, len(prompts), progress)
        for number, each in enumerate(prompts)
    ]
    said = []
    if ends_with_answer:
        for encoded in encode_conversations(ends_with_answer, reference.tokenizer):
            compared = torch.from_numpy(encoded.labels) != IGNORED
            said.append(_Said(torch.from_numpy(encoded.ids), compared))
    rows = []
    for variant in (reference, *variants):
        row = _row(variant, reference, answers, said, max_new_tokens, data, progress)
        rows.append(row)
        report(row)
    return rows


@torch.no_grad()
def _answer(
    reference: Variant,
    conversation: Conversation,
    max_new_tokens: int,
    number: int,
    count: int,
    progress: Progress | None,
) -> _Said:
    """Returns a conversation with the reference's greedy answer, its end included."""
    if progress is not None:
        progress("conversations answered", number, count)
    tokenizer = reference.tokenizer
    text = prompt_of(tokenizer, conversation.messages, conversation.where)
    given = torch.from_numpy(encode(tokenizer, text).ids)[None]
    given = given.to(reference.device)
    ends = chat_ends(tokenizer, reference.model.generation_config.eos_token_id)
    ids = reference.model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )[0].cpu()
    return _Said(ids, torch.arange(len(ids)) >= given.shape[1])


def _row(
    variant: Variant,
    reference: Variant,
    answers: Sequence[_Said],
    said: Sequence[_Said],
    max_new_tokens: int,
    data: str,
    progress: Progress | None,
) -> AgreementRow:
    """Reads all conversations, and counts."""
    agreed = answered = tokens = 0
    loss = 0.0
    with measured(variant.device) as measure:
        for number, each in enumerate((*answers, *said)):
            if progress is not None:
                progress("conversations compared", number, len(answers) + len(said))
            compared = each.is_compared[1:]
            logits = variant.logits(each.ids[None].to(variant.device))[0, :-1][compared].float()
            wanted = each.ids[1:][compared].to(logits.device)
            if number < len(answers):
                agreed += int((logits.argmax(-1) == wanted).sum())
                answered += len(wanted)
            else:
                loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                tokens += len(wanted)
    return AgreementRow(
        model=variant.name,
        attention=variant.attention,
        reference=reference.name,
        reference_dtype=reference.dtype,
        prompts=len(answers),
        answer_tokens=answered,
        agreed=agreed,
        agreement=agreed / answered if answered else None,
        conversations=len(said),
        tokens=tokens,
        loss=loss / tokens if tokens else None,
        perplexity=math.exp(loss / tokens) if tokens else None,
        max_new_tokens=max_new_tokens,
        settings=variant.settings(),
        dtype=variant.dtype,
        seconds=round(measure.seconds, 3),
        data=data,
    )
