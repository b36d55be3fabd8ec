"""The figure of a comparison: how good each method is on unseen domains, and on which of them it gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gkd_hf.comparison.results import number
from gkd_hf.comparison.table import columns
from gkd_hf.evaluation.report_text import percent, signed

DOTS_PER_INCH = 130
ROW, HEADING, GAP = 0.34, 0.34, 0.14  # inches: of a method, of a group's heading, between groups
TOP, BOTTOM = 1.05, 0.75  # inches
CHARACTER = 0.085  # inches: mean width at 10 points
DOTS_WIDTH, CELL_WIDTH = 4.6, 0.74  # inches
APART = 0.14  # cells: between the source, the unseen domains and their mean
# Okabe and Ito's colours, which people with any colour vision can tell apart, without the pale ones.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GAIN_COLOURS = "BrBG"  # brown: loss, blue-green: gain


@dataclass
class _Row:
    """A method's line: its place in inches from the top of the rows, its group's colour."""

    entry: Mapping[str, Any]
    y: float
    colour: str
    is_reference: bool


def draw_comparison(path: Path, results: Mapping[str, Any]) -> None:
    """Write the figure as a PNG.

    Args:
        path: the file.
        results: the content of results.json; a variant without a finished run has a line that says so.
    """
    rows, headings, height = _lay_out(results)
    names = columns(results) | {"source": "source"}
    longest = max([len(row.entry["title"]) for row in rows] + [1.1 * len(text) for text, _ in headings])
    left, between, right = 0.3 + CHARACTER * longest, 0.25, 0.2
    grid_width = CELL_WIDTH * (len(names) + 2 * APART)
    width, total = left + DOTS_WIDTH + between + grid_width + right, TOP + height + BOTTOM
    figure = Figure(figsize=(width, total), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    dots = figure.add_axes((left / width, BOTTOM / total, DOTS_WIDTH / width, height / total))
    place = ((left + DOTS_WIDTH + between) / width, BOTTOM / total, grid_width / width, height / total)
    grid = figure.add_axes(place, sharey=dots)
    dots.set_ylim(height, 0)
    _draw_dots(dots, results, rows)
    _draw_gains(grid, names, rows)
    for text, y in headings:
        figure.text(0.12 / width, (BOTTOM + height - y) / total, text, va="center", weight="bold")
    texts = (
        (0.25, f"Unseen domains, with labels of {results['source']} alone", {"fontsize": 13, "weight": "bold"}),
        (0.52, "stroke: mean · dots: seeds · bar: ± one standard deviation", {"fontsize": 9, "color": "0.35"}),
    )
    for y, text, style in texts:
        figure.text(0.12 / width, 1 - y / total, text, va="center", **style)
    labels = (
        (
            left + DOTS_WIDTH / 2,
            f"mean mIoU over {len(results['domains'])} unseen domain{'s' * (len(results['domains']) != 1)} (%)",
        ),
        (left + DOTS_WIDTH + between + grid_width / 2, f"gain over {_reference(results)['title']} (points of mIoU)"),
    )
    for x, text in labels:
        figure.text(x / width, 0.25 / total, text, ha="center", va="center")
    figure.savefig(path, format="png")


def _reference(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results["variants"][results["reference"]]


def _lay_out(results: Mapping[str, Any]) -> tuple[list[_Row], list[tuple[str, float]], float]:
    """Rows sorted within their groups, the best first; headings with their places; the height of it all in inches."""
    rows, headings, y = [], [], 0.0
    for index, (heading, names) in enumerate(results["groups"].items()):
        y += GAP if index else 0.0
        if heading:
            headings.append((heading, y + HEADING / 2))
            y += HEADING
        entries = [(name, results["variants"][name]) for name in names]
        entries.sort(key=lambda each: -(each[1]["mean"].get("mean_target") or 0.0))
        for name, entry in entries:
            is_reference = name == results["reference"]
            rows.append(_Row(entry, y + ROW / 2, COLOURS[index % len(COLOURS)], is_reference))
            y += ROW
    return rows, headings, y + 0.06


def _draw_dots(axes: Axes, results: Mapping[str, Any], rows: list[_Row]) -> None:
    axes.set_yticks([row.y for row in rows], [row.entry["title"] for row in rows])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    ends = []
    for row in rows:
        seeds = [number(run["mean_target"]) for run in row.entry["seeds"].values()]
        mean, std = (number(row.entry[key].get("mean_target")) for key in ("mean", "std"))
        if math.isnan(mean):
            axes.text(0.02, row.y, "no result yet", transform=axes.get_yaxis_transform(), color="0.5", fontsize=9,
                      va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
            continue
        reach = 0.0 if math.isnan(std) else std
        own_ends = [*seeds, mean - reach, mean + reach]
        ends += own_ends
        bar = Rectangle((mean - reach, row.y - 0.25 * ROW), 2 * reach, 0.5 * ROW, color=row.colour, alpha=0.25)
        axes.add_patch(bar).set_linewidth(0)
        axes.plot([mean, mean], [row.y - 0.36 * ROW, row.y + 0.36 * ROW], color=row.colour, linewidth=2.6)
        axes.plot(seeds, [row.y] * len(seeds), "o", color=row.colour, markersize=4.6, markeredgecolor="white",
                  markeredgewidth=0.7)  # fmt: skip
        missing = len(results["seeds"]) - len(seeds)
        note = f"  ({len(seeds)} of {len(results['seeds'])} seeds)" if missing else ""
        # On white, so that it can be read where the reference's line goes through it.
        axes.annotate(
            f"{percent(mean)}{note}", (max(own_ends), row.y), (7, 0), textcoords="offset points", va="center",
            fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    if ends:
        room = max(max(ends) - min(ends), 1.0)
        # To the right of the best there must be room for what is written beside it.
        axes.set_xlim(min(ends) - 0.05 * room, max(ends) + (0.38 if _incomplete(results) else 0.16) * room)
    else:
        axes.set_xticks([])
    reference = number(_reference(results)["mean"].get("mean_target"))
    if not math.isnan(reference):
        axes.axvline(reference, color="0.35", linestyle="--", linewidth=1, zorder=0.9)
        axes.annotate(
            _reference(results)["title"], (reference, 1), (0, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="bottom", fontsize=8.5, color="0.35",
        )  # fmt: skip


def _incomplete(results: Mapping[str, Any]) -> bool:
    shown = (entry for entry in results["variants"].values() if entry["shown"])
    return any(0 < len(entry["seeds"]) < len(results["seeds"]) for entry in shown)


def _draw_gains(axes: Axes, names: Mapping[str, str], rows: list[_Row]) -> None:
    keys = list(names)
    centres = [0.5 + index + APART * ((key != "source") + (key == "mean_target")) for index, key in enumerate(keys)]
    gains = np.array([[number(row.entry["gain"].get(key)) for key in keys] for row in rows], dtype=float)
    known = np.abs(gains[~np.isnan(gains)])
    limit = max(known.max() if known.size else 0.0, 1.0)
    colours, scale = matplotlib.colormaps[GAIN_COLOURS], Normalize(-1.15 * limit, 1.15 * limit)
    axes.set_xlim(0, len(keys) + 2 * APART)
    for row, values in zip(rows, gains, strict=True):
        if row.is_reference:
            axes.text(centres[-1] / 2, row.y, "reference", ha="center", va="center", fontsize=9, color="0.4")
            continue
        for key, centre, value in zip(keys, centres, values, strict=True):
            style = {"ha": "center", "va": "center", "fontsize": 9}
            if math.isnan(value):
                axes.text(centre, row.y, "–", color="0.5", **style)
                continue
            colour = colours(scale(value))
            cell = Rectangle((centre - 0.47, row.y - 0.46 * ROW), 0.94, 0.92 * ROW, facecolor=colour, linewidth=0)
            axes.add_patch(cell)
            # Rec. 709 luma: which of black and white stands out on the cell.
            light = float(np.dot(colour[:3], (0.2126, 0.7152, 0.0722)))
            weight = "bold" if key == "mean_target" else "normal"
            axes.text(centre, row.y, signed(value), color="black" if light > 0.5 else "white", weight=weight, **style)
    # Long names go over several lines, or into smaller letters.
    titles = [name if len(name) < 9 else name.replace("_", " ").replace(" ", "\n") for name in names.values()]
    widest = max(len(line) for title in titles for line in title.splitlines())
    axes.set_xticks(centres, titles)
    axes.tick_params(axis="both", length=0, labelleft=False)
    axes.tick_params(axis="x", labelsize=8.5 * min(1.0, 11 / widest), labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
