"""One of two processes of which the second goes wrong, as MODE says.

accelerate launch --multi_gpu --num_processes 2 tests/distributed/run_faults.py MODE OUT
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gkd_hf.errors import InputError
from gkd_hf.training import process_group
from gkd_hf.training.ending import exit_code
from gkd_hf.training.sigterm import Preempted
from tests.training.test_trainers import distillation_trainer

RANK = int(os.environ["RANK"])


class StopTheSecond(TrainerCallback):
    """The second process gives no answer any more after its third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)


class SignalTheSecond(TrainerCallback):
    """The second process alone gets SIGTERM, when the last step is done."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(mode: str, out: Path) -> None:
    """Go wrong."""
    # Long enough for two processes that start at different speed.
    process_group.join_process_group(True, timedelta(seconds=15))
    if mode == "wrong":
        if RANK == 1:
            raise InputError("something is wrong here: mend it")
        process_group.wait_patiently()
    elif mode == "unshared":
        process_group.SHARED_DELAY = 0.5
        # As on two hosts, where the same name is another folder.
        distillation_trainer(out / f"host-{RANK}", disable_tqdm=True).train()
    elif mode == "hung":
        trainer = distillation_trainer(out / "signalled", ddp_timeout=15, max_steps=1)
        trainer.add_callback(SignalTheSecond())
        try:
            trainer.train()
        except Preempted:
            print(f"process {RANK} is preempted", flush=True)
        trainer = distillation_trainer(out, ddp_timeout=15)
        trainer.add_callback(StopTheSecond())
        trainer.train()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1], Path(sys.argv[2]))))
