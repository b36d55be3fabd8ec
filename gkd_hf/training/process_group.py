"""The processes of a run as a group: joining it, waiting in it, losing a member of it, leaving it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed

from gkd_hf.errors import InputError, refused

PATIENCE = timedelta(hours=24)  # for what the main process does alone: downloads, checks, rendering
SHARED_DELAY = 10.0  # seconds until a file that one host has written is seen by the others
HEAD_START = 3.0  # seconds that a process whose peer is gone leaves to the launcher, to see the first failure first
_POLL = 0.05  # seconds
_TOKEN = ".seen-"
_OF_THE_GROUP = re.compile(r"gloo|nccl|ProcessGroup|c10d|TCPStore", re.IGNORECASE)
_HUNG = re.compile(r"timed? ?out", re.IGNORECASE)
_GONE = re.compile(
    # DDP counts none where the process that should have told did not.
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|socket closed|remote process exited|"
    r"ncclRemoteError|communicator was aborted|inconsistent 0 params|" + _HUNG.pattern,
    re.IGNORECASE,
)

_groups: dict[str, tuple[Any, distributed.ProcessGroup]] = {}


def several() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def join_process_group(use_cpu: bool, timeout: timedelta) -> PartialState:
    """Join the processes that were launched together, if there are any; every process calls this at its start.

    Args:
        use_cpu: without an accelerator, Accelerate joins launched processes (by gloo) only if it is told so.
        timeout: how long a process waits for an answer of the others while they train. `wait_patiently` waits longer.
    """
    state = PartialState(cpu=use_cpu, timeout=timeout)
    _group("patient", PATIENCE)
    return state


def wait_patiently() -> None:
    """Wait until every process is here, as long as one of them may take for what it does alone.

    Signals are answered while waiting.
    """
    group = _group("patient", PATIENCE)
    if group is None:
        return
    work = distributed.barrier(group=group, async_op=True)
    while not work.is_completed():
        time.sleep(_POLL)
    work.wait()


def side_group(timeout: timedelta) -> distributed.ProcessGroup | None:
    """Return a group beside the one that trains, whose messages never wait for a device; None for one process alone.

    Every process calls this at the same place.
    """
    return _group("side", timeout)


def _group(name: str, timeout: timedelta) -> distributed.ProcessGroup | None:
    if not several():
        return None
    world, group = _groups.get(name, (None, None))
    if world is not distributed.group.WORLD:
        group = distributed.new_group(backend="gloo", timeout=timeout)
        _groups[name] = (distributed.group.WORLD, group)
    return group


def of_main_process(value: Any) -> Any:
    """Return the main process's value in every process."""
    return broadcast_object_list([value])[0] if several() else value


def check_shared(folder: str | os.PathLike) -> None:
    """Make sure that every process can write to a folder, and that it is the same one for all; makes it.

    Raises:
        InputError: it cannot be written, or a process does not see what the main one has written there.
    """
    folder, state = Path(folder), PartialState()
    if state.is_main_process:
        for left in folder.glob(f"{_TOKEN}*"):  # by runs that were killed here
            left.unlink(missing_ok=True)
    run = of_main_process(uuid.uuid4().hex)
    own, of_main = (folder / f"{_TOKEN}{run}-{rank}" for rank in (state.process_index, 0))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        who = f" by process {state.process_index}" if several() else ""
        raise InputError(
            f"output_dir '{folder}' cannot be written{who} ({error.strerror}): choose a folder that you may write to"
        ) from error
    try:
        wait_patiently()
        deadline = time.monotonic() + SHARED_DELAY
        while not of_main.exists():
            if time.monotonic() > deadline:
                raise InputError(
                    f"output_dir '{folder}' of the main process is not seen by process {state.process_index}: "
                    "it must be on a file system that all hosts share"
                )
            time.sleep(_POLL)
        wait_patiently()
    finally:
        own.unlink(missing_ok=True)


# -- losing a member --------------------------------------------------------------------------------------------------


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process did not take part any more: it has ended, or hangs.

    What else goes wrong between processes, such as models that differ or a GPU that two share, is none.
    """
    if isinstance(error, (distributed.DistNetworkError, distributed.DistStoreError)):
        return "EADDRINUSE" not in str(error)
    text = str(error)
    if not isinstance(error, RuntimeError) or not several() or _GONE.search(text) is None:
        return False
    return isinstance(error, distributed.DistError) or _OF_THE_GROUP.search(text) is not None or "DDP expects" in text


def is_hung_peer(error: BaseException) -> bool:
    """Whether an error says that another process gave no answer in time."""
    return is_lost_peer(error) and _HUNG.search(str(error)) is not None


def hung_peer(error: BaseException, where: str, timeout: timedelta | None = None) -> InputError:
    """What to say of a process that gives no answer.

    By NCCL it may stay unsaid: where the host is blocked in a read of the device, torch's watchdog aborts the process
    with a report of its own after the timeout.

    Args:
        error: one that `is_hung_peer`. where: such as `in step 17 of task`. timeout: how long it was waited for, if
            that is known.
    """
    waited = f" for {timeout.total_seconds() / 60:.3g} min" if timeout is not None else " in time"
    return InputError(
        f"no answer from another process{waited} {where}: it hangs, or its host or the network is gone. Look at that "
        "process (py-spy dump --pid …, nvidia-smi, its disk), then run the same command again: it goes on from the "
        f"last checkpoint. If a step may take that long, raise timeout_minutes ({_first_line(error)})"
    )


def tell_lost_peer(error: BaseException, at_once: bool = False) -> int:
    """Say in one line that a peer is gone; returns the exit code, 1, or 2 where it hangs.

    Args:
        error: one that `is_lost_peer`. at_once: the launcher knows already; else it is first left the time to see the
            failure that was the first.
    """
    if not at_once:
        time.sleep(HEAD_START)
    if is_hung_peer(error):
        return refused(hung_peer(error, "where it was waited for"))
    told = "another process of the run ended; its message is above, or in the launcher's report below"
    print(f"process {PartialState().process_index}: {told} ({_first_line(error)})", file=sys.stderr, flush=True)
    return 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# -- leaving ----------------------------------------------------------------------------------------------------------


def leave(code: int) -> None:
    """End this process now, whatever its group is doing: an interpreter that ends with a live group can hang or abort.

    What was printed is written out, child processes are ended.
    """
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # nobody reads it any more
    os._exit(code)


def end_process_group() -> None:
    """End the process group, if there is one; a program's last act, when it holds no trainer and no wrapped model.

    A group that is still there when the interpreter ends can abort a process that has done its work. One whose last
    owner is a `DistributedDataParallel` can hang: its destructor waits for gloo's threads with the interpreter's lock
    in its hand, while such a thread wants that lock to give up the objects of its last reduction. So what is left of
    the wrapped models (trainers refer to themselves in circles) goes first, while the group is still there.
    """
    gc.collect()
    _groups.clear()
    PartialState().destroy_process_group()
