#!/usr/bin/env python
"""Measure how long `import gkd_hf` takes beside transformers, and `run_gkd.py --plan` of every shipped recipe.

    python scripts/benchmark_startup.py
    python scripts/benchmark_startup.py scripts/recipes/quickstart.yaml --import-rounds 9

Whole processes in turn. "import_over_transformers" is `import gkd_hf` over `import torch, transformers`, which imports
no model; "models_over_transformers" is `from gkd_hf import GKDStudentModel` over `from transformers import AutoModel,
PreTrainedModel`, which any model needs; both are medians over rounds. "plan_s" are the seconds of each plan, the
slowest of its rounds. The last line is one JSON object. Wrong input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

from gkd_hf.benchmarks.startup import measure
from gkd_hf.benchmarks.timing import machine
from gkd_hf.errors import InputError, refused

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="to plan (default: all in scripts/recipes)")
    parser.add_argument("--import-rounds", type=int, default=5, help="of each import (default %(default)s)")
    parser.add_argument("--plan-rounds", type=int, default=2, help="of each plan (default %(default)s)")
    options = parser.parse_args(argv)
    shipped = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
    recipes = options.recipes or [recipe for recipe in shipped if not recipe.stem.endswith("_compare")]
    try:
        result = measure(ROOT, [recipe.resolve() for recipe in recipes], options.import_rounds, options.plan_rounds)
    except InputError as error:
        return refused(error)
    for name, seconds in (result["import_s"] | result["plan_s"]).items():
        print(f"{name:<28} {seconds:6.2f} s")
    print(json.dumps(result | machine()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
