"""Settings of landmark attention; a model stores them as ``config.landmark``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MODES = ("retrieval", "all", "top_k")
GRANULARITIES = ("token_head", "head", "token", "group")
POSITIONS = ("stingy", "exact")
LOCALS = ("blocks", "chunk")
# What fields with names may be. ``add_choice`` adds to those that take policies.
CHOICES = {
    "mode": list(MODES),
    "granularity": list(GRANULARITIES),
    "positions": list(POSITIONS),
    "local": list(LOCALS),
}
# Fields that may change while a memory is used.
FREE_TO_CHANGE = (
    "chunk_tokens",
    "trained_length",
    "landmark_trained",
    "position_gap",
    "position_span",
    "retrieval_layers",
    "retrieval_heads",
)
# Fields that name layers.
LAYERS = ("layers", "retrieval_layers")
# Greatest integer that a setting may have; positions are counted in int64.
GREATEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class LandmarkConfig:
    """How a model inserts landmarks, and what its queries may see.

    The defaults of all settings stand here and nowhere else. Lengths are in *positions* (landmarks
    included) unless a name says tokens.

    Attributes:
        block_size: positions of a block: ``block_size - 1`` text tokens and one landmark.
        top_k: blocks that a query retrieves.
        granularity: which queries share one selection of blocks: ``token_head`` (each token and
            head has its own), ``head`` (the tokens of a block up to the query share it), ``token``
            (all heads share it), ``group`` (the query heads of one key/value head share it). Paper,
            section 3.2.
        positions: RoPE positions of retrieved blocks. ``stingy`` maps any distance into the trained
            length (paper, section 3.3.2); ``exact`` keeps distances.
        local_blocks: finished blocks before a query's own block that it always sees.
        max_blocks: candidates for retrieval are the latest ``max_blocks`` older blocks and block 0;
            ``None`` for all older blocks.
        layers: indices of the layers that retrieve; ``None`` for all. The others see their local
            context and block 0.
        local: what is local. ``blocks`` defines it by block index. With ``chunk`` the whole chunk
            is local and all before it is memory, as in the paper's evaluation; results then depend
            on the chunk size.
        mode: ``retrieval``; ``all``: every query attends to every past block (training);
            ``top_k``: each keeps its best ``top_k + local_blocks`` past blocks, as many as it sees
            in retrieval (training, in one pass without a memory).
        chunk_tokens: text tokens of a prefill chunk. It changes no result, except with
            ``local="chunk"``.
        trained_length: positions the model was trained on; ``None`` when unknown.
        landmark_trained: whether the landmark embedding has been trained.
        position_gap: in training, half of the rows draw ``J`` uniformly from ``0..position_gap``
            and let positions jump by a uniform ``0..J`` after each landmark (after the paper's
            appendix E). 0 switches it off.
        position_span: in training, positions of a longer row start again at 0 after so many, at a
            block drawn for each row. So no distance is longer than this, and far blocks may stand
            at any shorter one, as ``stingy`` places them in retrieval. ``landmark train`` does so
            in rows that ask something. A multiple of ``block_size``; ``None`` keeps distances.
        retrieval_layers: layers whose landmarks choose, in ``generate`` behind a memory, the blocks
            that all layers read (``landmark.hf.prompt_retrieval``), under ``token_head``. Where
            these and ``retrieval_heads`` are ``None``, every query selects for itself.
        retrieval_heads: layer and query head of those that choose among these blocks, or among all,
            by the blocks' text.

    Raises:
        ValueError: a field has a value that is not described here.
    """

    block_size: int = 64
    top_k: int = 4
    granularity: str = "token_head"
    positions: str = "stingy"
    local_blocks: int = 2
    max_blocks: int | None = None
    layers: tuple[int, ...] | None = None
    local: str = "blocks"
    mode: str = "retrieval"
    chunk_tokens: int = 1008
    trained_length: int | None = None
    landmark_trained: bool = False
    position_gap: int = 0
    position_span: int | None = None
    retrieval_layers: tuple[int, ...] | None = None
    retrieval_heads: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.retrieval_heads is not None:
            object.__setattr__(self, "retrieval_heads", _pairs(self.retrieval_heads))
        for name in LAYERS:
            layers = getattr(self, name)
            if layers is None:
                continue
            if not isinstance(layers, list | tuple):
                raise ValueError(
                    f"{name}: expected a list of integers, got {layers!r}; pass {name}=[1]"
                )
            for layer in layers:
                _require_int(name, layer, 0)
            object.__setattr__(self, name, tuple(layers))
        for name, least in (
            ("block_size", 2),
            ("top_k", 1),
            ("local_blocks", 0),
            ("chunk_tokens", 1),
        ):
            _require_int(name, getattr(self, name), least)
        if self.max_blocks is not None:
            _require_int("max_blocks", self.max_blocks, 0)
        if self.trained_length is not None:
            _require_int("trained_length", self.trained_length, 1)
        _require_int("position_gap", self.position_gap, 0)
        if self.position_span is not None:
            _require_int("position_span", self.position_span, 1)
            if self.position_span % self.block_size:
                raise ValueError(
                    f"position_span: expected a multiple of block_size {self.block_size}, got "
                    f"{self.position_span}; pass position_span={8 * self.block_size}"
                )
        if not isinstance(self.landmark_trained, bool):
            raise ValueError(
                f"landmark_trained: expected True or False, got {self.landmark_trained!r}"
            )
        for name in CHOICES:
            _require_choice(name, getattr(self, name))

    @property
    def text_per_block(self) -> int:
        """Text tokens of a block: ``block_size - 1``."""
        return self.block_size - 1

    @property
    def stingy_positions(self) -> int:
        """Positions that ``stingy`` uses.

        They are a prefix of ``top_k + 1`` blocks, the local blocks and the own block.
        """
        return (self.top_k + 1 + self.local_blocks + 1) * self.block_size

    @property
    def largest_top_k(self) -> int | None:
        """Largest ``top_k`` whose stingy positions fit ``trained_length``; ``None`` if unknown."""
        if self.trained_length is None:
            return None
        return self.trained_length // self.block_size - self.local_blocks - 2

    def replace(self, **changes: Any) -> LandmarkConfig:
        """Returns a copy with the given fields changed.

        Raises:
            ValueError: a field is unknown or has a value outside its range.
        """
        known = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(
                f"unknown landmark settings {unknown}: expected some of {sorted(known)}"
            )
        return dataclasses.replace(self, **changes)

    def differences(self, other: LandmarkConfig) -> dict[str, tuple[Any, Any]]:
        """Returns the fields by which ``other`` computes other results from a memory.

        Each has its value in ``self`` and in ``other``. ``FREE_TO_CHANGE`` fields are left out.
        """
        if self == other:
            return {}
        ours = self.to_dict()
        theirs = other.to_dict()
        return {
            name: (ours[name], theirs[name])
            for name in ours
            if ours[name] != theirs[name] and name not in FREE_TO_CHANGE
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types."""
        fields = dataclasses.asdict(self)
        for name in LAYERS:
            if fields[name] is not None:
                fields[name] = list(fields[name])
        if self.retrieval_heads is not None:
            fields["retrieval_heads"] = [list(pair) for pair in self.retrieval_heads]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LandmarkConfig:
        """Builds the settings from what ``to_dict`` returned.

        Raises:
            ValueError: ``fields`` is no mapping, a field is unknown, or a value is out of range.
        """
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise ValueError(
                f"landmark settings: expected a mapping such as {{'block_size': 64}}, got "
                f"{fields!r:.100}"
            )
        return cls().replace(**fields)


