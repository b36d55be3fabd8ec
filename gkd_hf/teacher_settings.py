"""What can be said of a teacher before there is one: a mistake in a recipe is told without loading any model class."""

from __future__ import annotations

import os
from typing import Any

GEOMETRIES = ("native", "resample_patch_embed")
SHARDINGS = ("auto", "always", "never")


def named_source(source: Any, revision: str | None) -> tuple[str, str | None] | None:
    """What tells a teacher from others: its folder or Hub id, and the revision; None for a configuration."""
    if not isinstance(source, str | os.PathLike):
        return None
    place = os.path.expanduser(os.fspath(source))
    return (os.path.realpath(place) if os.path.isdir(place) else place), revision
