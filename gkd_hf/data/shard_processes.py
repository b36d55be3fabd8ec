"""Write the shards of a prepared data set with several processes, of which any may be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any

from tqdm import tqdm

from gkd_hf.data.manifest import file_sha256
from gkd_hf.data.shard_writer import Job, Part, read_facts, write_shard
from gkd_hf.errors import InputError


def cores() -> int:
    """How many processes this one may keep busy."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Stopped(Exception):
    """The other processes are asked to give up."""


class _Worker:
    """Writes shards in a process of its own, counting rows where the main process sees them."""

    def __init__(self, job: Job, context: multiprocessing.context.BaseContext) -> None:
        self._job = job
        self._rows = context.Value("Q", 0)
        self._stop = context.Event()

    @property
    def rows(self) -> int:
        return self._rows.value

    def stop(self) -> None:
        self._stop.set()

    def row_done(self) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._rows.get_lock():
            self._rows.value += 1

    def write(self, part: Part) -> dict[str, Any]:
        return _finished(part) or write_shard(part, self._job, self.row_done)


_worker: _Worker | None = None  # in a worker process, its own


def _start_worker(worker: _Worker) -> None:
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's, which stops the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(part: Part) -> dict[str, Any]:
    return _worker.write(part)


def _finished(part: Part) -> dict[str, Any] | None:
    """The facts of a shard that is there already."""
    if not part.target.exists():
        return None
    facts = read_facts(part.target)
    del facts["settings"]
    return facts | {"bytes": part.target.stat().st_size, "sha256": file_sha256(part.target)}


def write_all(parts: Sequence[Part], job: Job, workers: int, progress: bool) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; return the facts of all, in order.

    Args:
        workers: processes; with one it is this one.
        progress: show a bar.

    Raises:
        InputError: as `write_shard`, more bad samples than ``job.limit`` allows, and a worker that was killed.
        OSError: a shard cannot be written.
    """
    done = sum(len(part.samples) for part in parts if part.target.exists())
    total = sum(len(part.samples) for part in parts)
    every = 0.2 if sys.stderr.isatty() else 30.0  # seconds; in a log each is a line
    with tqdm(
        total=total, initial=done, desc=job.domain, unit="image", mininterval=every, disable=not progress
    ) as bar:
        facts: dict[int, dict[str, Any]] = {}
        left_out: dict[str, list[dict[str, str]]] = {part.split: [] for part in parts}
        writing = _here(parts, job, bar) if workers == 1 else _in_processes(parts, job, min(workers, len(parts)), bar)
        with closing(writing):  # which ends the processes, whatever is raised here
            for number, found in writing:
                facts[number] = found
                split = parts[number].split
                left_out[split] += found["left_out"]
                job.limit.check(split, left_out[split])
    return [facts[number] for number in range(len(parts))]


def _here(parts: Sequence[Part], job: Job, bar: tqdm) -> Generator[tuple[int, dict[str, Any]], None, None]:
    for number, part in enumerate(parts):
        yield number, _finished(part) or write_shard(part, job, bar.update)


def _in_processes(
    parts: Sequence[Part], job: Job, workers: int, bar: tqdm
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Yield (number, facts) of each part as it is finished."""
    # Not forked from this process, where threads of datasets or a notebook may hold locks that a copy waits for
    # for ever; a server that has loaded everything once forks each worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    worker, done = _Worker(job, context), bar.n
    pool = ProcessPoolExecutor(workers, context, _start_worker, (worker,))
    try:
        numbers = {pool.submit(_work, part): number for number, part in enumerate(parts)}
        waiting = set(numbers)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(done + worker.rows - bar.n)
            for future in finished:
                yield numbers[future], future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, as the system does when memory runs out: run this again with fewer "
            "workers; finished shards stay"
        ) from error
    finally:
        worker.stop()
        pool.shutdown(cancel_futures=True)
