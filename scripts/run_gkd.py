#!/usr/bin/env python
"""Run a recipe: distil a student without labels, teach it the task on the source domain, measure the unseen domains.

    python scripts/run_gkd.py                                             # the quickstart's recipe, no downloads
    python scripts/run_gkd.py scripts/recipes/gtav_dinov2b_deits.yaml --plan
    accelerate launch scripts/run_gkd.py scripts/recipes/gtav_dinov2b_deits.yaml \\
        data.roots.imagenet=/data/imagenet data.roots.gtav=/data/gtav data.roots.cityscapes=/data/cityscapes \\
        data.roots.bdd100k=/data/bdd100k data.roots.mapillary=/data/mapillary
    accelerate launch --multi_gpu --num_processes 2 scripts/run_gkd.py scripts/recipes/quickstart.yaml

Any key of the recipe can be set as `key.sub=value`; `stages.task_agnostic=null` leaves a stage out. The same command
continues an interrupted run. Wrong input ends with one line on stderr and exit code 2; under
`accelerate launch` the launcher's own report follows it and the exit code is 1, so try a recipe with --plan first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "scripts" / "recipes" / "quickstart.yaml"
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line: an optional recipe, overrides, --plan."""
    parser = argparse.ArgumentParser(
        prog="run_gkd.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a YAML recipe (default: scripts/recipes/quickstart.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values to use in place of the recipe's")
    parser.add_argument(
        "--plan", action="store_true", help="print what would be done, without network or training, and stop"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.recipe is not None and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    arguments = parse(argv)
    from gkd_hf.errors import InputError, refused
    from gkd_hf.training.recipe_file import load_recipe

    try:
        recipe = load_recipe(arguments.recipe or QUICKSTART, arguments.overrides)
        if arguments.plan:
            from gkd_hf.training.plan import plan

            print(plan(recipe))
        else:
            from gkd_hf.training.pipeline import run
            from gkd_hf.training.process_group import end_process_group

            run(recipe)
            end_process_group()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except InputError as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
