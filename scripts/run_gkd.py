#!/usr/bin/env python
"""Run a recipe: distil a student without labels, teach it the task on the source domain, measure the unseen domains.

    python scripts/run_gkd.py                                             # the quickstart's recipe, no downloads
    python scripts/run_gkd.py scripts/recipes/gtav_dinov2b_deits.yaml --plan
    python scripts/run_gkd.py scripts/recipes/gtav_dinov2b_deits.yaml --plan --gpus 8 --memory 80
    accelerate launch scripts/run_gkd.py scripts/recipes/gtav_dinov2b_deits.yaml \\
        data.roots.imagenet=/data/imagenet data.roots.gtav=/data/gtav data.roots.cityscapes=/data/cityscapes \\
        data.roots.bdd100k=/data/bdd100k data.roots.mapillary=/data/mapillary
    accelerate launch --multi_gpu --num_processes 2 scripts/run_gkd.py scripts/recipes/quickstart.yaml

Any key of the recipe can be set as `key.sub=value`; `stages.task_agnostic=null` leaves a stage out. The same command
continues an interrupted run. Wrong input ends with one line on stderr and exit code 2, a loss that leaves the finite
numbers with one line and exit code 3; under `accelerate launch` the launcher's own report follows it and the exit code
is 1, so try a recipe with --plan first.
SIGTERM ends a run with exit code 0 after it has saved what it needs to go on.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from gkd_hf.training.scale_question import ScaleQuestion

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
    scale = parser.add_argument_group(
        "scale on paper", "with --plan --gpus: memory per GPU, operations and hours of each stage, on 1 to 512 GPUs"
    )
    scale.add_argument("--gpus", metavar="N", help="number of GPUs to say of whether the stages fit on them")
    scale.add_argument("--memory", metavar="GB", help="memory of one GPU (default: 80)")
    scale.add_argument(
        "--gpu-tflops", metavar="X", help="what one GPU can do in a second, 10^12 operations (default: 312, A100 bf16)"
    )
    scale.add_argument("--utilisation", metavar="U", help="part of that which training gets, 0 to 1 (default: 0.35)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.recipe is not None and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    return arguments


def scale_question(arguments: argparse.Namespace) -> ScaleQuestion | None:
    """What --gpus and its companions ask; None if nothing; raises `InputError` for what makes no sense."""
    from gkd_hf.errors import InputError
    from gkd_hf.training.scale_question import ScaleQuestion

    details = {
        "--memory": arguments.memory,
        "--gpu-tflops": arguments.gpu_tflops,
        "--utilisation": arguments.utilisation,
    }
    given = [name for name, value in {"--gpus": arguments.gpus, **details}.items() if value is not None]
    if given and not arguments.plan:
        raise InputError(f"{given[0]} belongs to --plan and does nothing without it: add --plan, or drop it")
    if arguments.gpus is None:
        if given:
            raise InputError(f"{given[0]} belongs to --gpus N and does nothing without it: add --gpus, or drop it")
        return None
    return ScaleQuestion.read(arguments.gpus, *details.values())


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 where another process of the run is gone, 2 for wrong input, 130 after Ctrl-C.

    3 says that the loss left the finite numbers.
    """
    arguments = parse(argv)
    if arguments.plan:  # begins nothing that could go on: at SIGTERM `end_early` says so
        try:
            return run(arguments)
        except KeyboardInterrupt:
            print("interrupted: nothing was begun", file=sys.stderr)
            return 130
    from gkd_hf.training.sigterm import interruptible

    goes_on = "the same command goes on from the last checkpoint, if there was one yet"
    return interruptible(lambda: run(arguments), goes_on)


def run(arguments: argparse.Namespace) -> int:
    """Plan or run a recipe; return the exit code."""
    try:
        from gkd_hf.errors import InputError, refused
        from gkd_hf.training.recipe_file import load_recipe
    except ImportError as error:  # no installation, or half of one
        hint = "" if "quickstart" in str(error) else ": ./scripts/quickstart installs all that is needed"
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    try:
        question = scale_question(arguments)
        recipe = load_recipe(arguments.recipe or QUICKSTART, arguments.overrides)
        if arguments.plan:
            from gkd_hf.training.plan import plan

            print(plan(recipe), flush=True)
            collect_again()
            if question is not None:
                from gkd_hf.training.scale_table import scale_report

                print("\nmemory and hours of every stage, a minute or two:", file=sys.stderr, flush=True)
                report = scale_report(recipe, question, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
                print(f"\n{report}")
            return 0
    except InputError as error:
        return refused(error)
    from gkd_hf.training import pipeline
    from gkd_hf.training.ending import exit_code

    collect_again()
    return exit_code(lambda: pipeline.run(recipe))


def collect_again() -> None:
    """Look for garbage again, but not in what the imports made, neither now nor at the end: 0.6 s of a plan's 4."""
    if not gc.isenabled():  # not where another program calls `main`
        gc.freeze()
        gc.enable()


def end_early(*_: object) -> NoReturn:
    """End at SIGTERM while the library, which has its own answer to it, is not imported yet."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"SIGTERM: ended before anything was begun; the same command begins\n")
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_early)
    # What an import makes stays; looking through it for garbage, again and again, is a sixth of its time.
    gc.disable()
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the library was imported
        print("interrupted before anything was begun", file=sys.stderr)
        sys.exit(130)
