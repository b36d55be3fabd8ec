#!/usr/bin/env python
"""Compare methods: variants × seeds of one recipe, each tuned on the source alone, in one table and one figure.

    python scripts/compare_methods.py COMPARISON.yaml --plan
    python scripts/compare_methods.py COMPARISON.yaml --jobs 2
    python scripts/compare_methods.py COMPARISON.yaml --only gkd alone --seeds 0 stages.task.max_steps=50
    python scripts/compare_methods.py COMPARISON.yaml --check STORED.json

COMPARISON.yaml names `recipe` (a file, or a recipe's keys), `output_dir`, `seeds`, the `reference` that gains are
told against, and `variants` by name: `title`; `set`, recipe keys and their values; `tune`, keys and lists of values,
of which the best on the source's held-out split is taken with the first seed; `tuned_as`, another variant whose
choice it takes; `start_from`, another variant whose encoder its student starts from; `shown: false` for one that is
only a step on the way. `groups` are headings of the table with names of variants, `spread` the points by which
`--check` lets results differ. scripts/recipes/toy_compare.yaml is an example of all of it.

`key.sub=value` changes the recipe that all variants share; what a variant sets itself stays. Stages that runs have in
common are trained once. The same command goes on where an interrupted one stood, and runs only what is missing where
variants or seeds were added. results.json, results.md and results.png in the comparison's output_dir are written anew
after every finished run. Wrong input ends with one line on stderr and exit code 2, failed runs, and with --check
results that are not the stored ones, with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="compare_methods.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", metavar="COMPARISON.yaml", help="what is compared")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes of the shared recipe")
    parser.add_argument("--jobs", metavar="N", help="runs at once (default: one for each GPU, else for each core)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these variants, and what they need")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="run these of the comparison's seeds")
    parser.add_argument("--plan", action="store_true", help="print the runs and what is finished, and stop")
    parser.add_argument("--check", metavar="STORED.json", help="compare the results with those of another time")
    arguments = parser.parse_intermixed_args(argv)
    # Overrides may follow an option that takes several values.
    for values in (arguments.only, arguments.seeds):
        arguments.overrides += [value for value in values or () if "=" in value]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 for failed runs or a failed check, 2 for wrong input, 130 after Ctrl-C."""
    arguments = parse(argv)
    from gkd_hf.training.sigterm import interruptible

    return interruptible(lambda: run(arguments), "the same command goes on where this comparison stood")


def run(arguments: argparse.Namespace) -> int:
    """Plan or run; return the exit code."""
    from gkd_hf.comparison.definition_file import read_comparison
    from gkd_hf.comparison.run import plan, run_comparison, select
    from gkd_hf.errors import InputError, refused

    try:
        if arguments.jobs is not None and not (arguments.jobs.isdecimal() and int(arguments.jobs) > 0):
            raise InputError(f"--jobs is '{arguments.jobs}': give a whole number from 1 on")
        chosen = [[value for value in values if "=" not in value] if values else None
                  for values in (arguments.only, arguments.seeds)]  # fmt: skip
        schedule = select(read_comparison(arguments.comparison, arguments.overrides), *chosen)
        if arguments.plan:
            schedule.check()
            print(plan(schedule), flush=True)
            return 0
        jobs = None if arguments.jobs is None else int(arguments.jobs)
        return run_comparison(schedule, jobs, ["python", *sys.argv], arguments.check)
    except InputError as error:
        return refused(error)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the library was imported
        print("interrupted before anything was begun", file=sys.stderr)
        sys.exit(130)
