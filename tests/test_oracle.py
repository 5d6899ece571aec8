"""The oracle against what is known without it: stock attention, the laws, and slots worked out by
hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import models
import oracle
from landmark import LandmarkConfig, landmark_attention
from landmark.config import GRANULARITIES


@pytest.fixture(autouse=True, scope="module")
def norms() -> Iterator[None]:
    with models.wide_norms():
        yield


@pytest.mark.parametrize("family", models.FAMILIES)
def test_one_block_is_the_stock_model(family: str) -> None:
    model = models.stock_model(family)
    ids = models.text(20)
    # Stock rotation has float32 angles, whatever the model's dtype.
    with torch.no_grad():
        stock = model(ids[None]).logits[0]
    torch.testing.assert_close(
        oracle.logits(model, models.landmark_vector(), ids, LandmarkConfig()),
        stock,
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_enough_blocks_is_every_block_under_any_positions(family: str) -> None:
    model = models.stock_model(family)
    ids = models.text(26)
    everything = oracle.logits(
        model, models.landmark_vector(), ids, LandmarkConfig(block_size=5, mode="all")
    )
    for positions, granularity, local_blocks in (
        ("stingy", "head", 2),
        ("exact", "group", 0),
        ("stingy", "token", 0),
    ):
        settings = LandmarkConfig(
            block_size=5,
            top_k=7,
            positions=positions,
            granularity=granularity,
            local_blocks=local_blocks,
        )
        torch.testing.assert_close(
            oracle.logits(model, models.landmark_vector(), ids, settings),
            everything,
            rtol=0,
            atol=1e-11,
        )
    few = oracle.logits(
        model, models.landmark_vector(), ids, LandmarkConfig(block_size=5, top_k=2, local_blocks=0)
    )
    assert (few - everything).abs().max() > 0.1


@pytest.mark.parametrize("granularity", ["token_head", "head", "token", "group"])
def test_later_text_changes_nothing(granularity: str) -> None:
    model = models.stock_model("llama")
    ids = models.text(26)
    settings = LandmarkConfig(block_size=5, top_k=2, granularity=granularity, local_blocks=1)
    whole = oracle.logits(model, models.landmark_vector(), ids, settings)
    part = oracle.logits(model, models.landmark_vector(), ids[:22], settings)
    torch.testing.assert_close(whole[:22], part, rtol=0, atol=1e-11)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_text_in_parts_is_the_whole_text(granularity: str) -> None:
    model = models.stock_model("llama")
    ids = models.text(26)
    settings = LandmarkConfig(block_size=5, top_k=2, granularity=granularity, local_blocks=1)
    whole = oracle.logits(model, models.landmark_vector(), ids, settings, silent={3, 7, 8})
    known: oracle.Known = {}
    for seen, end in ((0, 9), (9, 10), (10, 24), (6, 26)):
        part = oracle.logits(
            model,
            models.landmark_vector(),
            ids[:end],
            settings,
            silent={3, 7, 8},
            known=known,
            seen=seen,
        )
        torch.testing.assert_close(whole[seen:end], part, rtol=0, atol=1e-11)


def layer(slots: int, **settings: object) -> oracle.Layer:
    random = np.random.default_rng(0)
    return oracle.Layer(
        query=random.normal(size=(2, slots, 4)),
        key=random.normal(size=(1, slots, 4)),
        value=random.normal(size=(1, slots, 4)),
        frequencies=np.array([1.0, 0.1]),
        scale=0.5,
        index=1,
        settings=LandmarkConfig(block_size=4, **settings),  # type: ignore[arg-type]
        chunks=[(0, slots)],
        trace={},
    )


def places(one: oracle.Layer, query: int, chosen: list[int]) -> list[int]:
    return [one.final_position(query, one.landmark(block), chosen) // 4 for block in chosen]


def test_slots_worked_out_by_hand() -> None:
    one = layer(40, top_k=3, local_blocks=1)
    query = 9 * 4 + 1  # block 9: local 8 and 9, older 0..7 with ages 7..0
    assert one.candidates(query) == list(range(8))
    scoring = [one.scoring_position(query, one.landmark(block)) // 4 for block in range(8)]
    assert scoring == [0, 0, 0, 0, 0, 1, 2, 3]
    assert places(one, query, [0, 2, 4]) == [0, 1, 2]
    assert places(one, query, [0, 4, 7]) == [0, 1, 3]
    assert places(one, query, [1, 6, 7]) == [0, 2, 3]
    assert places(one, query, [5, 6, 7]) == [1, 2, 3]
    assert places(one, query, [0]) == [2]  # a layer that does not retrieve
    assert one.final_position(query, 8 * 4, []) == 4 * 4
    assert one.final_position(query, query, []) == 5 * 4 + 1
    early = 3 * 4 + 2  # block 3: local 2 and 3, older 0 and 1
    assert one.candidates(early) == [0, 1]
    assert places(one, early, [0, 1]) == [2, 3]
    assert places(one, early, [0]) == [3]


def test_candidates_worked_out_by_hand() -> None:
    query = 9 * 4
    assert layer(40, local_blocks=2, max_blocks=3).candidates(query) == [0, 4, 5, 6]
    assert layer(40, local_blocks=2, max_blocks=0).candidates(query) == [0]
    assert layer(40, local_blocks=9, max_blocks=3).candidates(query) == []
    assert layer(40, local_blocks=0, max_blocks=9).candidates(query) == list(range(9))
    chunked = layer(40, local_blocks=2, max_blocks=3, local="chunk")
    chunked.chunks = [(0, 30), (30, 40)]
    assert (
        chunked.candidates(29) == []
        and chunked.candidates(30) == [4, 5, 6]
        and chunked.candidates(39) == [4, 5, 6]
    )


def test_ties_go_to_the_lower_block() -> None:
    one = layer(40, top_k=2, local_blocks=1, positions="exact")
    one.query[:] = 0
    assert one.chosen(0, 37) == [0, 1]


def test_shared_choices() -> None:
    query = 38
    shares = {}
    for granularity in ("head", "token"):
        one = layer(40, top_k=2, local_blocks=1, granularity=granularity)
        shares[granularity] = one.sharers(0, query)
    assert shares["head"] == [(0, 36), (0, 37), (0, 38)]
    assert shares["token"] == [(0, query), (1, query)]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_exact_positions_without_local_blocks_are_the_operation(
    heads: int, top_k: int | None
) -> None:
    slots = 33
    random = np.random.default_rng(0)
    one = oracle.Layer(
        query=random.normal(size=(4, slots, 6)),
        key=random.normal(size=(heads, slots, 6)),
        value=random.normal(size=(heads, slots, 6)),
        frequencies=np.array([1.0, 0.1]),
        scale=0.4,
        index=1,
        settings=LandmarkConfig(
            block_size=5, mode="retrieval", positions="exact", local_blocks=0, top_k=top_k or 9
        ),
        chunks=[(0, slots)],
        trace={},
    )

    def rotated(rows: np.ndarray) -> torch.Tensor:
        turned = [
            [one.rotated(row[position], position) for position in range(slots)] for row in rows
        ]
        return torch.from_numpy(np.array(turned))[None]

    output = landmark_attention(
        rotated(one.query),
        rotated(one.key),
        torch.from_numpy(one.value)[None],
        block_size=5,
        scale=0.4,
        top_k=top_k,
        impl="reference",
    )
    torch.testing.assert_close(
        torch.from_numpy(one.attend()).transpose(0, 1)[None], output, rtol=0, atol=1e-12
    )
