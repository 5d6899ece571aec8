"""Pinned blocks: all queries retrieve them in place of what they select; and who chooses them."""

from dataclasses import dataclass, field

import pytest
import torch

from landmark.blocks import slot_of
from landmark.eval.yardsticks import EvidenceBlocks, evidence, register
from landmark.hf.cache import LandmarkCache
from landmark.hf.gate_loss import QUESTION_TOKENS
from landmark.hf.retrieval_layers import pin_by_layers
from tiny import BLOCK, tiny_landmark

TEXT = 155  # tokens: 10 finished blocks and a part of another; the last two blocks are local
LAYERS = [1]


@pytest.fixture(scope="module")
def model():
    return tiny_landmark()


def ids(tokens, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 300, (rows, tokens), generator=generator)


def answers(model, cache, question, steps=3):
    """Logits of a question's tokens and of some steps behind it."""
    found = [model(question, past_key_values=cache).logits]
    for _ in range(steps):
        token = found[-1][:, -1:].argmax(-1)
        found.append(model(token, past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def offloaded(model, tier, tmp_path):
    spill = {"spill_folder": tmp_path} if tier == "disk" else {}
    return LandmarkCache(model.config, tier, **spill)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("blocks", [[[1, 5], [0, 3]], [[7, 1], [2, 4]]])
def test_queries_read_what_is_pinned(model, tier, blocks, tmp_path):
    """As under the yardstick that selects named blocks."""
    register(EvidenceBlocks)
    question = ids(20, seed=1)
    model.configure_landmark(granularity="evidence")
    try:
        cache = model.read(ids(TEXT), retrieve=False)
        with evidence(blocks):
            expected = answers(model, cache, question)
    finally:
        model.configure_landmark(granularity="token_head")
    cache = model.read(ids(TEXT), cache=offloaded(model, tier, tmp_path), retrieve=False)
    cache.pin(torch.tensor(blocks))
    torch.testing.assert_close(answers(model, cache, question), expected)


@pytest.mark.parametrize("blocks", [[[-1, 4], [2, -1]], [[-1, -1], [-1, -1]]])
def test_fewer_are_read_where_fewer_are_pinned(model, blocks):
    cache = model.read(ids(TEXT), retrieve=False)
    cache.pin(torch.tensor(blocks))
    cache.record = True
    assert answers(model, cache, ids(20, seed=1)).isfinite().all()
    for retrieval in cache.retrievals:
        for row, pinned in enumerate(blocks):
            assert set(retrieval.blocks[row].flatten().tolist()) <= {-1, *pinned}


def test_all_old_blocks_pinned_is_what_selects_them_all(model):
    model.configure_landmark(top_k=12)
    try:
        cache = model.read(ids(TEXT), retrieve=False)
        pinned = cache.fork()
        pinned.pin(torch.arange(12).expand(2, -1))  # those that are local or not there yet, too
        question = ids(20, seed=1)
        torch.testing.assert_close(
            answers(model, pinned, question), answers(model, cache, question)
        )
    finally:
        model.configure_landmark(top_k=2)


def test_a_local_block_is_read_once(model):
    cache = model.read(ids(TEXT), retrieve=False)
    both = []
    for pinned in ([[1, 9], [2, 8]], [[1, -1], [2, -1]]):
        fork = cache.fork()
        fork.pin(torch.tensor(pinned))
        both.append(answers(model, fork, ids(3, seed=1), steps=1))
    torch.testing.assert_close(*both)


def test_rows_carry_what_is_pinned_with_them(model):
    cache = model.read(ids(TEXT), retrieve=False)
    cache.pin(torch.tensor([[1, 5], [0, 3]]))
    question = ids(10, seed=1)
    expected = answers(model, cache.fork(), question)
    cache.batch_repeat_interleave(2)
    found = answers(model, cache, question.repeat_interleave(2, 0))
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0))
    cache.reset()
    assert cache.pinned is None


