"""How a process leaves the group it trained in."""

from __future__ import annotations

import gc

from accelerate import PartialState


def end_process_group() -> None:
    """End the process group, if there is one; a program's last act, when it holds no trainer and no wrapped model.

    A group that is still there when the interpreter ends can abort a process that has done its work. One whose last
    owner is a `DistributedDataParallel` can hang: its destructor waits for gloo's threads with the interpreter's lock
    in its hand, while such a thread wants that lock to give up the objects of its last reduction. So what is left of
    the wrapped models (trainers refer to themselves in circles) goes first, while the group is still there.
    """
    gc.collect()
    PartialState().destroy_process_group()
