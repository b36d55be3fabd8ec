"""The one exception for what a user can get wrong, and the hint that names what they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something in the user's input (recipe, data, model, folder) is wrong.

    The message says what is wrong, where, and what to do. The command line prints it as one line and exits with 2.
    """


def nearest(word: object, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the known word closest to ``word``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f", did you mean '{matches[0]}'?" if matches else ""
