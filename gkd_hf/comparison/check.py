"""Results held against those of another time."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gkd_hf.errors import InputError
from gkd_hf.evaluation.report_text import box_table, percent, signed

LEAST_SPREAD = 1.0  # points


def read_stored(path: str | os.PathLike) -> dict[str, Any]:
    """Read a results.json that was kept; raises `InputError` if it is none."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        for entry in stored["variants"].values():
            for run in entry["seeds"].values():
                _ = run["mean_target"]
        return stored
    except OSError as error:
        raise InputError(f"stored results '{path}' cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is no results.json of a comparison: give one that compare_methods.py wrote"
        ) from error


def check_against(results: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[str, bool]:
    """Compare the mean over the unseen domains of every shown variant and seed that both have.

    Args:
        results: the content of results.json.
        stored: that of another time. Its `spread`, in points, is how far a figure may be off; without one it is
            twice the standard deviation of the variant's stored seeds, and at least 1.

    Returns:
        A table with a verdict for each, and whether all are within.

    Raises:
        InputError: there is nothing that both have.
    """
    rows, good = [], True
    for name, entry in results["variants"].items():
        other = stored["variants"].get(name)
        if not entry["shown"] or other is None:
            continue
        before = {seed: run["mean_target"] for seed, run in other["seeds"].items() if run["mean_target"] is not None}
        spread = stored.get("spread")
        if spread is None:
            std = statistics.stdev(before.values()) if len(before) > 1 else 0.0
            spread = max(LEAST_SPREAD, 2 * std)
        for seed, run in entry["seeds"].items():
            if seed not in before or run["mean_target"] is None:
                continue
            difference = run["mean_target"] - before[seed]
            within = abs(difference) <= spread
            good &= within
            figures = [percent(before[seed]), percent(run["mean_target"]), signed(difference), f"{spread:.1f}"]
            rows.append([entry["title"], seed, *figures, "yes" if within else "NO"])
    if not rows:
        raise InputError("the stored results and these have no variant and seed in common: there is nothing to check")
    header = ["mean of unseen domains", "seed", "stored", "now", "difference", "allowed", "within"]
    return box_table(header, [rows]), good
