#!/usr/bin/env python
"""Push a finished run to the Hub: the encoder to org/name, the segmenter to org/name-SOURCE, one commit each.

    hf auth login                                                # once, with a token of the role write
    python scripts/push.py runs/quickstart --repo-id org/gkd-toy
    python scripts/push.py runs/quickstart                       # where its recipe's hub.repo_id says
    python scripts/push.py runs/quickstart --repo-id org/gkd-toy --public
    python scripts/push.py out/encoder --repo-id org/gkd-small   # one exported folder, that of a trainer

Nothing but the two finished folders is uploaded: weights as safetensors, configuration, card, report; never the
teacher, optimiser state or pickles. New repos are private unless --public is given; the visibility of one that exists
stays as it is. It may be repeated: what did not change makes no commit, and what others did in the repo stays, a card
edited there included; pushed.json beside the folders remembers what came from here. Failure ends with one line on
stderr and exit code 2, and loses nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. There is no option for a token: it would stay in the shell's history."""
    parser = argparse.ArgumentParser(
        prog="push.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="output_dir of a finished run, or one exported folder")
    parser.add_argument("--repo-id", metavar="ORG/NAME", help="the encoder's repo (default: the recipe's hub.repo_id)")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--public", action="store_true", help="make new repos public")
    visibility.add_argument("--private", action="store_true", help="make new repos private, whatever the recipe says")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 where the push failed."""
    arguments = parse(argv)
    from gkd_hf.errors import InputError, refused
    from gkd_hf.hub.push import push_run

    private = False if arguments.public else True if arguments.private else None
    try:
        for url in push_run(arguments.run_dir, arguments.repo_id, private=private):
            print(url)
    except InputError as error:
        return refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
