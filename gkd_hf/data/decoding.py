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
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import PIL.Image
import PIL.ImageOps

from gkd_hf.data.bad_rows import WrongLabel

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


def _header(cell: Mapping | bytes | None, column: str) -> tuple[PIL.Image.Image, bytes]:
    """Open a cell (``{"bytes", "path"}`` or bytes) without decoding its pixels; return it with its bytes."""
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
    # Pillow warns from half the limit on; such images are legal here (aerial tiles), so the warning is noise.
    with _damage_is_corrupt(data, column), _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        image = PIL.Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise CorruptImage(f"{column}: decompression bomb ({image.width}×{image.height} pixels)")
    return image, data


def _open(cell: Mapping | bytes | None, column: str, min_size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """Decode a cell completely; raises ``CorruptImage`` with the reason."""
    image, data = _header(cell, column)
    with _damage_is_corrupt(data, column):
        if min_size is not None and image.format in ("JPEG", "MPO"):
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
            image.draft(image.mode, min_size[::-1] if turned else min_size)
        image.load()
    return image


def image_size(cell: Mapping | bytes | None) -> tuple[int, int]:
    """Return (width, height) of the upright image in a cell, as ``decode_image`` gives it, without its pixels.

    Only a TIFF is decoded. Raises ``CorruptImage`` for bytes that are no image; damage behind the header stays unseen.
    """
    image, data = _header(cell, "image")
    if image.format == "PNG" and not any(mark in data for mark in _PNG_ORIENTATION_MARKS):
        return image.size
    if image.format == "TIFF":  # Pillow turns it while decoding, and already says the turned size or not by version
        return decode_image(cell, "").size
    with _damage_is_corrupt(data, "image"):
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
    return (image.height, image.width) if turned else image.size


def decode_image(
    cell: Mapping | bytes | None, where: str, *, min_size: tuple[int, int] | None = None
) -> PIL.Image.Image:
    """Decode an image cell to an upright RGB image.

    With ``min_size`` = (width, height) of the upright image, a JPEG may come at a half, a quarter or an eighth of its
    size (sides rounded up), whichever is the smallest that is not below ``min_size`` on either side: its decoder
    shrinks at less than the cost of the whole image. Other formats keep their size.

    The rules are those of the module. Raises ``CorruptImage`` (with ``where`` in no message: the caller reports the
    row) for anything that cannot be decoded, floating-point pixels included.
    """
    image = _open(cell, "image", min_size)
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
    image = _open(cell, "label")
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
