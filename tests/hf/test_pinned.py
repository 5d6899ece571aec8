"""Pinned blocks: all queries retrieve them in place of what they select; and who chooses them."""

import pytest
import torch

from landmark.eval.yardsticks import EvidenceBlocks, evidence, register
from landmark.hf.cache import LandmarkCache
from landmark.hf.retrieval_heads import LAST_TOKENS, most_voted, pin_by_heads
from landmark.memory.retrieval import Retrieval
from tiny import BLOCK, tiny_landmark

TEXT = 155  # tokens: 10 finished blocks and a part of another; the last two blocks are local
HEADS = [(1, 0), (1, 3)]


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


def test_heads_vote_by_their_weights():
    """Each of the last tokens that is text counts; landmarks, padding and other heads do not."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(20, 50).repeat(2, 1)
    positions[1, 25:] = -1
    called = []
    for layer in range(3):
        blocks = torch.randint(-1, 9, (2, 4, 30, 2), generator=generator)
        weights = torch.rand(2, 4, 30, 2, generator=generator).masked_fill(blocks < 0, 0)
        called.append(Retrieval(layer, positions, blocks, weights))
    heads = [(0, 1), (2, 3)]
    votes = torch.zeros(2, 9)
    for row, last in enumerate((49, 44)):
        for layer, head in heads:
            for column, position in enumerate(positions[row].tolist()):
                if last - LAST_TOKENS < position <= last and position % BLOCK != BLOCK - 1:
                    for block, weight in zip(
                        called[layer].blocks[row, head, column].tolist(),
                        called[layer].weights[row, head, column].tolist(),
                        strict=True,
                    ):
                        votes[row, block] += weight
    expected = votes.argsort(dim=1, descending=True).masked_fill(
        votes.sort(dim=1, descending=True).values == 0, -1
    )
    assert most_voted(called, heads, BLOCK).tolist() == expected.tolist()


def test_votes_of_heads_that_are_not_there(model):
    cache = model.read(ids(TEXT), retrieve=False)
    with pytest.raises(
        ValueError, match=r"expected heads of layers that retrieve, got \[\[1, 4\]\]"
    ):
        pin_by_heads(model, cache, ids(9), heads=[(0, 1), (1, 4)])
    assert cache.tokens == [TEXT, TEXT] and not cache.retrievals, "the prompt is not kept"


def test_a_prompt_of_embeddings_chooses_as_its_ids_do(model):
    question = ids(12, seed=1)
    cache = model.read(ids(TEXT), retrieve=False)
    expected = pin_by_heads(model, cache.fork(), question, heads=HEADS)
    embeds = model.get_input_embeddings()(question).detach()
    assert pin_by_heads(model, cache, embeds, heads=HEADS).tolist() == expected.tolist()


def test_a_prompt_is_run_to_choose_and_taken_back(model):
    question = ids(12, seed=1)
    mask = torch.ones_like(question)
    mask[1, :5] = 0
    cache = model.read(ids(TEXT), retrieve=False)
    watched = cache.fork()
    watched.record = True
    model(question, attention_mask=mask, past_key_values=watched)
    expected = most_voted(watched.retrievals, HEADS, BLOCK)[:, :2]
    chosen = pin_by_heads(model, cache, question, mask, heads=HEADS)
    assert chosen.tolist() == expected.tolist() == cache.pinned.tolist()
    assert cache.tokens == [TEXT, TEXT] and not cache.retrievals and not cache.record
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
    model.configure_landmark(retrieval_heads=HEADS)
    try:
        cache = model.read(text[:rows], retrieve=False)
        fork = cache.fork()
        written = model.generate(whole, past_key_values=cache, max_new_tokens=4, do_sample=False)
        chosen = pin_by_heads(model, fork, question[:rows], heads=HEADS)
        assert (chosen >= 0).all()
        kept = model.generate(whole, past_key_values=fork, max_new_tokens=4, do_sample=False)
        assert fork.pinned.tolist() == chosen.tolist(), "what the caller pinned stays"
    finally:
        model.configure_landmark(retrieval_heads=None)
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
    model.configure_landmark(retrieval_heads=HEADS)
    try:
        cache = model.read(text[:, :9])
        found = model.generate(text, past_key_values=cache, max_new_tokens=60, do_sample=False)
    finally:
        model.configure_landmark(retrieval_heads=None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("heads", [[], [[1]], [1, 2], [[1, -1]], [[True, 1]], "21.8"])
def test_wrong_retrieval_heads(model, heads):
    with pytest.raises(ValueError, match="retrieval_heads: expected"):
        model.configure_landmark(retrieval_heads=heads)


def test_retrieval_heads_of_a_layer_that_is_not_there(model):
    with pytest.raises(ValueError, match=r"retrieval_heads: expected indices below 2, got \[7\]"):
        model.configure_landmark(retrieval_heads=[[7, 0]])


def test_retrieval_heads_are_saved(model, tmp_path):
    model.configure_landmark(retrieval_heads=HEADS)
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.configure_landmark(retrieval_heads=None)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.landmark.retrieval_heads == tuple(HEADS)