def _pairs(heads: Any) -> tuple[tuple[int, int], ...]:
    """Returns layers and heads as tuples; raises ``ValueError`` where they are no pairs."""
    pairs = heads if isinstance(heads, list | tuple) else [heads]
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"retrieval_heads: expected pairs of a layer and a head, got {heads!r}; pass for "
            "example retrieval_heads=[[21, 8]]"
        )
    for number in (number for pair in pairs for number in pair):
        _require_int("retrieval_heads", number, 0)
    return tuple((layer, head) for layer, head in pairs)


def _require_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name}: expected an integer of at least {least}, got {value!r}; pass "
            f"{name}={max(least, 1)}"
        )
    if value > GREATEST:
        raise ValueError(
            f"{name}: expected an integer of at most {GREATEST}, got {value}; pass a smaller one"
        )


def _require_choice(name: str, value: object) -> None:
    if value not in CHOICES[name]:
        remedy = ""
        if name in ("granularity", "positions"):
            remedy = "; a policy from outside has to be registered first: import its file"
        raise ValueError(
            f"{name}: expected one of {', '.join(CHOICES[name])}, got {value!r}{remedy}"
        )


def add_choice(field: str, name: str) -> None:
    """Lets a field take one more name: that of a policy (``landmark.memory.policies``).

    Raises:
        ValueError: the field has this name already.
    """
    if name in CHOICES[field]:
        raise ValueError(f"{field}: expected a new name, got {name!r}; there are {CHOICES[field]}")
    CHOICES[field].append(name)
