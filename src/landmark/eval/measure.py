"""Measure wall time and peak memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATM = Path("/proc/self/statm")


@dataclass
class Measure:
    """Filled when the work ends: ``seconds``, and the peak of memory in bytes.

    Attributes:
        seconds: wall time, the device's queue drained.
        peak_bytes: on a GPU the peak of allocated device memory, weights included; on a CPU the
            peak of what the process held beyond what it held at the start (sampled every 10 ms,
            Linux only); ``None`` when unknown.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured(device: str) -> Iterator[Measure]:
    """Measures the body of a ``with`` on ``device``."""
    import torch

    measure = Measure()
    on_gpu = device.startswith("cuda")
    sampler = None if on_gpu or not _STATM.exists() else _Sampler()
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield measure
    finally:
        if on_gpu:
            torch.cuda.synchronize(device)
            measure.peak_bytes = torch.cuda.max_memory_allocated(device)
        measure.seconds = time.perf_counter() - start
        if sampler is not None:
            measure.peak_bytes = sampler.stop()


class _Sampler:
    def __init__(self) -> None:
        self._start = self._peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, _resident())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, _resident()) - self._start


def _resident() -> int:
    import resource

    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
