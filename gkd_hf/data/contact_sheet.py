"""A contact sheet: images beside their labels, with a legend, so that a wrong label map is seen before training.

sheet = contact_sheet("data/camvid/day", label_map("identity", 11), label_space("camvid_day"), split="train")
sheet.save("contact.png")
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pyarrow as pa
import pyarrow.parquet as pq

from gkd_hf.data.decoding import CorruptImage, decode_image, decode_label
from gkd_hf.data.domains import IGNORE_INDEX, LabelSpace
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.shards import count_rows, find_shards, is_hub_id, open_rows, readable
from gkd_hf.errors import InputError

_TILE_AREA = 72_000  # pixels of one picture: two pairs of street scenes fill a row
_SHEET_WIDTH = 1400
_MARGIN, _GAP = 24, 20
_CAPTION_HEIGHT, _ENTRY_HEIGHT, _ENTRY_WIDTH = 22, 24, 268
_LABEL_OPACITY = 0.65
_STRIPE = 5
_BACKGROUND, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (130, 130, 130)
_STRIPES = np.array([(20, 20, 20), (250, 250, 250)], dtype=np.float32)


@dataclass(frozen=True)
class _Sample:
    """One row: its name, its picture at tile size, and its train ids likewise; or why there is none."""

    name: str
    image: PIL.Image.Image | None
    label: np.ndarray | None
    note: str


def contact_sheet(
    source: str | os.PathLike | Iterable[Mapping],
    label_map: LabelMap | None,
    label_space: LabelSpace | None,
    count: int = 12,
    *,
    split: str = "train",
    title: str = "",
) -> PIL.Image.Image:
    """Draw ``count`` rows: each image, beside it the image under its label, the row's id and size below.

    The legend tells each class's colour, its share of the shown rows' pixels, its train id, its name, and from which
    stored ids it comes where they are others. Ignored pixels are striped black and white, as no class colour is. A row
    that cannot be decoded is shown as an empty picture with the reason.

    Args:
        source: a folder of shards, from which rows are taken at even distances; a Hub id ``org/name``, or rows with
            ``image``, ``label`` and ``id`` cells as ``open_rows`` gives them, of which the first ones are taken.
        label_map, label_space: of the domain; both None for images without labels, which are then shown alone.
        count: rows to show, 1 or more; fewer are shown if there are fewer.
        split: of a folder or Hub id.
        title: first line of the sheet, such as the domain's name.

    Returns an RGB image about 1400 pixels wide. Raises ``InputError`` naming the row for a label value outside the
    map, an image and label of different size, and a missing or coloured label; for a label map that does not fit the
    label space; for no rows or no readable one; and as ``open_rows``.
    """
    if count < 1:
        raise InputError(f"contact sheet of {count} images: ask for 1 or more")
    _check_fit(label_map, label_space)
    columns = ("image",) if label_map is None else ("image", "label")
    if isinstance(source, (str, os.PathLike)):
        location = os.fspath(source)
        where, total = f"{location}, split '{split}'", count_rows(location, split)
        rows = _spread_rows(location, split, columns, count)
    else:
        where, total = title or "contact sheet", None
        rows = itertools.islice(((index, row) for index, row in enumerate(source)), count)
    pixels = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    samples = [_sample(row, f"{where}, row {row.get('id') or index}", index, label_map, pixels) for index, row in rows]
    if not samples:
        raise InputError(f"{where}: no rows to show; check the folder and the split")
    if all(sample.image is None for sample in samples):
        raise InputError(f"{where}: none of the {len(samples)} rows looked at is readable; {samples[0].note}")
    of_total = "" if total is None else f" of {total:,}"
    heading = [title] if title else []
    heading.append(f"{where if total is not None else ''}  {len(samples)}{of_total} images".strip())
    return _draw(samples, heading, label_map, label_space, pixels)


def _check_fit(label_map: LabelMap | None, label_space: LabelSpace | None) -> None:
    if (label_map is None) != (label_space is None):
        missing = "label map" if label_map is None else "label space"
        raise InputError(f"contact sheet: a {missing} is missing; give both for labelled images, neither for others")
    if label_map is None:
        return
    used = label_map.table[label_map.known]
    largest = int(used[used != IGNORE_INDEX].max(initial=0))
    if largest >= len(label_space.classes):
        raise InputError(
            f"label map '{label_map.name}' leads to class {largest}, but label space '{label_space.name}' has the "
            f"classes 0..{len(label_space.classes) - 1}; give the map and the classes of one domain"
        )


def _spread_rows(location: str, split: str, columns: tuple[str, ...], count: int) -> Iterator[tuple[int, dict]]:
    """Yield (index in the split, row): at even distances of a folder, the first ones of a Hub data set.

    Of a folder only the row groups that hold a wanted row are read.
    """
    rows = open_rows(location, split, columns=columns)  # which checks folder, shards and columns
    if is_hub_id(location):
        yield from enumerate(readable(rows.take(count), f"{location}, split '{split}'"))
        return
    total = count_rows(location, split)
    wanted = iter(sorted({(2 * place + 1) * total // (2 * count) for place in range(count)}))
    index, first = next(wanted), 0
    for shard in find_shards(location, split):
        file = pq.ParquetFile(shard)
        present = [name for name in (*columns, "id") if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if index < end:
                table = next(readable((_read(file, group, present) for _ in "1"), shard))
            while index < end:
                yield index, table.slice(index - first, 1).to_pylist()[0]
                index = next(wanted, math.inf)
            first = end


def _read(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
    return file.read_row_group(group, columns=columns)


def _sample(row: Mapping, where: str, index: int, label_map: LabelMap | None, pixels: np.ndarray) -> _Sample:
    """Decode one row and shrink it to tile size; adds its pixels of each train id to ``pixels``."""
    name = str(row.get("id") or Path((row.get("image") or {}).get("path") or f"row {index}").name)
    try:
        if "image" not in row:
            raise InputError(f"{where}: no column 'image' (columns present: {', '.join(row)})")
        image = decode_image(row["image"], where)
        ids = None
        if label_map is not None:
            if "label" not in row:
                raise InputError(
                    f"{where}: no column 'label' (columns present: {', '.join(row)}); for images without labels give "
                    "no label map"
                )
            label = decode_label(row["label"], where)
            if label.shape != (image.height, image.width):
                raise InputError(
                    f"{where}: the image is {image.width}×{image.height} pixels but its label "
                    f"{label.shape[1]}×{label.shape[0]}; they must agree"
                )
            ids = label_map.apply(label, where)
            pixels += np.bincount(ids.ravel(), minlength=len(pixels))
    except CorruptImage as error:
        return _Sample(name, None, None, f"unreadable: {error}")
    note = f"{image.width} x {image.height}"
    width, height = _tile_size(image.width / image.height)
    method = PIL.Image.Resampling.LANCZOS if image.width > width else PIL.Image.Resampling.NEAREST
    if ids is not None:
        ids = np.asarray(PIL.Image.fromarray(ids).resize((width, height), PIL.Image.Resampling.NEAREST))
    return _Sample(name, image.resize((width, height), method), ids, note)


def _tile_size(aspect: float) -> tuple[int, int]:
    """Width and height of a picture of this width / height; extreme panoramas still fit the sheet."""
    width = min(math.sqrt(_TILE_AREA * aspect), (_SHEET_WIDTH - 2 * _MARGIN) / 2)
    height = min(width / aspect, _SHEET_WIDTH)
    return max(1, round(height * aspect)), max(1, round(height))


def _overlay(sample: _Sample, palette: np.ndarray) -> PIL.Image.Image:
    """The image in grey under the class colours, with an edge where two classes meet and stripes where ignored."""
    ids = sample.label
    grey = np.asarray(sample.image.convert("L"), dtype=np.float32)[..., None]
    picture = (1 - _LABEL_OPACITY) * grey + _LABEL_OPACITY * palette[ids]
    rows, columns = np.indices(ids.shape)
    stripes = _STRIPES[(rows + columns) // _STRIPE % 2]
    ignored = ids == IGNORE_INDEX
    picture[ignored] = stripes[ignored]
    edge = np.zeros(ids.shape, dtype=bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    edge &= ~ignored
    picture[edge] = (picture[edge] + 255) / 2  # a pole is hardly wider than its edge
    return PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _draw(
    samples: list[_Sample],
    heading: list[str],
    label_map: LabelMap | None,
    label_space: LabelSpace | None,
    pixels: np.ndarray,
) -> PIL.Image.Image:
    sizes = [sample.image.size for sample in samples if sample.image is not None]
    tile_width, tile_height = (max(side) for side in zip(*sizes, strict=True))
    pictures = 1 if label_map is None else 2
    cell_width = pictures * tile_width + _GAP
    per_row = max(1, min(len(samples), (_SHEET_WIDTH - 2 * _MARGIN + _GAP) // cell_width))
    width = max(2 * _MARGIN + per_row * cell_width - _GAP, 2 * _MARGIN + 2 * _ENTRY_WIDTH)
    entries = [] if label_space is None else _legend(label_map, label_space, pixels)
    legend_columns = max(1, (width - 2 * _MARGIN) // _ENTRY_WIDTH)
    legend_rows = -(-len(entries) // legend_columns)
    top = _MARGIN + 30 * len(heading)
    first_row = top + _ENTRY_HEIGHT * legend_rows + (_GAP if entries else 0)
    cell_height = tile_height + _CAPTION_HEIGHT + _GAP
    sheet = PIL.Image.new("RGB", (width, first_row + -(-len(samples) // per_row) * cell_height), _BACKGROUND)
    pen = PIL.ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        large = number == 0 and len(heading) > 1
        text = _shortened(pen, line, _font(22 if large else 15), width - 2 * _MARGIN)
        pen.text((_MARGIN, _MARGIN - 6 + 32 * number), text, _INK, _font(22 if large else 15))
    for number, (colour, text, share) in enumerate(entries):
        column, row = divmod(number, legend_rows)
        _draw_entry(sheet, pen, (_MARGIN + column * _ENTRY_WIDTH, top + row * _ENTRY_HEIGHT), colour, text, share)
    # Train ids without a class do not occur; the row of "ignore" is overdrawn with stripes.
    palette = np.zeros((IGNORE_INDEX + 1, 3), dtype=np.float32)
    if label_space is not None:
        palette[: len(label_space.palette)] = label_space.palette
    for number, sample in enumerate(samples):
        left = _MARGIN + number % per_row * cell_width
        upper = first_row + number // per_row * cell_height
        _draw_sample(sheet, pen, sample, (left, upper), (tile_width, tile_height), pictures, palette)
    return sheet


def _draw_sample(
    sheet: PIL.Image.Image,
    pen: PIL.ImageDraw.ImageDraw,
    sample: _Sample,
    corner: tuple[int, int],
    tile: tuple[int, int],
    pictures: int,
    palette: np.ndarray,
) -> None:
    left, upper = corner
    span = pictures * tile[0]
    if sample.image is None:
        pen.rectangle((left, upper, left + span - 1, upper + tile[1] - 1), (235, 235, 235), _FAINT)
        text = _shortened(pen, sample.note, _font(14), span - 16)
        pen.text((left + 8, upper + tile[1] // 2 - 8), text, (190, 20, 20), _font(14))
    else:
        sheet.paste(sample.image, corner)
        if sample.label is not None:
            sheet.paste(_overlay(sample, palette), (left + sample.image.width, upper))
    size = f"  {sample.note}" if sample.image is not None else ""
    room = span - pen.textlength(size, _font(14))
    name = _shortened(pen, sample.name, _font(14), room)
    below = upper + (tile[1] if sample.image is None else sample.image.height) + 3
    pen.text((left, below), name, _INK, _font(14))
    pen.text((left + pen.textlength(name, _font(14)), below), size, _FAINT, _font(14))


def _draw_entry(
    sheet: PIL.Image.Image,
    pen: PIL.ImageDraw.ImageDraw,
    corner: tuple[int, int],
    colour: tuple[int, int, int] | None,
    text: str,
    share: float,
) -> None:
    left, upper = corner
    box = (left, upper + 2, left + 25, upper + 19)
    if colour is None:
        rows, columns = np.indices((18, 26))
        sheet.paste(PIL.Image.fromarray(_STRIPES[(rows + columns) // _STRIPE % 2].astype(np.uint8)), box[:2])
        pen.rectangle(box, None, _FAINT)
    else:
        pen.rectangle(box, tuple(colour), _FAINT)
    number = "none" if share == 0 else "< 0.1 %" if share < 0.001 else f"{share:.1%}".replace("%", " %")
    ink = _FAINT if share == 0 else _INK
    name = left + 96
    pen.text((name - 10, upper + 1), number, ink, _font(15), anchor="ra")
    pen.text((name, upper + 1), _shortened(pen, text, _font(15), left + _ENTRY_WIDTH - 16 - name), ink, _font(15))


def _legend(
    label_map: LabelMap, label_space: LabelSpace, pixels: np.ndarray
) -> list[tuple[tuple[int, int, int] | None, str, float]]:
    """(colour or None for "ignored", text, share of all pixels) in train-id order, "ignored" last."""
    total = max(1, int(pixels.sum()))
    entries = []
    for train_id, (name, colour) in enumerate(zip(label_space.classes, label_space.palette, strict=True)):
        stored = np.flatnonzero(label_map.known & (label_map.table == train_id)).tolist()
        origin = f" (from {_listed(stored)})" if stored not in ([], [train_id]) else ""
        entries.append((colour, f"{train_id} {name}{origin}", int(pixels[train_id]) / total))
    return [*entries, (None, "ignored", int(pixels[IGNORE_INDEX]) / total)]


def _listed(values: list[int]) -> str:
    return ", ".join(str(value) for value in values[:3]) + (", ..." if len(values) > 3 else "")


def _font(size: int) -> PIL.ImageFont.FreeTypeFont:
    return PIL.ImageFont.load_default(size)  # comes with Pillow; it has little beyond Western European letters


def _shortened(pen: PIL.ImageDraw.ImageDraw, text: str, font: PIL.ImageFont.FreeTypeFont, width: float) -> str:
    """``text``, its middle left out if it is wider than ``width`` pixels."""
    if pen.textlength(text, font) <= width:
        return text
    keep = len(text)
    while keep > 2 and pen.textlength(_cut(text, keep), font) > width:
        keep -= 1
    return _cut(text, keep)


def _cut(text: str, keep: int) -> str:
    return text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :]
