#!/usr/bin/env python
"""Look at segmenters in the browser: a picture in, two models' classes side by side out.

    python scripts/demo.py runs/quickstart/segmenter
    python scripts/demo.py runs/quickstart/segmenter runs/other/segmenter --examples pictures/ --port 8000
    python scripts/demo.py org/gkd-resnet50-gtav nvidia/segformer-b0-finetuned-cityscapes-1024-1024
    python scripts/demo.py org/gkd-resnet50-gtav org/gkd-deit-small-gtav --push-space org/gkd-demo

Needs the package gradio. The page is served on this machine only (127.0.0.1) and fetches nothing from elsewhere. With
more than two models the page's menus say which are compared. --push-space makes a Space of it on the Hub, private
unless --public is given, and serves nothing here; to read private models the Space needs a secret HF_TOKEN. Wrong
input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("segmenters", nargs="+", metavar="SEGMENTER", help="folders or Hub ids")
    parser.add_argument("--examples", metavar="FOLDER", help="pictures to click on (default: a toy city's)")
    parser.add_argument("--port", type=int, default=7860, help="default %(default)s")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a segmenter")
    parser.add_argument("--push-space", metavar="ORG/NAME", help="put the page on the Hub as a Space instead")
    parser.add_argument("--public", action="store_true", help="make a new Space public")
    return parser.parse_args(argv)


def pictures(folder: str) -> list[Path]:
    """The picture files of a folder."""
    from gkd_hf.errors import InputError

    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"there are no pictures ({', '.join(PICTURES)}) in '{folder}'")
    return found


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for wrong input."""
    arguments = parse(argv)
    from gkd_hf.errors import InputError, refused
    from gkd_hf.hub.space import load_segmenters, push_space, toy_examples

    trust = arguments.trust_remote_code
    try:
        if not 0 < arguments.port < 2**16:
            raise InputError(f"there is no port {arguments.port}: --port takes 1 to 65535")
        with tempfile.TemporaryDirectory() as folder:
            examples = pictures(arguments.examples) if arguments.examples else toy_examples(folder)
            if arguments.push_space:
                url = push_space(
                    arguments.push_space,
                    arguments.segmenters,
                    trust_remote_code=trust,
                    private=not arguments.public,
                    examples=examples,
                )
                print(url)
                return 0
            segmenters = load_segmenters(arguments.segmenters, trust_remote_code=trust)
            from gkd_hf.hub.space_app import build, launch

            try:
                launch(build(segmenters, examples), server_name="127.0.0.1", server_port=arguments.port)
            except OSError as error:
                raise InputError(f"cannot serve on port {arguments.port}, choose another with --port") from error
    except InputError as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
