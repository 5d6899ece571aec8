"""CUDA graphs for one-token decode steps, where launches take longer than the kernels.

A graph holds what one step launched, with the addresses of its tensors. It is captured once
consecutive steps have found all memories at the same addresses, and replayed as long as they stay
there. It is dropped when ``generate`` returns, so that what a caller changes in the model between
two calls is never missed. Results are those of steps that are launched one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from landmark.hf.attention import CachedPass
from landmark.memory.geometry import CallGeometry

WARM_UP = 2  # steps with the same key before one is captured

_graph: ContextVar[DecodeGraph | None] = ContextVar("graph", default=None)


@contextmanager
def capture_scope() -> Iterator[None]:
    """Lets decode steps inside, of this thread, be captured and replayed."""
    before = _graph.set(DecodeGraph())
    try:
        yield
    finally:
        _graph.reset(before)


def current_graph() -> DecodeGraph | None:
    """Returns the graph of the ``generate`` that is running in this thread, if any."""
    return _graph.get()


@dataclass(frozen=True)
class Captured:
    """A CUDA graph with the tensors that it reads and writes.

    Attributes:
        graph: the graph.
        embeds: ``(B, 1, hidden)``, which it reads.
        geometry: the geometry of the call, which it reads.
        output: the output of the stock decoder, which it writes.
    """

    graph: torch.cuda.CUDAGraph
    embeds: Tensor
    geometry: CallGeometry
    output: Any


@dataclass(frozen=True)
class StepKey:
    """What has to be equal in two steps for one graph to serve both."""

    decoder: Any
    cache: Any
    shape: torch.Size
    dtype: torch.dtype
    autocast: bool
    memories: tuple[Any, ...]


class DecodeGraph:
    """The graph of one ``generate``: at most one at a time.

    Attributes:
        replayed: how many steps were replayed.
    """

    def __init__(self) -> None:
        self.replayed = 0
        self._key: StepKey | None = None  # of the last step
        self._repeated = 0  # steps since the key changed
        self._captured: Captured | None = None
        self._hooks_checked = False
        self._refused = False

    def run(self, context: CachedPass, decoder: Any, embeds: Tensor, kwargs: dict[str, Any]) -> Any:
        """Runs a decode step as a graph, if there is one for it.

        Args:
            context: the step; no row finishes a block in it.
            decoder: the landmark decoder.
            embeds: ``(B, 1, hidden)`` embeddings of one token a row.
            kwargs: further arguments of the stock decoder.

        Returns:
            the output of the stock decoder; ``None`` if the caller has to call it.
        """
        if self._refused or not can_capture(embeds) or not _all_none(kwargs):
            return None
        if not self._hooks_checked:
            self._hooks_checked = True
            if has_hooks(decoder):
                self._refused = True
                return None
        key = _key_of(context, decoder, embeds)
        if key is None or key != self._key:
            self._key = key
            self._repeated = 0
            self._captured = None
            return None
        self._repeated += 1
        if self._captured is None:
            if self._repeated < WARM_UP:
                return None
            try:
                captured = capture(context, decoder, embeds)
                require_states_alone(captured.output)
            except RuntimeError:
                # A stock layer that reads from the device, an output with more than the last
                # states, or no memory left.
                self._refused = True
                return None
            self._captured = captured
        self._captured.embeds.copy_(embeds)
        copy_geometry_(self._captured.geometry, context.geometry)
        self._captured.graph.replay()
        self.replayed += 1
        output = self._captured.output
        return type(output)(last_hidden_state=output.last_hidden_state.clone())


def _all_none(kwargs: dict[str, Any]) -> bool:
    return all(value is None for value in kwargs.values())


def _key_of(context: CachedPass, decoder: Any, embeds: Tensor) -> StepKey | None:
    """Returns the key of a step, ``None`` where it cannot be captured."""
    memories = context.graph_key()
    if memories is None:
        return None
    return StepKey(
        decoder=decoder,
        cache=context.cache,
        shape=embeds.shape,
        dtype=embeds.dtype,
        autocast=torch.is_autocast_enabled(),
        memories=memories,
    )


def can_capture(embeds: Tensor) -> bool:
    """Returns whether steps on these embeddings can be captured."""
    return embeds.is_cuda


def capture(context: CachedPass, decoder: Any, embeds: Tensor) -> Captured:
    """Captures a decode step; nothing is computed yet."""
    fixed = context.for_capture(embeds.device)
    embeds = embeds.clone()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = decoder.stock(embeds, fixed)
    except BaseException:
        release_generator(embeds.device)
        raise
    return Captured(graph, embeds, fixed.geometry, output)


def release_generator(device: torch.device) -> None:
    """Takes the random generator of a GPU out of a capture that failed.

    torch leaves it registered there, and sampling would fail.
    """
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


def require_states_alone(output: Any) -> None:
    """Makes sure that a stock decoder returned its last states and nothing else.

    Raises:
        RuntimeError: it returned more.
    """
    if set(output.keys()) != {"last_hidden_state"}:
        raise RuntimeError(f"expected last_hidden_state alone, got {list(output.keys())}")


def copy_geometry_(to: Any, geometry: Any) -> None:
    """Copies the tensors of a geometry into those of another one of the same shapes."""
    for field in fields(to):
        old = getattr(to, field.name)
        new = getattr(geometry, field.name)
        if isinstance(old, Tensor):
            old.copy_(new, non_blocking=True)
        elif is_dataclass(old):
            copy_geometry_(old, new)


def has_hooks(decoder: nn.Module) -> bool:
    """Returns whether hooks run between the layers, which a replay would leave out."""
    return any(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        for module in decoder.modules()
    )
