"""Rows of a run: windows cover the text, episodes have their share, everything follows from the
seed.
"""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from landmark.data.episodes import IGNORED, Episodes
from landmark.data.rows import Rows, Share, Stage, Windows, plain_row, stack
from landmark.data.tokenizer import backend

TOKENS = 130


@pytest.fixture
def mixed(ids, tokenizer):
    episodes = Episodes(backend(tokenizer), ids, tokens=TOKENS, seed=3, block_tokens=63)
    windows = Windows(ids, tokens=TOKENS, seed=3)
    return Rows([Stage([Share(episodes, 0.5), Share(windows, 0.5)], groups=400)], seed=3)


def test_a_pass_visits_every_window_once():
    ids = np.arange(1000, dtype=np.uint16)
    windows = Windows(ids, tokens=30, seed=0)
    for turn in range(3):
        rows = [
            windows(turn * windows.per_epoch + number).input_ids
            for number in range(windows.per_epoch)
        ]
        seen = np.sort(np.concatenate(rows))
        assert np.array_equal(seen, np.arange(seen[0], seen[0] + 30 * windows.per_epoch))
        assert len(seen) >= 1000 - 2 * 30
    starts = [
        [windows(turn * windows.per_epoch + n).input_ids[0] for n in range(5)] for turn in range(2)
    ]
    assert starts[0] != starts[1]


def test_windows_with_a_first_token():
    ids = np.arange(100, 1000, dtype=np.uint16)
    row = Windows(ids, tokens=30, seed=0, prefix=[7])(0)
    assert row.input_ids[0] == 7 and len(row.input_ids) == 30
    assert np.array_equal(np.diff(row.input_ids[1:]), np.ones(28))


def test_plain_rows_are_predicted_throughout():
    row = plain_row(np.array([5, 6, 7], dtype=np.uint16))
    assert row.labels.tolist() == [IGNORED, 6, 7] and not row.answers.any()


def test_share_of_episodes(mixed):
    counted = sum(row.answers.any() for index in range(400) for row in mixed[index])
    assert abs(counted / 400 - 0.5 * 0.85) < 0.08


def test_order_is_that_of_the_index(mixed):
    def batches(workers):
        loader = DataLoader(
            mixed, 50, num_workers=workers, collate_fn=lambda groups: stack(groups, answers=True)
        )
        return list(loader)

    for here, there in zip(batches(0), batches(2), strict=True):
        for name in ("questions", "packed"):
            assert here.pop(name) == there.pop(name)
        assert all(torch.equal(here[name], there[name]) for name in here)
    assert torch.equal(batches(0)[1]["input_ids"][3], torch.from_numpy(mixed[53][0].input_ids))


def test_stacked_types(mixed):
    batch = stack([mixed[0], mixed[1]], answers=True)
    assert batch.pop("questions") == [mixed[0][0].questions, mixed[1][0].questions]
    assert batch.pop("packed") == [False, False]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, TOKENS)),
        "labels": (torch.int64, (2, TOKENS)),
        "answers": (torch.bool, (2, TOKENS)),
    }
    assert "answers" not in stack([mixed[0]], answers=False)


def test_stages_follow_each_other():
    """Every window of a pass once, first in groups of three short rows, then one long row each."""
    ids = np.arange(1000, dtype=np.uint16)
    short = Stage([Share(Windows(ids, tokens=10, seed=0), 1.0)], groups=4, rows=3)
    long = Stage([Share(Windows(ids, tokens=30, seed=0), 1.0)], groups=5)
    rows = Rows([short, long], seed=0)
    assert len(rows) == 9
    assert [[len(row.input_ids) for row in group] for group in rows] == 4 * [[10] * 3] + 5 * [[30]]
    for groups, windows in ((range(4), 12), (range(4, 9), 5)):
        tokens = np.concatenate([row.input_ids for index in groups for row in rows[index]])
        assert len(set(tokens.tolist())) == len(tokens) == windows * (10 if windows == 12 else 30)
    with pytest.raises(IndexError, match="expected an index below 9, got one greater by 0"):
        rows[9]
    batch = stack([rows[0], rows[1]], answers=False)
    assert batch["input_ids"].shape == (6, 10)
