#!/usr/bin/env python
"""Measure how fast training data comes: bare decoding of the same bytes against the streams of both stages.

    python scripts/benchmark_loader.py                                    # street scenes rendered on the spot
    python scripts/benchmark_loader.py data/camvid/day --split train --classes 11
    python scripts/benchmark_loader.py data/gtav --label-map gtav --classes 19 --as-stored --workers 8

Images of a folder of shards are tiled to 1024x512 JPEGs, unless --as-stored. Measured on as many worker processes as
training would have: (a) Pillow decoding alone, (b) the stage-1 stream with crop, flip and normalisation, (c) with
RandAugment and erasing too, (d) the stage-2 stream, label included. Workers pass on bytes: the main process
normalises, and erases, each batch as it comes, as the trainers do, on the GPU if there is one, and the time for it
counts in the images per second ("normalise_ms" tells it). Rounds of all four alternate and the fastest of each
counts. "cpu_ms" is the processor time of the workers alone per image, which other programs disturb less than the
images per second. "resident_mib" is the memory of the stage-2 stream's workers after each of three passes: it should
stay flat. The last line is one JSON object. Wrong input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

import torch

from gkd_hf.data.label_maps import label_map
from gkd_hf.data.loader_benchmark import LoaderSettings, measure, rendered, tiled, write_pairs
from gkd_hf.data.toy_city import CLASSES
from gkd_hf.errors import InputError, refused


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="shards with image and label; default: rendered street scenes")
    parser.add_argument("--split", default="train")
    parser.add_argument("--label-map", default="identity", help="name of a label map (default %(default)s)")
    parser.add_argument("--classes", type=int, default=len(CLASSES), help="number of classes (default %(default)s)")
    parser.add_argument("--as-stored", action="store_true", help="read the folder as it is, without tiling")
    parser.add_argument("--pictures", type=int, default=48, help="distinct pictures (default %(default)s)")
    parser.add_argument("--images", type=int, default=384, help="images per measurement (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a batch (default %(default)s)")
    parser.add_argument("--stage1-size", type=int, default=224, help="stage-1 crop, pixels (default %(default)s)")
    parser.add_argument("--stage2-size", type=int, default=512, help="stage-2 crop, pixels (default %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=device, choices=("cpu", "cuda"), help="that normalises (default here: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    options = parse(argv)
    torch.set_num_threads(1)
    try:
        settings = LoaderSettings(**{field.name: vars(options)[field.name] for field in fields(LoaderSettings)})
        labels = label_map(options.label_map, options.classes)
        if options.as_stored and options.folder is None:
            raise InputError("--as-stored needs a folder of shards")
        if options.as_stored:
            result = measure(options.folder, options.split, labels, settings)
        else:
            with tempfile.TemporaryDirectory() as folder:
                count = options.pictures
                pairs = tiled(options.folder, options.split, count) if options.folder else rendered(count)
                write_pairs(pairs, folder)
                result = measure(folder, "train", labels, settings)
    except InputError as error:
        return refused(error)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
