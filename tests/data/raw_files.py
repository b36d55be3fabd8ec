"""Image files in the encodings of the distributed data sets, and what a layout reads from them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image

from gkd_hf.data.raw_layouts import RawLayout, RawSample


def save(path: Path, pixels: object, palette: list[int] | None = None) -> Path:
    """Write ``pixels`` (H×W or H×W×3, 0..255); a ``palette`` (flat RGB) makes it a palette image of these indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    if palette is not None:
        image.putpalette(palette)
        assert image.mode == "P"
    image.save(path)
    return path


def photo(path: Path, size: tuple[int, int] = (4, 1)) -> Path:
    """Write a plain photograph of (width, height)."""
    return save(path, np.full((size[1], size[0], 3), 90))


def save_png16(path: Path, values: np.ndarray) -> Path:
    """Write H×W×3 values (0..65535) as a 16-bit RGB PNG, which Pillow cannot write; rows use different filters."""
    height, width, _ = values.shape
    rows, before = [], np.zeros(width * 6, dtype=np.uint8)
    for y, row in enumerate(values.astype(">u2")):
        raw = np.frombuffer(row.tobytes(), dtype=np.uint8)
        left = np.concatenate([np.zeros(6, dtype=np.uint8), raw[:-6]])
        kind, predicted = ((0, np.zeros_like(raw)), (1, left), (2, before))[y % 3]
        rows.append(bytes([kind]) + (raw - predicted).tobytes())
        before = raw
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    return path


def train_ids(layout: RawLayout, sample: RawSample) -> list[int]:
    """The train ids of a sample's label, row after row."""
    label = layout.read_label(sample)
    assert label.dtype == np.uint8 and label.ndim == 2
    return label.reshape(-1).tolist()


def names(samples: list[RawSample]) -> list[str]:
    return [sample.id for sample in samples]
