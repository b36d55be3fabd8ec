"""The order of rows that can only be read one after the other: a pure function of the seed, read once."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import fsspec.asyn
import numpy as np
import pyarrow as pa
import torch.utils.data

from gkd_hf.data.bad_rows import row_identity
from gkd_hf.data.shards import limit_read_retries, readable
from gkd_hf.errors import InputError

if TYPE_CHECKING:
    import datasets

_READ_ROWS = 16
_BUFFER_BYTES = 256 * 2**20
_COMPARED_BYTES = 4096


class StreamedOrder:
    """Random access, forwards only, to the endless sequence of streamed rows: pass 0, then pass 1 in another order, ….

    Every process and worker that builds this with the same arguments sees the same sequence. Reading is done here
    rather than by iterating ``rows``, which inside a ``DataLoader`` worker would silently yield only that worker's
    share of the shards.

    Args:
        rows: the data set, image cells undecoded.
        seed: seed of the run.
        shuffle: a new order in each pass, or the stored order in every pass.
        buffer_size: rows held for shuffling (fewer when they exceed 256 MiB together).
        num_rows: rows in one pass if known, so that whole passes can be skipped without reading them; else counted.
        name: of the domain, for messages.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        seed: int,
        shuffle: bool,
        buffer_size: int,
        num_rows: int | None,
        name: str,
    ) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._buffer_size = buffer_size
        self._num_rows = num_rows
        self._name = name
        self._window: deque[dict] = deque()
        self._first = 0
        self._source: Iterator[dict] | None = None
        if torch.utils.data.get_worker_info() is not None:
            # A forked worker must not wait on the parent's event loop when it reads remote files.
            fsspec.asyn.reset_lock()

    @property
    def num_rows(self) -> int:
        """Rows in one pass; read through once if nobody told."""
        if self._num_rows is None:
            self._num_rows = sum(len(table) for table in self._tables(self._rows))
        return self._num_rows

    def row(self, index: int) -> dict:
        """Return the raw row at global ``index`` (over all passes), which must not lie before ``release``d rows."""
        if self._source is None:
            self._first = index
            self._source = self._from(index)
        while index - self._first >= len(self._window):
            self._window.append(next(self._source))
        return self._window[index - self._first]

    def place(self, index: int) -> tuple[None, None]:
        """Return that nobody knows where a streamed row is stored."""
        return None, None

    def release(self, index: int) -> None:
        """Forget the rows before ``index``: they will not be asked for again."""
        while self._first < index and self._source is not None:
            if self._window:
                self._window.popleft()
            else:
                next(self._source)
            self._first += 1

    def one_pass(self, number: int = 0) -> Iterator[dict]:
        """Yield the raw rows of pass ``number`` in order, told apart by `told_apart`."""
        return told_apart(self._one_pass(number))

    def _one_pass(self, number: int) -> Iterator[dict]:
        if not self._shuffle:
            for table in self._tables(self._rows):
                yield from table.to_pylist()
            return
        # `set_epoch` is not used: its counter lives in memory shared between workers, which reach a new pass at
        # different times. One shard is read at a time because datasets sleeps 5 s after interleaving several, and the
        # mixing is done here because its own buffer fails beyond 2 GiB of image bytes.
        entropy = np.random.SeedSequence([self._seed, number])
        source = self._rows.shuffle(
            seed=int(entropy.generate_state(1)[0]), buffer_size=_READ_ROWS, max_buffer_input_shards=1
        )
        rng = np.random.default_rng(entropy)
        buffer: list[dict] = []
        held = 0
        for table in self._tables(source):
            for row in table.to_pylist():
                held += _num_bytes(row)
                buffer.append(row)
                while len(buffer) > self._buffer_size or (held > _BUFFER_BYTES and len(buffer) > 1):
                    chosen = _swap_out(buffer, int(rng.integers(len(buffer))))
                    held -= _num_bytes(chosen)
                    yield chosen
        for position in rng.permutation(len(buffer)):
            yield buffer[position]

    def _from(self, index: int) -> Iterator[dict]:
        first_pass, skip = divmod(index, self.num_rows) if index and self.num_rows else (0, 0)
        for number in itertools.count(first_pass):
            count = 0
            for row in self.one_pass(number):
                count += 1
                if count > skip:
                    yield row
            skip = 0
            if count == 0:
                raise InputError(f"domain '{self._name}' has no rows: check the folder and the split")
            if self._num_rows is not None and count != self._num_rows:
                raise InputError(
                    f"domain '{self._name}' gave {count} rows in pass {number} but {self._num_rows} were expected: "
                    "the data changed under the run, or a shard is being written; restart when it is complete"
                )
            self._num_rows = count

    def _tables(self, rows: datasets.IterableDataset) -> Iterator[pa.Table]:
        limit_read_retries()
        # `iter` (unlike `__iter__`) does not split the rows between DataLoader workers.
        tables = rows.with_format("arrow").iter(batch_size=_READ_ROWS)
        yield from readable(tables, f"domain '{self._name}'")


def told_apart(rows: Iterable[dict]) -> Iterator[dict]:
    """Yield the rows of one pass; of rows without id and file whose image is the same, each but the first gets an id.

    As many rows as are empty or hold the same error page then count as bad, in whatever order a pass has them. Only
    images below 4 KiB are compared: few others are the same.
    """
    met: Counter[int] = Counter()
    for row in rows:
        image = row.get("image")
        if row.get("id") is None and (image is None or isinstance(image, dict) and not image.get("path")):
            data = (image or {}).get("bytes") or b""
            if len(data) < _COMPARED_BYTES:
                key = hash(data)
                met[key] += 1
                if met[key] > 1:
                    row = {**row, "id": f"{row_identity(row)} no. {met[key]}"}
        yield row


def _swap_out(buffer: list[dict], position: int) -> dict:
    """Remove and return one element in constant time, the last one taking its place."""
    buffer[position], buffer[-1] = buffer[-1], buffer[position]
    return buffer.pop()


def _num_bytes(row: dict) -> int:
    return sum(len(cell["bytes"] or b"") for cell in row.values() if isinstance(cell, dict) and "bytes" in cell)
