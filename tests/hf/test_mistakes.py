"""Mistakes that other implementations made, put in on purpose: each turns a check of the other
files red.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import test_generation as generation
import test_policies as policies
import torch

import landmark.hf.model as decoder
import models
from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.hf.layout import TextLayout
from landmark.memory import eager, retrieval
from landmark.ops import select
from landmark.ops.select import select_top

pytestmark = pytest.mark.usefixtures("wide_norms")

SIZE = 5
Patch = pytest.MonkeyPatch


def generation_case(*lengths: int, **settings: Any) -> generation.Case:
    """A case in which nothing is left out, and that crosses borders."""
    return generation.Case(
        kind="greedy",
        family="llama",
        kv_heads=2,
        settings=LandmarkConfig(block_size=SIZE, top_k=12, **settings),
        prompts=tuple(models.text(length, seed=length) for length in lengths),
        new=7,
        side="left",
        dtype=torch.float64,
        random=random.Random(0),
    )


def policy_case(*cuts: int, **settings: Any) -> policies.Case:
    """A case in which most blocks are left out."""
    chosen = {"block_size": SIZE, "top_k": 2, "local_blocks": 1, **settings}
    return policies.Case(
        "llama", 2, LandmarkConfig(**chosen), (models.text(33, seed=1),), "left", cuts
    )


def green(case: policies.Case) -> None:
    assert policies.worst(case) < 1e-8


def turns_red(check: Callable[[], None], put_in: Callable[[Patch], None]) -> None:
    """The check passes, and fails once the mistake is there."""
    check()
    with pytest.MonkeyPatch.context() as patch:
        put_in(patch)
        with pytest.raises(AssertionError):
            check()
    check()


def test_1_no_landmark_among_generated_tokens() -> None:
    prompt = 9
    real = decoder.padded_layout

    def slots(tokens: int, block_size: int) -> int:
        return slots_for(min(tokens, prompt), block_size) + max(0, tokens - prompt)

    def layout(
        mask: torch.Tensor, block_size: int, seen: Any = None, width: int | None = None
    ) -> TextLayout:
        if seen is None or int(seen[0]) < prompt:
            return real(mask, block_size, seen, width)
        columns = torch.arange(mask.shape[1])
        return TextLayout(block_size, mask.shape[1], columns, columns[None], columns[None])

    def put_in(patch: Patch) -> None:
        patch.setattr(decoder, "slots_for", slots)
        patch.setattr(decoder, "padded_layout", layout)

    turns_red(lambda: generation.greedy(generation_case(prompt)), put_in)


def test_2_retrieval_in_decode_but_every_block_in_prefill() -> None:
    real = decoder.LandmarkDecoderMixin.extend

    def extend(
        self: Any,
        embeds: Any,
        mask: Any,
        cache: Any,
        *,
        settings: LandmarkConfig,
        **more: Any,
    ) -> Any:
        settings = settings.replace(mode="all") if embeds.shape[1] > 1 else settings
        return real(self, embeds, mask, cache, settings=settings, **more)

    def put_in(patch: Patch) -> None:
        patch.setattr(decoder.LandmarkDecoderMixin, "extend", extend)

    turns_red(lambda: green(policy_case(34)), put_in)
    with pytest.MonkeyPatch.context() as patch:
        put_in(patch)
        green(policy_case(1))  # token by token is what it was: prefill and decode disagree


def test_3_blocks_counted_from_the_padding() -> None:
    def put_in(patch: Patch) -> None:
        patch.setattr(decoder, "text_mask", lambda *_: None)
        patch.setattr(decoder.LandmarkCache, "hide", lambda *_: None)

    turns_red(lambda: generation.greedy(generation_case(9, 14)), put_in)
    turns_red(lambda: generation.prefill(generation_case(9, 14)), put_in)


def test_4_chunks_that_must_be_multiples_of_the_block() -> None:
    real = decoder.make_geometry

    def make_geometry(starts: list[int], *rest: Any) -> Any:
        return real([start // SIZE * SIZE for start in starts], *rest)

    def put_in(patch: Patch) -> None:
        patch.setattr(decoder, "make_geometry", make_geometry)

    for cut in (1, SIZE, 7):
        turns_red(lambda cut=cut: green(policy_case(cut)), put_in)
    with pytest.MonkeyPatch.context() as patch:
        put_in(patch)
        green(policy_case(2 * (SIZE - 1)))


@pytest.mark.parametrize("granularity", ["token_head", "group"])
def test_7_a_cut_off_computed_finely_and_met_coarsely(granularity: str) -> None:
    def two_passes(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        places, valid = select_top(scores, k)
        cut_off = scores.gather(-1, places).masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        again = scores.to(torch.bfloat16).to(scores.dtype)
        return select_top(scores.masked_fill(again < cut_off, -torch.inf), k)

    def put_in(patch: Patch) -> None:
        patch.setattr(retrieval if granularity == "group" else select, "select_top", two_passes)

    turns_red(lambda: green(policy_case(6, granularity=granularity)), put_in)


@pytest.mark.parametrize("term", ["_read_shared", "_read_selected"])
def test_8_a_term_without_the_scale(term: str) -> None:
    """Scores of the local blocks, or of the retrieved ones."""
    real = getattr(eager, term)

    def put_in(patch: Patch) -> None:
        patch.setattr(eager, term, lambda query, *rest: real(query / 8**-0.5, *rest))

    turns_red(lambda: green(policy_case(6, granularity="group")), put_in)


def test_8_a_choice_without_the_scale() -> None:
    real = retrieval.landmark_scores

    def unscaled(query: Any, grid: Any, landmarks: Any, context: Any) -> Any:
        assert context.scale == pytest.approx(8**-0.5)
        return real(query / context.scale, grid, landmarks, context)

    def put_in(patch: Patch) -> None:
        patch.setattr(retrieval, "landmark_scores", unscaled)

    turns_red(lambda: green(policy_case(6, granularity="group")), put_in)


def test_10_only_the_last_chunk_comes_back() -> None:
    def put_in(patch: Patch) -> None:
        patch.setattr(decoder, "_join", lambda parts: parts[-1])

    turns_red(lambda: generation.prefill(generation_case(30, chunk_tokens=8)), put_in)


def test_a_whole_chunk_hides_10() -> None:
    """The last mistake shows only where a text takes more than one chunk: the check above must cut
    its text.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_join", lambda parts: parts[-1])
        generation.prefill(dataclasses.replace(generation_case(30, chunk_tokens=30)))
