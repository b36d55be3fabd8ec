"""Figures and tables as text, box drawing for the terminal and pipes for Markdown; and files written whole."""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Begins of lines that are no prose, and the parts of prose that stay on one line.
_NO_PROSE = ("#", "|", "<", "![", "- ", "    ")
_UNBROKEN = re.compile(r"`[^`]+`|!?\[[^\]]*\]\([^)]*\)")


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


def wrapped(markdown: str, width: int = 100) -> str:
    """Break the lines of a text's paragraphs anew; code, tables, headings and everything else stays as it is."""
    lines: list[str] = []
    paragraph: list[str] = []
    in_code = False

    def close(quote: str = "") -> None:
        if paragraph:
            # A command or a link that is broken over two lines is hard to read and to copy.
            text = _UNBROKEN.sub(lambda part: part[0].replace(" ", "\0"), " ".join(paragraph))
            filled = textwrap.wrap(text, width - len(quote), break_long_words=False, break_on_hyphens=False)
            lines.extend(quote + line.replace("\0", " ") for line in filled)
            paragraph.clear()

    quote = ""
    for line in markdown.splitlines():
        fence = line.startswith("```")
        if in_code or fence or not line.strip() or line.startswith(_NO_PROSE):
            close(quote)
            lines.append(line)
            in_code ^= fence
            continue
        quote = "> " if line.startswith("> ") else ""
        paragraph.append(line.removeprefix("> ").strip())
    close(quote)
    return "\n".join(lines)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write(temporary)`` make a file, and put it where ``path`` is: it is there whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