def test_own_selections_again(model):
    cache = model.read(ids(TEXT), retrieve=False)
    question = ids(10, seed=1)
    expected = answers(model, cache.fork(), question)
    cache.pin(torch.tensor([[1, 5], [0, 3]]))
    changed = answers(model, cache.fork(), question)
    assert not torch.equal(changed, expected)
    cache.pin(None)
    assert torch.equal(answers(model, cache, question), expected)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[1, 2]], r"expected blocks of shape \(2, K\) with K of at most top_k=2, got \(1, 2\)"),
        ([[1, 2, 3], [1, 2, 3]], "pin fewer"),
        ([[1, 1], [1, 2]], "expected each block once in a row"),
    ],
)
def test_wrong_pins(model, blocks, message):
    cache = model.read(ids(TEXT))
    cache.pin(torch.tensor([[1, 5], [0, 3]]))
    with pytest.raises(ValueError, match=message):
        cache.pin(torch.tensor(blocks))
    assert cache.pinned.tolist() == [[1, 5], [0, 3]], "nothing is changed"


def test_a_granularity_with_a_state_is_refused(model):
    model.configure_landmark(granularity="head")
    try:
        cache = model.read(ids(TEXT))
        with pytest.raises(ValueError, match="expected a granularity without a state, got 'head'"):
            cache.pin(torch.tensor([[1, 5], [0, 3]]))
    finally:
        model.configure_landmark(granularity="token_head")


@dataclass
class Kept:
    """An observer that keeps the queries of each layer, and of whom."""

    calls: list = field(default_factory=list)

    def __call__(self, memory, query, geometry, scale):
        self.calls.append((memory, query, geometry, scale))


