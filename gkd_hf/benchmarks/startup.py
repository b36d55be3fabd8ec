"""How long the library takes to import beside transformers, and a plan of a recipe to be told: whole processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd_hf.benchmarks.timing import ratio, timed_in_turn
from gkd_hf.errors import InputError

IMPORTS = {
    "transformers": "import torch, transformers",
    "models": "import torch; from transformers import AutoModel, PreTrainedModel",
    "gkd_hf": "import gkd_hf",
    "gkd_hf_models": "from gkd_hf import GKDStudentModel",
}


def measure(root: Path, recipes: Sequence[Path], import_rounds: int = 5, plan_rounds: int = 2) -> dict[str, Any]:
    """Time processes in turn, after one that is not timed, so that files come from memory.

    Args:
        root: of a checkout. recipes: to plan. import_rounds, plan_rounds: timed processes of each.

    Returns:
        ``import_over_transformers``: `import gkd_hf` over `import torch, transformers`. ``models_over_transformers``:
        `from gkd_hf import GKDStudentModel` over what any model class of transformers takes. ``import_s``: medians by
        name. ``plan_s``: seconds by recipe, the slowest of its rounds; ``slowest_plan_s``.

    Raises:
        InputError: no such recipe; a process ended with an error, whose last line is told; rounds below 1.
    """
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}

    def process(arguments: Sequence[str]) -> Callable[[], None]:
        def run() -> None:
            command = [sys.executable, *arguments]
            ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
                raise InputError(f"python {' '.join(arguments)} ended with exit code {ended.returncode}: {last}")

        return run

    script = str(root / "scripts" / "run_gkd.py")
    arms = {}
    for recipe in recipes:
        if not recipe.is_file():
            raise InputError(f"recipe '{recipe}' does not exist")
        # One that leaves its teacher open is planned with the one that ships.
        teacher = ["teacher.name=toy"] if 'name: "???"' in recipe.read_text(encoding="utf-8") else []
        arms[recipe.stem] = process([script, str(recipe), *teacher, "--plan"])
    imports = timed_in_turn({name: process(["-c", line]) for name, line in IMPORTS.items()}, rounds=import_rounds)
    plans = {name: max(times) for name, times in timed_in_turn(arms, rounds=plan_rounds, warmup=0).items()}
    return {
        "import_over_transformers": ratio(imports["gkd_hf"], imports["transformers"]),
        "models_over_transformers": ratio(imports["gkd_hf_models"], imports["models"]),
        "import_s": {name: sorted(times)[len(times) // 2] for name, times in imports.items()},
        "plan_s": plans,
        "slowest_plan_s": max(plans.values(), default=None),
    }
