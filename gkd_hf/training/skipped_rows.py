"""The files in a run's folder that list the rows it skipped: one for each process, one row a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gkd_hf.data.bad_rows import distinct
from gkd_hf.errors import InputError


class SkippedRows:
    """The file of one process: each distinct row is written once, at once.

    Args:
        folder: of the run. process_index: of this process.

    Raises ``InputError`` if the file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike, process_index: int) -> None:
        self._path = Path(folder) / f"bad_rows.{process_index}.jsonl"
        content = _content(self._path)
        self._entries = distinct(_entries(content))
        # A line that a killed run left unfinished must not swallow the next.
        self._break = b"" if content.endswith(b"\n") or not content else b"\n"

    def add(self, entries: Iterable[Mapping[str, Any]]) -> bool:
        """Write the entries that are new; returns whether there are any.

        Raises:
            InputError: they cannot be written, as on a full disk.
        """
        known = len(self._entries)
        self._entries = distinct([*self._entries, *entries])
        new = self._entries[known:]
        if not new:
            return False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(self._break + b"".join(json.dumps(entry).encode() + b"\n" for entry in new))
        except OSError as error:
            raise InputError(
                f"'{self._path}': the skipped rows cannot be written ({error.strerror}); make room there, and resume"
            ) from error
        self._break = b""
        return True


def skipped_rows(folder: str | os.PathLike) -> list[Mapping[str, Any]]:
    """Return the distinct rows that the run in a folder has skipped, over all processes and restarts.

    Raises:
        InputError: a file cannot be read.
    """
    paths = sorted(Path(folder).glob("bad_rows.*.jsonl"))
    return distinct(entry for path in paths for entry in _entries(_content(path)))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(f"'{path}': the skipped rows cannot be read ({error.strerror}); remove the file") from error


def _entries(content: bytes) -> list[dict[str, Any]]:
    """Return the entries of a file. A line that was not written to its end is left out: its row is met again."""
    entries = []
    for line in content.splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
