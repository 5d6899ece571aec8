"""`landmark eval index`: what is recorded is what retrieval scores, recall is counted right, copies
are said to be.
"""

import pytest
import torch

from landmark.eval import index, results
from landmark.memory import retrieval
from landmark.memory.faiss_index import KINDS
from small_text import sentences
from tiny import BLOCK

TEXT = BLOCK - 1


@pytest.fixture(autouse=True)
def few_trials(monkeypatch):
    """Times are medians of the least number of trials: no test here asks how exact they are."""
    monkeypatch.setattr(index, "SECONDS", 0.0)


def ids_of(count, seed=0):
    return torch.randint(0, 290, (count,), generator=torch.Generator().manual_seed(seed))


def test_what_is_recorded_is_what_an_index_is_asked(marked, monkeypatch):
    """Recorded queries against recorded landmarks give the scores that retrieval computes for old
    blocks.
    """
    ids = ids_of(40 * TEXT)
    asked = []
    recorded = index.record(marked, ids, 1, queries=20)
    choose = retrieval.select_with_index

    def kept(query, grid, context):
        found = context.index.rows[0].heads
        search = [head.search for head in found]
        for head, of in zip(found, search, strict=True):
            monkeypatch.setattr(
                head, "search", lambda q, *more, of=of: asked.append(q) or of(q, *more)
            )
        return choose(query, grid, context)

    monkeypatch.setattr(retrieval, "select_with_index", kept)
    with marked.configured(
        layers=(1,)
    ):  # what layer 1 reads does not depend on what an earlier one retrieves
        cache = index.LandmarkCache(marked.model, index="faiss-flat")
        marked.model.read(ids[None, :-TEXT], cache=cache, retrieve=False)
        asked.clear()
        marked.model.read(ids[None, -TEXT : -TEXT + 1], cache=cache)
    heads, repeats = recorded.query.shape[:2]
    # the first of the last 16 slots, the landmark among them, is that of the first of the last 15
    # tokens
    expected = recorded.query[:, :, -16]
    found = torch.stack(asked[:heads])
    assert torch.allclose(found.view(heads, repeats, -1), expected, atol=1e-5)
    old = recorded.keys.shape[1]
    assert torch.allclose(
        recorded.keys, cache.memories[1].store.landmark_keys[0][:, :old].float(), atol=1e-5
    )


def test_rows(marked):
    told = []
    task = index.IndexTask((20, 60), queries=24, max_tokens=40 * TEXT)
    rows = index.run(marked, task, [sentences(4000)], "sentences", told.append)
    assert told == rows and [row.index for row in rows] == [*KINDS, *KINDS]
    for row in rows:
        assert (row.layer, row.queries, row.top_k, row.seed) == (1, 24, 2, 0)
        assert (
            row.step_ms > 0 and row.chunk_ms > 0 and row.nbytes >= row.landmarks * row.heads * 8 * 4
        )
    real = rows[:4]
    copied = rows[4:]
    assert all(row.recorded == 20 and row.heads == 2 and row.noise == 0 for row in real)
    assert all(row.recall == 1 for row in real), (
        "below what lists and graphs are made of every landmark is looked at"
    )
    assert all(row.recorded == 34 and row.heads == 1 and row.noise == index.NOISE for row in copied)
    assert all(row.recall is None for row in copied)


def test_recall_counts_what_was_found():
    right = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    found = torch.tensor([[3, 9, 1, -1], [7, 6, 5, 4]])
    assert index._recall(found, right) == pytest.approx(6 / 8)


def test_the_exact_choice_by_loops():
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 5, 8, generator=random)
    keys = torch.randn(2, 50, 8, generator=random)
    found = index.exact(query, keys, 4)
    for head in range(2):
        for repeat in range(3):
            for position in range(5):
                scores = [float(query[head, repeat, position] @ key) for key in keys[head]]
                best = sorted(sorted(range(50), key=lambda block: -scores[block])[:4])
                assert found[head, repeat, position].tolist() == best


def test_copies_are_noisy(marked):
    recorded = index.Recorded(torch.randn(2, 30, 8), torch.randn(2, 1, 4, 8))
    copies = index.with_copies(recorded, 100, seed=0)
    assert copies.keys.shape == (1, 100, 8) and torch.equal(copies.keys[0, :30], recorded.keys[0])
    apart = (copies.keys[0, 30:60] - recorded.keys[0]) / recorded.keys[0].std(0)
    assert 0.05 < float(apart.std()) < 0.15


def test_rows_are_kept(marked, tmp_path):
    report = results.Recorder(tmp_path / "rows.json", "cpu", lambda row: None)
    index.run(
        marked,
        index.IndexTask((10,), ("exact",), queries=8),
        [sentences(2000)],
        "sentences",
        report,
    )
    assert results.read(tmp_path / "rows.json") == report.rows
