"""The table of a comparison: a row for each method, a column for each domain, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_hf.comparison.cells import values_text
from gkd_hf.comparison.results import number
from gkd_hf.evaluation.report_text import box_table, markdown_table, percent, signed, wrapped


def short_names(domains: Sequence[str]) -> list[str]:
    """Names of domains for headings: without the family that all of them share."""
    families = {name.partition(":")[0] for name in domains}
    return [name.partition(":")[2] or name if len(families) == 1 else name for name in domains]


def columns(results: Mapping[str, Any]) -> dict[str, str]:
    """Key of a figure → heading: the source apart from the unseen domains, their mean last."""
    domains = dict(zip(results["domains"], short_names(results["domains"]), strict=True))
    return {"source": f"source {results['source']}", **domains, "mean_target": "mean unseen"}


def terminal_table(results: Mapping[str, Any]) -> str:
    """The table with box-drawing characters; the best of a column is marked with *."""
    header = ["method", *columns(results).values(), "gain"]
    groups = []
    for heading, rows in _rows(results, best="{}*", plain="{} ").items():
        # A group's heading is a row of its own, above the rule that its methods follow.
        groups += [[[heading, *[""] * (len(header) - 1)]], rows] if heading else [rows]
    lines = [f"mIoU in percent, {_seeds_text(results)} · * best · gain over {_title(results, results['reference'])}"]
    return "\n".join([*lines, box_table(header, groups), *incomplete(results)])


def markdown(results: Mapping[str, Any]) -> str:
    """The content of results.md."""
    header = ["method", *columns(results).values(), "gain"]
    rows = []
    for heading, group in _rows(results, best="**{}**", plain="{}").items():
        rows += [[f"*{heading}*", *[""] * (len(header) - 1)]] if heading else []
        rows += group
    reference = _title(results, results["reference"])
    parts = [
        f"# Methods compared, from {results['source']}",
        f"Mean IoU in percent, {_seeds_text(results)}. The source's held-out split stands apart; all other domains "
        "are unseen in training, and the mean is over them. In bold the best of a column; gain = mean over the unseen "
        f"domains, minus that of {reference}, seed by seed.",
        "![Mean over unseen domains by method, and gain by domain](results.png)",
        markdown_table(header, rows),
        *(["\n".join(f"- {line}" for line in incomplete(results))] if incomplete(results) else []),
        "## Hyper-parameters",
        "Chosen by the mIoU on the source's held-out split with the first seed; no unseen domain was looked at.",
        _tuning(results),
        "## Training",
        markdown_table(["method", "stages: steps", "minutes"], _training(results), align="---"),
        "## How it was made",
        f"`{results['command']}`",
        markdown_table(["package", "version"], results["versions"].items(), align="---"),
    ]
    return wrapped("\n\n".join(parts), 119) + "\n"


def incomplete(results: Mapping[str, Any]) -> list[str]:
    """A line for every shown variant of which seeds are missing."""
    wanted, lines = len(results["seeds"]), []
    for entry in results["variants"].values():
        if entry["shown"] and len(entry["seeds"]) < wanted:
            lines.append(f"{entry['title']}: {len(entry['seeds'])} of {wanted} seeds")
    return lines


def _rows(results: Mapping[str, Any], best: str, plain: str) -> dict[str, list[list[str]]]:
    keys = list(columns(results))
    shown = [entry for entry in results["variants"].values() if entry["shown"]]
    highest = {key: max((round(m, 1) for e in shown if (m := e["mean"].get(key)) is not None), default=None)
               for key in keys}  # fmt: skip
    found: dict[str, list[list[str]]] = {}
    for heading, names in results["groups"].items():
        rows = found.setdefault(heading, [])
        for name in names:
            entry = results["variants"][name]
            cells = []
            for key in keys:
                mean, std = number(entry["mean"].get(key)), number(entry["std"].get(key))
                text = percent(mean) + ("" if math.isnan(std) else f" ± {std:.1f}")
                is_best = not math.isnan(mean) and round(mean, 1) == highest[key]
                cells.append((best if is_best else plain).format(text))
            is_reference = name == results["reference"]
            gain = "" if is_reference else signed(number(entry["gain"].get("mean_target")))
            rows.append([entry["title"], *cells, gain])
    return found


def _tuning(results: Mapping[str, Any]) -> str:
    parts = []
    for name, entry in results["variants"].items():
        if entry["tuned_as"] is not None:
            chosen = entry["chosen"]
            applied = "" if chosen is None else f" ({values_text(chosen) or 'nothing of it applies'})"
            parts.append(f"{entry['title']}: as {_title(results, entry['tuned_as'])}{applied}.")
        if not entry["tuning"]:
            continue
        rows = []
        for trial in entry["tuning"]:
            figure = "diverged" if trial["diverged"] else percent(number(trial["source"]))
            texts = [values_text(trial["values"]), figure]
            rows.append([f"**{text}**" for text in texts] if trial["values"] == entry["chosen"] else texts)
        parts.append(markdown_table([f"{_title(results, name)}", "source"], rows))
    return "\n\n".join(parts) or "None was tuned."


def _training(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for entry in results["variants"].values():
        runs = list(entry["seeds"].values())
        if runs:
            steps = ", ".join(f"{name} {count}" for name, count in runs[0]["steps"].items())
            minutes = [sum(filter(None, run["seconds"].values())) / 60 for run in runs]
            rows.append([entry["title"], steps, f"{sum(minutes) / len(minutes):.1f}"])
    return rows


def _title(results: Mapping[str, Any], name: str) -> str:
    return results["variants"][name]["title"]


def _seeds_text(results: Mapping[str, Any]) -> str:
    count = len(results["seeds"])
    return f"mean ± standard deviation over {count} seeds" if count > 1 else f"seed {results['seeds'][0]}"
