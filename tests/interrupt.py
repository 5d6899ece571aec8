"""Interrupts a writer at the n-th of its calls to the system that change what is on the disk."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import pytest

NAMES = ("open", "pwrite", "ftruncate", "truncate", "fsync", "replace", "unlink")


class Interrupted:
    """While open, counts these calls; the n-th (from 0) fails for want of room, or kills the
    process.

    A write is done by half before.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, kill: bool) -> None:
        self.at = at
        self.kill = kill
        self.calls = 0
        for name in NAMES:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    @property
    def happened(self) -> bool:
        return self.calls > self.at

    def _counted(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls == self.at + 1:
                if name == "pwrite":
                    handle, data, begin = arguments
                    real(handle, data[: len(data) // 2], begin)
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name != "unlink":  # which needs no room
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **more)

        return call
