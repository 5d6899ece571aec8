"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere.

Short work says nothing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from types import TracebackType
from typing import Any

from landmark.cli.output import in_line, note

FIRST = 2.5  # seconds of work before anything is said of it: with the start of Python, within three
EVERY = 2.5  # seconds between two lines
CHECKED = 0.25  # seconds between two states of a bar


class Shown:
    """Shows the progress that it was told last, inside its ``with`` block.

    It begins with loading, and shows nothing between ``rest`` and the next call.

    It is a ``Progress`` of ``landmark.data.encoding``. A thread shows it, so that work in one long
    step is seen too.
    """

    def __init__(self) -> None:
        self._console = _terminal()
        self._begun = time.perf_counter()
        self._due = self._begun + FIRST
        self._latest: tuple[str, int, int] | None = ("loading", 0, 0)
        self._bar: Any = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Takes the progress to show.

        Args:
            what: the work that is being done.
            done: how much of it is done.
            total: how much there is; 0 where that is not known.
        """
        if self._latest is None:
            self._due = time.perf_counter() + FIRST
        self._latest = (what, done, total)

    def rest(self) -> None:
        """Shows nothing until it is called again: for what is printed meanwhile."""
        with self._lock:
            self._latest = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def __enter__(self) -> Shown:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self.rest()

    def _run(self) -> None:
        while not self._over.wait(CHECKED):
            with (
                self._lock,
                contextlib.suppress(OSError, ValueError),
            ):  # a closed stderr is no reason to stop working
                now = time.perf_counter()
                if self._latest is not None and now >= self._due:
                    self._due = now if self._console is not None else now + EVERY
                    self._show(*self._latest)

    def _show(self, what: str, done: int, total: int) -> None:
        count = f": {done:,} of {total:,}" if total else f": {done:,}" if done else ""
        if self._console is None:
            note(f"{what}{count} ({time.perf_counter() - self._begun:.0f} s)")
            return
        if self._bar is None:
            self._bar = _bar(self._console)
            self._bar.start()
        for task in self._bar.tasks:
            self._bar.update(
                task.id, description=in_line(f"{what}{count}"), completed=done, total=total or None
            )


def _terminal() -> Any:
    """Returns the console of stderr, ``None`` where it cannot show a bar."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    bar.add_task("", total=None)
    return bar
