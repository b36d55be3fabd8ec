"""A run of several processes as a test handles it: started by `accelerate launch`, watched, and disturbed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "scripts" / "accelerate"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_command(processes: int, preset: str | None = None) -> list[str]:
    """What comes before the script; None takes the preset for that many processes with whole copies."""
    # --cpu --num_processes 2 silently runs one process; the preset ddp starts two, which find no GPU and take gloo.
    preset = preset or ("ddp" if processes > 1 else "single")
    command = [*LAUNCH, "--config_file", str(PRESETS / f"{preset}.yaml"), "--num_processes", str(processes)]
    return [*command, "--main_process_port", str(free_port())]


def own_environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this checkout and has one thread and no GPU."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def run_launched(script: str, *arguments: object, processes: int, preset: str | None = None) -> str:
    """Run a script of the repository to its end and return what it printed; see `launch_command`."""
    run = subprocess.run(
        [*launch_command(processes, preset), str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=own_environment(),
        timeout=480,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


class Launched:
    """A run in a session of its own, whose output goes to a file.

    Args:
        processes: number of them; 0 starts the script with python, without the launcher.
        log: file of stdout and stderr. script: of the repository. arguments: its own.
    """

    def __init__(self, processes: int, log: Path, script: str, *arguments: object):
        self.processes, self.log = processes, log
        start = launch_command(processes) if processes else [sys.executable]
        environment = own_environment(HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*start, str(ROOT / script), *map(str, arguments)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def workers(self) -> dict[int, int]:
        """Process ids of the ranks that have been started and live, by rank."""
        if self.processes <= 1:
            return {0: self.process.pid}
        found = {}
        for pid in children(self.process.pid):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            for entry in environment:
                if entry.startswith(b"RANK=") and state != "Z":
                    found[int(entry[5:])] = pid
        return found

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, happened: Callable[[], object], what: str, patience: float = 120) -> None:
        """Wait for something; fail with the output if the run ends or the patience does before it."""
        deadline = time.monotonic() + patience
        while not happened():
            ended = self.process.poll() is not None
            if ended and happened():
                return
            assert not ended, f"ended before {what}:\n{self.output()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.output()[-4000:]}"
            time.sleep(0.005)

    def wait(self, patience: float = 120) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end:\n{self.output()[-4000:]}") from None

    def kill(self) -> None:
        """End all of it, at once."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=30)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """All below a process."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found
