"""What a comparison has found so far: every figure of every run, their means and spreads, as plain values."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gkd_hf.comparison.cells import Cell, source_miou
from gkd_hf.comparison.definition import Variant
from gkd_hf.comparison.schedule import Schedule
from gkd_hf.evaluation.domain_report import package_versions
from gkd_hf.evaluation.report_text import write_whole


def collect(everything: Schedule, command: Sequence[str]) -> dict[str, Any]:
    """Read the reports of all runs that are finished.

    Args:
        everything: all runs of a comparison.
        command: what was typed.

    Returns:
        The content of results.json: mIoU in percent, seconds; None where nothing is known yet.
    """
    comparison = everything.comparison
    everything.look_again()
    variants = {name: _variant(everything, each) for name, each in comparison.variants.items()}
    reference = variants[comparison.reference]
    for entry in variants.values():
        entry["gain"] = _gains(entry["seeds"], reference["seeds"])
    first = comparison.variants[comparison.reference]
    recipe = comparison.recipe(first, comparison.seeds[0], comparison.output_dir, {})
    return {
        "source": recipe.stages.task.data,
        "domains": [name for name in recipe.evaluate if name not in recipe.stages.task.domains],
        "seeds": list(comparison.seeds),
        "reference": comparison.reference,
        "groups": {heading: list(names) for heading, names in comparison.grouped().items()},
        "spread": comparison.spread,
        "variants": variants,
        "comparison": {
            "file": str(comparison.path),
            "recipe": dict(comparison.base) if isinstance(comparison.base, Mapping) else str(comparison.base),
            "overrides": list(comparison.overrides),
            "output_dir": str(comparison.output_dir),
        },
        "command": shlex.join(command),
        "versions": package_versions(),
    }


def _variant(everything: Schedule, variant: Variant) -> dict[str, Any]:
    cells = everything.finals(variant.name)
    seeds = {str(cell.seed): _run(cell, result) for cell in cells if (result := everything.result(cell)) is not None}
    choice = everything.choice(variant)
    tuning = [
        {"values": dict(cell.tuned), "source": _figure(everything, cell), "diverged": cell.diverged}
        for cell in everything.trials.get(variant.name, [])
    ]
    return {
        "title": variant.title,
        "shown": variant.shown,
        "set": dict(variant.changes),
        "start_from": variant.start_from,
        "tuned_as": variant.tuned_as,
        "chosen": cells[0].applied if choice is not None and cells else None,
        "tuning": tuning,
        "seeds": seeds,
        "mean": _over_seeds(seeds, statistics.fmean, 1),
        "std": _over_seeds(seeds, statistics.stdev, 2),
    }


def _figure(everything: Schedule, cell: Cell) -> float | None:
    result = everything.result(cell)
    return None if result is None else source_miou(result)


def _run(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    summaries = cell.summaries()
    facts = {name: summary.get("facts") or {} for name, summary in summaries.items()}
    return {
        "source": source_miou(result),
        "mean_target": result.get("mean_target_miou"),
        "domains": {name: entry["miou"] for name, entry in result.get("targets", {}).items()},
        "seconds": {name: each.get("seconds") for name, each in facts.items()},
        "steps": {name: summary["steps"] for name, summary in summaries.items()},
        "command": shlex.join(["python", "scripts/run_gkd.py", str(cell.folder / "cell.yaml")]),
    }


def _flat(run: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a run: `source`, `mean_target` and those of the domains by name."""
    return {"source": run["source"], "mean_target": run["mean_target"], **run["domains"]}


def _over_seeds(
    seeds: Mapping[str, Mapping[str, Any]], statistic: Callable[[list[float]], float], least: int
) -> dict[str, float | None]:
    runs = [_flat(run) for run in seeds.values()]
    found = {}
    for key in runs[0] if runs else ():
        figures = [run[key] for run in runs if run.get(key) is not None]
        found[key] = statistic(figures) if len(figures) >= max(least, len(runs)) else None
    return found


def _gains(seeds: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean difference to the reference, seed by seed, over the seeds that both have."""
    both = [(_flat(run), _flat(reference[seed])) for seed, run in seeds.items() if seed in reference]
    found = {}
    for key in both[0][0] if both else ():
        pairs = [(own.get(key), other.get(key)) for own, other in both]
        known = [own - other for own, other in pairs if own is not None and other is not None]
        found[key] = statistics.fmean(known) if len(known) == len(both) else None
    return found


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def number(value: float | None) -> float:
    """A figure to calculate and draw with: nan where there is none."""
    return math.nan if value is None else value
