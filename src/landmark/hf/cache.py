"""``LandmarkCache``: what a model remembers of the texts it has read, over all layers."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from landmark.blocks import slots_for
from landmark.config import LandmarkConfig
from landmark.hf.cache_io import Saved, Streams, open_saved, require_reader, save
from landmark.hf.columns import TextColumns
from landmark.memory.cropping import check_crop
from landmark.memory.geometry import CallGeometry
from landmark.memory.layer import LayerMemory
from landmark.memory.policies import check_index
from landmark.memory.retrieval import Retrieval
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.tiers import TIERS, OffloadConfig, TransferStats

# Called with a layer's memory, the queries ``(B, H, T, D)`` that attended with it (not rotated),
# the geometry of the call and the softmax scale. What it gets is not to be changed.
Observer = Callable[[LayerMemory, Tensor, CallGeometry, float], None]
NEW_CACHE = "make a new LandmarkCache(model.config)"


class LandmarkCache(Cache):  # type: ignore[misc]
    """The memory of a landmark model, passed as ``past_key_values``.

    Lengths count text columns as the caller sees them (padding included), never landmarks.

    Args:
        config: a landmark model's config (or the model itself).
        tier: ``device``, ``host`` or ``disk``: the lowest that blocks may move down to.
        index: how a query finds its blocks: ``exact`` scores every landmark; ``faiss-flat``,
            ``faiss-ivf`` and ``faiss-hnsw`` ask an index on the CPU. The last two miss some blocks,
            so that results change.
        **budgets: ``device_bytes``, ``host_bytes`` and ``spill_folder`` of
            ``landmark.memory.storage.tiers.OffloadConfig``.

    Attributes:
        settings: the ``LandmarkConfig`` it was made with.
        index: see above.
        record: whether to keep what each layer retrieves in ``retrievals``.
        retrievals: what was retrieved while ``record`` was set, oldest first.
        observer: called after each layer has attended, as ``Observer`` says, or ``None``. A fork
            has the same one.
        saved: the folder that it was opened from or saved to.
        rewound: whether something that was saved has been taken back.

    Raises:
        ValueError: ``config`` is not that of a landmark model, settings that an index cannot serve,
            or as ``OffloadConfig``.
        FileNotFoundError: there is no such folder.
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
        self.tiers = OffloadConfig(tier, **budgets)
        self.record = False
        self.observer: Observer | None = None
        self.retrievals: list[Retrieval] = []
        self.saved: Saved | None = None
        self.rewound = False
        self._columns = TextColumns()
        self._rows = 0  # that the layers hold
        self._hidden = False  # tokens were hidden, and nothing was read since
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
        """Returns layer ``layer``'s memory, made at its first use."""
        while (
            len(self.memories) <= layer
        ):  # early exit says fewer layers, and some architectures run all the same
            self.memories.append(None)
        found = self.memories[layer]
        if found is None:
            found = self.memories[layer] = LayerMemory(
                self.settings, tables, layer, self.tiers.share(len(self.memories)), self.index
            )
        return found

    def check(self, settings: LandmarkConfig, batch: int, decoder: Any) -> None:
        """Raises ``ValueError`` unless a model with these settings can go on with ``batch``
        rows.
        """
        self.check_settings(settings, "model")
        if self.is_initialized and self.batch_size != batch:
            raise ValueError(
                f"expected {self.batch_size} rows as in the cache, got {batch}; repeat or choose "
                "its rows with batch_repeat_interleave or batch_select_indices, or make a new "
                "LandmarkCache"
            )
        if self.is_initialized:
            require_reader(self.decoder, decoder)
        elif (
            self._rows != batch
        ):  # a first call that failed, or a crop to nothing, left layers of other rows
            self.memories = [None] * len(self.memories)
        self._rows = batch
        self._decoder = weakref.ref(decoder)

    def begin_with(
        self, text: Tensor, attention_mask: Tensor | None, embedding: nn.Module, left_out: int = 0
    ) -> None:
        """Makes ready to go on with a text that begins with all that was read.

        Rows are repeated to as many as the text has. Where the text is exactly what was read, its
        last column is removed, to be computed again.

        Args:
            text: ``(B, T)`` token ids, or ``(B, T, hidden)`` embeddings.
            attention_mask: ``(B, T)``, 0 for columns of the text that do not count.
            embedding: gives the embeddings of token ids.
            left_out: columns read before the text, which goes on from there.

        Raises:
            ValueError: the text begins otherwise, or its rows are not a multiple of those here;
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

    def check_settings(self, settings: LandmarkConfig, owner: str, remedy: str = NEW_CACHE) -> None:
        """Raises ``ValueError`` where the settings of ``owner`` compute something else."""
        differing = self.settings.differences(settings)
        if differing:
            raise ValueError(f"cache and {owner} differ in {differing} (cache, {owner}): {remedy}")

    def append(self, mask: Tensor, ids: Tensor | None = None) -> None:
        """Counts columns that all layers have filed.

        Args:
            mask: ``(B, T)`` bool on the CPU, True for text.
            ids: ``(B, T)`` token ids, ``None`` where only embeddings are known.
        """
        for memory in self.layers_in_use():
            memory.commit()
        self._columns.append(mask, ids)
        self._hidden = False

    def ids(self, row: int = 0) -> Tensor:
        """Returns a row's token ids ``(tokens,)`` int32, padding left out; -1 where only embeddings
        were given.
        """
        return self._columns.ids_of(row)

    def undo(self, retrieved: int) -> None:
        """Forgets what a call that failed in some layer has filed, and what it retrieved after
        ``retrieved`` others.
        """
        del self.retrievals[retrieved:]
        for memory in self.layers_in_use():
            memory.rollback()
        if (
            self._hidden
        ):  # some layers hold other keys now where the hidden tokens were: these do not come back
            self._columns.changes += 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the text columns seen so far, padding included."""
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
        mask, ids = self._columns.all()
        self._go_back(mask[:, :keep], ids[:, :keep])

    def hide(self, attention_mask: Tensor) -> None:
        """Takes back the last tokens of each row that a mask leaves out; their columns count as
        padding from then on.

        So a row that ended early in a batch goes on behind its end, not behind the padding that
        ``generate`` wrote.

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
            self._go_back(wanted, self._columns.all()[1])
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
        """Keeps the text that ``mask`` leaves, the first tokens of every row; raises as
        ``crop``.
        """
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

    def fork(self) -> LandmarkCache:
        """Returns a copy that goes on independently; so do ``copy.copy`` and ``copy.deepcopy``."""
        return copy.deepcopy(self)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> LandmarkCache:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> LandmarkCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a memory may lie in files, and belongs to a model."""
        raise ValueError(
            "a LandmarkCache cannot be pickled, nor saved by torch.save: use cache.save(folder) "
            "and LandmarkCache.open(folder, model), or cache.fork() for a copy"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row ``i`` by row ``beam_idx[i]``; raises ``ValueError`` for a row that is not
        there, or for none.
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
            mask, ids = self._columns.all()
            self._columns.replace(mask[rows], ids[rows])
        self._rows = len(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows (a boolean mask or indices); raises as ``reorder_cache``."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self._columns.tokens)).repeat_interleave(repeats))

    def nbytes(self, *tiers: str) -> int:
        """Bytes of keys and values held, those of an index among them, in the given tiers or in
        all.
        """
        return sum(
            memory.nbytes(tier) for memory in self.layers_in_use() for tier in tiers or TIERS
        )

    @property
    def traffic(self) -> TransferStats:
        """What moved between tiers, over all layers."""
        return sum((memory.store.stats for memory in self.layers_in_use()), TransferStats())

    @property
    def decoder(self) -> Any:
        """The decoder that read last, ``None`` if there is none any more."""
        return None if self._decoder is None else self._decoder()

    def save(
        self,
        folder: str | Path,
        *,
        notes: dict[str, Any] | None = None,
        streams: Streams | None = None,
    ) -> None:
        """Saves the memory of one row to a folder, or to its own folder (opened from, saved to)
        what came since.

        When this returns, all is on the disk; when it is interrupted, the folder holds what it held
        before.

        Args:
            folder: a new or empty one, or that of this memory.
            notes: JSON to keep beside it, instead of what was kept so far.
            streams: bytes to keep beside it, by name: each is a function that is given how many
                bytes the folder keeps of it so far, and returns those that come behind them.

        Raises:
            ValueError: several rows, a memory that was cropped since it was saved, a folder that
                holds something else or cannot be written to, no room on the disk, or another
                writer.
            FileNotFoundError: its own folder is not there any more.
        """
        save(self, folder, notes, streams or {})

    @classmethod
    @torch.inference_mode(False)
    def open(
        cls, folder: str | Path, model: Any, tier: str = "device", **budgets: Any
    ) -> LandmarkCache:
        """Opens a memory that was saved; on the tiers ``host`` and ``disk`` without reading its
        blocks.

        Everything that is read is checked; the blocks when they are fetched.

        Args:
            folder: where it was saved.
            model: the landmark model that made it.
            tier: as for ``LandmarkCache``; ``disk`` reads from the folder, and writes what comes on
                top to files in ``spill_folder``.
            **budgets: likewise, and ``index``, which is not saved: it is built again at the first
                call.

        Raises:
            FileNotFoundError: there is no memory in the folder.
            ValueError: it was made with another model, dtype or other settings, or (``Damaged``) is
                not what was written.
        """
        return open_saved(folder, model, tier, budgets)

    def resume(self, ids: Tensor, decoder: Any) -> None:
        """Counts what was read from a folder; ``ids (tokens,)`` int32."""
        self._columns.replace(torch.ones(1, len(ids), dtype=torch.bool), ids[None])
        self._rows = 1
        self._decoder = weakref.ref(decoder)

    def _note_change(self, tokens: list[int]) -> None:
        """Told before rows are cropped to so many tokens, or changed."""
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
        """False for every layer: transformers asks which keep a state of fixed size instead of
        keys.
        """
        return [False] * len(self.memories)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: landmark layers file their keys themselves."""
        raise ValueError(
            "expected a landmark model with this cache, got a stock attention layer; use "
            "landmark.convert"
        )
