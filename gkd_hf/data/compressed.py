"""Shortcuts through JPEG and PNG files: decode only the upper rows of a photograph, and labels without filters."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # Huffman-coded, one pass; a progressive file has no upper part to decode alone
_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_TRAILER = 64  # bytes in which a complete file's end is looked for: some cameras pad


def cut_jpeg(data: bytes, rows: int) -> bytes | None:
    """Return a JPEG of the first ``rows`` rows of the image in ``data`` or a few more, pixel for pixel the same.

    None where that saves nothing or is not possible: the file has more than one scan, or does not end as a complete
    one does, so that only decoding it whole tells whether it is truncated.
    """
    if data[:2] != b"\xff\xd8" or _END_OF_IMAGE not in data[-_TRAILER:]:
        return None
    place, frame = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in _SEQUENTIAL_FRAMES:
            frame = place
        elif marker == _SCAN:
            break
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None
        place += 2 + length
    if frame is None or place + 5 > len(data) or data[place : place + 2] != bytes((0xFF, _SCAN)):
        return None
    components = data[frame + 9]
    if data[place + 4] != components or frame + 10 + 3 * components > len(data):
        return None
    block = 8 * max(data[frame + 11 + 3 * number] & 15 for number in range(components))
    if not block:
        return None
    # The decoder smooths chroma over the rows of two blocks: the last row before the cut is not to be used.
    height = -(-(rows + 1) // block) * block
    if height >= int.from_bytes(data[frame + 5 : frame + 7], "big"):
        return None
    return b"".join((data[: frame + 5], height.to_bytes(2, "big"), data[frame + 7 :]))


def encode_label(ids: np.ndarray) -> bytes:
    """Encode ids (uint8, H×W) as a grey PNG that is smaller and twice as fast to decode than usual ones.

    Its rows are stored as they are: the filters that PNG puts before compression help photographs, not ids.
    """
    height, width = ids.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)
    rows[:, 1:] = ids
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, _GREY, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return _PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def plain_png(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Return the values (uint8, H×W, read-only) of a PNG of one 8-bit channel without filters or interlacing.

    None for every other PNG, and for one that is damaged or has more than ``max_pixels``.
    """
    if data[:8] != _PNG_SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if depth != 8 or colour not in (_GREY, _PALETTE) or interlaced or width * height > max_pixels:
        return None
    parts, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name = data[place + 4 : place + 8]
        if name == b"IDAT":
            parts.append(data[place + 8 : place + 8 + length])
        elif name == b"acTL":
            return None
        elif name == b"IEND":
            break
        place += 12 + length
    else:
        return None
    size, inflate = height * (width + 1), zlib.decompressobj()
    try:
        # No more than the header says is ever unpacked.
        values = inflate.decompress(b"".join(parts), size + 1)
    except zlib.error:
        return None
    if len(values) != size or not inflate.eof or any(values[:: width + 1]):
        return None
    return np.frombuffer(values, dtype=np.uint8).reshape(height, width + 1)[:, 1:]