def scores_in_loops(model, calls, layers, text, prompt):
    """The score of each old block, for each row, from queries and landmark keys one by one.

    ``calls`` were observed in the prompt's pass; ``text`` and ``prompt`` are the tokens of a row.
    """
    settings = model.landmark
    prefix = settings.top_k + 1 + settings.local_blocks
    found = []
    for row, (before, new) in enumerate(zip(text, prompt, strict=True)):
        tokens = range(before + max(0, new - QUESTION_TOKENS), before + new)
        last = slot_of(before + new - 1, BLOCK) // BLOCK
        scores = [0.0] * (last - settings.local_blocks)
        for memory, query, geometry, scale in calls:
            if memory.layer not in layers:
                continue
            keys = memory.store.landmark_keys
            repeats = query.shape[1] // keys.shape[1]
            for token in tokens:
                slot = slot_of(token, BLOCK)
                column = geometry.slots[row].tolist().index(slot)
                position = torch.tensor([prefix * BLOCK + slot % BLOCK])
                rotation = memory.tables.rotary.rotation(position, query.dtype)
                for head in range(query.shape[1]):
                    rotated = rotation.rotate(query[row, head, column][None])[0]
                    for block in range(len(scores)):
                        scores[block] += float(scale * rotated @ keys[row, head // repeats, block])
        found.append(scores)
    return found


@pytest.mark.parametrize("layers", [[1], [1, 2], [0, 2]])
@pytest.mark.parametrize("tokens", [3, 40])
def test_layers_choose_by_the_sum_of_their_scores(layers, tokens):
    """All landmarks of the first layer are equal, so that it changes nothing."""
    model = tiny_landmark(layers=3)
    model.configure_landmark(top_k=4)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, : tokens // 3] = 0
    cache = model.read(ids(TEXT), retrieve=False)
    watched = cache.fork()
    watched.observer = Kept()
    question = ids(tokens, seed=1)
    model(question, attention_mask=mask, past_key_values=watched)
    scores = scores_in_loops(
        model, watched.observer.calls, layers, [TEXT, TEXT], mask.sum(1).tolist()
    )
    expected = [
        sorted(range(len(row)), key=lambda block, row=row: -row[block])[:4] for row in scores
    ]
    assert pin_by_layers(model, cache, question, mask, layers=layers).tolist() == expected
    assert cache.pinned.tolist() == expected


def test_fewer_old_blocks_than_are_chosen():
    model = tiny_landmark()
    model.configure_landmark(top_k=4)
    cache = model.read(ids(80), retrieve=False)  # 5 finished blocks, 3 of them old
    chosen = pin_by_layers(model, cache, ids(9, seed=1), layers=LAYERS)
    assert [sorted(row) for row in chosen.tolist()] == [[-1, 0, 1, 2]] * 2


def test_evicted_blocks_are_not_chosen():
    model = tiny_landmark()
    model.configure_landmark(top_k=8, max_blocks=4)
    cache = model.read(ids(TEXT), retrieve=False)
    chosen = pin_by_layers(model, cache, ids(2, seed=1), layers=LAYERS)
    assert [sorted(row)[-5:] for row in chosen.tolist()] == [[0, 4, 5, 6, 7]] * 2


def test_a_prompt_of_embeddings_chooses_as_its_ids_do(model):
    question = ids(12, seed=1)
    cache = model.read(ids(TEXT), retrieve=False)
    expected = pin_by_layers(model, cache.fork(), question, layers=LAYERS)
    embeds = model.get_input_embeddings()(question).detach()
    assert pin_by_layers(model, cache, embeds, layers=LAYERS).tolist() == expected.tolist()


def test_a_prompt_is_run_to_choose_and_taken_back(model):
    question = ids(12, seed=1)
    mask = torch.ones_like(question)
    mask[1, :5] = 0
    cache = model.read(ids(TEXT), retrieve=False)
    chosen = pin_by_layers(model, cache, question, mask, layers=LAYERS)
    assert cache.tokens == [TEXT, TEXT] and cache.observer is None
    fresh = model.read(ids(TEXT), retrieve=False)
    fresh.pin(chosen)
    torch.testing.assert_close(
        model(question, attention_mask=mask, past_key_values=cache).logits,
        model(question, attention_mask=mask, past_key_values=fresh).logits,
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_generate_pins_for_a_prompt(model, rows):
    """What is written is what the pinned blocks give; afterwards nothing is pinned."""
    text = ids(TEXT)
    question = ids(12, seed=1)
    whole = torch.cat((text, question), dim=1)[:rows]
    model.configure_landmark(retrieval_layers=LAYERS)
    try:
        cache = model.read(text[:rows], retrieve=False)
        fork = cache.fork()
        written = model.generate(whole, past_key_values=cache, max_new_tokens=4, do_sample=False)
        chosen = pin_by_layers(model, fork, question[:rows], layers=LAYERS)
        assert (chosen >= 0).all()
        kept = model.generate(whole, past_key_values=fork, max_new_tokens=4, do_sample=False)
        assert fork.pinned.tolist() == chosen.tolist(), "what the caller pinned stays"
    finally:
        model.configure_landmark(retrieval_layers=None)
    assert cache.pinned is None
    last = written[:, TEXT + 12 :]
    assert torch.equal(kept[:, TEXT + 12 :], last)
    again = model.read(text[:rows], retrieve=False)
    again.pin(chosen)
    assert torch.equal(answers(model, again, question[:rows]).argmax(-1)[:, 11:], last)


def test_generate_for_a_text_that_is_local(model):
    """Nothing is old, so nothing is pinned, and what is written is the same."""
    text = ids(20, rows=1)
    expected = model.generate(
        text, past_key_values=model.read(text[:, :9]), max_new_tokens=60, do_sample=False
    )
    model.configure_landmark(retrieval_layers=LAYERS)
    try:
        cache = model.read(text[:, :9])
        found = model.generate(text, past_key_values=cache, max_new_tokens=60, do_sample=False)
    finally:
        model.configure_landmark(retrieval_layers=None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layers", [[-1], [True], ["1"], 1, [[1, 0]]])
def test_wrong_retrieval_layers(model, layers):
    with pytest.raises(ValueError, match="retrieval_layers: expected"):
        model.configure_landmark(retrieval_layers=layers)


def test_retrieval_layers_that_are_not_there(model):
    with pytest.raises(ValueError, match=r"retrieval_layers: expected indices below 2, got \[7\]"):
        model.configure_landmark(retrieval_layers=[7])


def test_retrieval_layers_are_saved(model, tmp_path):
    model.configure_landmark(retrieval_layers=LAYERS)
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.configure_landmark(retrieval_layers=None)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.landmark.retrieval_layers == tuple(LAYERS)
