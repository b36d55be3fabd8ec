"""The rows that a stream skipped: counted by reason, and found again in their shards."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from gkd_hf.data.shards import find_shards, readable

_DETAIL = re.compile(r"\s*\(.*", re.DOTALL)
_BATCH_ROWS = 16


def count_by_reason(entries: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Count the entries ``{domain, id, reason}`` of skipped rows, each row once, by reason without its details.

    The most frequent reason comes first, reasons of one count in alphabetical order.
    """
    distinct = {(entry.get("domain"), entry["id"]): _DETAIL.sub("", entry["reason"]) for entry in entries}
    counts = Counter(distinct.values())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def locate_rows(entries: Sequence[Mapping[str, str]], location: str | os.PathLike, split: str) -> list[dict]:
    """Find skipped rows in a folder of shards.

    Args:
        entries: ``{domain, id, reason}`` of rows of this folder and split, as streams report them.
        location, split: of ``open_rows``.

    Returns ``{domain, id, reason, shard, row}`` in the order of the shards, with the shard's path relative to the
    folder and the row counted from 0 within the shard. Rows that share an id are all listed; an id that is not there
    (the data changed since) has None for both and comes last. Only the column that names the rows is read, or all
    image bytes where they have neither ids nor file names. Raises ``InputError`` as ``find_shards`` and for an
    unreadable shard.
    """
    by_id = {entry["id"]: dict(entry) for entry in entries}
    if not by_id:
        return []
    found, missing = [], set(by_id)
    for shard in find_shards(os.fspath(location), split):
        name = Path(shard).relative_to(location).as_posix()
        for row, identity in enumerate(readable(_identities(shard), shard)):
            if identity in by_id:
                found.append({**by_id[identity], "shard": name, "row": row})
                missing.discard(identity)
    return found + [{**by_id[identity], "shard": None, "row": None} for identity in by_id if identity in missing]


def row_identity(row: Mapping) -> str:
    """Name a row by its ``id``, its file, or the hash of its bytes: the same in every pass and on every process."""
    if row.get("id") is not None:
        return str(row["id"])
    image = row.get("image") or {}
    if image.get("path"):
        return image["path"]
    return "sha1:" + hashlib.sha1(image.get("bytes") or b"").hexdigest()[:12]


def _identities(shard: str) -> Iterator[str]:
    with pq.ParquetFile(shard) as file:
        columns = ["image"]
        if "id" in file.schema_arrow.names:
            named = file.read(columns=["id"])["id"].null_count == 0
            columns = ["id"] if named else ["id", "image"]
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            yield from map(row_identity, batch.to_pylist())
