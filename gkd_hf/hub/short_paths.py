"""Paths of one machine as others should read them; nothing heavy is imported here."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping
from typing import Any

import yaml

# What an absolute path begins with; the paths of Windows too, from wherever a recipe may come.
_ABSOLUTE = re.compile(r"file:|[A-Za-z]:[\\/]|\\\\|[/~]")
# One inside other text, as in the reason why a row was skipped; not what follows `https:`.
_PATH_INSIDE = re.compile(
    r"(?<![\w:/\\.~-])(?:file:/*|[A-Za-z]:[\\/]+|\\\\|~|/)"
    r"(?:[^\s/\\,;:'\"{}\[\]=]+[/\\]|[/\\])*([^\s/\\,;:'\"{}\[\]=]+)[/\\]?"
)


def shortened(value: Any) -> Any:
    """The same nested plain value with every path out of the working directory cut to its last component."""
    if isinstance(value, Mapping):
        return {shortened(key): shortened(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(each) for each in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and _leads_out(value):
        return _last_component(value)
    return _PATH_INSIDE.sub(r"\1", value)


def shortened_yaml(text: str) -> str:
    """`shortened` for an override's value, which is YAML: a path in it may hold spaces, or lie in a mapping."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return shortened(text)
    if isinstance(value, str):
        return shortened(value)
    short = shortened(value)
    if short == value:
        return text
    return yaml.safe_dump(short, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf).strip()


def _leads_out(text: str) -> bool:
    """Whether a text is one path, absolute or up from the working directory."""
    if _ABSOLUTE.match(text):
        return True
    steps = text.replace("\\", "/")
    return "://" not in text and posixpath.normpath(steps).split("/")[0] == ".."


def _last_component(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".", "..", "file:") and part[0] != "~"]
    return parts[-1] if parts else "."
