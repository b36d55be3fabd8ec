#!/usr/bin/env python
"""Export a segmenter to ONNX: any batch and image size in, class logits of the same size out.

    python scripts/export_onnx.py runs/quickstart/segmenter        # → runs/quickstart/segmenter/onnx/model.onnx
    python scripts/export_onnx.py org/gkd-resnet50-gtav --revision main --out model.onnx
    python scripts/export_onnx.py nvidia/segformer-b0-finetuned-ade-512-512 --out segformer.onnx
    python scripts/export_onnx.py runs/swin/segmenter --size 512x1024          # a graph for images of this size only

Needs the packages onnx, onnxruntime and onnxscript. The graph is run in onnxruntime at two batch sizes and two image
sizes and compared with PyTorch; if the logits differ by more than --tolerance nothing is written. Wrong input ends
with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed


def image_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, for example 512x1024")
    return int(height), int(width)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="export_onnx.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("segmenter", help="a folder or a Hub id")
    parser.add_argument("--out", metavar="FILE", help="default: onnx/model.onnx in the segmenter's folder")
    parser.add_argument("--revision", help="commit, tag or branch of the Hub id")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the segmenter")
    parser.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="one image size instead of any")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest absolute difference of the logits (default %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    arguments = parse(argv)
    from gkd_hf.errors import InputError, refused
    from gkd_hf.hub.onnx import export_onnx, onnx_usage

    try:
        exported = export_onnx(
            arguments.segmenter,
            arguments.out,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            size=arguments.size,
            tolerance=arguments.tolerance,
        )
    except InputError as error:
        return refused(error)
    print(f"{exported.file}: {exported.file.stat().st_size / 1e6:.1f} MB, opset {exported.opset}")
    print(f"{len(exported.labels)} classes: {', '.join(exported.labels)}")
    print("largest difference to PyTorch:")
    for (batch, height, width), difference in exported.differences.items():
        print(f"  {batch} × {height}×{width}: {difference:.1e}")
    print(f"\nIn Python:\n\n{onnx_usage(exported.file)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
