#!/usr/bin/env python
"""Measure the metric against the algorithm of evaluate's mean_iou, and a whole evaluation against its model's forward.

    python scripts/benchmark_metric.py                                    # ResNet-18, 100 images of 2048x1024
    python scripts/benchmark_metric.py --only metric --height 1024 --width 2048 --classes 19
    python scripts/benchmark_metric.py --student vit-s --images 24
    python scripts/benchmark_metric.py --device cuda --precision bf16 --workers 8 --student resnet-50

"speedup" is the time of the histograms of evaluate's mean_iou over ours for one pair of int64 maps in memory, median
over rounds in turn; "equal" whether intersections and unions are the same numbers. The histograms are numpy's, on one
thread of the CPU; ours takes all --threads, or the GPU. "evaluation_over_forward" is the time of evaluate_domains
(reading, decoding, resizing to 1024x512, sliding windows of 512 with stride 341, resizing the scores to the labels'
2048x1024, counting there) over that of the model's forward alone on the same windows in the same batches, half of
them before and half after; median over --rounds; weights are random, the head is linear.
On two cores it takes six minutes.
The last line is one JSON object. Wrong input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

import torch

from gkd_hf.benchmarks.metric import STUDENTS, EvaluationSettings, measure_evaluation, measure_metric
from gkd_hf.benchmarks.timing import machine, use_threads
from gkd_hf.errors import InputError, refused


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = {field.name: field.default for field in fields(EvaluationSettings)}
    parser.add_argument("--only", choices=("metric", "evaluation"), help="measure one of the two")
    parser.add_argument("--height", type=int, default=1024, help="of the metric's pair (default %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="of the metric's pair (default %(default)s)")
    parser.add_argument("--classes", type=int, default=default["classes"], help="number (default %(default)s)")
    parser.add_argument("--student", default=default["student"], help=f"{', '.join(STUDENTS)} (default %(default)s)")
    parser.add_argument("--images", type=int, default=default["images"], help="evaluated (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=default["rounds"], help="evaluations (default %(default)s)")
    parser.add_argument("--workers", type=int, default=default["workers"], help="that read (default %(default)s)")
    parser.add_argument("--precision", default=default["precision"], help="fp32 or bf16 (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    options = parse(argv)
    result = {}
    try:
        use_threads(options.threads)
        evaluated, given = options.only != "metric", vars(options)
        wanted = {f.name: given[f.name] for f in fields(EvaluationSettings) if f.name in given}
        settings = EvaluationSettings(**wanted) if evaluated else None  # refused before anything is measured
        if options.only != "evaluation":
            result |= measure_metric(options.height, options.width, options.classes, device=options.device)
            print(f"one pair of {options.height}×{options.width}, {options.classes} classes:")
            ours = "the GPU" if options.device == "cuda" else f"{torch.get_num_threads()} thread(s)"
            for name, where in (("histograms", "numpy, 1 thread"), ("ours", ours), ("ours_uint8", ours)):
                print(f"  {name:<12} {result[f'{name}_ms']:8.2f} ms  ({where})")
            least, most = result["speedup_range"]
            print(f"  speedup {result['speedup']:.1f} ({least:.1f} to {most:.1f} over the rounds)")
            print(f"  equal: {result['equal']}")
        if settings is not None:
            result |= measure_evaluation(settings)
            print(f"{settings.images} images of 2048×1024 at 1024×512, {settings.student}, {settings.precision}:")
            for name in ("evaluation", "forward"):
                print(f"  {name:<12} {result[f'{name}_s']:8.2f} s")
            print(f"  evaluation / forward {result['evaluation_over_forward']:.3f}")
    except InputError as error:
        return refused(error)
    print(json.dumps(result | machine(options.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
