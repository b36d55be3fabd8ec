"""Every label of a run's folders is read before the run begins: a wrong one must not end a night of training."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gkd_hf.data.decoding import CorruptImage, decode_image, decode_label, image_size
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.shards import Rows, count_rows, find_shards, readable
from gkd_hf.errors import InputError
from gkd_hf.training.progress import no_bar
from gkd_hf.training.stage_folder import write_json

FIRST_ROWS = 4
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without holding the interpreter's lock
_ROWS_AHEAD = 4 * _THREADS


@dataclass(frozen=True)
class LabelledSplit:
    """A split in a local folder whose labels the run reads: all rows, or the first `limit`."""

    domain: str
    location: str
    split: str
    rows: Rows
    label_map: LabelMap
    limit: int | None

    @property
    def num_rows(self) -> int:
        """Rows to check."""
        total = count_rows(self.location, self.split)
        return total if self.limit is None else min(total, self.limit)

    def facts(self) -> dict[str, Any]:
        """What a successful check holds for: if any of it changes, the labels are to be checked again."""
        shards = [(path, os.stat(path)) for path in find_shards(self.location, self.split)]
        files = [(os.path.basename(path), found.st_size, found.st_mtime_ns) for path, found in shards]
        return {
            "location": os.path.abspath(self.location),
            "rows": self.num_rows,
            "label_map": _digest(self.label_map.known.tobytes() + self.label_map.table.tobytes()),
            "files": _digest(repr(files).encode()),
        }


def check_labels(splits: Sequence[LabelledSplit], memory: Path) -> None:
    """Check every label value and size of the splits, but of those that ``memory`` knows to be good.

    Unreadable images are left to the run, which counts them.

    Args:
        splits: what to check.
        memory: JSON file of the splits found good; written after each of them.

    Raises:
        InputError: a label value outside the map, a missing or coloured label, image and label of different size.
    """
    known = _remembered(memory)
    new = {f"{split.domain}/{split.split}": (split, split.facts()) for split in splits}
    new = {key: (split, facts) for key, (split, facts) in new.items() if known.get(key) != facts}
    if not new:
        return
    total = sum(facts["rows"] for _, facts in new.values())
    with tqdm(total=total, desc="checking labels", unit="image", disable=no_bar()) as bar:
        for key, (split, facts) in new.items():
            _check_split(split, facts["rows"], bar)
            known[key] = facts
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known)


def look_at_first_rows(rows: Rows, location: str, split: str, label_map: LabelMap | None = None) -> None:
    """Decode the first rows of a split, which costs little even where rows are streamed; raises as `check_labels`."""
    for index, row in enumerate(readable(itertools.islice(rows, FIRST_ROWS), f"{location}, split '{split}'")):
        where = _where(location, split, row, index)
        try:
            decode_image(row["image"], where)
        except CorruptImage:
            continue
        if label_map is not None:
            _check_row(row, label_map, where)


def _check_split(split: LabelledSplit, num_rows: int, bar: tqdm) -> None:
    # Few rows are held at a time, and looked at in their order: the first wrong one is told.
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            rows = readable(itertools.islice(split.rows, num_rows), f"{split.location}, split '{split.split}'")
            for index, row in enumerate(rows):
                where = _where(split.location, split.split, row, index)
                pending.append(pool.submit(_check_row, row, split.label_map, where))
                if len(pending) >= _ROWS_AHEAD:
                    pending.popleft().result()
                    bar.update()
            while pending:
                pending.popleft().result()
                bar.update()
        finally:
            for future in pending:
                future.cancel()


def _check_row(row: dict, label_map: LabelMap, where: str) -> None:
    try:
        width, height = image_size(row["image"])
        label = decode_label(row["label"], where)
    except CorruptImage:
        return
    if label.shape != (height, width):
        raise InputError(
            f"{where}: the image is {width}×{height} pixels but its label {label.shape[1]}×{label.shape[0]}; "
            "they must agree"
        )
    label_map.apply(label, where)


def _where(location: str, split: str, row: dict, index: int) -> str:
    name = row.get("id")
    return f"{location}, split '{split}', row {index if name is None else name}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
