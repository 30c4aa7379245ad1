"""Asking a run to stop, by signal or by the clock; the loop looks after each step and ends in order."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Literal


class StopRequests:
    """While it is entered, SIGTERM and Ctrl-C ask for a stop instead of killing; a second Ctrl-C kills."""

    def __init__(self, max_minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes > 0 else float("inf")
        self.signalled = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True
        print("\nstopping after this step; its checkpoint is saved first", file=sys.stderr)

    def pending(self) -> Literal["signal", "time"] | None:
        """Why to stop now, if at all."""
        if self.signalled:
            return "signal"
        return "time" if time.monotonic() >= self.deadline else None


def leave_signals_to_the_main_process(worker: int) -> None:
    """For a loader's workers: terminals and schedulers signal the whole group, only the loop may answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
