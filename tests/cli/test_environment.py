"""What quickstart and test do where a virtual environment cannot be made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Debian's python3 without its venv package: the folder is begun, but pip and then activate are never put there.
PYTHON_WITHOUT_VENV = f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && ln -sf {sys.executable} "$3/bin/python"
    echo "The virtual environment was not created successfully because ensurepip is not"
    echo "available."
    exit 1
fi
exec {sys.executable} "$@"
"""
PYTHON_WITHOUT_PIP = f"""#!/bin/sh
[ "$1 $2" = "-m pip" ] && exit 1
exec {sys.executable} "$@"
"""


def prepare(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | environment
    script = checkout / "scripts" / "environment.sh"
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . {script}"], env=variables, capture_output=True, text=True, check=False
    )


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/environment.sh", "scripts/constraints.txt", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_python_without_venv_leaves_nothing_behind(checkout: Path) -> None:
    executable(checkout / "bin" / "python3", PYTHON_WITHOUT_VENV)
    for _ in range(2):
        done = prepare(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "because ensurepip is not)" in line
        assert "apt install python3-venv" in line
        assert not (checkout / ".venv").exists()


def test_environment_without_pip(checkout: Path) -> None:
    executable(checkout / "mine" / "bin" / "python", PYTHON_WITHOUT_PIP)
    mine = checkout / "mine"
    done = prepare(checkout, VIRTUAL_ENV=str(mine), PATH=f"{mine / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {mine} has no working pip: run '{mine}/bin/python -m ensurepip', or remove that folder and start "
        "again\n"
    )
