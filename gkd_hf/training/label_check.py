"""Every label of a run's folders is read before the run begins: a wrong map must not end a night of training."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from gkd_hf.data.bad_rows import BAD_ROW_LIMIT, BadRows, bad_row, check_bad_rows, count_by_reason
from gkd_hf.data.decoding import CorruptImage
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.row_decoder import RowDecoder
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows, find_shards, readable
from gkd_hf.data.streamed_order import told_apart
from gkd_hf.training.progress import no_bar
from gkd_hf.training.stage_folder import write_json

FIRST_ROWS = 4
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding the interpreter's lock
_ROWS_AHEAD = 4 * _THREADS
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LabelledSplit:
    """A split in a local folder whose labels the run reads: all of `rows`, or the first `limit`."""

    domain: str
    location: str
    split: str
    rows: ShardRows
    label_map: LabelMap
    limit: int | None

    @property
    def num_rows(self) -> int:
        """Rows to check."""
        return len(self.rows) if self.limit is None else min(len(self.rows), self.limit)

    def facts(self) -> dict[str, Any]:
        """What a check holds for: if any of it changes, the labels are to be checked again."""
        shards = [(path, os.stat(path)) for path in find_shards(self.location, self.split)]
        files = [(os.path.basename(path), found.st_size, found.st_mtime_ns) for path, found in shards]
        facts = {
            "location": os.path.abspath(self.location),
            "rows": self.num_rows,
            "label_map": _digest(self.label_map.known.tobytes() + self.label_map.table.tobytes()),
            "files": _digest(repr(files).encode()),
        }
        # The names of the shards that hold the kept rows belong to what they are.
        kept = self.rows.kept
        names = [shard.name for shard in self.rows.shards]
        return facts if kept is None else facts | {"kept": _digest(repr(names).encode() + kept.tobytes())}

    def look(self, question: Callable[[RowDecoder, dict], Answer]) -> Iterator[tuple[int, dict, Answer]]:
        """Yield number, raw row and the answer of each row to check, in their order.

        Several threads work ahead of the reader, a few rows. Close it where it is not read to its end.
        """
        decode = RowDecoder(self.domain, self.label_map)
        pending: deque[tuple[int, dict, Future[Answer]]] = deque()

        def next_answer() -> tuple[int, dict, Answer]:
            index, row, future = pending.popleft()
            return index, row, future.result()

        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                where = f"{self.location}, split '{self.split}'"
                for index, row in enumerate(readable(itertools.islice(self.rows, self.num_rows), where)):
                    pending.append((index, row, pool.submit(question, decode, row)))
                    if len(pending) >= _ROWS_AHEAD:
                        yield next_answer()
                while pending:
                    yield next_answer()
            finally:
                for _, _, future in pending:
                    future.cancel()


def check_labels(splits: Sequence[LabelledSplit], memory: Path) -> None:
    """Check every label of the splits, but of those that ``memory`` knows: values, kind, size.

    Rows with a wrong label, or an image whose header cannot be read, are skipped by the run if they are few; how many
    is said on stderr. Damage inside images is left to the run.

    Args:
        splits: what to check.
        memory: JSON file of the splits that were checked; written after each of them.

    Raises:
        InputError: more than 1 % of a split's rows would be skipped.
    """
    known = remembered(memory)
    new = {f"{split.domain}/{split.split}": (split, split.facts()) for split in splits}
    new = {key: (split, facts) for key, (split, facts) in new.items() if known.get(key) != facts}
    if not new:
        return
    total = sum(facts["rows"] for _, facts in new.values())
    with tqdm(total=total, desc="checking labels", unit="image", disable=no_bar()) as bar:
        for key, (split, facts) in new.items():
            skipped = _check_split(split, facts["rows"], bar)
            if skipped:
                reasons = "; ".join(f"{count} × {reason}" for reason, count in count_by_reason(skipped).items())
                tqdm.write(f"[data] {split.domain} ({split.split}): skipping {reasons}", file=sys.stderr)
            remember(memory, key, facts)


def look_at_first_rows(rows: Rows, domain: str, location: str, split: str, label_map: LabelMap | None = None) -> None:
    """Decode the first rows of a split, which costs little even where rows are streamed.

    Raises:
        InputError: all of them are bad, or so many that they are too many of the whole split, where its rows are
            counted. Fewer say nothing of the others: damage often lies in one place.
    """
    decode = RowDecoder(domain, label_map)
    stored = isinstance(rows, ShardRows)
    bad: list[dict[str, Any]] = []
    count = 0
    first = readable(itertools.islice(rows, FIRST_ROWS), f"{location}, split '{split}'")
    for count, row in enumerate(told_apart(first), start=1):
        try:
            decode(row)
        except CorruptImage as error:
            bad.append(bad_row(domain, row, str(error), rows.place(count - 1) if stored else (None, None)))
    if stored:
        check_bad_rows(domain, bad, len(rows), BAD_ROW_LIMIT)
    if len(bad) == count:
        check_bad_rows(domain, bad, count, BAD_ROW_LIMIT, among="among the first")


def _check_split(split: LabelledSplit, num_rows: int, bar: tqdm) -> list[dict[str, Any]]:
    """Return the entries of the rows that will be skipped."""
    bad = BadRows(split.domain, BAD_ROW_LIMIT, lambda: num_rows, shuffled=False)
    skipped: list[dict[str, Any]] = []
    with contextlib.closing(split.look(RowDecoder.check)) as answers:
        for index, row, reason in answers:
            bad.attempted += 1
            if reason is not None:
                skipped.append(bad.add(row, reason, split.rows.place(index)))
            bar.update()
    return skipped


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def remembered(memory: Path) -> dict[str, Any]:
    """What was checked before, by key; nothing where that cannot be read."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(memory: Path, key: str, facts: dict[str, Any]) -> None:
    """Add what holds for one check to the others'."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_json(memory, remembered(memory) | {key: facts})
