"""Write one parquet shard of a prepared data set: whole or not at all, and the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gkd_hf.data.compressed import encode_label
from gkd_hf.data.domains import IGNORE_INDEX
from gkd_hf.data.raw_layouts import BadSample, RawLayout, RawSample
from gkd_hf.data.raw_rows import Limit, read_row
from gkd_hf.errors import InputError

FOOTER = b"gkd_hf"
_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_IMAGE, _TEXT = {"_type": "Image"}, {"dtype": "string", "_type": "Value"}
FEATURES = {"image": _IMAGE, "label": _IMAGE, "id": _TEXT, "domain": _TEXT}
SCHEMA = pa.schema(
    [("image", _CELL), ("label", _CELL), ("id", pa.string()), ("domain", pa.string())],
    # What datasets writes, so that it shows pictures.
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


@dataclass(frozen=True)
class Job:
    """What all shards have in common.

    Attributes:
        layout: of the raw data. domain: its name. classes: how many train ids there are; None without labels.
        row_group_rows: rows in a row group. re_encode: None (original bytes), "png" or "jpeg:QUALITY".
        limit: how many bad samples may be left out.
        settings: all that the shards depend on, kept in each of them.
    """

    layout: RawLayout
    domain: str
    classes: int | None
    row_group_rows: int
    re_encode: str | None
    limit: Limit
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One shard to be written: where, and the samples in it; ``labelled`` if they have labels."""

    target: Path
    split: str
    samples: tuple[RawSample, ...]
    labelled: bool


class _Sink(io.RawIOBase):
    """A file that hashes what is written; once abandoned it takes anything and keeps nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._size = 0
        self.abandoned = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if not self.abandoned:
            try:
                self._file.write(data)
            except OSError:
                self.abandoned = True
                raise
            self._digest.update(data)
        self._size += size
        return size

    def to_disk(self) -> tuple[int, str]:
        """Make sure that the content survives a power cut; return its size and SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._size, self._digest.hexdigest()

    def close(self) -> None:
        if not self.closed:
            try:
                self._file.close()
            except OSError:
                if not self.abandoned:
                    raise
        super().close()


def temporary_name(target: Path) -> Path:
    """Where a file is written before it is renamed to ``target``."""
    return target.with_name(f".{target.name}.tmp")


@contextmanager
def whole_file(target: Path) -> Iterator[_Sink]:
    """Open ``target`` for writing under another name; it appears, on disk to stay, only if nothing is raised."""
    temporary = temporary_name(target)
    sink = _Sink(temporary)
    try:
        yield sink
        sink.to_disk()
        sink.close()
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        sink.abandoned = True
        sink.close()
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make sure that renamed files keep their names after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(part: Part, job: Job, row_done: Callable[[], None]) -> dict[str, Any]:
    """Write one shard; return what the manifest says of it, `read_facts`'s dictionary with "bytes" and "sha256".

    Args:
        row_done: called after every sample; what it raises ends the writing, and nothing is left of the shard.

    Raises:
        InputError: a raw file that cannot be read, or more bad samples than ``job.limit`` allows to leave out.
        OSError: the shard cannot be written, as on a full disk.
    """
    facts = _Facts(job.classes if part.labelled else None)
    with whole_file(part.target) as sink:
        writer = pq.ParquetWriter(
            sink, SCHEMA, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
        )
        try:
            rows = _rows(part, job, facts, row_done)
            while group := list(itertools.islice(rows, job.row_group_rows)):
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA), row_group_size=len(group))
            content = {"settings": dict(job.settings), **facts.to_dict()}
            writer.add_key_value_metadata({FOOTER: json.dumps(content, sort_keys=True)})
        except BaseException:
            sink.abandoned = True
            raise
        finally:
            writer.close()
        size, digest = sink.to_disk()
    return facts.to_dict() | {"bytes": size, "sha256": digest}


def read_facts(shard: Path) -> dict[str, Any]:
    """Return what a finished shard says of itself: settings, rows, sizes, pixels of each class, samples left out.

    Raises:
        InputError: not a parquet file, or not one that `write_shard` wrote.
    """
    try:
        metadata = pq.read_metadata(shard).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{shard} is not a readable parquet file ({error}): remove it and run this again") from error
    if FOOTER not in metadata:
        raise InputError(f"{shard} was not made by preparing a data set: choose another folder, or remove it")
    return json.loads(metadata[FOOTER])


class _Facts:
    def __init__(self, classes: int | None) -> None:
        self._classes = classes
        self._pixels = np.zeros(256, dtype=np.int64)
        self._sizes: list[tuple[int, int]] = []
        self._image_bytes = self._label_bytes = 0
        self.left_out: list[dict[str, str]] = []

    def add(self, size: tuple[int, int], image: bytes, label: bytes | None, ids: np.ndarray | None) -> None:
        self._sizes.append(size)
        self._image_bytes += len(image)
        if label is not None and ids is not None:
            self._label_bytes += len(label)
            self._pixels += np.bincount(ids.ravel(), minlength=256)

    def to_dict(self) -> dict[str, Any]:
        labelled = self._classes is not None
        return {
            "rows": len(self._sizes),
            "image_bytes": self._image_bytes,
            "label_bytes": self._label_bytes,
            "smallest": [min(side) for side in zip(*self._sizes, strict=True)],
            "largest": [max(side) for side in zip(*self._sizes, strict=True)],
            "pixels": self._pixels[: self._classes].tolist() if labelled else None,
            "ignored_pixels": int(self._pixels[IGNORE_INDEX]) if labelled else None,
            "left_out": self.left_out,
        }


def _rows(part: Part, job: Job, facts: _Facts, row_done: Callable[[], None]) -> Iterator[dict[str, Any]]:
    for sample in part.samples:
        try:
            row = read_row(job.layout, sample, job.classes, job.re_encode, labelled=part.labelled)
        except BadSample as error:
            facts.left_out.append({"id": sample.id, "reason": error.reason})
            job.limit.check(part.split, facts.left_out)
        else:
            name = sample.id.replace("/", "_")
            label = None if row.ids is None else encode_label(row.ids)
            facts.add(row.size, row.image, label, row.ids)
            yield {
                "image": {"bytes": row.image, "path": name + row.suffix},
                "label": None if label is None else {"bytes": label, "path": f"{name}.png"},
                "id": sample.id,
                "domain": job.domain,
            }
        row_done()
