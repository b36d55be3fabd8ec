#!/usr/bin/env python
"""Measure one stage-1 training step against the method as it is written, and against the least it could cost.

    python scripts/benchmark_step.py                                      # ViT-S from ViT-B, 224/14, batch 8, fp32
    python scripts/benchmark_step.py --student resnet-50 --profile
    python scripts/benchmark_step.py --early-backward                     # as on GPUs: one view's activations
    python scripts/benchmark_step.py --teacher-cache                      # and: what reading teacher tokens saves
    python scripts/benchmark_step.py --device cuda --precision bf16 --batch-size 32 --image-size 512 --patch-size 16
    python scripts/benchmark_step.py --student facebook/dinov2-small --teacher facebook/dinov2-base

Three arms take turns in one process, with the same weights, masks and precision: "reference" (2·B student forwards,
explicit softmax attention over B×N×N), "ours" (the trainer's own step) and "floor" (teacher forward, 1.5·B student
forwards and backwards, no heads, no loss). All of them have AdamW and the same images as bytes, ready in memory.
Named models have random weights; Hub ids and folders bring theirs. "speedup" is reference / ours and "over_floor" ours
/ floor, each the median over --rounds; "parts_ms" are medians of at most five other steps, which wait after each part.
It takes six minutes on two cores. Memory is in MiB: what an arm holds between two steps, and the most that a step
allocates beyond it; "activation_mb" is the most that is kept for a backward pass. The losses are compared with
batch norms in eval mode. --profile adds a table by operator of ten steps, and what in them waits for the device or
copies. --teacher-cache adds three of our steps in turn, whose teacher is asked, read from shards, or asked and written
there, and after how many passes over a view that pays. The last line is one JSON object. Wrong input ends with one
line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

from gkd_hf.benchmarks import cache
from gkd_hf.benchmarks.step import PRESETS, StepSettings, measure
from gkd_hf.benchmarks.step_report import profiled, table
from gkd_hf.benchmarks.timing import use_threads
from gkd_hf.errors import InputError, refused


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = {field.name: field.default for field in fields(StepSettings)}
    named = ", ".join(PRESETS)
    own.add_argument("--student", default=default["student"], help=f"{named}, a Hub id or a folder (%(default)s)")
    own.add_argument("--teacher", default=default["teacher"], help="the same (%(default)s)")
    own.add_argument("--batch-size", type=int, default=default["batch_size"], help="images (%(default)s)")
    own.add_argument("--image-size", type=int, default=default["image_size"], help="pixels of a side (%(default)s)")
    own.add_argument("--patch-size", type=int, help="of the student (default: its own)")
    own.add_argument("--precision", default=default["precision"], help="fp32 or bf16 (%(default)s)")
    own.add_argument("--device", default=default["device"], help="cpu or cuda (%(default)s)")
    own.add_argument(
        "--early-backward",
        action=argparse.BooleanOptionalAction,
        help="one view's activations at a time (default: as a training, on GPUs alone)",
    )
    own.add_argument("--rounds", type=int, default=default["rounds"], help="timed steps of each arm (%(default)s)")
    own.add_argument("--peak-tflops", type=float, help="of the GPU, for its utilisation (known for some in bf16)")
    own.add_argument("--threads", type=int, default=2, help="of the CPU (%(default)s)")
    own.add_argument("--teacher-cache", action="store_true", help="also tell when a cache of teacher tokens pays")
    own.add_argument("--profile", action="store_true", help="also profile ten steps of the trainer")
    return own


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    options = vars(parser().parse_args(argv))
    try:
        use_threads(options["threads"])
        settings = StepSettings(**{field.name: options[field.name] for field in fields(StepSettings)})
        result = measure(settings)
        print(table(result))
        if options["teacher_cache"]:
            result["teacher_cache"] = cache.measure(settings)
            print(cache.table(result["teacher_cache"]))
        if options["profile"]:
            text, result["profile"] = profiled(settings)
            print(text)
    except InputError as error:
        return refused(error)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
