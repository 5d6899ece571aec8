"""Geometry against counting by hand, one slot at a time."""

import pytest
import torch

from landmark.blocks import (
    IGNORE,
    insert_landmarks,
    key_grid,
    query_blocks,
    slot_labels,
    slot_of,
    slot_starts,
    slots_for,
    strip_landmarks,
    tokens_for,
)

LANDMARK = 99


def by_hand(tokens, block_size):
    """Tokens with a landmark after every ``block_size - 1`` of them."""
    slots = []
    for index, token in enumerate(tokens, 1):
        slots.append(token)
        if index % (block_size - 1) == 0:
            slots.append(LANDMARK)
    return slots


@pytest.mark.parametrize("block_size", [2, 3, 5, 11, 12, 64])
def test_counts_and_places(block_size):
    for tokens in range(1, 70):
        slots = by_hand(range(tokens), block_size)
        assert slots_for(tokens, block_size) == len(slots)
        assert tokens_for(len(slots), block_size) == tokens
        assert slot_of(tokens - 1, block_size) == len(slots) - 1 - slots[::-1].index(tokens - 1)
    many = torch.arange(70)
    assert slots_for(many, block_size).tolist() == [
        slots_for(each, block_size) for each in range(70)
    ]
    assert slot_of(many, block_size).tolist() == [slot_of(each, block_size) for each in range(70)]


@pytest.mark.parametrize("block_size", [2, 3, 4, 11, 30])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_insert_and_strip(block_size, dtype):
    ids = torch.arange(1, 23, dtype=dtype).view(2, 11)
    slots = insert_landmarks(ids, block_size=block_size, landmark_id=LANDMARK)
    assert slots.dtype == dtype
    assert slots.tolist() == [by_hand(row, block_size) for row in ids.tolist()]
    assert torch.equal(strip_landmarks(slots, block_size=block_size), ids)
    assert torch.equal(
        insert_landmarks(ids[0], block_size=block_size, landmark_id=LANDMARK), slots[0]
    )


@pytest.mark.parametrize("block_size", [2, 3, 4, 11, 30])
@pytest.mark.parametrize("starts", [[0, 3, 11], [2, 2, 2], [10, 5, 1]])
def test_insert_and_strip_with_padding(block_size, starts):
    ids = torch.arange(1, 34).view(3, 11)
    starts = torch.tensor(starts)
    for row, start in enumerate(starts.tolist()):
        ids[row, :start] = 0
    slots = insert_landmarks(ids, block_size=block_size, landmark_id=LANDMARK, starts=starts)
    first = slot_starts(starts, 11, block_size)
    for row, start in enumerate(starts.tolist()):
        text = by_hand(ids[row, start:].tolist(), block_size)
        assert slots[row].tolist() == [ids[row, 0].item()] * (slots.shape[1] - len(text)) + text
        assert first[row] == slots.shape[1] - len(text)
    assert torch.equal(strip_landmarks(slots, block_size=block_size, starts=first), ids)


def test_nothing_to_insert():
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert insert_landmarks(empty, block_size=3, landmark_id=1).shape == (2, 0)
    assert strip_landmarks(empty, block_size=3).shape == (2, 0)


def test_the_token_before_a_landmark_predicts_the_text_after_it():
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert slot_labels(labels, block_size=3).tolist() == [[2, 3, IGNORE, 4, 5, IGNORE, IGNORE]]
    padded = torch.tensor([[7, 1, 2, 3, 4]])
    assert slot_labels(padded, block_size=3, starts=torch.tensor([1])).tolist() == [
        [IGNORE, 2, 3, IGNORE, 4, IGNORE, IGNORE]
    ]


def test_grid_of_a_padded_row():
    grid = key_grid(9, block_size=3, starts=torch.tensor([0, 4]))
    assert grid.block.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2], [-1, -1, -1, -1, 0, 0, 0, 1, 1]]
    assert grid.landmark.long().tolist() == [
        [0, 0, 1, 0, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
    ]


def test_grid_of_a_packed_row():
    grid = key_grid(8, block_size=3, segments=torch.tensor([[5, 5, 5, 5, 2, 7, 7, 7]]))
    assert grid.block.tolist() == [[0, 0, 0, 1, 2, 3, 3, 3]]
    assert grid.landmark.long().tolist() == [[0, 0, 1, 0, 0, 0, 0, 1]]
    assert grid.first.tolist() == [[0, 0, 0, 0, 2, 3, 3, 3]]


def test_grid_of_irregular_landmarks():
    landmarks = torch.tensor([[0, 1, 1, 0, 0, 1, 0]], dtype=torch.bool)
    grid = key_grid(7, block_size=3, landmarks=landmarks)
    assert grid.block.tolist() == [[0, 0, 1, 2, 2, 2, 3]]
    own, _ = query_blocks(grid, torch.arange(5, 10), block_size=3, regular=False)
    assert own.tolist() == [[2, 3, 3, 3, 3]]


def test_blocks_of_queries_behind_all_keys():
    grid = key_grid(7, block_size=3, starts=torch.tensor([0, 2, 7]))
    own, first = query_blocks(grid, torch.arange(6, 13), block_size=3, regular=True)
    assert own[:2].tolist() == [[2, 2, 2, 3, 3, 3, 4], [1, 1, 2, 2, 2, 3, 3]]
    assert (own[2] == -1).all() and not first[:2].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ids: insert_landmarks(ids, block_size=1, landmark_id=0),
            "block_size: expected .* at least 2, got 1",
        ),
        (lambda ids: strip_landmarks(ids, block_size=True), "block_size: expected .* got True"),
        (
            lambda ids: insert_landmarks(ids.float(), block_size=3, landmark_id=0),
            "ids: expected integers",
        ),
        (
            lambda ids: insert_landmarks(
                ids, block_size=3, landmark_id=0, starts=torch.tensor([0])
            ),
            r"starts: expected integers of shape \(B,\)",
        ),
        (
            lambda ids: strip_landmarks(ids[0], block_size=3, starts=torch.tensor([0])),
            r"starts: expected integers of shape \(B,\)",
        ),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 5, dtype=torch.long))
