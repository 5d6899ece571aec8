"""``LandmarkCache``: what a model remembers of the texts it has read, over all layers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.memory.layer import RECENT_BLOCKS, LayerMemory, Retrieval
from landmark.memory.plan import oldest_needed
from landmark.memory.positions import RotationTables
from landmark.memory.tiers import TIERS, Tiers, Traffic

FREE_TO_CHANGE = ("chunk_tokens", "trained_length", "landmark_trained", "position_gap")


class LandmarkCache(Cache):  # type: ignore[misc]
    """The memory of a landmark model, passed as ``past_key_values``.

    Lengths count text columns as the caller sees them (padding included), never landmarks.

    Args:
        config: a landmark model's config (or the model itself).
        tier: ``device``, ``host`` or ``disk``: the lowest that blocks may move down to.
        **budgets: ``device_bytes``, ``host_bytes`` and ``folder`` of ``landmark.memory.tiers.Tiers``.

    Attributes:
        settings: the ``LandmarkConfig`` it was made with.
        record: whether to keep what each layer retrieves in ``retrievals``.
        retrievals: what was retrieved while ``record`` was set, oldest first.

    Raises:
        ValueError: ``config`` is not that of a landmark model, or as ``Tiers``.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, config: Any, tier: str = "device", **budgets: Any) -> None:
        super().__init__(layers=[])
        config = getattr(config, "config", config)
        fields = getattr(config, "landmark", None)
        if fields is None:
            raise ValueError(f"expected a landmark model's config, got {type(config).__name__}; use landmark.convert")
        self.settings = LandmarkConfig.from_dict(fields)
        self.memories: list[LayerMemory | None] = [None] * config.num_hidden_layers
        self.tiers = Tiers(tier, **budgets)
        self.record = False
        self.retrievals: list[Retrieval] = []
        self._mask: Tensor | None = None  # (B, columns) bool on the CPU
        self._tokens: list[int] = []

    @property
    def tokens(self) -> list[int]:
        """Text tokens of each row, padding not counted."""
        return list(self._tokens)

    @property
    def slots(self) -> list[int]:
        """Slots of each row: its tokens and landmarks."""
        return [slots_for(tokens, self.settings.block_size) for tokens in self._tokens]

    def memory(self, layer: int, tables: RotationTables) -> LayerMemory:
        """Returns layer ``layer``'s memory, made at its first use."""
        found = self.memories[layer]
        if found is None:
            found = self.memories[layer] = LayerMemory(
                self.settings, tables, layer, self.tiers.share(len(self.memories))
            )
        return found

    def check(self, settings: LandmarkConfig, batch: int) -> None:
        """Raises ``ValueError`` unless a model with these settings can go on with ``batch`` rows."""
        same = {name: getattr(self.settings, name) for name in FREE_TO_CHANGE}
        if settings.replace(**same) != self.settings:
            ours, theirs = self.settings.to_dict(), settings.replace(**same).to_dict()
            differing = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
            raise ValueError(
                f"cache and model differ in {differing} (cache, model): make a new LandmarkCache(model.config)"
            )
        if self._mask is not None and len(self._tokens) != batch:
            raise ValueError(
                f"expected {len(self._tokens)} rows as in the cache, got {batch}; make a new LandmarkCache"
            )

    def append(self, mask: Tensor) -> None:
        """Counts columns that all layers have filed; ``mask (B, T)`` bool on the CPU, True for text."""
        for memory in self._made():
            memory.settle()
        counts = mask.sum(1).tolist()
        self._tokens = [a + b for a, b in zip(self._tokens or [0] * len(mask), counts, strict=True)]
        self._mask = mask if self._mask is None else torch.cat((self._mask, mask), dim=1)

    def undo(self) -> None:
        """Forgets what a call that failed in some layer has filed."""
        for memory in self._made():
            memory.undo()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the text columns seen so far, padding included."""
        return 0 if self._mask is None else self._mask.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns of every row.

        Args:
            tokens_to_remove: ``-n`` removes ``n`` columns; a positive number is the length to keep.

        Raises:
            ValueError: the blocks needed to go on from there were evicted (``max_blocks``); nothing is changed.
        """
        length = self.get_seq_length()
        keep = min(length, tokens_to_remove) if tokens_to_remove > 0 else length + tokens_to_remove
        if self._mask is None or keep == length:
            return
        if keep < 0:
            raise ValueError(f"expected to remove at most {length} tokens, got {-tokens_to_remove}")
        tokens = self._mask[:, :keep].sum(1).tolist()
        self._check_crop([slots_for(n, self.settings.block_size) for n in tokens])
        self._mask, self._tokens = self._mask[:, :keep].clone(), tokens
        for memory in self._made():
            memory.forget_peak()

    def _check_crop(self, slots: list[int]) -> None:
        size = self.settings.block_size
        own = min(s // size for s in slots)
        for memory in self._made():
            lowest = oldest_needed(own, self.settings) if memory.retrieves else own - self.settings.local_blocks
            if max(1, lowest) < memory.store.first:
                raise ValueError(
                    f"cannot go back to where block {lowest} is seen: blocks before {memory.store.first} were evicted; "
                    "keep a cache.fork() from there instead"
                )
        if self.settings.granularity == "head":
            far = [a // size - b // size for a, b in zip(self.slots, slots, strict=True) if b % size]
            if far and max(far) >= RECENT_BLOCKS:
                raise ValueError(
                    f"granularity head can go back less than {RECENT_BLOCKS} blocks, or to a block's border, "
                    f"got {max(far)} blocks; keep a cache.fork() from there instead"
                )

    def reset(self) -> None:
        """Forgets everything."""
        self.memories = [None] * len(self.memories)
        self._mask, self._tokens, self.retrievals = None, [], []

    def fork(self) -> LandmarkCache:
        """Returns a copy that goes on independently."""
        shared = {id(memory.tables): memory.tables for memory in self._made()}
        return copy.deepcopy(self, shared)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row ``i`` by row ``beam_idx[i]``."""
        if self._mask is None:
            return
        rows = beam_idx.cpu()
        for memory in self._made():
            memory.select_rows(rows)
        self._mask = self._mask[rows]
        self._tokens = [self._tokens[row] for row in rows.tolist()]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows (a boolean mask or indices)."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self._tokens)).repeat_interleave(repeats))

    def nbytes(self, *tiers: str) -> int:
        """Bytes of keys and values held, in the given tiers or in all."""
        return sum(memory.store.nbytes(tier) for memory in self._made() for tier in tiers or TIERS)

    @property
    def traffic(self) -> Traffic:
        """What moved between tiers, over all layers."""
        return sum((memory.store.traffic for memory in self._made()), Traffic())

    def _made(self) -> list[LayerMemory]:
        return [memory for memory in self.memories if memory is not None]

    def __len__(self) -> int:
        return len(self.memories)

    def __repr__(self) -> str:
        return f"LandmarkCache(tokens={self._tokens}, settings={dataclasses.asdict(self.settings)})"

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        return len(self._tokens) if self._mask is not None else -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self._mask is not None

    @property
    def is_compileable(self) -> bool:
        """False: the memory grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: ``crop`` leaves no trace."""
        return True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: landmark layers file their keys themselves."""
        raise ValueError("expected a landmark model with this cache, got a stock attention layer; use landmark.convert")
