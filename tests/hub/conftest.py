"""A Hub for one test, and processes whose clients use it: they read HF_ENDPOINT once, when they are imported."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants

from gkd_hf.hub import upload

from .runs import finished_run
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

    `hub_process(code | path of a script, *arguments, token=…, home=…, check=True, timeout=300, python=…, NAME=value)`
    where `home` is the folder of the client's caches, by default one per test.
    """

    def run(
        program: str | Path,
        *arguments: str,
        token: str | None = hub.write_token,
        home: Path = tmp_path / "home",
        check: bool = True,
        timeout: float = 300,
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


@pytest.fixture(scope="session")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "original")


@pytest.fixture
def run_dir(one_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(one_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none is waited."""
    found: list[float] = []
    monkeypatch.setattr(upload.time, "sleep", found.append)
    return found


@pytest.fixture
def online(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> LoopbackHub:
    """This process's client uses the loopback Hub, with a token that may write."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub


@pytest.fixture(scope="session")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("push_script", ROOT / "scripts" / "push.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run scripts/push.py; assert exit code 2 and one error line; return that line."""

    def run(*arguments: object) -> str:
        assert script.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if "error:" in line]
        assert len(lines) == 1 and "Traceback" not in said.err, said.err
        return lines[0]

    return run
