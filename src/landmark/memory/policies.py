"""Policies by name, and how to add one from outside the package.

A policy is one small object. Importing the file that registers it is all that is needed before a
``LandmarkConfig`` or ``LandmarkCache`` names it:

- a *selector* says who shares a selection of blocks, and which blocks it prefers
  (``LandmarkConfig.granularity``);
- a *position scheme* says at which RoPE positions blocks are scored and read
  (``LandmarkConfig.positions``);
- an *index* finds the best landmarks without scoring every one (``LandmarkCache(index=...)``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from landmark.config import LandmarkConfig, add_choice
from landmark.memory.faiss_index import FaissIndex, require_faiss
from landmark.memory.head_choice import HeadSelector
from landmark.memory.landmark_index import LandmarkIndex
from landmark.memory.positions import SCHEMES, PositionScheme
from landmark.memory.retrieval import GroupSelector, Selector, TokenHeadSelector, TokenSelector


@dataclass(frozen=True)
class IndexKind:
    """A kind of index.

    Attributes:
        make: returns an empty index for one layer; ``None`` where every landmark is scored.
        require: raises ``ModuleNotFoundError`` where a package is missing.
    """

    make: Callable[[], LandmarkIndex | None]
    require: Callable[[], object]


def _nothing() -> None:
    """Returns nothing: there is no index, and no package is needed."""


SELECTORS: dict[str, type[Selector]] = {
    each.name: each for each in (TokenHeadSelector, HeadSelector, TokenSelector, GroupSelector)
}
INDEXES: dict[str, IndexKind] = {"exact": IndexKind(_nothing, _nothing)}
for _name in ("faiss-flat", "faiss-ivf", "faiss-hnsw"):
    INDEXES[_name] = IndexKind(partial(FaissIndex, _name), require_faiss)


def register_selector(selector: type[Selector]) -> None:
    """Makes ``selector.name`` a value of ``LandmarkConfig.granularity``.

    Raises:
        ValueError: there is a selector of this name.
    """
    add_choice("granularity", selector.name)
    SELECTORS[selector.name] = selector


def register_positions(scheme: PositionScheme) -> None:
    """Makes ``scheme.name`` a value of ``LandmarkConfig.positions``.

    Raises:
        ValueError: there is a scheme of this name.
    """
    add_choice("positions", scheme.name)
    SCHEMES[scheme.name] = scheme


def register_index(name: str, kind: IndexKind) -> None:
    """Makes ``name`` a value of ``LandmarkCache``'s ``index``.

    Raises:
        ValueError: there is an index of this name.
    """
    if name in INDEXES:
        raise ValueError(f"index: expected a new name, got {name!r}; there are {sorted(INDEXES)}")
    INDEXES[name] = kind


def check_index(name: str, config: LandmarkConfig) -> None:
    """Makes sure that an index can stand in for scoring every landmark.

    Raises:
        ValueError: an unknown index, or settings under which a selection needs every score.
        ModuleNotFoundError: its package is missing.
    """
    if name not in INDEXES:
        raise ValueError(f"index: expected one of {', '.join(INDEXES)}, got {name!r}")
    if name == "exact":
        return
    reasons = {
        "mode": ("retrieval", "nothing is chosen otherwise"),
        "granularity": ("token_head", "the others score every landmark"),
        "positions": ("stingy", "otherwise each landmark is rotated for each query"),
    }
    for field, (needed, reason) in reasons.items():
        found = getattr(config, field)
        if found != needed:
            raise ValueError(
                f"index {name!r}: expected {field}={needed!r} ({reason}), got {found!r}; set it, "
                "or leave index='exact'"
            )
    INDEXES[name].require()
