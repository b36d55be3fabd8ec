"""Random access to the undecoded rows of parquet shards."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gkd_hf.errors import InputError

IMAGE_COLUMNS = ("image", "label")
CACHE_BYTES = 128 * 2**20
"""Row groups of more than one row that a process keeps of one split."""
KEPT_GROUPS = 12
"""So many are kept whatever they weigh: reading one again for each of its rows would cost more."""
_OPEN_FILES = 256
_FOOTER_BYTES = 32 * 2**20


class ShardStore(Protocol):
    """Where shards are.

    Attributes:
        remote: whether they have to be fetched.
    """

    remote: ClassVar[bool]

    def path(self, name: str) -> Path:
        """Return the file of a shard, which may have to be fetched first; raises ``InputError``."""

    def title(self, name: str) -> str:
        """What messages call a shard."""


@dataclass(frozen=True)
class ShardFolder:
    """The shards below a folder here, named by their paths relative to it."""

    folder: str
    remote: ClassVar[bool] = False

    def path(self, name: str) -> Path:
        """Return the file of a shard."""
        return Path(self.folder, name)

    def title(self, name: str) -> str:
        """Its whole path."""
        return str(self.path(name))


@dataclass(frozen=True, eq=False)
class Shard:
    """What a shard's footer tells.

    Attributes:
        name: within its store.
        group_rows: int32, rows of each row group.
        num_bytes: of all row groups, uncompressed, all columns.
    """

    name: str
    group_rows: np.ndarray
    num_bytes: int

    @classmethod
    def described(cls, name: str, metadata: pq.FileMetaData) -> Shard:
        """Read it off a footer."""
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], dtype=np.int32)
        return cls(name, rows, sum(group.total_byte_size for group in groups))


class ShardRows:
    """The rows of one split, each a dict whose ``image`` and ``label`` cells are undecoded ``{"bytes", "path"}``.

    ``len(rows)``, ``rows[i]`` and iteration in stored order. Reading a row reads its row group, no more; groups of
    more than one row are kept, up to 128 MiB of them or twelve, and so are open files. Pickling carries what the
    footers told and neither files nor rows; a forked process opens its own files. Not for several threads at once.

    Args:
        store: where the shards are.
        shards: what their footers tell, in stored order.
        columns: what a row has.
        kept: int64, rising: only these rows of the shards are there, and numbered anew; None: all.

    Raises ``InputError`` naming shard and row for what cannot be read, and for a shard that has changed.
    """

    def __init__(
        self,
        store: ShardStore,
        shards: Sequence[Shard],
        columns: Sequence[str],
        kept: np.ndarray | None = None,
    ) -> None:
        self.store = store
        self.shards = tuple(shards)
        self.columns = tuple(columns)
        self.kept = kept
        self.stored_group_rows = np.concatenate([shard.group_rows for shard in self.shards]).astype(np.int64)
        """Rows that each row group of all shards has where it is stored, kept or not."""
        self.shard_groups = np.array([len(shard.group_rows) for shard in self.shards])
        """Row groups of each shard."""
        self._group_ends = self.stored_group_rows.cumsum()
        self._shard_ends = self.shard_groups.cumsum()
        self.group_rows = self.stored_group_rows
        """Rows of each row group of all shards, in stored order."""
        if kept is not None:
            groups = self._group_ends.searchsorted(kept, side="right")
            self.group_rows = np.bincount(groups, minlength=len(self.stored_group_rows))
        self._len = int(self.group_rows.sum())
        self._forget()

    def __reduce__(self) -> tuple:
        return ShardRows, (self.store, self.shards, self.columns, self.kept)

    def subset(self, indices: np.ndarray) -> ShardRows:
        """Return some of the rows, as rows of their own: in stored order, without the shards that hold none of them.

        Args:
            indices: int64, at least one, none twice.
        """
        stored = np.sort(indices) if self.kept is None else self.kept[np.sort(indices)]
        shard_rows = np.array([shard.group_rows.sum() for shard in self.shards], dtype=np.int64)
        ends = shard_rows.cumsum()
        owner = ends.searchsorted(stored, side="right")
        used = np.unique(owner)
        rows_before = np.where(np.isin(np.arange(len(shard_rows)), used), 0, shard_rows).cumsum()
        shards = [self.shards[shard] for shard in used]
        return ShardRows(self.store, shards, self.columns, stored - rows_before[owner])

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        shard, group, offset = self._find(index)
        return {name: _cell(name, cell) for name, cell in self._row(shard, group, offset).items()}

    @property
    def shard_rows(self) -> np.ndarray:
        """Rows of each shard, int64."""
        ends = np.concatenate([[0], self.group_rows.cumsum()])[np.concatenate([[0], self._shard_ends])]
        return np.diff(ends)

    @property
    def num_bytes(self) -> int:
        """Of all shards, uncompressed, with the rows and columns that are not read."""
        return sum(shard.num_bytes for shard in self.shards)

    def place(self, index: int) -> tuple[str, int]:
        """Return the name of a row's shard, and the row counted from 0 within it."""
        shard, group, offset = self._find(index)
        return self.shards[shard].name, int(self.shards[shard].group_rows[:group].sum()) + offset

    def shard(self, index: int) -> int:
        """Return the number of the shard that a row is in."""
        return self._find(index)[0]

    def expect(self, shards: Iterable[int]) -> None:
        """Fetch these shards, by their numbers, in the background and in this order, where the store is remote.

        What cannot be fetched is told by whoever reads it. A later call takes the place of an earlier one.
        """
        if self.store.remote:
            self._own()
            self._expected = deque(self.shards[shard].name for shard in shards)
            if self._fetcher is None or not self._fetcher.is_alive():
                self._fetcher = Thread(target=self._fetch_expected, daemon=True)
                self._fetcher.start()

    def _fetch_expected(self) -> None:
        while True:
            try:
                name = self._expected.popleft()
            except IndexError:
                return
            with contextlib.suppress(InputError):
                self.store.path(name)

    def _own(self) -> None:
        """Forget what a forked process has from its parent."""
        if self._process != os.getpid():
            self._forget()

    def _find(self, index: int) -> tuple[int, int, int]:
        """Shard, row group within it, row within that."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        stored = index if self.kept is None else int(self.kept[index])
        group = int(self._group_ends.searchsorted(stored, side="right"))
        shard = int(self._shard_ends.searchsorted(group, side="right"))
        offset = stored - int(self._group_ends[group] - self.stored_group_rows[group])
        return shard, group - int(self._shard_ends[shard] - self.shard_groups[shard]), offset

    def _row(self, shard: int, group: int, offset: int) -> dict:
        self._own()
        table = self._groups.get((shard, group))
        if table is None:
            table = self._read(shard, group)
            if len(table) > 1:
                self._keep((shard, group), table)
        else:
            self._groups.move_to_end((shard, group))
        return table.slice(offset, 1).to_pylist()[0]

    def _read(self, shard: int, group: int) -> pa.Table:
        described = self.shards[shard]
        try:
            # No threads: they do not live on in a forked worker.
            table = self._file(shard).read_row_group(group, columns=list(self.columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            first = int(described.group_rows[:group].sum())
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"{self.store.title(described.name)}: the data cannot be read on from row {first} ({reason}); check "
                "the shard, or write it again"
            ) from error
        if len(table) != described.group_rows[group]:
            raise self._changed(shard)
        return table

    def _keep(self, key: tuple[int, int], table: pa.Table) -> None:
        self._groups[key] = table
        self._kept_bytes += table.nbytes
        while self._kept_bytes > CACHE_BYTES and len(self._groups) > KEPT_GROUPS:
            self._kept_bytes -= self._groups.popitem(last=False)[1].nbytes

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        described = self.shards[shard]
        file = pq.ParquetFile(self.store.path(described.name), pre_buffer=False)
        if [file.metadata.num_row_groups, file.metadata.num_rows] != [
            len(described.group_rows),
            described.group_rows.sum(),
        ]:
            raise self._changed(shard)
        self._files[shard] = file
        self._footer_bytes += file.metadata.serialized_size
        while len(self._files) > _OPEN_FILES or (self._footer_bytes > _FOOTER_BYTES and len(self._files) > 1):
            with self._files.popitem(last=False)[1] as closed:
                self._footer_bytes -= closed.metadata.serialized_size
        return file

    def _changed(self, shard: int) -> InputError:
        return InputError(
            f"{self.store.title(self.shards[shard].name)} is not what it was when the run began: other rows are in "
            "it now, or it is being written; start again when the data is complete"
        )

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._footer_bytes = 0
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._kept_bytes = 0
        self._expected: deque[str] = deque()
        self._fetcher: Thread | None = None


def _cell(column: str, cell: object) -> object:
    """An image cell in the one form that decoding takes, of a column that may hold bare bytes."""
    if column not in IMAGE_COLUMNS or cell is None:
        return cell
    if isinstance(cell, bytes):
        return {"bytes": cell, "path": None}
    return {"bytes": cell["bytes"], "path": cell.get("path")}
