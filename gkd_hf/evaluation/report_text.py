"""Figures and tables as text: box drawing for the terminal, pipes for Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


def percent(value: float) -> str:
    """Write a figure that is already in percent with one decimal; nan (nothing counted) as a dash."""
    return "–" if math.isnan(value) else f"{value:.1f}"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return "–" if math.isnan(value) else f"{value:+.1f}"


def box_table(header: Sequence[str], groups: Sequence[Sequence[Sequence[str]]]) -> str:
    """Draw a table of fixed width: a rule between the groups of rows, the first column to the left, the rest right."""
    groups = [group for group in groups if group]
    widths = [
        max(map(len, column)) for column in zip(header, *(row for group in groups for row in group), strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "│ " + " │ ".join(padded) + " │"

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * (width + 2) for width in widths) + right

    body = [line(header)]
    for group in groups:
        body += [rule("├", "┼", "┤"), *map(line, group)]
    return "\n".join([rule("┌", "┬", "┐"), *body, rule("└", "┴", "┘")])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, align: str = "---:") -> str:
    """Write a Markdown table; `align` is the mark of all columns but the first. Pipes and line breaks are defused."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(header), "|---|" + f"{align}|" * (len(header) - 1), *map(line, rows)])


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """List the leaves of a nested mapping as (dotted key, JSON value)."""
    if not (isinstance(value, dict) and value):
        return [(prefix, json.dumps(value, ensure_ascii=False))] if prefix else []
    return [row for key, each in value.items() for row in flatten(each, f"{prefix}.{key}" if prefix else str(key))]
