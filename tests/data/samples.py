"""Small data sets made on the spot: parquet shards whose images say which row they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encode(pixels: np.ndarray | PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row_image(number: int, size: int = 8) -> bytes:
    """A flat image whose red value is the row's number and whose green value is 7."""
    return encode(np.full((size, size, 3), (number, 7, 0), dtype=np.uint8))


def row_label(number: int, size: int = 8) -> bytes:
    """Half class 0, half class 1."""
    label = np.zeros((size, size), dtype=np.uint8)
    label[:, size // 2 :] = 1
    return encode(label)


def write_shard(path: Path, rows: list[dict], group: int | None = None) -> None:
    """Write one shard, in row groups of ``group`` rows or in one."""
    columns = {}
    for name in rows[0]:
        if name in ("image", "label"):
            cells = [{"bytes": row[name], "path": None} for row in rows]
            columns[name] = pa.array(cells, type=IMAGE_TYPE)
        else:
            columns[name] = pa.array([row[name] for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)


def make_rows(
    count: int, *, images: dict[int, bytes] | None = None, labels: dict[int, bytes] | None = None
) -> list[dict]:
    """Rows 0..count-1; ``images`` and ``labels`` replace the bytes of some."""
    return [
        {
            "image": (images or {}).get(number, row_image(number)),
            "label": (labels or {}).get(number, row_label(number)),
            "id": f"row{number:03d}",
        }
        for number in range(count)
    ]
