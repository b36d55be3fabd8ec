#!/usr/bin/env python
"""Measure segmentation by sliding windows: batched or one by one, eager, compiled or in ONNX Runtime, and its memory.

    python scripts/benchmark_inference.py                                 # ViT-S/16 with a linear head, random weights
    python scripts/benchmark_inference.py --model resnet-50 --head upernet
    python scripts/benchmark_inference.py --model runs/quickstart/segmenter --window 64 --stride 43 --image-size 64x96
    python scripts/benchmark_inference.py --device cuda --precision bf16 --batch-size 32 --images 16

All arms segment the same random images, in turn, from pixels to labels. "eager", "compiled" (inductor) and "onnx" (an
exported graph, in fp32) take --batch-size windows at a time, "one by one" is eager with a single one. Latency is that
of one image, images/s that of --images at once. "batched_over_one_by_one", "compiled_over_eager" and
"onnx_over_eager" are ratios of images/s, > 1 where the first is faster: the medians over the rounds. An arm that is
not possible here is skipped with the reason. Memory is what one image of --memory-size takes beyond pixels and
weights: on a GPU by torch's allocator, elsewhere by the storages of tensors; "bound_mb" is the image's scores and one
batch of windows. "tile_fused_over_plain" is how many times faster the best class at the labels' size is found tile by
tile than from all resized scores. The last line is one JSON object. Wrong input ends with one line on stderr and exit
code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

from gkd_hf.benchmarks.inference import InferenceSettings, measure, table
from gkd_hf.benchmarks.inference_arms import PRESETS
from gkd_hf.benchmarks.timing import use_threads
from gkd_hf.errors import InputError, refused


def size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, for example 512x1024")
    return int(height), int(width)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = {field.name: field.default for field in fields(InferenceSettings)}
    parser.add_argument(
        "--model",
        default=default["model"],
        help=f"{', '.join(PRESETS)}, or a segmenter's Hub id or folder (default %(default)s)",
    )
    parser.add_argument("--head", help="decode head of a model with random weights (default linear)")
    for name, what in (
        ("image_size", "of the timed images"),
        ("label_size", "of their labels"),
        ("memory_size", "of the image for the memory"),
    ):
        height, width = default[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=size,
            metavar="HEIGHTxWIDTH",
            default=default[name],
            help=f"{what} (default {height}x{width})",
        )
    for name, what in (
        ("classes", "of a model with random weights"),
        ("window", "side of the window, pixels"),
        ("stride", "of the windows, pixels"),
        ("batch_size", "windows in one forward"),
        ("images", "segmented at once for the images/s"),
        ("rounds", "timed calls of each arm"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default[name], help=f"{what} (default %(default)s)")
    parser.add_argument("--precision", default=default["precision"], help="fp32 or bf16 (default %(default)s)")
    parser.add_argument("--device", default=default["device"], help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    options = vars(parse(argv))
    try:
        use_threads(options["threads"])
        settings = InferenceSettings(**{field.name: options[field.name] for field in fields(InferenceSettings)})
        result = measure(settings)
    except InputError as error:
        return refused(error)
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
