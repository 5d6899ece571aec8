"""Recall of evidence: counts against a loop, and against what a model is seen to retrieve."""

import random

import pytest
import torch

import models
from landmark.config import LandmarkConfig
from landmark.hf.cache import LandmarkCache
from landmark.hf.recall import EvidenceQuery, EvidenceRecall
from landmark.memory.retrieval import Retrieval

SIZE = 8  # positions of a block: 7 text tokens and a landmark
SETTINGS = LandmarkConfig(block_size=SIZE, top_k=2, local_blocks=1)


def retrieval(layer, columns, blocks):
    """One row, one head for each list of ``blocks``."""
    return Retrieval(
        layer,
        torch.tensor([columns]),
        torch.tensor([blocks]),
        torch.zeros(1, len(blocks), len(columns), len(blocks[0][0])),
    )


def test_a_block_of_any_mention_is_enough():
    recall = EvidenceRecall(SETTINGS)
    query = EvidenceQuery(0, 50, (range(3, 5), range(20, 22)))  # in blocks 0, and 2 to 3
    slot = 50 + 50 // 7
    heads = [[[-1, -1], [0, 4]], [[0, 1], [1, 4]], [[2, 3], [3, -1]]]
    recall.add([retrieval(1, [slot - 1, slot], heads)], [query])
    (layer,) = recall.layers()
    assert (layer.layer, layer.heads, layer.any_head) == (1, (1.0, 0.0, 1.0), 1.0)
    assert recall.queries == 1


def test_local_evidence_is_not_counted():
    recall = EvidenceRecall(SETTINGS)
    near = EvidenceQuery(0, 50, (range(0, 2), range(40, 44)))  # block 6 is local to block 7
    far = EvidenceQuery(0, 50, (range(0, 2), range(35, 42)))  # block 5 is not
    recall.add([retrieval(0, [57], [[[-1, -1]]])], [near])
    assert recall.queries == 0 and recall.layers() == []
    recall.add([retrieval(0, [57], [[[4, 5]]])], [near, far])
    assert recall.queries == 1 and recall.layers()[0].heads == (1.0,)


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_a_loop(seed):
    rng = random.Random(seed)
    rows = 3
    heads = 2
    tokens = 90
    recall = EvidenceRecall(SETTINGS)
    expected = {layer: [0] * (heads + 1) for layer in (0, 2)}
    queries = 0
    for _ in range(3):
        slots = torch.tensor([[t + t // 7 for t in range(tokens)]] * rows)
        found = {layer: torch.randint(-1, 12, (rows, heads, tokens, 2)) for layer in expected}
        asked = [
            EvidenceQuery(
                rng.randrange(rows),
                rng.randrange(30, tokens),
                tuple(range(b, b + rng.randrange(1, 9)) for b in rng.sample(range(60), 2)),
            )
            for _ in range(20)
        ]
        # The same call in two parts.
        calls = [
            Retrieval(layer, slots[:, part], blocks[:, :, part], blocks[:, :, part])
            for layer, blocks in found.items()
            for part in (slice(0, 40), slice(40, None))
        ]
        recall.add(calls, asked)
        for query in asked:
            evidence = {token // 7 for mention in query.evidence for token in mention}
            if max(evidence) >= query.token // 7 - 1:
                continue
            queries += 1
            for layer, blocks in found.items():
                hits = [bool(evidence & set(b)) for b in blocks[query.row, :, query.token].tolist()]
                for head, hit in enumerate(hits):
                    expected[layer][head] += hit
                expected[layer][heads] += any(hits)
    assert recall.queries == queries > 10
    for layer in recall.layers():
        counts = [*layer.heads, layer.any_head]
        assert counts == pytest.approx([n / queries for n in expected[layer.layer]])


def test_a_model_that_retrieves_everything_finds_everything():
    model = models.landmark_model("llama", SETTINGS.replace(top_k=20))
    ids = models.text(140)[None]
    cache = LandmarkCache(model.config)
    cache.record = True
    model.read(ids, cache=cache)
    recall = EvidenceRecall(model.landmark)
    recall.add(cache.retrievals, [EvidenceQuery(0, 139, (range(30, 33),))])
    assert recall.queries == 1
    for layer in recall.layers():
        assert layer.any_head == 1.0 and set(layer.heads) == {1.0}
