"""One layer's memory: appends keys and values, retrieves blocks, attends (paper, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.archive.layer import ArchivedLayer
from landmark.memory.context import LayerContext
from landmark.memory.geometry import CallGeometry
from landmark.memory.kernel_limits import FUSED_BYTES
from landmark.memory.landmark_index import LandmarkIndex
from landmark.memory.policies import INDEXES, SELECTORS
from landmark.memory.positions import SCHEMES
from landmark.memory.reader import MemoryReader, ReadResult
from landmark.memory.retrieval import Selector
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.store import BlockStore
from landmark.memory.storage.tiers import OffloadConfig
from landmark.ops.choice import refusal
from landmark.ops.triton.configs import power_of_two


class LayerMemory:
    """All that one layer remembers of the rows of a batch.

    Args:
        config: the settings.
        tables: rotations of this layer's rotary type.
        layer: the layer's index.
        offload: where its blocks live, ``None`` for the device; budgets of this layer.
        index: a name of ``landmark.memory.policies.INDEXES``. Where all old landmarks are equal no
            index can tell them apart, and every one is scored.

    Attributes:
        store: the layer's blocks.
        retrieves: whether queries of this layer retrieve.
        reader: selects blocks and attends to them.
        selector: who shares a selection of blocks, and what that has to know of earlier calls.
    """

    def __init__(
        self,
        config: LandmarkConfig,
        tables: RotaryTables,
        layer: int,
        offload: OffloadConfig | None = None,
        index: str = "exact",
    ) -> None:
        self.config = config
        self.tables = tables
        self.layer = layer
        is_asked_to = config.layers is None or layer in config.layers
        self.retrieves = config.mode == "retrieval" and is_asked_to
        self.store = BlockStore(
            config.block_size,
            local_blocks=config.local_blocks,
            shared_landmark=layer == 0 and config.positions == "stingy",
            reads_older=self.retrieves or config.mode == "all",
            offload=offload,
        )
        selector = SELECTORS[config.granularity] if self.retrieves else Selector
        self.selector = selector(config)
        self._context: LayerContext | None = None  # of the scale that was used last
        self.reader = MemoryReader(layer, self.selector)
        self.index: LandmarkIndex | None = None
        if self.retrieves and not self.store.shared_landmark:
            self.index = INDEXES[index].make()

    def prepare(self, geometry: CallGeometry, like: Tensor) -> None:
        """Makes room for a call, and drops what no query will see any more.

        Args:
            geometry: the call.
            like: keys ``(B, G, *, D)`` of the call's dtype and device.
        """
        self.store.begin_call(geometry, like)

    def can_be_captured(self, geometry: CallGeometry) -> bool:
        """Returns whether kernels alone may compute a call, so that it can be a CUDA graph."""
        has_read = self.store.capacity > 0 and geometry.candidates > 0
        return has_read and self.retrieves and self.reader.selects_fused(self.index)

    def graph_key(self) -> tuple[Any, ...] | None:
        """Returns what a CUDA graph of a call depends on; the call was prepared.

        These are addresses, and numbers that do not lie on the device. ``None`` where the call
        asks the host.
        """
        found = self.store.graph_key()
        return None if found is None else (*found, *self.tables.data_pointers())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: CallGeometry,
        *,
        scale: float,
        retrieve: bool,
        record: bool,
        prepared: bool = False,
        pinned: Tensor | None = None,
    ) -> ReadResult:
        """Appends the keys and values of a call, then attends.

        Args:
            query: ``(B, H, T, D)``, not rotated.
            key: ``(B, G, T, D)``, not rotated.
            value: ``(B, G, T, D)``.
            geometry: the call, on the same device.
            scale: the softmax scale.
            retrieve: whether to retrieve; otherwise the local blocks and block 0 are read.
            record: whether to return what was retrieved.
            prepared: whether ``prepare`` was called.
            pinned: ``(B, top_k)`` blocks that every query retrieves in place of its own selection,
                -1 for none; ``None`` for own selections.

        Returns:
            the output ``(B, T, H, D)``, and what was retrieved where asked for.
        """
        context = self._with_scale(scale)
        query = torch.unflatten(query, 1, (key.shape[1], -1))
        retrieve = retrieve and self.retrieves and geometry.candidates > 0
        fused = runs_fused(query, self.config)
        selects = retrieve and pinned is None
        if fused and selects and self.reader.takes_few(query, geometry, context):
            return self._decode(
                query, key, value, geometry, context, record=record, prepared=prepared
            )
        rotation = self.tables.by_offset(geometry.offsets, key.dtype)[:, None]
        self.store.append(rotation.rotate(key), value, geometry, begun=prepared)
        if self.index is not None:
            self._follow_with_index(geometry)
        return self.reader.read(
            rotation[:, None].rotate(query),
            geometry,
            context,
            retrieve=retrieve,
            fused=fused,
            record=record,
            pinned=pinned,
        )

    def archive_tensors(self, blocks: int, slots: int) -> dict[str, Tensor]:
        """Returns what an archive has to hold of the one row beside its finished blocks.

        Args:
            blocks: finished blocks.
            slots: slots of the block behind them.
        """
        return {"tail": self.store.partial_block(blocks, slots), **self.selector.state()}

    def resume(
        self, saved: ArchivedLayer, first: int, tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        """Goes on from an archive.

        Args:
            saved: the finished blocks.
            first: the first of them that is kept, but for block 0.
            tensors: what ``archive_tensors`` returned.
            device: the model's.

        Raises:
            Damaged: what was saved is not what was written.
        """
        self.store.resume(saved, first, tensors["tail"].to(device))
        self.selector.load_state({name: each.to(device) for name, each in tensors.items()})

    def commit(self) -> None:
        """Called when all layers have done a call: it will not be taken back."""
        self.selector.commit()

    def rollback(self) -> None:
        """Called when a call failed in some layer.

        Blocks need nothing here: the next call writes the same slots, and its ``begin_call``
        forgets what is on the device of later blocks (``BlockTable.forget_after``).
        """
        self.selector.rollback()

    def note_crop(self) -> None:
        """Called when the rows were cropped; blocks are forgotten by the next ``begin_call``."""
        self.selector.note_crop()

    def nbytes(self, tier: str) -> int:
        """Returns the bytes held in a tier; an index counts in host memory."""
        indexed = self.index.nbytes if self.index is not None and tier == "host" else 0
        return self.store.nbytes(tier) + indexed

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
        self.store.select_rows(rows)
        self.selector.select_rows(rows)
        if self.index is not None:
            self.index.select_rows(rows.tolist())

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the bookkeeping of the blocks contradicts itself."""
        self.store.check_integrity()

    def _with_scale(self, scale: float) -> LayerContext:
        """Returns what reading needs; all calls of a layer have the same scale."""
        if self._context is None or self._context.scale != scale:
            self._context = LayerContext(self.store, self.tables, self.config, scale, self.index)
        return self._context

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: CallGeometry,
        context: LayerContext,
        *,
        record: bool,
        prepared: bool,
    ) -> ReadResult:
        """Computes ``attend`` by the kernels for few queries, ``(B, G, R, T, D)``."""
        from landmark.memory.triton.append import append

        if not prepared:
            self.prepare(geometry, key)
        query = append(query, key, value, geometry.grid, context)
        if geometry.finished_blocks:
            self.store.pool.seal_blocks(geometry)
        return self.reader.decode(query, geometry, context, record=record)

    def _follow_with_index(self, geometry: CallGeometry) -> None:
        """Brings the index to what this call may find in it."""
        assert self.index is not None
        ends = (geometry.grid.local_first[:, 0] - self.config.top_k).clamp(min=0)
        self.index.follow(self.store, ends.tolist())


def runs_fused(query: Tensor, config: LandmarkConfig) -> bool:
    """Returns whether the Triton kernels compute a call.

    They run on NVIDIA GPUs, where no gradient is asked for and a block of keys fits one tile, for
    the position schemes that they know.
    """
    if not query.is_cuda or (torch.is_grad_enabled() and query.requires_grad):
        return False
    numbers = power_of_two(config.block_size) * power_of_two(query.shape[-1])
    if numbers * query.element_size() > FUSED_BYTES:
        return False
    is_known = SCHEMES[config.positions].in_kernels
    return is_known and refusal(query, config.block_size, config.top_k) is None
