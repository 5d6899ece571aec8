"""Steps of one token inside ``generate`` as a CUDA graph: a step of a large model is over before it
is launched.

A graph holds what one call launched, with the addresses of its tensors. It is captured once
consecutive steps have found all memories at the same addresses, replayed as long as they stay
there, and dropped when ``generate`` returns, so that what a caller does to the model between two
calls is never missed. Results are those of steps launched one by one.
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

WARM_UP = 2  # steps that find all at the same addresses before one is captured

_steps: ContextVar[DecodeGraph | None] = ContextVar("steps", default=None)


@contextmanager
def capture_scope() -> Iterator[None]:
    """Lets the calls inside, of this thread, be captured and replayed."""
    before = _steps.set(DecodeGraph())
    try:
        yield
    finally:
        _steps.reset(before)


def current() -> DecodeGraph | None:
    """Returns the steps of the ``generate`` that is running in this thread, if any."""
    return _steps.get()


@dataclass(frozen=True)
class Captured:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    embeds: Tensor
    plan: CallGeometry
    output: Any


class DecodeGraph:
    """The steps of one ``generate``; at most one graph is kept."""

    def __init__(self) -> None:
        self.replayed = 0
        self._known: Any = None  # what the last step depended on
        self._steady = 0  # steps since it changed
        self._captured: Captured | None = None
        self._refused = False

    def run(self, call: CachedPass, decoder: Any, embeds: Tensor, kwargs: dict[str, Any]) -> Any:
        """Returns what the stock decoder gives for a call of one token a row, ``None`` if it has to
        be called.

        Args:
            call: the call; no row closes a block in it.
            decoder: the landmark decoder.
            embeds: ``(B, 1, hidden)``.
            kwargs: what else the stock decoder is given.
        """
        if (
            self._refused
            or not captures(embeds)
            or any(value is not None for value in kwargs.values())
        ):
            return None
        if self._known is None and has_hooks(decoder):
            self._refused = True
            return None
        known = (
            decoder,
            call.cache,
            embeds.shape,
            embeds.dtype,
            torch.is_autocast_enabled(),
            call.graph_key(),
        )
        if known[-1] is None or known != self._known:
            self._known = known
            self._steady = 0
            self._captured = None
            return None
        self._steady += 1
        if self._captured is None:
            if self._steady < WARM_UP:
                return None
            try:
                captured = capture(call, decoder, embeds)
                require_states_alone(captured.output)
            except (
                RuntimeError
            ):  # a stock layer that asks the device something, more that is wanted, or no memory
                self._refused = True
                return None
            self._captured = captured
        self._captured.embeds.copy_(embeds)
        copy_geometry_(self._captured.plan, call.plan)
        self._captured.graph.replay()
        self.replayed += 1
        output = self._captured.output
        return type(output)(last_hidden_state=output.last_hidden_state.clone())


def captures(embeds: Tensor) -> bool:
    """Whether calls on these embeddings can be captured."""
    return embeds.is_cuda


def capture(call: CachedPass, decoder: Any, embeds: Tensor) -> Captured:
    """Captures a call; nothing is computed yet."""
    fixed = call.fixed(embeds.device)
    embeds = embeds.clone()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = decoder.stock(embeds, fixed)
    except BaseException:
        release_generator(embeds.device)
        raise
    return Captured(graph, embeds, fixed.plan, output)


def release_generator(device: torch.device) -> None:
    """Takes the random generator of a GPU out of a capture that failed: torch leaves it there, and
    sampling fails.
    """
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


def require_states_alone(output: Any) -> None:
    """Raises ``RuntimeError`` where the output of a stock decoder holds more than its last
    states.
    """
    if set(output.keys()) != {"last_hidden_state"}:
        raise RuntimeError(f"expected last_hidden_state alone, got {list(output.keys())}")


def copy_geometry_(to: Any, plan: Any) -> None:
    """Puts the numbers of a plan where those of another of the same shape lie."""
    for field in fields(to):
        old = getattr(to, field.name)
        new = getattr(plan, field.name)
        if isinstance(old, Tensor):
            old.copy_(new, non_blocking=True)
        elif is_dataclass(old):
            copy_geometry_(old, new)


def has_hooks(decoder: nn.Module) -> bool:
    """Whether something is called or moved between the layers that a replay would leave out."""
    return any(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        for module in decoder.modules()
    )
