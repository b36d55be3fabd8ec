"""The figure of a comparison: how good each method is on unseen domains, and on which of them it gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gkd_hf.comparison.results import number
from gkd_hf.comparison.table import columns
from gkd_hf.evaluation.report_text import percent, signed

DOTS_PER_INCH = 130
ROW, HEADING, GAP = 0.34, 0.36, 0.10  # inches: of a method, of a group's heading, between groups
TOP, BOTTOM = 0.95, 0.75  # inches
CHARACTER = 0.085  # inches: mean width at 10 points
DOTS_WIDTH, CELL_WIDTH = 4.6, 0.72  # inches
# Okabe and Ito's colours, which people with any colour vision can tell apart, without the pale ones.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GAIN_COLOURS = "BrBG"  # brown: loss, blue-green: gain


@dataclass
class _Row:
    """A method's line: `y` in inches from the top of the rows."""

    entry: Mapping[str, Any]
    y: float
    colour: str
    is_reference: bool


def draw_comparison(path: Path, results: Mapping[str, Any]) -> None:
    """Write the figure as a PNG.

    Args:
        path: the file.
        results: the content of results.json; variants without a finished run have an empty line.
    """
    rows, headings, height = _lay_out(results)
    names = columns(results)
    longest = max([len(row.entry["title"]) for row in rows] + [len(text) * 1.1 for text, _ in headings])
    left, right = 0.25 + CHARACTER * longest, 0.2
    between = 0.25
    width = left + DOTS_WIDTH + between + CELL_WIDTH * len(names) + right
    total = TOP + height + BOTTOM
    figure = Figure(figsize=(width, total), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    dots = figure.add_axes((left / width, BOTTOM / total, DOTS_WIDTH / width, height / total))
    grid_left = left + DOTS_WIDTH + between
    grid = figure.add_axes(
        (grid_left / width, BOTTOM / total, CELL_WIDTH * len(names) / width, height / total), sharey=dots
    )
    dots.set_ylim(height, 0)
    _draw_dots(dots, results, rows)
    _draw_gains(grid, names, rows)
    for text, y in headings:
        dots.text(
            -(left - 0.12) / DOTS_WIDTH, y, text, transform=dots.get_yaxis_transform(), va="center", weight="bold"
        )
    figure.text(
        0.12 / width, 1 - 0.25 / total, f"Unseen domains, learned from {results['source']} alone",
        fontsize=13, weight="bold", va="center",
    )  # fmt: skip
    return figure.savefig(path, format="png")


def _lay_out(results: Mapping[str, Any]) -> tuple[list[_Row], list[tuple[str, float]], float]:
    """Rows sorted within their groups, the best first; headings with their places; the height of it all in inches."""
    rows, headings, y = [], [], 0.0
    for index, (heading, names) in enumerate(results["groups"].items()):
        if heading:
            headings.append((heading, y + HEADING / 2))
            y += HEADING
        entries = [(name, results["variants"][name]) for name in names]
        entries.sort(key=lambda each: -(each[1]["mean"].get("mean_target") or -math.inf))
        for name, entry in entries:
            is_reference = name == results["reference"]
            rows.append(_Row(entry, y + ROW / 2, COLOURS[index % len(COLOURS)], is_reference))
            y += ROW
        y += GAP
    return rows, headings, y


def _draw_dots(axes: Axes, results: Mapping[str, Any], rows: list[_Row]) -> None:
    axes.set_yticks([row.y for row in rows], [row.entry["title"] for row in rows])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"mean mIoU over {len(results['domains'])} unseen domains (%)")
    spots = []
    for row in rows:
        seeds = [number(run["mean_target"]) for run in row.entry["seeds"].values()]
        mean, std = (number(row.entry[key].get("mean_target")) for key in ("mean", "std"))
        if not seeds or math.isnan(mean):
            axes.text(0.01, row.y, "no result yet", transform=axes.get_yaxis_transform(), color="0.5", va="center",
                      fontsize=9)  # fmt: skip
            continue
        spots += [*seeds, *([] if math.isnan(std) else [mean - std, mean + std])]
        axes.plot(seeds, [row.y] * len(seeds), "o", color=row.colour, alpha=0.45, markersize=5, markeredgewidth=0)
        if not math.isnan(std):
            axes.plot([mean - std, mean + std], [row.y] * 2, color=row.colour, linewidth=2, solid_capstyle="round")
        axes.plot([mean], [row.y], "D", color=row.colour, markersize=6.5, markeredgecolor="white")
        note = "" if len(seeds) == len(results["seeds"]) else f"  ({len(seeds)} of {len(results['seeds'])} seeds)"
        furthest = max(spot for spot in [*seeds, mean + (0 if math.isnan(std) else std)])
        axes.annotate(
            f"{percent(mean)}{note}", (furthest, row.y), (7, 0), textcoords="offset points", va="center", fontsize=9
        )
    if spots:
        room = max(max(spots) - min(spots), 1.0)
        axes.set_xlim(min(spots) - 0.06 * room, max(spots) + 0.24 * room)
    reference = number(results["variants"][results["reference"]]["mean"].get("mean_target"))
    if not math.isnan(reference):
        axes.axvline(reference, color="0.35", linestyle="--", linewidth=1, zorder=0.5)
        title = results["variants"][results["reference"]]["title"]
        axes.annotate(title, (reference, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", va="bottom", fontsize=8.5, color="0.35")  # fmt: skip


def _draw_gains(axes: Axes, names: Mapping[str, str], rows: list[_Row]) -> None:
    keys = list(names)
    gains = np.array([[number(row.entry["gain"].get(key)) for key in keys] for row in rows], dtype=float)
    known = np.abs(gains[~np.isnan(gains)])
    limit = max(known.max() if known.size else 0.0, 1.0)
    axes.set_xlim(0, len(keys))
    for row, values in zip(rows, gains, strict=True):
        if row.is_reference:
            axes.text(len(keys) / 2, row.y, "reference", ha="center", va="center", fontsize=9, color="0.4")
            continue
        for column, value in enumerate(values):
            if math.isnan(value):
                axes.text(column + 0.5, row.y, "–", ha="center", va="center", fontsize=9, color="0.5")
                continue
            axes.pcolormesh(
                [column + 0.03, column + 0.97], [row.y - 0.46 * ROW, row.y + 0.46 * ROW], [[value]],
                cmap=GAIN_COLOURS, vmin=-limit, vmax=limit,
            )  # fmt: skip
            axes.text(
                column + 0.5, row.y, signed(value), ha="center", va="center", fontsize=9,
                color="white" if abs(value) > 0.62 * limit else "black",
                weight="bold" if keys[column] == "mean_target" else "normal",
            )  # fmt: skip
    axes.set_xticks(
        [index + 0.5 for index in range(len(keys))], [name.replace(" ", "\n", 1) for name in names.values()]
    )
    axes.tick_params(axis="both", length=0, labelleft=False)
    axes.tick_params(axis="x", labelsize=8.5, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("gain over the reference by domain (points of mIoU)")
