"""What a user can get wrong. Defined beside the models, because that folder alone travels to the Hub."""

from __future__ import annotations

import sys

from gkd_hf.models.errors import InputError, nearest

__all__ = ["NOT_FINITE", "InputError", "nearest", "refused"]

# Exit code of a run whose loss left the finite numbers: one of its own, as that answers who tries several values.
NOT_FINITE = 3


def refused(error: InputError) -> int:
    """Print the error as one line on stderr and return 2, the exit code of every script for it."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2
