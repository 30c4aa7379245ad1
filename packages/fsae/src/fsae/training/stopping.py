"""Asking a run to stop, by signal or by the clock; the loop looks after each step and ends in order."""

from __future__ import annotations

import multiprocessing
import os
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


class WorkerSignals:
    """A loader's `worker_init_fn`: terminals and schedulers signal the whole group, only the loop may answer.

    Once the run has ended, SIGTERM ends a worker again. Python sends it on exit to workers that are still there, as
    they are when an error keeps hold of their loader, and waits for them.
    """

    def __init__(self) -> None:
        self._ended = multiprocessing.RawValue("b", 0)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._answer)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self._ended.value:
            os._exit(0)

    def run_has_ended(self) -> None:
        """Tell the workers, in the main process."""
        self._ended.value = 1
