"""The rows that a stream skips: named, counted by reason, and too many of them refused."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from gkd_hf.errors import InputError

BAD_ROW_LIMIT = 0.01
"""The fraction of a domain's rows that may be bad: so many are skipped, more stop the run."""

_DETAIL = re.compile(r"\s*\(.*", re.DOTALL)
_SHOWN = 10


class WrongLabel(InputError):
    """A label that could be read but is none: missing, in colours, or with values that its map does not list.

    Attributes:
        reason: for lists of skipped rows: the column, a colon and what is wrong; what differs between rows of one
            reason stands in parentheses.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)  # both, or it could not leave a worker process
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


def count_by_reason(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count the entries of skipped rows, each row once, by reason without its details.

    The most frequent reason comes first, reasons of one count in alphabetical order.
    """
    counts = Counter(_DETAIL.sub("", entry["reason"]) for entry in distinct(entries))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def distinct(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entry of each skipped row once: rows are told apart by their places, or, streamed, by
    their ids, which `told_apart` gives to rows without any that are the same."""
    found: dict[Hashable, Mapping[str, Any]] = {}
    for entry in entries:
        found.setdefault(_key(entry), entry)
    return list(found.values())


def row_identity(row: Mapping) -> str:
    """Name a row by its ``id``, its file, or the hash of its bytes: the same in every pass and on every process."""
    if row.get("id") is not None:
        return str(row["id"])
    image = row.get("image") or {}
    if image.get("path"):
        return image["path"]
    return "sha1:" + hashlib.sha1(image.get("bytes") or b"").hexdigest()[:12]


def bad_row(domain: str, row: Mapping, reason: str, place: tuple[str | None, int | None]) -> dict[str, Any]:
    """Return the entry of a bad row at a place of `ShardRows.place` or (None, None)."""
    return {"domain": domain, "id": row_identity(row), "reason": reason, "shard": place[0], "row": place[1]}


def check_bad_rows(
    domain: str, entries: Sequence[Mapping[str, Any]], num_rows: int, limit: float, among: str = "among"
) -> None:
    """Raise `InputError` if more than ``limit`` of a domain's ``num_rows`` rows, and more than one, are bad.

    Args:
        entries: of the domain's bad rows, ``{domain, id, reason, shard, row}``; a row that is there twice counts once.
        among: what the message says before the number of rows.
    """
    entries = distinct(entries)
    if len(entries) > max(1.0, limit * num_rows):
        raise _too_many(domain, entries, f"{among} {num_rows}", limit)


class BadRows:
    """The bad rows of one domain that one reader has met, and the rule for stopping.

    Args:
        domain: its name.
        limit: the largest fraction of bad rows that is skipped.
        num_rows: tells how many rows the domain has; asked only when there is more than one bad row.
        shuffled: whether the rows come in random order, so that the first ones tell of the others. In stored order
            they do not: damage often lies in one place.
    """

    def __init__(self, domain: str, limit: float, num_rows: Callable[[], int], *, shuffled: bool) -> None:
        self._domain = domain
        self._limit = limit
        self._num_rows = num_rows
        self._shuffled = shuffled
        self._entries: dict[Hashable, Mapping[str, Any]] = {}
        self.attempted = 0

    def add(self, row: Mapping, reason: str, place: tuple[str | None, int | None]) -> dict[str, Any]:
        """Note one bad row, at a place of `ShardRows.place` or (None, None); returns its entry for the report.

        Raises ``InputError`` if they are too many: judged against all rows of the domain, and of shuffled rows earlier
        when what was read so far leaves no doubt (four standard deviations), so that neither a few bad rows met early
        stop a run nor a rotten data set runs for long.
        """
        entry = bad_row(self._domain, row, reason, place)
        if _key(entry) in self._entries:
            return entry
        self._entries[_key(entry)] = entry
        bad = len(self._entries)
        if bad > 1:
            num_rows = self._num_rows()
            expected = self._limit * min(self.attempted, num_rows)
            among = None
            if bad > self._limit * num_rows:
                among = f"among {num_rows}"
            elif self._shuffled and bad > expected + 4 * math.sqrt(expected) + 3:
                among = f"among {num_rows}, of which only {self.attempted} were looked at"
            if among is not None:
                raise _too_many(self._domain, list(self._entries.values()), among, self._limit)
        return entry


def _too_many(domain: str, entries: Sequence[Mapping[str, Any]], among: str, limit: float) -> InputError:
    reasons = "; ".join(f"{count} × {reason}" for reason, count in count_by_reason(entries).items())
    shown = "; ".join(f"{_place(entry)} ({entry['reason']})" for entry in entries[:_SHOWN])
    advice = "Repair or remove such rows"
    if any(entry["reason"].startswith("label: ") for entry in entries):
        advice += ", or correct the label map: a contact sheet of the data shows what its labels mean"
    return InputError(
        f"domain '{domain}': {len(entries)} bad rows {among}, more than the {limit:.1%} that may be skipped: "
        f"{reasons}. The first are {shown}. {advice}"
    )


def _key(entry: Mapping[str, Any]) -> Hashable:
    return entry.get("domain"), entry["id"] if entry.get("shard") is None else (entry["shard"], entry["row"])


def _place(entry: Mapping[str, Any]) -> str:
    return entry["id"] if entry.get("shard") is None else f"{entry['id']} in {entry['shard']} row {entry['row']}"
