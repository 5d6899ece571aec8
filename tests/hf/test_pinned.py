"""Pinned blocks: all queries retrieve them in place of what they select; and who chooses them."""

from dataclasses import dataclass, field

import pytest
import torch

from landmark.blocks import slot_of
from landmark.eval.yardsticks import EvidenceBlocks, evidence, register
from landmark.hf import prompt_retrieval
from landmark.hf.cache import LandmarkCache
from landmark.hf.gate_loss import QUESTION_TOKENS
from landmark.hf.prompt_retrieval import pin_for_prompt
from tiny import BLOCK, tiny_landmark

TEXT = 155  # tokens: 10 finished blocks and a part of another; the last two blocks are local
HEADS_OF_A_LAYER = range(4)
CHOSEN_BY = {"retrieval_layers": [1], "retrieval_heads": [[1, 0], [1, 3]]}


@pytest.fixture(scope="module")
def model():
    return tiny_landmark()


@pytest.fixture
def choosing():
    """A model in which a layer and two of its heads choose."""
    model = tiny_landmark()
    model.configure_landmark(**CHOSEN_BY)
    return model


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


def rotated_queries(model, calls, row, tokens):
    """Yields each layer's memory, with a head and its rotated, scaled query of a token."""
    settings = model.landmark
    prefix = settings.top_k + 1 + settings.local_blocks
    for memory, query, geometry, scale in calls:
        for token in tokens:
            slot = slot_of(token, BLOCK)
            column = geometry.slots[row].tolist().index(slot)
            position = torch.tensor([prefix * BLOCK + slot % BLOCK])
            rotation = memory.tables.rotary.rotation(position, query.dtype)
            for head in range(query.shape[1]):
                rotated = rotation.rotate(query[row, head, column][None])[0]
                yield memory, head, scale * rotated


def scores_in_loops(model, calls, row, before, new):
    """The scores of each old block for a row, by landmarks and by text, one by one.

    ``calls`` were observed in the prompt's pass; ``before`` and ``new`` are the tokens of the text
    and of the prompt.
    """
    settings = model.landmark
    tokens = range(before + max(0, new - QUESTION_TOKENS), before + new)
    last = slot_of(before + new - 1, BLOCK) // BLOCK
    blocks = range(last - settings.local_blocks)
    by_landmark = [0.0 for _ in blocks]
    by_text = [0.0 for _ in blocks]
    for memory, head, query in rotated_queries(model, calls, row, tokens):
        groups = memory.store.landmark_keys.shape[1]
        group = head // (len(HEADS_OF_A_LAYER) // groups)
        for block in blocks:
            if memory.layer in (settings.retrieval_layers or ()):
                by_landmark[block] += float(query @ memory.store.landmark_keys[row, group, block])
            if (memory.layer, head) in (settings.retrieval_heads or ()):
                row_head = torch.tensor([row * groups + group])
                keys, _ = memory.store.pool.gather(row_head, torch.tensor([block]))
                masses = [(query @ key).exp() for key in keys[0, : BLOCK - 1]]
                by_text[block] += float(sum(masses).log())
    return by_landmark, by_text


def order(scores):
    return sorted(range(len(scores)), key=lambda block: -scores[block])


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    "chosen_by",
    [
        {"retrieval_layers": [1]},
        {"retrieval_layers": [0, 2]},  # all landmarks of the first layer are equal
        {"retrieval_heads": [[1, 2]]},
        {"retrieval_heads": [[0, 3], [2, 0], [2, 1]]},
        {"retrieval_layers": [1, 2], "retrieval_heads": [[2, 3], [1, 0]]},
    ],
)
def test_blocks_are_chosen_by_sums_of_scores(tier, tokens, chosen_by, tmp_path, monkeypatch):
    """Where landmarks and text score, landmarks choose six blocks and text four of them."""
    monkeypatch.setattr(prompt_retrieval, "CANDIDATES", 6)
    monkeypatch.setattr(prompt_retrieval, "AT_ONCE", 5)
    model = tiny_landmark(layers=3)
    model.configure_landmark(top_k=4, **chosen_by)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, : tokens // 3] = 0
    cache = model.read(ids(TEXT), cache=offloaded(model, tier, tmp_path), retrieve=False)
    watched = model.read(ids(TEXT), retrieve=False)
    watched.observer = Kept()
    question = ids(tokens, seed=1)
    model(question, attention_mask=mask, past_key_values=watched)
    expected = []
    for row in range(2):
        scores = scores_in_loops(model, watched.observer.calls, row, TEXT, int(mask[row].sum()))
        by_landmark, by_text = map(order, scores)
        if len(chosen_by) == 2:
            by_text = [block for block in by_text if block in by_landmark[:6]]
        best = by_text if "retrieval_heads" in chosen_by else by_landmark
        expected.append(best[:4])
    assert pin_for_prompt(model, cache, question, mask).tolist() == expected
    assert cache.pinned.tolist() == expected


def test_fewer_old_blocks_than_are_chosen(choosing):
    choosing.configure_landmark(top_k=4)
    cache = choosing.read(ids(80), retrieve=False)  # 5 finished blocks, 3 of them old
    chosen = pin_for_prompt(choosing, cache, ids(9, seed=1))
    assert [sorted(row) for row in chosen.tolist()] == [[-1, 0, 1, 2]] * 2


