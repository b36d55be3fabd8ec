"""A user's own data that is in a table already: a data set on the Hub, or a folder of parquet shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gkd_hf.data.custom_layout import CustomLayout
from gkd_hf.data.hub_files import HubFiles, hub_files
from gkd_hf.data.raw_layouts import RawSample
from gkd_hf.data.raw_layouts.base import ids_in
from gkd_hf.data.rows import IMAGE_COLUMNS, Shard, ShardFolder, ShardRows
from gkd_hf.data.shards import find_shards, is_hub_id, open_rows
from gkd_hf.errors import InputError

_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"II*\0": ".tif", b"MM\0*": ".tif"}


@dataclass(frozen=True)
class RowSample(RawSample):
    """A row: its split, and its place there, counted from 0; ``image`` and ``label`` name it and are no files."""

    split: str = ""
    row: int = 0


class RowsLayout(CustomLayout):
    """Rows with the columns ``image`` and ``label`` (ids, not colours), in splits called train, validation or test.

    A sample is called what a column ``id`` says if that is there and different for each row, or else by its number.

    Args:
        location: Hub id of a data set stored as parquet, or a folder as ``open_rows`` takes it.
        classes, id_map: as for ``CustomLayout``.
        revision: branch, tag or commit of a Hub data set; which commit it stands for is part of the settings.

    Raises:
        InputError: as ``CustomLayout``, and as ``hub_files``.
    """

    description = "a Hub id or a folder of parquet shards, with columns image and label"

    def __init__(
        self,
        location: str | os.PathLike,
        classes: Sequence[str],
        id_map: Mapping[int, int] | None = None,
        *,
        revision: str | None = None,
    ) -> None:
        super().__init__(classes, id_map)
        self._location = os.fspath(location)
        self._files = hub_files(self._location, revision) if is_hub_id(self._location) else None
        if self._files is not None and self._files.shards is None:
            raise InputError(
                f"'{self._location}' is not stored as parquet on the Hub: download it, and give the folder with "
                "images/ and masks/"
            )
        self._opened: dict[str, ShardRows] = {}
        self._last: tuple[RowSample, dict] | None = None

    def splits_in(self, root: Path) -> tuple[str, ...]:
        there = self._files.shards if self._files is not None else splits_of_shards(Path(self._location))
        found = tuple(split for split in self.splits if split in there)
        if not found:
            known = ", ".join(there) or "none"
            raise InputError(f"{self._location} has no split called {', '.join(self.splits)}; it has: {known}")
        return found

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        files = self._files
        rows = open_rows(self._location, split) if files is None else _fetched(files, split)
        self._opened[split] = rows
        place = Path(self._location if files is None else f"{files.location}@{files.commit}")
        samples = []
        for number, name in enumerate(_names(rows)):
            shard, row = rows.place(number)
            path = place / shard / f"row {row}"
            samples.append(RowSample(name, path, path, None, split, number))
        return samples

    def file_size(self, path: Path) -> int:
        """Of the shard; 0 on the Hub, where the commit is part of the path."""
        return 0 if self._files is not None else super().file_size(path.parent)

    def read_image(self, sample: RawSample) -> tuple[bytes, str]:
        cell = self._row(sample)["image"] or {}
        data = cell.get("bytes") or b""
        suffix = next((suffix for magic, suffix in _SUFFIXES.items() if data.startswith(magic)), "")
        return data, Path(cell.get("path") or "").suffix.lower() or suffix

    def read_stored(self, sample: RawSample) -> np.ndarray:
        cell = self._row(sample)["label"]
        return ids_in(cell if cell and cell["bytes"] is not None else None, str(sample.label))

    def _row(self, sample: RawSample) -> dict:
        if self._last is None or self._last[0] != sample:
            self._last = (sample, self._opened[sample.split][sample.row])
        return self._last[1]


def splits_of_shards(folder: Path) -> dict[str, list[str]]:
    """Return split → shards, of those splits that a folder holds as parquet; empty if there are none."""
    found = {}
    for split in CustomLayout.splits if folder.is_dir() else ():
        try:
            found[split] = find_shards(str(folder), split)
        except InputError:
            continue
    return found


def _fetched(files: HubFiles, split: str) -> ShardRows:
    """The rows of a split whose shards are all fetched, so that worker processes need no network."""
    open_rows(files.location, split, revision=files.commit)  # which checks split and columns
    shards, columns, folder = [], None, Path()
    for name in files.shards[split]:
        path = files.path(name)
        folder = Path(str(path).removesuffix(name))
        metadata = pq.read_metadata(path)
        shards.append(Shard.described(name, metadata))
        there = metadata.schema.to_arrow_schema().names
        if not set(IMAGE_COLUMNS) <= set(there):
            raise InputError(f"{name} of '{files.location}' lacks column image or label: it has {', '.join(there)}")
        columns = there if columns is None else [column for column in columns if column in there]
    return ShardRows(ShardFolder(str(folder)), shards, [name for name in (*IMAGE_COLUMNS, "id") if name in columns])


def _names(rows: ShardRows) -> list[str]:
    numbers = [f"{number:08d}" for number in range(len(rows))]
    if "id" not in rows.columns:
        return numbers
    names = [row["id"] for row in ShardRows(rows.store, rows.shards, ["id"])]
    usable = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
    return names if usable else numbers
