"""SIGTERM while a stage trains: all processes save at the end of the same step and end with exit code 0.

What really reaches the processes hangs on who sends it:

- `python scripts/run_gkd.py`: the signal itself; exit code 0.
- `accelerate launch` on several processes passes SIGTERM on to them and waits 30 s for their end, then kills them. The
  processes save and end with 0; the launcher itself ends with its own `SignalException` and exit code 1.
- `accelerate launch` on one process does not pass it on: the launcher ends, the training goes on without it. Start
  run_gkd.py with python there, or send the signal to the process group (`kill -TERM -- -PGID`).
- A signal to the whole process group, to one worker or to all comes to the same: one process that got it is enough.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gkd_hf.training.process_group import side_group
from gkd_hf.training.sigterm import note_sigterm


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

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this context SIGTERM is only noted; the handler that was there before is put back after it."""
        self.received = self.agreed = False
        self._asked = None
        note_sigterm(False)
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        note_sigterm()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the group the processes agree in; it gives up a little before the one that trains, to say why."""
        self._group = side_group(timedelta(seconds=0.9 * args.ddp_timeout))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the answer to the question of the step before, and ask the next."""
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
