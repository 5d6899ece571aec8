"""``LandmarkCache``: the KV cache of a landmark model, over all layers."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.hf.cache_io import (
    Attachments,
    CacheContents,
    Saved,
    decoder_of,
    load,
    require_reader,
    require_settings,
    save,
)
from landmark.hf.columns import TextColumns
from landmark.memory.archive.log import Archive, Damaged
from landmark.memory.cropping import check_crop
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.memory.policies import SELECTORS, check_index
from landmark.memory.retrieval import Retrieval
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.tiers import TIERS, OffloadConfig, TransferStats

# Called with a layer's memory, the queries ``(B, H, T, D)`` that attended with it (not rotated),
# the geometry of the call and the softmax scale. It must not change what it gets.
Observer = Callable[[LayerMemory, Tensor, CallGeometry, float], None]
NEW_CACHE = "make a new LandmarkCache(model.config)"


class LandmarkCache(Cache):  # type: ignore[misc]
    """The KV cache of a landmark model, passed as ``past_key_values``.

    It grows with the text and has no maximum length. Lengths count text columns as the caller sees
    them (padding included), never landmarks.

    Args:
        config: a landmark model's config (or the model itself).
        tier: ``device``, ``host`` or ``disk``: the lowest tier that blocks are offloaded to.
        index: how a query finds its blocks. ``exact`` scores every landmark. ``faiss-flat``,
            ``faiss-ivf`` and ``faiss-hnsw`` search an index on the CPU; the last two miss some
            blocks, so that results change.
        **budgets: ``device_bytes``, ``host_bytes`` and ``spill_folder`` of
            ``landmark.memory.storage.tiers.OffloadConfig``.

    Attributes:
        settings: the ``LandmarkConfig`` that the cache was made with.
        index: see above.
        memories: the memory of each layer, ``None`` for a layer that has read nothing.
        offload_config: tier and budgets, over all layers.
        record: whether to keep what each layer retrieves in ``retrievals``.
        retrievals: what was retrieved while ``record`` was set, oldest first.
        pinned: as ``pin`` was told, ``None`` where queries select for themselves.
        observer: called after each layer has attended, as ``Observer`` says, or ``None``. A fork
            has the same one.
        saved: the folder that the cache was opened from or saved to, ``None`` without one.
        rewound: whether something that this folder holds was removed from the cache.

    Raises:
        ValueError: ``config`` is not that of a landmark model, its settings and the index do not go
            together, or as ``OffloadConfig``.
        FileNotFoundError: ``spill_folder`` does not exist.
        ModuleNotFoundError: an index without the package faiss.
    """

    def __init__(
        self, config: Any, tier: str = "device", *, index: str = "exact", **budgets: Any
    ) -> None:
        super().__init__(layers=[])
        config = getattr(config, "config", config)
        fields = getattr(config, "landmark", None)
        if fields is None:
            raise ValueError(
                f"expected a landmark model's config, got {type(config).__name__}; use "
                "landmark.convert"
            )
        self.settings = LandmarkConfig.from_dict(fields)
        check_index(index, self.settings)
        self.index = index
        self.memories: list[LayerMemory | None] = [None] * config.num_hidden_layers
        self.offload_config = OffloadConfig(tier, **budgets)
        self.record = False
        self.pinned: Tensor | None = None
        self.observer: Observer | None = None
        self.retrievals: list[Retrieval] = []
        self.saved: Saved | None = None
        self.rewound = False
        self._columns = TextColumns()
        self._rows = 0  # rows that the layers hold
        self._hidden = False  # whether tokens were hidden and nothing was read since
        self._decoder: weakref.ref[Any] | None = None

    @property
    def tokens(self) -> list[int]:
        """Text tokens of each row, padding not counted."""
        return list(self._columns.tokens)

    @property
    def slots(self) -> list[int]:
        """Slots of each row: its tokens and landmarks."""
        return [slots_for(tokens, self.settings.block_size) for tokens in self._columns.tokens]

    def memory(self, layer: int, tables: RotaryTables) -> LayerMemory:
        """Returns the memory of a layer, made at its first use."""
        # With early exit a config names fewer layers, and some architectures run all the same.
        while len(self.memories) <= layer:
            self.memories.append(None)
        found = self.memories[layer]
        if found is None:
            share = self.offload_config.share(len(self.memories))
            found = LayerMemory(self.settings, tables, layer, share, self.index)
            self.memories[layer] = found
        return found

    def check(self, settings: LandmarkConfig, batch: int, decoder: Any) -> None:
        """Makes sure that a model can go on from this cache.

        Args:
            settings: the landmark settings of the model.
            batch: rows of its text.
            decoder: its decoder.

        Raises:
            ValueError: other settings, other rows, or other weights than those that read so far.
        """
        require_settings(self.settings, settings, "model", NEW_CACHE)
        if self.is_initialized and self.batch_size != batch:
            raise ValueError(
                f"expected {self.batch_size} rows as in the cache, got {batch}; repeat or choose "
                "its rows with batch_repeat_interleave or batch_select_indices, or make a new "
                "LandmarkCache"
            )
        if self.is_initialized:
            require_reader(self.decoder, decoder)
        elif self._rows != batch:
            # A first call that failed, or a crop to nothing, left layers of other rows.
            self.memories = [None] * len(self.memories)
        self._rows = batch
        self._decoder = weakref.ref(decoder)

    def begin_with(
        self, text: Tensor, attention_mask: Tensor | None, embedding: nn.Module, left_out: int = 0
    ) -> None:
        """Prepares the cache for a text that begins with all that was read.

        Rows are repeated to as many as the text has. Where the text is exactly what was read, its
        last column is removed, to be computed again.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            attention_mask: ``(B, T)``, 0 for columns of the text that do not count.
            embedding: the module that embeds token ids.
            left_out: columns read before the text, which the text leaves out.

        Raises:
            ValueError: the text begins otherwise, or its rows are not a multiple of the cache's;
                nothing is changed.
        """
        if not self.is_initialized:
            return
        repeats, rest = divmod(len(text), self.batch_size)
        if rest:
            raise ValueError(
                f"expected {self.batch_size} rows as in the cache, or a multiple, got "
                f"{len(text)}; choose rows with batch_select_indices, or make a new LandmarkCache"
            )
        if not left_out:
            self._columns.check_beginning(text, attention_mask, embedding, repeats)
        if left_out + text.shape[1] == len(self._columns):
            self.crop(-1)
        if repeats > 1:
            self._select_rows(torch.arange(self._rows).repeat_interleave(repeats))

    def commit(self, mask: Tensor, ids: Tensor | None = None) -> None:
        """Counts the columns of a call that every layer has finished.

        Args:
            mask: ``(B, T)`` bool on the CPU, True for text.
            ids: ``(B, T)`` token ids, ``None`` where only embeddings are known.
        """
        for memory in self.layers_in_use():
            memory.commit()
        self._columns.append(mask, ids)
        self._hidden = False

    def ids(self, row: int = 0) -> Tensor:
        """Returns the token ids of a row, ``(tokens,)`` int32, padding left out.

        An id is -1 where only an embedding was given.
        """
        return self._columns.ids_of(row)

    def rollback(self, retrievals: int) -> None:
        """Forgets a call that failed in some layer.

        Args:
            retrievals: how many entries of ``retrievals`` there were before the call.
        """
        del self.retrievals[retrievals:]
        for memory in self.layers_in_use():
            memory.rollback()
        if self._hidden:
            # Some layers hold other keys now where the hidden tokens were: these do not come back.
            self._columns.changes += 1

    @contextmanager
    def unchanged_on_failure(self) -> Iterator[None]:
        """Restores the cache when a call is refused, or fails before it has read anything.

        Tokens that a mask has hidden stay hidden where some layers have read new text in their
        place.
        """
        columns = self._columns.copy()
        hidden = self._hidden
        rewound = self.rewound
        try:
            yield
        except BaseException:
            if self._columns.changes == columns.changes:
                repeats = self._rows // max(1, len(columns.tokens))
                if columns.tokens and repeats > 1:
                    self._select_rows(torch.arange(0, self._rows, repeats))
                self._columns = columns
                self._hidden = hidden
                self.rewound = rewound
            raise

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of text columns read so far, padding included."""
        return len(self._columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns of every row.

        Args:
            tokens_to_remove: ``-n`` removes ``n`` columns; a positive number is the length to keep.

        Raises:
            ValueError: the blocks needed to go on from there were evicted (``max_blocks``); nothing
                is changed.
        """
        length = self.get_seq_length()
        keep = min(length, tokens_to_remove) if tokens_to_remove > 0 else length + tokens_to_remove
        if not self.is_initialized or keep == length:
            return
        if keep < 0:
            raise ValueError(f"expected to remove at most {length} tokens, got {-tokens_to_remove}")
        columns = self._columns.all()
        self._go_back(columns.mask[:, :keep], columns.ids[:, :keep])

    def pin(self, blocks: Tensor | None) -> None:
        """Says which blocks all queries retrieve from now on, in every layer and head.

        Nothing is selected then. A query that has a block among its local ones reads it there. An
        archive does not hold what is pinned.

        Args:
            blocks: ``(B, K)`` blocks with ``K`` of at most ``top_k``, counted from the first of a
                row; -1 for none. ``None`` for own selections again.

        Raises:
            ValueError: another shape, a block twice in a row, or a granularity that keeps a state;
                nothing is changed.
        """
        if blocks is None:
            self.pinned = None
            return
        top_k = self.settings.top_k
        if SELECTORS[self.settings.granularity].keeps_state:
            raise ValueError(
                f"expected a granularity without a state, got {self.settings.granularity!r}; use "
                "token_head"
            )
        shape = tuple(blocks.shape)
        if blocks.ndim != 2 or shape[0] != self._rows or shape[1] > top_k:
            raise ValueError(
                f"expected blocks of shape ({self._rows}, K) with K of at most top_k={top_k}, got "
                f"{shape}; pin fewer, or for each row"
            )
        pinned = torch.full((len(blocks), top_k), -1)
        pinned[:, : blocks.shape[1]] = blocks.cpu()
        ordered = pinned.sort(dim=1).values
        if bool(((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError(f"expected each block once in a row, got {blocks.tolist()}; drop one")
        self.pinned = pinned

    def hide(self, attention_mask: Tensor) -> None:
        """Removes the last tokens of each row that a mask leaves out.

        Their columns count as padding from then on. So a row that ended early in a batch goes on
        behind its end, not behind the padding that ``generate`` wrote.

        Args:
            attention_mask: ``(B, columns)`` of all columns read so far, 0 for those that do not
                count.

        Raises:
            ValueError: another shape, a token that is followed by one that stays, a 1 over a column
                that was read as padding, or as ``crop``; nothing is changed.
        """
        if not self.is_initialized:
            return
        wanted = attention_mask.bool().cpu()
        if not self._columns.are_read_with(wanted):
            self._columns.check_mask(wanted)
            self._go_back(wanted, self._columns.all().ids)
            self._hidden = True

    def check_mask(self, attention_mask: Tensor) -> None:
        """Makes sure that ``hide`` can be given a mask ``(B * repeats, columns)``.

        Raises:
            ValueError: as ``hide``, but for what ``crop`` refuses.
        """
        wanted = attention_mask.bool().cpu()
        if self.is_initialized and len(wanted) % self.batch_size == 0:
            self._columns.check_mask(wanted, len(wanted) // self.batch_size)

    def _go_back(self, mask: Tensor, ids: Tensor) -> None:
        """Keeps the first tokens of every row, those that ``mask`` leaves; raises as ``crop``."""
        tokens = mask.sum(1).tolist()
        check_crop(
            self.layers_in_use(),
            self.settings,
            self.slots,
            [slots_for(n, self.settings.block_size) for n in tokens],
        )
        self._note_change(tokens)
        self._columns.replace(mask, ids)
        for memory in self.layers_in_use():
            memory.note_crop()

    def reset(self) -> None:
        """Forgets everything."""
        self.memories = [None] * len(self.memories)
        self._columns = TextColumns()
        self._hidden = False
        self.retrievals = []
        self.saved = None
        self.rewound = False
        self.pinned = None

    def fork(self) -> LandmarkCache:
        """Returns an independent copy, as ``copy.copy`` and ``copy.deepcopy`` do."""
        return copy.deepcopy(self)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> LandmarkCache:
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> LandmarkCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses to be pickled: a memory may lie in files, and belongs to a model."""
        raise ValueError(
            "a LandmarkCache cannot be pickled, nor saved by torch.save: use cache.save(folder) "
            "and LandmarkCache.open(folder, model), or cache.fork() for a copy"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row ``i`` by row ``beam_idx[i]``.

        Raises:
            ValueError: a row that does not exist, or no row at all.
        """
        if not self.is_initialized:
            return
        rows = beam_idx.cpu()
        if len(rows) == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size:
            raise ValueError(
                f"expected at least one of the rows 0 to {self.batch_size - 1}, got "
                f"{rows.tolist()[:20]}; choose among the rows of the cache"
            )
        self._select_rows(rows)

    @torch.inference_mode(False)
    def _select_rows(self, rows: Tensor) -> None:
        self._note_change([0])
        for memory in self.layers_in_use():
            memory.select_rows(rows)
        if self.is_initialized:
            columns = self._columns.all()
            self._columns.replace(columns.mask[rows], columns.ids[rows])
        self._rows = len(rows)
        if self.pinned is not None:
            self.pinned = self.pinned[rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows (a boolean mask or indices); raises as ``reorder_cache``."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self._columns.tokens)).repeat_interleave(repeats))

    def nbytes(self, *tiers: str) -> int:
        """Returns the bytes of keys, values and indexes in the given tiers, by default in all."""
        return sum(
            memory.nbytes(tier) for memory in self.layers_in_use() for tier in tiers or TIERS
        )

    @property
    def transfers(self) -> TransferStats:
        """Blocks and bytes that moved between tiers, over all layers."""
        return sum((memory.store.stats for memory in self.layers_in_use()), TransferStats())

    @property
    def decoder(self) -> Any:
        """The decoder that read last, ``None`` if it is gone."""
        return None if self._decoder is None else self._decoder()

    def save(
        self,
        folder: str | Path,
        *,
        notes: dict[str, Any] | None = None,
        attachments: Attachments | None = None,
    ) -> None:
        """Saves the memory of one row to a folder.

        To the folder that the memory was opened from or saved to, it appends what came since.

        When this returns, all is on the disk. When it is interrupted, the folder holds what it held
        before.

        Args:
            folder: a new or empty one, or that of this memory.
            notes: JSON to save beside the memory, in place of earlier notes; ``None`` keeps them.
            attachments: bytes to save beside the memory, by name. Each is a function that is given
                how many bytes of it the folder holds, and returns the bytes to append.

        Raises:
            ValueError: several rows, a memory that was cropped since it was saved, a folder that
                holds something else or cannot be written to, no room on the disk, or another
                writer.
            FileNotFoundError: the memory's own folder was removed.
        """
        contents = CacheContents(
            settings=self.settings,
            tokens=self.tokens,
            ids=self.ids(),
            memories=self.layers_in_use(),
            decoder=self.decoder,
            saved=self.saved,
            rewound=self.rewound,
        )
        self.saved = save(contents, Path(folder), notes, attachments or {})
        self.rewound = False

    @classmethod
    @torch.inference_mode(False)
    def open(
        cls, folder: str | Path, model: Any, tier: str = "device", **budgets: Any
    ) -> LandmarkCache:
        """Opens a memory that was saved.

        The tiers ``host`` and ``disk`` do not read its blocks yet. Everything that is read is
        checked; blocks are checked when they are fetched.

        Args:
            folder: the folder that it was saved to.
            model: the landmark model that made it.
            tier: as for ``LandmarkCache``; ``disk`` reads from the folder, and writes what comes on
                top to files in ``spill_folder``.
            **budgets: as for ``LandmarkCache``, and ``index``, which is not saved: it is built
                again at the first call.

        Raises:
            FileNotFoundError: there is no memory in the folder.
            ValueError: the memory was made with another model, dtype or other settings, or
                (``Damaged``) a file is not what was written.
        """
        archive = Archive.open(folder)
        cache = cls(model, tier, **budgets)
        try:
            cache._load(archive, decoder_of(model))
        except Damaged:
            if not archive.is_outdated():
                raise
            # A writer has replaced the file of the partial block in between.
            return cls.open(folder, model, tier, **budgets)
        return cache

    def _load(self, archive: Archive, decoder: Any) -> None:
        """Fills an empty cache from an archive."""

        def memory_of(layer: int) -> LayerMemory:
            return self.memory(layer, decoder.tables_of(layer))

        loaded = load(archive, self.settings, decoder, memory_of)
        mask = torch.ones(1, len(loaded.ids), dtype=torch.bool)
        self._columns.replace(mask, loaded.ids[None])
        self._rows = 1
        self._decoder = weakref.ref(decoder)
        self.saved = loaded.saved

    def _note_change(self, tokens: list[int]) -> None:
        """Is called before rows are cropped to so many tokens, or changed."""
        if self.saved is not None and min(tokens) < self.saved.archive.manifest["tokens"]:
            self.rewound = True

    def layers_in_use(self) -> list[LayerMemory]:
        """Returns the memories of the layers that have read something."""
        return [memory for memory in self.memories if memory is not None]

    def __len__(self) -> int:
        return len(self.memories)

    def __repr__(self) -> str:
        settings = dataclasses.asdict(self.settings)
        return f"LandmarkCache(tokens={self._columns.tokens}, settings={settings})"

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length
    max_cache_len = property(get_max_length)

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        return len(self._columns.tokens) if self.is_initialized else -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return len(self._columns) > 0

    @property
    def is_compileable(self) -> bool:
        """False: the memory grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: ``crop`` leaves no trace."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: none keeps a state of fixed size in place of keys."""
        return [False] * len(self.memories)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses a stock attention layer: landmark layers write their keys themselves."""
        raise ValueError(
            "expected a landmark model with this cache, got a stock attention layer; use "
            "landmark.convert"
        )