def test_evicted_blocks_are_not_chosen(choosing):
    choosing.configure_landmark(top_k=8, max_blocks=4)
    cache = choosing.read(ids(TEXT), retrieve=False)
    chosen = pin_for_prompt(choosing, cache, ids(2, seed=1))
    assert [sorted(row)[-5:] for row in chosen.tolist()] == [[0, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrieval_heads": [[0, 1], [1, 4]]}, r"retrieval_heads: .* got \[\[1, 4\]\]"),
        ({"retrieval_heads": [[0, 1]], "layers": [1]}, r"retrieval_heads: .* got \[\[0, 1\]\]"),
        ({"retrieval_layers": [0, 1], "layers": [1]}, r"retrieval_layers: .* got \[0\]"),
    ],
)
def test_who_chooses_has_to_retrieve(settings, message):
    model = tiny_landmark()
    model.configure_landmark(**settings)
    cache = model.read(ids(TEXT), retrieve=False)
    with pytest.raises(ValueError, match=message):
        pin_for_prompt(model, cache, ids(9))
    assert cache.tokens == [TEXT, TEXT], "the prompt is not kept"
    assert cache.pinned is None


def test_a_prompt_of_embeddings_chooses_as_its_ids_do(choosing):
    question = ids(12, seed=1)
    cache = choosing.read(ids(TEXT), retrieve=False)
    expected = pin_for_prompt(choosing, cache.fork(), question)
    embeds = choosing.get_input_embeddings()(question).detach()
    assert pin_for_prompt(choosing, cache, embeds).tolist() == expected.tolist()


def test_a_prompt_is_run_to_choose_and_taken_back(choosing):
    question = ids(12, seed=1)
    mask = torch.ones_like(question)
    mask[1, :5] = 0
    cache = choosing.read(ids(TEXT), retrieve=False)
    cache.record = True
    chosen = pin_for_prompt(choosing, cache, question, mask)
    assert cache.tokens == [TEXT, TEXT] and cache.observer is None
    assert cache.record and not cache.retrievals
    fresh = choosing.read(ids(TEXT), retrieve=False)
    fresh.pin(chosen)
    torch.testing.assert_close(
        choosing(question, attention_mask=mask, past_key_values=cache).logits,
        choosing(question, attention_mask=mask, past_key_values=fresh).logits,
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_generate_pins_for_a_prompt(choosing, rows):
    """What is written is what the pinned blocks give; afterwards nothing is pinned."""
    text = ids(TEXT)
    question = ids(12, seed=1)
    whole = torch.cat((text, question), dim=1)[:rows]
    cache = choosing.read(text[:rows], retrieve=False)
    fork = cache.fork()
    written = choosing.generate(whole, past_key_values=cache, max_new_tokens=4, do_sample=False)
    chosen = pin_for_prompt(choosing, fork, question[:rows])
    assert (chosen >= 0).all()
    kept = choosing.generate(whole, past_key_values=fork, max_new_tokens=4, do_sample=False)
    assert fork.pinned.tolist() == chosen.tolist(), "what the caller pinned stays"
    assert cache.pinned is None
    last = written[:, TEXT + 12 :]
    assert torch.equal(kept[:, TEXT + 12 :], last)
    again = choosing.read(text[:rows], retrieve=False)
    again.pin(chosen)
    assert torch.equal(answers(choosing, again, question[:rows]).argmax(-1)[:, 11:], last)


def test_generate_for_a_text_that_is_local(model, choosing):
    """Nothing is old, so nothing is pinned, and what is written is the same."""
    text = ids(20, rows=1)
    expected, found = (
        each.generate(
            text, past_key_values=each.read(text[:, :9]), max_new_tokens=60, do_sample=False
        )
        for each in (model, choosing)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layers", [[-1], [True], ["1"], 1, [[1, 0]]])
def test_wrong_retrieval_layers(model, layers):
    with pytest.raises(ValueError, match="retrieval_layers: expected"):
        model.configure_landmark(retrieval_layers=layers)


@pytest.mark.parametrize("heads", [[], [[1]], [1, 2], [[1, -1]], [[True, 1]], "21.8"])
def test_wrong_retrieval_heads(model, heads):
    with pytest.raises(ValueError, match="retrieval_heads: expected"):
        model.configure_landmark(retrieval_heads=heads)


@pytest.mark.parametrize(("name", "value"), [("layers", [7]), ("heads", [[7, 0]])])
def test_layers_that_are_not_there(model, name, value):
    message = rf"retrieval_{name}: expected indices below 2, got \[7\]"
    with pytest.raises(ValueError, match=message):
        model.configure_landmark(**{f"retrieval_{name}": value})


def test_who_chooses_is_saved(choosing, tmp_path):
    choosing.save_pretrained(tmp_path)
    loaded = type(choosing).from_pretrained(tmp_path).landmark
    assert loaded.retrieval_layers == (1,)
    assert loaded.retrieval_heads == ((1, 0), (1, 3))
