"""Positions of a row in training: where they start again, and the jumps after landmarks."""

import pytest
import torch

import landmark
from landmark import LandmarkConfig
from landmark.hf.layout import packed_layout, plain_layout
from models import landmark_model, text
from tiny import tiny_llama

SIZE = 16
SPAN = 4 * SIZE
TOKENS = 150  # ten blocks


def drawn(settings, layout=None, seed=0, batch=64):
    torch.manual_seed(seed)
    layout = layout or plain_layout(TOKENS, SIZE, torch.device("cpu"))
    return layout.training_positions(batch, settings).expand(batch, -1)


def test_a_row_keeps_its_positions_without_settings():
    positions = drawn(LandmarkConfig(block_size=SIZE))
    assert (positions == torch.arange(positions.shape[1])).all()


def test_positions_start_again_at_a_block_of_each_row():
    positions = drawn(LandmarkConfig(block_size=SIZE, position_span=SPAN))
    assert positions.min() == 0
    assert positions.max() == SPAN - 1
    steps = positions.diff(dim=1)
    restarts = steps != 1
    assert (positions[:, 1:][restarts] == 0).all()
    _, slots = restarts.nonzero(as_tuple=True)
    assert ((slots + 1) % SIZE == 0).all()
    first = restarts.int().argmax(1)
    assert len(first.unique()) == SPAN // SIZE
    for row in restarts:
        between = row.nonzero()[:, 0].diff()
        assert (between == SPAN).all()


def test_only_some_rows_start_again():
    restarts = torch.tensor([-1, 0, 1, 3])
    layout = plain_layout(TOKENS, SIZE, torch.device("cpu"))
    settings = LandmarkConfig(block_size=SIZE, position_span=SPAN)
    positions = layout.training_positions(4, settings, restarts)
    assert (positions[0] == torch.arange(layout.width)).all()
    for row, first in zip(positions[1:], [SPAN, SIZE, 3 * SIZE], strict=True):
        begins = (row == 0).nonzero()[:, 0].tolist()
        assert begins == [0, *range(first, layout.width, SPAN)]
        assert (row.diff()[row[1:] != 0] == 1).all()


def test_a_row_of_the_span_keeps_its_positions():
    layout = plain_layout(SPAN - SPAN // SIZE, SIZE, torch.device("cpu"))
    assert layout.width == SPAN
    positions = drawn(LandmarkConfig(block_size=SIZE, position_span=SPAN), layout)
    assert (positions == torch.arange(SPAN)).all()


def test_jumps_are_counted_from_where_positions_start():
    gap = 8
    settings = LandmarkConfig(block_size=SIZE, position_span=SPAN, position_gap=gap)
    positions = drawn(settings, batch=256)
    assert positions.min() == 0
    assert SPAN < positions.max() < SPAN + gap * (SPAN // SIZE)
    steps = positions.diff(dim=1)
    inside = torch.arange(1, positions.shape[1]) % SIZE != 0
    assert (steps[:, inside] == 1).all()
    at_borders = steps[:, ~inside]
    jumps = at_borders[at_borders > 0]
    assert jumps.min() == 1
    assert jumps.max() == 1 + gap
    assert (positions[:, 1:][steps < 0] == 0).all()


def test_documents_of_a_row_start_again_on_their_own():
    documents = torch.zeros(1, TOKENS, dtype=torch.long)
    documents[:, 30:] = 1
    layout = packed_layout(documents, SIZE)
    positions = drawn(LandmarkConfig(block_size=SIZE, position_span=SPAN), layout)
    begins = layout.positions.expand(64, -1) == 0
    assert (positions[begins] == 0).all()
    assert positions.max() < SPAN


def test_only_training_draws_positions():
    settings = LandmarkConfig(block_size=SIZE, mode="all", position_span=SPAN)
    model = landmark_model("llama", settings)
    ids = text(TOKENS)[None]
    stays = model(ids).logits
    assert torch.equal(stays, model(ids).logits)
    model.train()
    drawn_anew = model(ids).logits
    model.eval()
    assert not torch.allclose(stays, drawn_anew, atol=1e-4)


def test_a_converted_model_keeps_its_span():
    model = landmark.convert(tiny_llama(), block_size=SIZE, position_span=SPAN)
    assert model.landmark.position_span == SPAN


@pytest.mark.parametrize("span", [0, -64, 40, 1.5, True])
def test_a_span_is_whole_blocks(span):
    with pytest.raises(ValueError, match="position_span: expected"):
        LandmarkConfig(block_size=SIZE, position_span=span)
