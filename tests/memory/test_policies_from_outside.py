"""Policies that are added from outside the package, as CONTRIBUTING describes it."""

from typing import ClassVar

import pytest
import torch

import models
from landmark import LandmarkCache
from landmark.config import CHOICES, LandmarkConfig
from landmark.memory import policies
from landmark.memory.positions import ExactPositions
from landmark.memory.retrieval import Selector, landmark_scores, select_by_merit

TEXT = models.text(90)[None]


class RecentSelector(Selector):
    """Selects the latest older blocks, whatever their scores."""

    name: ClassVar[str] = "recent"

    def select(self, query, grid, candidates, context, *, is_first):
        """See ``Selector.select``."""
        landmarks = context.store.landmarks_before(candidates)
        scores = landmark_scores(query * context.scale, grid, landmarks, context)
        latest = landmarks.blocks[0].to(scores.dtype).expand_as(scores)
        return select_by_merit(
            latest.masked_fill(scores == -torch.inf, -torch.inf), landmarks, self.config.top_k
        )


class NearPositions(ExactPositions):
    """Reads every selected block right behind the own block."""

    name = "near"
    in_kernels = False

    def distances(self, blocks, valid, grid, config):
        """See ``PositionScheme.distances``."""
        return torch.ones_like(blocks)


class EveryLandmark:
    """An index that finds the blocks that are older than the latest candidates by scoring them."""

    def __init__(self):
        self.ends = []
        self.nbytes = 0
        self.searches = 0

    def follow(self, store, ends):
        """See ``LandmarkIndex.follow``."""
        self.store = store
        self.ends = ends

    def search(self, query, count, lowest, *, keep_first):
        """See ``LandmarkIndex.search``."""
        self.searches += 1
        end = min(self.ends)
        landmarks = self.store.landmarks_before(end)
        scores = torch.einsum("bgrnwd,bgpd->bgrnwp", query, landmarks.keys.to(query.dtype))
        if end == 0:
            scores = torch.full_like(scores, -torch.inf)
        spare = max(0, count - scores.shape[-1])
        scores = torch.nn.functional.pad(scores, (0, spare), value=-torch.inf)
        blocks = torch.nn.functional.pad(landmarks.blocks[0], (0, spare))
        best = scores.topk(count, dim=-1)
        blocks, order = blocks[best.indices].sort(dim=-1)
        return best.values.gather(-1, order), blocks

    def select_rows(self, rows):
        """See ``LandmarkIndex.select_rows``."""


@pytest.fixture
def registered():
    """Registers the three policies, and takes them back."""
    indexes = []

    def make():
        indexes.append(EveryLandmark())
        return indexes[-1]

    policies.register_selector(RecentSelector)
    policies.register_positions(NearPositions())
    policies.register_index("every", policies.IndexKind(make, lambda: None))
    yield indexes
    models.landmark_model("llama", settings())  # it is shared, and is to know no other policies
    CHOICES["granularity"].remove("recent")
    CHOICES["positions"].remove("near")
    del policies.SELECTORS["recent"]
    del policies.SCHEMES["near"]
    del policies.INDEXES["every"]


def settings(**changes):
    fields = {"block_size": 4, "top_k": 2, "local_blocks": 1, "chunk_tokens": 30, **changes}
    return LandmarkConfig(**fields)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@torch.no_grad()
def test_a_selector_prefers_recent_blocks(registered, tier):
    model = models.landmark_model("llama", settings(granularity="recent"))
    cache = LandmarkCache(model.config, tier)
    cache.record = True
    model(TEXT, past_key_values=cache)
    retrieval = cache.retrievals[-1]
    compared = 0
    for column, slot in enumerate(retrieval.positions[0].tolist()):
        older = slot // 4 - 1  # blocks before the one local block
        expected = [block for block in (older - 2, older - 1) if block >= 0]
        for head in range(retrieval.blocks.shape[1]):
            blocks = [each for each in retrieval.blocks[0, head, column].tolist() if each >= 0]
            assert blocks == expected
            compared += 1
    assert compared > 50


@torch.no_grad()
def test_a_position_scheme_says_where_blocks_are_read(registered):
    ids = TEXT[:, :40]
    exact = models.landmark_model("llama", settings(positions="exact"))
    one = exact(ids, use_cache=False).logits
    near = models.landmark_model("llama", settings(positions="near"))
    other = near(ids, use_cache=False).logits
    before = 2 * 3  # tokens whose queries have no older block
    assert torch.equal(one[:, :before], other[:, :before])
    assert (one - other)[:, 20:].abs().max() > 1e-9, "float64 rounds a million times finer"
    cache = LandmarkCache(near.config, "host")
    torch.testing.assert_close(near(ids, past_key_values=cache).logits, other)


@torch.no_grad()
def test_an_index_finds_what_scoring_all_finds(registered):
    model = models.landmark_model("llama", settings())
    expected = model(TEXT, past_key_values=LandmarkCache(model.config)).logits
    found = model(TEXT, past_key_values=LandmarkCache(model.config, index="every")).logits
    assert sum(each.searches for each in registered) > 0
    torch.testing.assert_close(found, expected)


def test_a_name_is_taken_once(registered):
    with pytest.raises(ValueError, match="granularity: expected a new name, got 'recent'"):
        policies.register_selector(RecentSelector)
    with pytest.raises(ValueError, match="positions: expected a new name, got 'near'"):
        policies.register_positions(NearPositions())
    with pytest.raises(ValueError, match="index: expected a new name, got 'exact'"):
        policies.register_index("exact", policies.INDEXES["exact"])
