"""Results held against those of another time."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gkd_hf.errors import InputError
from gkd_hf.evaluation.report_text import box_table, percent, signed

LEAST_SPREAD = 1.0  # points
FIGURES = {"mean_target": "mean unseen", "source": "source"}


def read_stored(path: str | os.PathLike) -> dict[str, Any]:
    """Read a results.json that was kept; raises `InputError` if it is none."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        spread = stored.get("spread")
        good = spread is None or (_is_figure(spread) and spread > 0)
        for entry in stored["variants"].values():
            good &= isinstance(entry["title"], str) and isinstance(entry["shown"], bool)
            for run in entry["seeds"].values():
                good &= all(run[key] is None or _is_figure(run[key]) for key in FIGURES)
    except OSError as error:
        raise InputError(f"stored results '{path}' cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise InputError(f"'{path}' is no results.json of a comparison: give one that compare_methods.py wrote")
    return stored


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_against(
    results: Mapping[str, Any],
    stored: Mapping[str, Any],
    names: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
) -> tuple[str, bool]:
    """Compare every stored figure, of the source and the mean over the unseen domains, of shown variants.

    Args:
        results: the content of results.json.
        stored: that of another time. Its `spread`, in points, is how far a figure may be off; without one it is
            twice the standard deviation of the variant's stored seeds, and at least 1.
        names: the variants to compare; None: all that are stored.
        seeds: the seeds to compare; None: all that are stored.

    Returns:
        A table with a verdict for each, and whether all are there and within.

    Raises:
        InputError: nothing that is stored is to be compared.
    """
    rows, good = [], True
    for name, before in stored["variants"].items():
        if not before["shown"] or (names is not None and name not in names):
            continue
        now = results["variants"].get(name, {"seeds": {}})["seeds"]
        for key, heading in FIGURES.items():
            known = {seed: run[key] for seed, run in before["seeds"].items() if run[key] is not None}
            spread = stored.get("spread")
            if spread is None:
                spread = max(LEAST_SPREAD, 2 * statistics.stdev(known.values()) if len(known) > 1 else 0.0)
            for seed, figure in known.items():
                if seeds is not None and seed not in map(str, seeds):
                    continue
                found = now.get(seed, {}).get(key)
                within = found is not None and abs(found - figure) <= spread
                good &= within
                texts = ["missing", ""] if found is None else [percent(found), signed(found - figure)]
                verdict = "yes" if within else "NO"
                rows.append([before["title"], seed, heading, percent(figure), *texts, f"{spread:.1f}", verdict])
    if not rows:
        raise InputError("the stored results have no figure of the variants and seeds to compare: nothing to check")
    header = ["mIoU in percent", "seed", "figure", "stored", "now", "difference", "allowed", "within"]
    lines = [box_table(header, [rows])]
    if names is not None:
        lines.append(f"compared: only {', '.join(names)}")
    if seeds is not None:
        lines.append(f"compared: only seed {', '.join(map(str, seeds))}")
    return "\n".join(lines), good
