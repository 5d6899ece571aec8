"""Heads that choose among old blocks by their text: against scores one by one, and in a run."""

import types

import pytest
import torch
from toy import silent, toy_recipe

import landmark
from landmark.blocks import slot_of
from landmark.data.episodes import Row, RowQuestion
from landmark.hf.gate_loss import QUESTION_TOKENS
from landmark.train import heads as heads_module
from landmark.train.heads import RowScores, best_heads
from landmark.train.run import train
from tiny import BLOCK, tiny_landmark

TOKENS = 200
QUESTIONS = (
    RowQuestion(range(150, 162), range(160, 162), (range(20, 22), range(88, 91))),
    RowQuestion(range(165, 168), range(166, 168), (range(3, 5),)),
    RowQuestion(range(190, 198), range(196, 198), (range(185, 187),)),  # local
)


@pytest.fixture(scope="module")
def model():
    return tiny_landmark(layers=3)


def row(seed=0, questions=QUESTIONS):
    ids = torch.randint(5, 300, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    return Row(ids.numpy(), ids.numpy(), (ids > 300).numpy(), questions=questions)


def test_scores_are_those_of_a_loop(model):
    found = RowScores(model, row())
    assert found.heads == [(layer, head) for layer in range(3) for head in range(4)]
    assert found.evidence == [[1, 5, 6], [0]]
    kept = []
    cache = landmark.LandmarkCache(model.config)
    cache.observer = lambda *call: kept.append(call)
    model.read(torch.tensor(row().input_ids)[None], cache=cache)
    settings = model.landmark
    prefix = settings.top_k + 1 + settings.local_blocks
    for question, scores in zip(QUESTIONS[:2], found.scores, strict=True):
        end = question.answer.start
        own = slot_of(end - 1, BLOCK) // BLOCK
        assert scores.shape == (12, own - settings.local_blocks)
        expected = torch.zeros_like(scores)
        for memory, query, geometry, scale in kept:
            slots = geometry.slots[0].tolist()
            for token in range(max(question.tokens.start, end - QUESTION_TOKENS), end):
                slot = slot_of(token, BLOCK)
                if slot not in slots:  # of another call
                    continue
                position = torch.tensor([prefix * BLOCK + slot % BLOCK])
                rotation = memory.tables.rotary.rotation(position, query.dtype)
                for head in range(4):
                    asked = rotation.rotate(query[0, head, slots.index(slot)][None])[0]
                    for block in range(scores.shape[1]):
                        where = torch.tensor([head // 2]), torch.tensor([block])
                        keys, _ = memory.store.pool.gather(*where)
                        mass = (scale * keys[0, :-1] @ asked).logsumexp(0)
                        expected[memory.layer * 4 + head, block] += mass
        torch.testing.assert_close(scores, expected)


def test_heads_are_added_while_they_help(model, monkeypatch):
    """The second head is wrong alone and right together with the first."""

    found = types.SimpleNamespace(
        heads=[(0, 0), (0, 1), (1, 0)],
        scores=[
            torch.tensor([[9.0, 0.0, 1.0], [5.0, 9.0, 8.0], [0.0, 1.0, 2.0]]),
            torch.tensor([[8.0, 9.0, 0.0], [5.0, 0.0, 9.0], [1.0, 1.0, 0.0]]),
        ],
        evidence=[[0], [0]],
    )
    monkeypatch.setattr(heads_module, "RowScores", lambda model, row: found)
    assert best_heads(model, [row()], 1) == ((0, 0),)
    assert best_heads(model, [row()], 3) == ((0, 0), (0, 1))


def test_nothing_to_choose_by(model):
    assert best_heads(model, [], 3) is None
    assert best_heads(model, [row(questions=QUESTIONS[2:])], 3) is None


def test_a_run_names_heads(books, scratch, tmp_path):
    recipe = toy_recipe(steps=2, episodes=1.0, named_heads=2)
    train(str(books), tmp_path, recipe=recipe, tokenizer=str(scratch[0]), report=silent)
    named = landmark.load(tmp_path).landmark.retrieval_heads
    assert 1 <= len(set(named)) <= 2
    assert all(layer < 2 and head < 2 for layer, head in named)
