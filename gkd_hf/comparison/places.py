"""Where the runs of a comparison are: their processes, the GPUs and cores of each, the data that all of them read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from gkd_hf.comparison.cells import Cell
from gkd_hf.comparison.definition import Comparison
from gkd_hf.errors import InputError
from gkd_hf.training.recipe_data import RecipeData

RUN_GKD = Path(__file__).resolve().parents[2] / "scripts" / "run_gkd.py"


class Process(Protocol):
    """A run that was started: as `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(frozen=True)
class Places:
    """Where runs can be at once.

    Attributes:
        jobs: how many.
        devices: the GPUs that they share, one for each run; empty on CPUs.
        threads: of each run.
    """

    jobs: int
    devices: tuple[str, ...]
    threads: int

    @classmethod
    def here(cls, jobs: int | None) -> Places:
        """As many as there are GPUs, else as there are cores; or ``jobs``."""
        import torch

        from gkd_hf.data.shard_processes import cores

        count = torch.cuda.device_count()
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = tuple(named.split(","))[:count] if named else tuple(map(str, range(count)))
        jobs = jobs or count or cores()
        return cls(jobs, devices, max(1, cores() // jobs))

    def environment(self, place: int) -> dict[str, str]:
        """The environment of the run in one of them; what the user has set stays."""
        environment = {"OMP_NUM_THREADS": str(self.threads)} | os.environ
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        return environment


def command(cell: Cell) -> list[str]:
    """The command of a run."""
    return [sys.executable, str(RUN_GKD), str(cell.folder / "cell.yaml")]


def start(cell: Cell, environment: dict[str, str]) -> Process:
    """Start a run; what it prints is added to its log."""
    with cell.log.open("ab") as log:
        # In a session of its own: Ctrl-C comes to this program alone, which asks the runs to save and end.
        return subprocess.Popen(
            command(cell), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def is_held(cell: Cell) -> bool:
    """Whether a run is going on in its folder that this comparison has not started."""
    place = cell.folder / ".lock"
    if not place.is_file():
        return False
    lock = FileLock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def render_data(comparison: Comparison, names: Iterable[str], progress: bool) -> None:
    """Render what the runs of the variants read, once, into the comparison's own folder.

    Raises:
        InputError: as `RecipeData`.
    """
    seen = []
    for name in names:
        recipe = comparison.recipe(comparison.variants[name], comparison.seeds[0], comparison.output_dir, {})
        try:
            data = RecipeData(recipe)
            if data.uses() not in seen:
                data.render_toy_city(progress)
            seen.append(data.uses())
        except InputError as error:
            raise InputError(f"variant '{name}': {error}") from error
