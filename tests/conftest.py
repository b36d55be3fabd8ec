"""What several test packages need: a Python that has only what a stranger would have installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BARE_PACKAGES = ("torch", "transformers", "pillow", "scipy")


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python in a virtual environment of its own that sees torch, transformers, pillow, scipy and what they require.

    Neither gkd_hf nor datasets nor accelerate can be imported there. The packages are linked, not installed again.
    """
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "bare"
    python.write_text(f'#!/bin/sh\nexec env -u PYTHONPATH "{folder}/bin/python" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(where, text=True).strip())
    for name in _with_requirements(BARE_PACKAGES):
        for entry in _top_level(name):
            link = site / entry.name
            if not link.exists():
                link.symlink_to(entry)
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('gkd_hf', 'datasets', 'accelerate')))"
    subprocess.run([python, "-c", f"import torch, transformers, PIL, scipy; {absent}"], check=True, cwd=folder)
    return python


def _with_requirements(names: tuple[str, ...]) -> set[str]:
    """Distributions that have to be there for ``names``, by their canonical names."""
    found, waiting = set(), [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def _top_level(name: str) -> set[Path]:
    """What a distribution has put directly into site-packages."""
    distribution = importlib.metadata.distribution(name)
    root = Path(distribution.locate_file("")).resolve()
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return {root / top for top in tops if Path(sys.prefix) in (root / top).parents}
