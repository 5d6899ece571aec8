"""The attention function that transformers calls, and the context of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from landmark.config import LandmarkConfig
from landmark.hf.cache import LandmarkCache
from landmark.hf.gate_loss import GateLoss, LayerInputs
from landmark.hf.layout import without_autocast
from landmark.memory.geometry import CallGeometry, move
from landmark.memory.rotary_tables import RotaryTables
from landmark.ops.attention import landmark_attention
from landmark.rotary import Rotation

IMPLEMENTATION = "landmark"


class Attend(Protocol):
    """Attends in one attention layer, as ``ForwardContext.attend``."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, /
    ) -> Tensor:
        """See ``ForwardContext.attend``."""


@dataclass
class ForwardContext:
    """One forward pass of a decoder.

    Every layer gets its ``attend`` as the keyword argument ``landmark``, and not itself: FSDP
    copies dataclasses among the arguments of a layer, and rounds the tensors in them.

    Attributes:
        settings: the landmark settings.
        layer_types: the rotary type of each layer, ``None`` where all have the same.
    """

    settings: LandmarkConfig
    layer_types: tuple[str | None, ...]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends in one attention layer.

        Args:
            module: the layer.
            query: ``(B, H, T, D)``, not rotated.
            key: ``(B, G, T, D)``, not rotated.
            value: ``(B, G, T, D)``.
            scale: the softmax scale.

        Returns:
            ``(B, T, H, D)``.
        """
        raise NotImplementedError


@dataclass
class FullPass(ForwardContext):
    """A pass in mode ``all`` or ``top_k`` without a cache, differentiable.

    Attributes:
        rotations: the rotation of each rotary type.
        segments: ``(B, T)`` document of each slot of packed rows.
        gate_loss: what every layer adds to, if anything.
        forced: ``(B, T, F)`` past blocks that each slot keeps whatever their score in mode
            ``top_k``, -1 for none.
    """

    rotations: dict[str | None, Rotation]
    segments: Tensor | None
    gate_loss: GateLoss | None = None
    forced: Tensor | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends as ``ForwardContext.attend`` says."""
        kind = self._rotary_type(module)
        rotation = self.rotations[kind].to(query.device)
        if self.gate_loss is not None:
            _add(self.gate_loss, LayerInputs(query, key, rotation, scale, kind))
        segments = None if self.segments is None else self.segments.to(query.device)
        forced = None
        if self.forced is not None and self.top_k is not None:
            forced = self.forced.to(query.device)
        size = self.settings.block_size
        query = rotation.rotate(query)
        key = rotation.rotate(key)
        output = landmark_attention(
            query,
            key,
            value,
            block_size=size,
            scale=scale,
            top_k=self.top_k,
            segments=segments,
            forced=forced,
        )
        assert isinstance(output, Tensor)
        return output.transpose(1, 2).contiguous()

    @property
    def top_k(self) -> int | None:
        """Past blocks that each query keeps; ``None`` for all."""
        if self.settings.mode == "all":
            return None
        return self.settings.top_k + self.settings.local_blocks

    def _rotary_type(self, module: nn.Module) -> str | None:
        """Returns the rotary type of a layer."""
        if len(self.rotations) == 1:
            # The layer's index is not read, so that torch.compile has one graph for all layers.
            return next(iter(self.rotations))
        return self.layer_types[_layer_index(module)]


# A list that grows from layer to layer would be another graph for each layer.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _add(gate_loss: GateLoss, layer: LayerInputs) -> None:
    """Calls a loss on the gate outside compiled code, between two graphs of the layer."""
    gate_loss.add(layer)


