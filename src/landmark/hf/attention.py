"""The attention function that transformers calls, and what it needs to know of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from landmark.config import LandmarkConfig
from landmark.hf.cache import LandmarkCache
from landmark.hf.layout import without_autocast
from landmark.memory.geometry import CallGeometry, move
from landmark.memory.rotary_tables import RotaryTables
from landmark.ops.attention import landmark_attention
from landmark.rotary import Rotation

IMPLEMENTATION = "landmark"


@dataclass
class ForwardContext:
    """One forward pass of a decoder, handed to every layer as the keyword argument ``landmark``."""

    settings: LandmarkConfig
    layer_types: tuple[str | None, ...]

    def to(self, *args: Any, **kwargs: Any) -> ForwardContext:
        """Returns itself: tensors follow each layer's device (accelerate moves arguments by calling
        this).
        """
        return self

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends in the attention layer ``module``.

        Takes un-rotated query ``(B, H, T, D)``, key and value ``(B, G, T, D)``; returns ``(B, T, H,
        D)``.
        """
        raise NotImplementedError


@dataclass
class FullPass(ForwardContext):
    """Mode ``all`` without a memory: every past block, in one differentiable pass."""

    rotations: dict[str | None, Rotation]
    segments: Tensor | None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends as ``ForwardContext.attend`` says."""
        rotation = self._rotation(module).to(query.device)
        segments = None if self.segments is None else self.segments.to(query.device)
        size = self.settings.block_size
        query = rotation.rotate(query)
        key = rotation.rotate(key)
        output = landmark_attention(
            query, key, value, block_size=size, scale=scale, segments=segments
        )
        assert isinstance(output, Tensor)
        return output.transpose(1, 2).contiguous()

    def _rotation(self, module: nn.Module) -> Rotation:
        """The layer's rotation; where all have the same, its index is not looked at, so that one
        graph serves all.
        """
        if len(self.rotations) == 1:
            return next(iter(self.rotations.values()))
        return self.rotations[self.layer_types[_index(module)]]


@dataclass
class CachedPass(ForwardContext):
    """A call whose keys are filed in a cache.

    Attributes:
        tables: rotations of each layer type.
        cache: the cache.
        plan: the geometry, on the CPU.
        retrieve: whether to retrieve.
        dtype: of keys and values where nothing is remembered yet; under autocast, not what the
            layers compute in.
        prepared: whether every layer's memory was told of it by ``prepare``.
        plans: the geometry on each device.
    """

    tables: dict[str | None, RotaryTables]
    cache: LandmarkCache
    plan: CallGeometry
    retrieve: bool
    dtype: torch.dtype
    prepared: bool = False
    plans: dict[torch.device, CallGeometry] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attends as ``ForwardContext.attend`` says."""
        if query.device not in self.plans:
            self.plans[query.device] = move(self.plan, query.device)
        layer = _index(module)
        memory = self.cache.memory(layer, self.tables[self.layer_types[layer]])
        plan = self.plans[query.device]
        record = self.cache.record
        rest = {"retrieve": self.retrieve, "record": record, "prepared": self.prepared}
        dtype = memory.store.dtype or self.dtype
        with without_autocast(query.device):
            output, found = memory.attend(
                query.to(dtype), key.to(dtype), value.to(dtype), plan, scale=scale, **rest
            )
        if found is not None:
            self.cache.retrievals.append(found)
        if self.cache.observer is not None:
            self.cache.observer(memory, query, plan, scale)
        return output.to(value.dtype)

    def graph_key(self) -> tuple[Any, ...] | None:
        """Prepares all memories, and returns what a CUDA graph of this pass depends on.

        Returns:
            ``None`` where the pass cannot be captured.
        """
        if self.cache.record or self.cache.observer is not None or not self.retrieve:
            return None
        found: list[Any] = [self.plan.grid.local.shape]
        for memory in self.cache.memories:
            if memory is None or not memory.can_be_captured(self.plan):
                return None
            memory.prepare(self.plan, memory.store.landmark_keys)
            key = memory.graph_key()
            if key is None:
                return None
            found.append(key)
        return tuple(found)

    def fixed(self, device: torch.device) -> CachedPass:
        """Returns the same call, prepared, with a geometry whose tensors on ``device`` later ones
        can be copied to.

        It may choose among as many blocks as there are places for.
        """
        places = min(
            memory.store.first + memory.store.capacity - 1 for memory in self.cache.layers_in_use()
        )
        plan = replace(move(self.plan, device, own_memory=True), candidates=places)
        return replace(self, plan=plan, prepared=True, plans={device: plan})


def landmark_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    landmark: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered as attention implementation ``landmark``; shapes as in
    ``ForwardContext.attend``.
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
    return landmark.attend(module, query, key, value, scale), None


def _index(module: nn.Module) -> int:
    return int(module.layer_idx)  # type: ignore[arg-type]


def claim_attention(config: Any) -> None:
    """Sets the attention of a model about to be built; raises ``ValueError`` where the config asks
    for another.
    """
    if config._attn_implementation is not None:
        check_attention(config)
    config._attn_implementation = IMPLEMENTATION


def check_attention(config: Any) -> None:
    """Raises ``ValueError`` where a config asks for another attention, which would ignore the
    landmarks.
    """
    if config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"a landmark model attends by {IMPLEMENTATION!r} only, got attn_implementation="
            f"{config._attn_implementation!r}; leave it out"
        )


AttentionInterface.register(IMPLEMENTATION, landmark_attention_forward)
