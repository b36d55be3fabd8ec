"""SIGTERM, which schedulers send before they take a machine away: outside of training it ends a run at once.

What is under way there is made again by the same command, and nothing is left half written. `preemption` answers the
signal while a stage trains.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

ENDED = "SIGTERM: ended; the same command goes on where this run stood"

_came = _in_training = False


class Preempted(SystemExit):
    """The run was asked to end and has saved what it needs to go on; a program that does not catch it exits with 0."""

    def __init__(self) -> None:
        super().__init__(0)


def sigterm_came() -> bool:
    """Whether SIGTERM came since the program began, or since its last training did."""
    return _came


def sigterm_ended() -> bool:
    """Whether SIGTERM came where it ends the program at once, not in a training, which first saves."""
    return _came and not _in_training


def note_sigterm(came: bool = True, in_training: bool = False) -> None:
    """Remember that SIGTERM came, and where, or forget it."""
    global _came, _in_training
    _came, _in_training = came, in_training


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


def interruptible(run: Callable[[], int], interrupted: str) -> int:
    """Call a program's ``run`` and return its exit code: 0 after SIGTERM, 130 after Ctrl-C.

    Args:
        interrupted: how the program goes on after Ctrl-C, told on stderr.
    """
    try:
        with ending_at_once():
            return run()
    except Preempted:
        return 0
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130


def outlive_sigterm(worker: int, first: Callable[[int], None] | None = None) -> None:
    """Let a loader's worker outlive every SIGTERM sent to the whole process group: the step that saves needs samples.

    Args:
        worker: its number. first: what else is to be done when a worker begins.
    """
    if first is not None:
        first(worker)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def outliving_sigterm(loader: DataLoader) -> DataLoader:
    """Give a loader workers that outlive SIGTERM, and return it.

    They end with their loader. One that hangs then would be waited for at this program's end, which ends workers with
    the signal that these ignore: it is killed first.
    """
    read = getattr(loader, "base_dataloader", loader)  # Accelerate's own only passes batches on
    before = read.worker_init_fn
    if getattr(before, "func", None) is not outlive_sigterm:
        read.worker_init_fn = partial(outlive_sigterm, first=before)
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # called before what multiprocessing has registered
    return loader


def end_workers() -> None:
    """Kill the child processes that are not to live longer than this one, as loader workers are not."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is killed
    for worker in workers:
        worker.kill()
