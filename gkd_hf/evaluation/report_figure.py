"""The picture of a report: one row per domain, the image, the truth and the predictions beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

DOTS_PER_INCH = 120
MAX_PIXELS = 720  # a label map is thinned to this long side: no cell of the picture has more dots
TITLE_INCHES = 0.30
HEADING_INCHES = 0.42
LEGEND_ROW_INCHES = 0.24
GAP_INCHES = 0.08
CHARACTER_INCHES = 0.09  # mean width of a bold character at 9 points


@dataclass
class FigureCell:
    """One prediction: its title, and the uint8 h×w label map (None leaves the cell empty)."""

    title: str
    prediction: np.ndarray | None


@dataclass
class FigureRow:
    """One domain: its name, an image (uint8 H×W×3) with its truth (uint8 h×w), and the predictions on that image."""

    title: str
    image: np.ndarray | None
    truth: np.ndarray | None
    predictions: list[FigureCell]


def draw_report(
    path: Path,
    heading: str,
    rows: Sequence[FigureRow],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    """Draw the rows with a legend of the classes into a PNG; ignored pixels of the truth (255) are black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    columns = 2 + max((len(row.predictions) for row in rows), default=1)
    # Street scenes are wide and toy scenes square: wider cells for wide images keep the picture's shape reasonable.
    ratios = [row.image.shape[0] / row.image.shape[1] if row.image is not None else 0.5 for row in rows]
    cell_width = 1.9 / (np.mean(ratios) ** 0.5 if ratios else 1)
    heights = [TITLE_INCHES + ratio * cell_width for ratio in ratios]

    width = columns * cell_width + (columns + 1) * GAP_INCHES
    longest = max(map(len, classes))
    per_row = max(1, min(len(classes) + 1, int(width / (0.55 + 0.085 * longest))))
    legend_rows = -(-(len(classes) + 1) // per_row)
    legend_height = legend_rows * LEGEND_ROW_INCHES + 0.25
    height = HEADING_INCHES + sum(heights) + legend_height + len(rows) * GAP_INCHES

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(GAP_INCHES / width, 1 - 0.22 / height, heading, fontsize=10, va="center", weight="bold")
    top = HEADING_INCHES
    for row, row_height, ratio in zip(rows, heights, ratios, strict=True):
        pictures = [
            (row.title, row.image),
            ("truth", _coloured(row.truth, colours)),
            *((cell.title, _coloured(cell.prediction, colours)) for cell in row.predictions),
        ]
        for column, (title, picture) in enumerate(pictures):
            left = GAP_INCHES + column * (cell_width + GAP_INCHES)
            bottom = height - top - row_height
            axes = figure.add_axes((left / width, bottom / height, cell_width / width, ratio * cell_width / height))
            _show(axes, picture, smooth=column == 0)
            figure.text(
                left / width,
                (bottom + ratio * cell_width + 0.05) / height,
                title,
                # A long name is set smaller, or it would run into the next cell's title.
                fontsize=min(9.0, 9.0 * cell_width / (CHARACTER_INCHES * max(len(title), 1))),
                va="bottom",
                weight="bold" if column == 0 else "normal",
            )
        top += row_height + GAP_INCHES
    patches = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="0.4", linewidth=0.5, label=name)
        for name, colour in [*zip(classes, palette, strict=True), ("ignored", (0, 0, 0))]
    ]
    figure.legend(
        handles=patches, loc="lower center", bbox_to_anchor=(0.5, 0.06 / height), ncols=per_row, frameon=False,
        fontsize=9, handlelength=1.4, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip
    figure.savefig(path, format="png")


def _coloured(labels: np.ndarray | None, colours: np.ndarray) -> np.ndarray | None:
    if labels is None:
        return None
    step = -(-max(labels.shape) // MAX_PIXELS)
    return colours[np.asarray(labels[::step, ::step], np.uint8)]


def _show(axes: Axes, picture: np.ndarray | None, *, smooth: bool) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.6", linewidth=0.5)
    if picture is None:
        axes.text(0.5, 0.5, "no example", ha="center", va="center", color="0.5", fontsize=9, transform=axes.transAxes)
        return
    # Mixing two classes' colours at an edge would show a third class: label maps are never interpolated.
    axes.imshow(picture, aspect="auto", interpolation="antialiased" if smooth else "nearest")
