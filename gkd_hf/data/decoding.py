"""From the bytes of one table cell to an RGB image or an array of label ids, by stated rules.

An image cell becomes an upright 8-bit RGB image:

- grey, bilevel, palette, CMYK, YCbCr and Lab images are converted; alpha, and the transparency of a palette, is
  dropped: a transparent pixel keeps its stored colour;
- of 16 bits per channel the upper eight are kept; a wider integer is clipped to 16 bits first;
- the EXIF orientation is applied; of an animation (GIF, PNG, WebP) or a TIFF of many pages the first frame is taken.

A label cell becomes its stored ids:

- grey and 16- or 32-bit integer images as they are, palette images as their indices, bilevel ones as 0 and 1;
- grey stored as RGB (three equal channels) as one of them, grey with alpha as the grey;
- no orientation is applied, and of an animation the first frame is taken.

The row is skipped, counted and reported (`CorruptImage`) if a cell is empty (an image only), has zero bytes, names a
file that cannot be read, holds bytes that are no image or are truncated or damaged, has floating-point pixels, or is a
decompression bomb of more than `MAX_PIXELS`. So is a row whose label is missing (`WrongLabel`), in colours, of another
size than its image, or has values outside the map: some published data sets have a few of them, and where a wrong map
makes them many the run stops all the same. `gkd_hf.data.bad_rows` counts skipped rows by reason and judges them.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

from gkd_hf.data.bad_rows import WrongLabel
from gkd_hf.data.compressed import cut_jpeg, plain_png

MAX_PIXELS = 178_956_970
"""Images with more pixels are skipped as decompression bombs (Pillow's own limit for an error)."""

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # the orientations that swap width and height
# What a PNG's orientation can be kept in. Pillow decodes every pixel to find it, as it may come after them.
_PNG_ORIENTATION_MARKS = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")
_WARNING_FILTERS = threading.Lock()  # they belong to the whole process


class CorruptImage(Exception):
    """The bytes of one cell are not a readable image; the row is skipped, counted and reported.

    The message is the column, a colon and the reason; what differs between rows of one reason stands in parentheses.
    """


@contextmanager
def _damage_is_corrupt(data: bytes, column: str) -> Iterator[None]:
    """Turn what Pillow raises on ``data`` into ``CorruptImage`` with the reason."""
    try:
        yield
    except (CorruptImage, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise CorruptImage(f"{column}: decompression bomb ({error})") from error
    except Exception as error:  # Pillow's plug-ins raise many kinds of exceptions on damaged bytes
        reason = str(error) if str(error) and "BytesIO" not in str(error) else f"not an image ({len(data)} bytes)"
        raise CorruptImage(f"{column}: {reason}") from error


def cell_bytes(cell: Mapping | bytes | None, column: str) -> bytes:
    """Return the bytes of a cell (``{"bytes", "path"}`` or bytes), which are not none."""
    if cell is None:
        raise CorruptImage(f"{column}: empty cell")
    data, path = (cell, None) if isinstance(cell, bytes) else (cell.get("bytes"), cell.get("path"))
    if data is None and path:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise CorruptImage(f"{column}: file cannot be read ({error})") from error
    if not data:
        raise CorruptImage(f"{column}: zero bytes")
    return data


def _whole(image: PIL.ImageFile.ImageFile, data: bytes) -> PIL.ImageFile.ImageFile:
    """Let Pillow hand an opened image's bytes to its decoder at once, not in parts that are joined and cut again."""
    image.decodermaxblock = len(data)
    return image


def _header(cell: Mapping | bytes | None, column: str) -> tuple[PIL.Image.Image, bytes]:
    """Open a cell without decoding its pixels; return it with its bytes."""
    data = cell_bytes(cell, column)
    # Pillow warns from half the limit on; such images are legal here (aerial tiles), so the warning is noise.
    with _damage_is_corrupt(data, column), _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        image = _whole(PIL.Image.open(io.BytesIO(data)), data)
    if image.width * image.height > MAX_PIXELS:
        raise CorruptImage(f"{column}: decompression bomb ({image.width}×{image.height} pixels)")
    return image, data


def _open(cell: Mapping | bytes | None, column: str) -> PIL.Image.Image:
    """Decode a cell completely; raises ``CorruptImage`` with the reason."""
    image, data = _header(cell, column)
    with _damage_is_corrupt(data, column):
        image.load()
    return image


class EncodedImage:
    """An image cell of which no more is decoded than is asked for.

    Raises ``CorruptImage`` for bytes that are no image; damage behind the header is met when decoding.
    """

    def __init__(self, cell: Mapping | bytes | None) -> None:
        self._image, self._data = _header(cell, "image")

    @cached_property
    def _orientation(self) -> int:
        with _damage_is_corrupt(self._data, "image"):
            return self._image.getexif().get(_EXIF_ORIENTATION, 1)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        image = self._image
        if image.format == "PNG" and not any(mark in self._data for mark in _PNG_ORIENTATION_MARKS):
            return image.size
        if (
            image.format == "TIFF"
        ):  # Pillow turns it while decoding, and already says the turned size or not by version
            return decode_image(self._data, "").size
        return (image.height, image.width) if self._orientation in _TURNED else image.size

    def decode(self) -> PIL.Image.Image:
        """Decode the upright RGB image by the rules of the module; raises ``CorruptImage``."""
        with _damage_is_corrupt(self._data, "image"):
            self._image.load()
        return _upright(self._image)

    def decode_crop(
        self, box: tuple[float, float, float, float], size: tuple[int, int]
    ) -> tuple[PIL.Image.Image, tuple[float, float, float, float]]:
        """Decode what resizing ``box`` of the upright image to ``size`` = (width, height) needs.

        A JPEG may come at a half, a quarter or an eighth of its size (sides rounded up), never so small that the box
        falls below ``size``, and without rows far below the box: its decoder saves the work. Other formats come whole.

        Returns:
            the upright RGB image, and the box in its pixels. Raises ``CorruptImage`` for a file without its end, and
            for damage where it is decoded. Damage of a JPEG below the box stays unseen: its row may be good with one
            crop and bad with another.
        """
        if self._image.format not in ("JPEG", "MPO"):
            return self.decode(), box
        within = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
        factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(within, 1))
        image, data = self._image, self._data
        if self._orientation == 1 and (cut := cut_jpeg(data, math.ceil(box[3]) + factor)) is not None:
            with _damage_is_corrupt(data, "image"):
                image = _whole(PIL.Image.open(io.BytesIO(cut)), cut)
        with _damage_is_corrupt(data, "image"):
            if factor > 1:
                image.draft(image.mode, (max(1, image.width // factor), max(1, image.height // factor)))
            image.load()
        left, top, right, bottom = (edge / factor for edge in box)
        return _upright(image), (left, top, right, bottom)


def image_size(cell: Mapping | bytes | None) -> tuple[int, int]:
    """Return (width, height) of the upright image in a cell, as ``decode_image`` gives it, without its pixels.

    Only a TIFF is decoded. Raises ``CorruptImage`` for bytes that are no image; damage behind the header stays unseen.
    """
    return EncodedImage(cell).size


def decode_image(cell: Mapping | bytes | None, where: str) -> PIL.Image.Image:
    """Decode an image cell to an upright RGB image.

    The rules are those of the module. Raises ``CorruptImage`` (with ``where`` in no message: the caller reports the
    row) for anything that cannot be decoded, floating-point pixels included.
    """
    return EncodedImage(cell).decode()


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a decoded image upright and convert it to RGB."""
    try:
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block
        raise CorruptImage(f"image: damaged EXIF block ({error})") from error
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise CorruptImage("image: floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:  # a mode that this build of Pillow knows no way from
        raise CorruptImage(f"image: no conversion from mode {image.mode} to RGB ({error})") from error


def decode_label(cell: Mapping | bytes | None, where: str) -> np.ndarray:
    """Decode a label cell to its stored ids, H×W (uint8, uint16 or int32), by the rules of the module.

    Raises ``CorruptImage`` for unreadable bytes, and ``WrongLabel`` naming ``where`` for a missing label or for one
    that stores colours in place of ids.
    """
    if cell is None:
        raise WrongLabel(
            f"{where}: the row has no label; remove the row, or use the data for label-free stages only",
            "label: missing",
        )
    data = cell_bytes(cell, "label")
    if (values := plain_png(data, MAX_PIXELS)) is not None:
        return values
    image = _open(data, "label")
    if image.mode in ("L", "P") or image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode == "LA":
        return np.asarray(image)[..., 0]
    if image.mode == "RGB":
        pixels = np.asarray(image)
        if (pixels == pixels[..., :1]).all():
            return np.ascontiguousarray(pixels[..., 0])
    raise WrongLabel(
        f"{where}: the label is a picture of mode {image.mode} (colours), not one integer id per pixel; "
        "convert it to a single-channel PNG of ids",
        f"label: colours in place of ids (mode {image.mode})",
    )
