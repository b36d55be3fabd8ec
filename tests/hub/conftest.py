"""A Hub for one test, and processes whose clients use it: they read HF_ENDPOINT once, when they are imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .server import LoopbackHub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A new, empty Hub."""
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def hub_process(hub: LoopbackHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python against `hub`; fails the test if `check` is set and the process ends with an error.

    `hub_process(code | path of a script, *arguments, token=…, home=…, check=True, timeout=120, python=…, NAME=value)`
    where `home` is the folder of the client's caches, by default one per test.
    """

    def run(
        program: str | Path,
        *arguments: str,
        token: str | None = hub.write_token,
        home: Path = tmp_path / "home",
        check: bool = True,
        timeout: float = 120,
        python: str | Path = sys.executable,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        command = [program] if isinstance(program, Path) else ["-c", program]
        paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [python, *command, *arguments],
            env=hub.environment(home, token, **(paths | environment)),
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run
