"""SIGTERM, which schedulers send before they take a machine away: outside of training it ends a run at once.

What is under way there is made again by the same command, and nothing is left half written. `preemption` answers the
signal while a stage trains.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDED = "SIGTERM: ended; the same command goes on where this run stood"

_came = False


class Preempted(SystemExit):
    """The run was asked to end and has saved what it needs to go on; a program that does not catch it exits with 0."""

    def __init__(self) -> None:
        super().__init__(0)


def sigterm_came() -> bool:
    """Whether SIGTERM came since the program began, or since its last training did."""
    return _came


def note_sigterm(came: bool = True) -> None:
    """Remember that SIGTERM came, or forget it."""
    global _came
    _came = came


@contextmanager
def ending_at_once() -> Iterator[None]:
    """In this context SIGTERM ends the program with `Preempted`, where no training watches for it.

    The main process says how to go on.
    """

    def end(number: int, frame: FrameType | None) -> None:
        note_sigterm()
        if os.environ.get("RANK", "0") == "0":
            os.write(sys.stderr.fileno(), f"{ENDED}\n".encode())  # print may have been interrupted itself
        raise Preempted

    note_sigterm(False)
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def outlive_sigterm(worker: int, first: Callable[[int], None] | None = None) -> None:
    """Let a loader's worker outlive a SIGTERM sent to the whole process group: the step that saves needs its samples.

    A second one ends it, so the loader can still end a worker that hangs. Meant as ``worker_init_fn``.

    Args:
        worker: its number. first: what else is to be done when a worker begins.
    """
    if first is not None:
        first(worker)

    def take(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, take)