@dataclass
class CachedPass(ForwardContext):
    """A pass whose keys and values are written to a cache.

    Attributes:
        tables: rotary tables of each rotary type.
        cache: the cache.
        geometry: the geometry of the call, on the CPU.
        retrieve: whether queries retrieve; otherwise they see their local context and block 0.
        dtype: dtype of keys and values in an empty cache. Under autocast it is not the dtype that
            the layers compute in.
        prepared: whether ``graph_key`` has prepared the memory of every layer.
        geometry_on: the geometry on each device that was needed so far.
    """

    tables: dict[str | None, RotaryTables]
    cache: LandmarkCache
    geometry: CallGeometry
    retrieve: bool
    dtype: torch.dtype
    prepared: bool = False
    geometry_on: dict[torch.device, CallGeometry] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends as ``ForwardContext.attend`` says."""
        if query.device not in self.geometry_on:
            self.geometry_on[query.device] = move(self.geometry, query.device)
        geometry = self.geometry_on[query.device]
        layer = _layer_index(module)
        memory = self.cache.memory(layer, self.tables[self.layer_types[layer]])
        dtype = memory.store.dtype or self.dtype
        pinned = None if self.cache.pinned is None else self.cache.pinned.to(query.device)
        with without_autocast(query.device):
            output, retrieval = memory.attend(
                query.to(dtype),
                key.to(dtype),
                value.to(dtype),
                geometry,
                scale=scale,
                retrieve=self.retrieve,
                record=self.cache.record,
                prepared=self.prepared,
                pinned=pinned,
            )
        if retrieval is not None:
            self.cache.retrievals.append(retrieval)
        if self.cache.observer is not None:
            self.cache.observer(memory, query, geometry, scale)
        return output.to(value.dtype)

    def graph_key(self) -> tuple[Any, ...] | None:
        """Prepares the memory of every layer and returns the key of the call's CUDA graph.

        Calls with equal keys launch the same kernels on the same addresses. The key is ``None``
        where the call cannot be captured.
        """
        cache = self.cache
        is_watched = cache.record or cache.observer is not None
        if is_watched or cache.pinned is not None or not self.retrieve:
            return None
        key: list[Any] = [self.geometry.grid.local.shape]
        for memory in self.cache.memories:
            if memory is None or not memory.can_be_captured(self.geometry):
                return None
            memory.prepare(self.geometry, memory.store.landmark_keys)
            layer_key = memory.graph_key()
            if layer_key is None:
                return None
            key.append(layer_key)
        return tuple(key)

    def for_capture(self, device: torch.device) -> CachedPass:
        """Returns the same pass for the capture of a CUDA graph, after ``graph_key``.

        The tensors of its geometry are on ``device``, and those of later calls can be copied to
        them. It selects among as many blocks as the stores have room for, as later calls have more.
        """
        room = min(
            memory.store.first + memory.store.capacity - 1 for memory in self.cache.layers_in_use()
        )
        geometry = replace(move(self.geometry, device, own_memory=True), candidates=room)
        return replace(self, geometry=geometry, prepared=True, geometry_on={device: geometry})


def landmark_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    landmark: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends in a layer; the function registered as attention implementation ``landmark``.

    Shapes are those of ``ForwardContext.attend``.

    Raises:
        ValueError: no context, as in a model that is not a landmark model, or attention dropout.
    """
    if landmark is None:
        raise ValueError(
            "attention 'landmark' got no landmark context: it works in models made by "
            "landmark.convert"
        )
    if dropout:
        raise ValueError(
            f"expected no attention dropout, got {dropout}: set config.attention_dropout = 0"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return landmark(module, query, key, value, scale), None


def _layer_index(module: nn.Module) -> int:
    return int(module.layer_idx)  # type: ignore[arg-type]


def claim_attention(config: Any) -> None:
    """Sets the attention of a model about to be built.

    Raises:
        ValueError: the config asks for another attention.
    """
    if config._attn_implementation is not None:
        check_attention(config)
    config._attn_implementation = IMPLEMENTATION


def check_attention(config: Any) -> None:
    """Makes sure that a config asks for the attention that knows landmarks.

    Raises:
        ValueError: it asks for another.
    """
    if config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"a landmark model attends by {IMPLEMENTATION!r} only, got attn_implementation="
            f"{config._attn_implementation!r}; leave it out"
        )


AttentionInterface.register(IMPLEMENTATION, landmark_attention_forward)
