"""SIGTERM while a stage trains: all processes save at the end of the same step and end with exit code 0.

What really reaches the processes hangs on who sends it:

- `python scripts/run_gkd.py`: the signal itself; exit code 0.
- `accelerate launch` on several processes passes SIGTERM on to them and waits 30 s for their end, then kills them. The
  processes save and end with 0; the launcher itself ends with its own `SignalException` and exit code 1.
- `accelerate launch` on one process does not pass it on: the launcher ends, the training goes on without it. Start
  run_gkd.py with python there, or send the signal to the process group (`kill -TERM -- -PGID`).
- A signal to the whole process group, to one worker or to all comes to the same: one process that got it is enough.

A process that is blocked in its step, since a peer is gone, does not get to the step's end: it leaves by itself some
seconds after the signal, before the launcher would kill it. One that is blocked in an evaluation or in a save, which
may take long and be sound, is left to the launcher.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gkd_hf.training.process_group import leave, several, side_group
from gkd_hf.training.sigterm import note_sigterm

STEP_PATIENCE = 20.0  # seconds for a step to end after SIGTERM, or as long as three steps; the launcher kills after 30


class Preemption(TrainerCallback):
    """Ends the training of all processes at the same step, with a checkpoint, once one of them got SIGTERM.

    At the end of each step the processes begin to exchange whether they got it, and read what was exchanged at the
    step before: nobody waits for a device, and all know the same. So the signal is answered one step later than it
    came; a process alone answers at the end of the current step.
    """

    def __init__(self) -> None:
        self.received = False
        self.agreed = False
        self._asked: tuple[torch.Tensor, distributed.Work] | None = None
        self._group: distributed.ProcessGroup | None = None
        self._step_began: float | None = None
        self._longest = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this context SIGTERM is only noted; the handler that was there before is put back after it.

        A signal that came too late for `agree` is handed on to that one.
        """
        self.received = self.agreed = False
        self._asked = self._step_began = None
        note_sigterm(False)
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            with self._leaving_a_hung_step() if several() else nullcontext():
                yield
        finally:
            signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)
        if self.received and not self.agreed:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        note_sigterm(in_training=True)

    def agree(self, args: TrainingArguments) -> bool:
        """Return whether any process got the signal until now; all call it once, when their training has ended."""
        received = torch.tensor([int(self.received)])
        group = side_group(timedelta(seconds=0.9 * args.ddp_timeout))
        if group is not None:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=group)
        self.agreed |= bool(received.item())
        return self.agreed

    @contextmanager
    def _leaving_a_hung_step(self) -> Iterator[None]:
        """In this context a thread sees SIGTERM although the main one, which would answer, is blocked in a step."""
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        ended = threading.Event()
        thread = threading.Thread(target=self._leave_a_hung_step, args=(ear, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            ended.set()
            os.close(mouth)  # wakes the thread
            thread.join()
            os.close(ear)

    def _leave_a_hung_step(self, ear: int, ended: threading.Event) -> None:
        came = None
        while not ended.is_set():
            heard = select.select([ear], [], [], 1.0)[0]
            if heard and signal.SIGTERM in os.read(ear, 64) and came is None:
                came = time.monotonic()
            began = self._step_began
            if came is None or began is None:
                continue
            if time.monotonic() - max(came, began) > max(STEP_PATIENCE, 3 * self._longest):
                told = f"SIGTERM: process {os.environ.get('RANK', '0')} is blocked in its step and ends without saving"
                os.write(2, f"{told}; the same command goes on from the last checkpoint\n".encode())
                leave(1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the group the processes agree in; it gives up a little before the one that trains, to say why."""
        self._group = side_group(timedelta(seconds=0.9 * args.ddp_timeout))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note when the step began."""
        self._step_began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the answer to the question of the step before, and ask the next."""
        if self._step_began is not None:
            self._longest = max(self._longest, time.monotonic() - self._step_began)
            self._step_began = None
        if self._group is None:
            self.agreed = self.received
        else:
            self._read()
            asked = torch.tensor([int(self.received)])
            work = distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = (asked, work)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the last answer."""
        self._read()

    def _read(self) -> None:
        if self._asked is not None:
            answer, work = self._asked
            self._asked = None
            work.wait()
            self.agreed |= bool(answer.item())
