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

from gkd_hf.data.decoding import CorruptImage, decode_image, decode_label
from gkd_hf.data.domains import IGNORE_INDEX, MAX_CLASSES, LabelSpace
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows, count_rows, open_rows, readable
from gkd_hf.errors import InputError

_TILE_AREA = 72_000  # pixels of one picture, if two pairs of them fit into a row
_SHEET_WIDTH = 1400
_MARGIN, _GAP = 24, 20
_CAPTION_HEIGHT, _ENTRY_HEIGHT, _ENTRY_WIDTH = 22, 24, 300
_LABEL_OPACITY = 0.65
_STRIPE = 5
_BACKGROUND, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (130, 130, 130)
_STRIPES = np.array([(20, 20, 20), (250, 250, 250)], dtype=np.float32)
_ALARM = (200, 20, 20)
_ALARM_STRIPES = np.array([(20, 20, 20), (255, 0, 255)], dtype=np.float32)
_SEE_BELOW = "see below"
_UNLISTED = MAX_CLASSES  # stands for stored values that the map does not list; no train id is as great


@dataclass(frozen=True)
class _Sample:
    """One row: its name, its picture at tile size, and its train ids likewise; what is wrong with it."""

    name: str
    image: PIL.Image.Image | None
    label: np.ndarray | None
    note: str
    problem: str = ""


@dataclass(frozen=True, eq=False)
class _Entry:
    """A line of the legend: a colour, or two that alternate; the text; the share of all pixels."""

    colour: tuple[int, int, int] | np.ndarray
    text: str
    share: float


def contact_sheet(
    source: str | os.PathLike | Iterable[Mapping],
    label_map: LabelMap | None,
    label_space: LabelSpace | None,
    count: int = 12,
    *,
    split: str = "train",
    title: str = "",
    revision: str | None = None,
) -> PIL.Image.Image:
    """Draw ``count`` rows: each image, beside it the image under its label, the row's id and size below.

    The legend tells each class's colour, its share of the shown rows' pixels, its train id, its name, and from which
    stored ids it comes where they are others. Ignored pixels are striped black and white, as no class colour is. What
    is wrong is drawn, not raised: stored values that the map does not list are striped black and magenta, and a
    picture or label that cannot be shown is an empty frame with the reason; the heading counts such rows.

    Args:
        source: a folder of shards, from which rows are taken at even distances; a Hub id ``org/name``, or rows with
            ``image``, ``label`` and ``id`` cells as ``open_rows`` gives them, of which the first ones are taken; one
            that has a ``problem`` is shown with that text in place of its label.
        label_map, label_space: of the domain; both None for images without labels, which are then shown alone.
        count: rows to show, 1 or more; fewer are shown if there are fewer.
        split: of a folder or Hub id. revision: of a Hub id.
        title: first line of the sheet, such as the domain's name.

    Returns an RGB image about 1400 pixels wide. Raises ``InputError`` for a label map that does not fit the label
    space, for a missing column, for no rows or no readable image, and as ``open_rows``.
    """
    if count < 1:
        raise InputError(f"contact sheet of {count} images: ask for 1 or more")
    _check_fit(label_map, label_space)
    columns = ("image",) if label_map is None else ("image", "label")
    if isinstance(source, (str, os.PathLike)):
        location = os.fspath(source)
        where, total = f"{location}, split '{split}'", count_rows(location, split, revision=revision)
        rows = _spread_rows(open_rows(location, split, columns=columns, revision=revision), where, count)
    else:
        where, total = title or "contact sheet", None
        rows = itertools.islice(((index, row) for index, row in enumerate(source)), count)
    pixels, unlisted = np.zeros(IGNORE_INDEX + 1, dtype=np.int64), set()
    samples = [_sample(row, where, index, label_map, pixels, unlisted) for index, row in rows]
    if not samples:
        raise InputError(f"{where}: no rows to show; check the folder and the split")
    if all(sample.image is None for sample in samples):
        raise InputError(f"{where}: none of the {len(samples)} rows looked at is readable; {samples[0].problem}")
    heading = [title] if title else []
    shown = "shown" if total is None else f"of {total:,} images"
    heading.append(f"{'' if total is None else where}  {len(samples)} {shown}".strip())
    if bad := sum(bool(sample.problem) for sample in samples):
        heading.append(f"bad: {bad} of {len(samples)}, {_SEE_BELOW}")
    return _draw(samples, heading, _legend(label_map, label_space, pixels, unlisted), label_space)


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


def _spread_rows(rows: Rows, where: str, count: int) -> Iterator[tuple[int, dict]]:
    """Yield (index in the split, row): at even distances, or the first ones where rows are only streamed."""
    if not isinstance(rows, ShardRows) or rows.store.remote:
        yield from enumerate(readable(itertools.islice(rows, count), where))
        return
    for index in sorted({(2 * place + 1) * len(rows) // (2 * count) for place in range(count)}):
        yield index, rows[index]


def _sample(
    row: Mapping, where: str, index: int, label_map: LabelMap | None, pixels: np.ndarray, unlisted: set[int]
) -> _Sample:
    """Decode one row and shrink it to tile size; adds its pixels of each train id, and its unlisted values."""
    for column in ("image",) if label_map is None else ("image", "label"):
        if column not in row:
            hint = "; for images without labels give no label map" if column == "label" else ""
            raise InputError(f"{where}, row {index}: no column '{column}' (columns present: {', '.join(row)}){hint}")
    name = str(row.get("id") or Path((row["image"] or {}).get("path") or f"row {index}").name)
    try:
        image = decode_image(row["image"], f"{where}, row {name}")
    except CorruptImage as error:
        return _Sample(name, None, None, "", f"unreadable: {error}")
    note = f"{image.width} x {image.height}"
    width, height = _tile_size(image.width / image.height)
    method = PIL.Image.Resampling.LANCZOS if image.width > width else PIL.Image.Resampling.NEAREST
    tile = image.resize((width, height), method)
    if label_map is None:
        return _Sample(name, tile, None, note)
    try:
        if row.get("problem"):
            raise InputError(row["problem"])
        label = decode_label(row["label"], f"row {name}")
    except (CorruptImage, InputError) as error:
        return _Sample(name, tile, None, note, str(error))
    if label.shape != (image.height, image.width):
        return _Sample(name, tile, None, note, f"label: {label.shape[1]} x {label.shape[0]}, not the image's size")
    ids, strange = _train_ids(label, label_map)
    pixels += np.bincount(ids.ravel(), minlength=len(pixels))
    unlisted.update(strange)
    shown = np.asarray(PIL.Image.fromarray(ids).resize((width, height), PIL.Image.Resampling.NEAREST))
    return _Sample(name, tile, shown, note, f"not in the map: {_listed(strange)}" if strange else "")


def _train_ids(label: np.ndarray, label_map: LabelMap) -> tuple[np.ndarray, list[int]]:
    """Train ids, `_UNLISTED` for stored values that are not in the map; and these values."""
    values, places = np.unique(label, return_inverse=True)
    listed = (values >= 0) & (values < len(label_map.table))
    inside = np.where(listed, values, 0)
    listed &= label_map.known[inside]
    ids = np.where(listed, label_map.table[inside], np.uint8(_UNLISTED)).astype(np.uint8)
    return ids[places].reshape(label.shape), values[~listed].tolist()


def _tile_size(aspect: float) -> tuple[int, int]:
    """Width and height of a picture of this width / height; extreme panoramas still fit the sheet."""
    width = min(math.sqrt(_TILE_AREA * aspect), (_SHEET_WIDTH - 2 * _MARGIN - _GAP) // 4)
    height = min(width / aspect, _SHEET_WIDTH)
    return max(1, round(height * aspect)), max(1, round(height))


def _overlay(sample: _Sample, palette: np.ndarray) -> PIL.Image.Image:
    """The image in grey under the class colours, with an edge where two classes meet and stripes where none is."""
    ids = sample.label
    grey = np.asarray(sample.image.convert("L"), dtype=np.float32)[..., None]
    picture = (1 - _LABEL_OPACITY) * grey + _LABEL_OPACITY * palette[ids]
    edge = np.zeros(ids.shape, dtype=bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    picture[edge] = (picture[edge] + 255) / 2  # a pole is hardly wider than its edge
    for value, colours in ((IGNORE_INDEX, _STRIPES), (_UNLISTED, _ALARM_STRIPES)):
        picture[ids == value] = _striped(ids.shape, colours)[ids == value]
    return PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _striped(shape: tuple[int, int], colours: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(shape)
    return colours[(rows + columns) // _STRIPE % 2]


def _draw(
    samples: list[_Sample], heading: list[str], entries: list[_Entry], label_space: LabelSpace | None
) -> PIL.Image.Image:
    sizes = [sample.image.size for sample in samples if sample.image is not None]
    tile_width, tile_height = (max(side) for side in zip(*sizes, strict=True))
    pictures = 1 if label_space is None else 2
    cell_width = pictures * tile_width + _GAP
    per_row = max(1, min(len(samples), (_SHEET_WIDTH - 2 * _MARGIN + _GAP) // cell_width))
    width = max(2 * _MARGIN + per_row * cell_width - _GAP, 2 * _MARGIN + 2 * _ENTRY_WIDTH)
    legend_columns = max(1, (width - 2 * _MARGIN) // _ENTRY_WIDTH)
    legend_rows = -(-len(entries) // legend_columns)
    top = _MARGIN + 30 * len(heading)
    first_row = top + _ENTRY_HEIGHT * legend_rows + (_GAP if entries else 0)
    cell_height = tile_height + _CAPTION_HEIGHT + _GAP
    sheet = PIL.Image.new("RGB", (width, first_row + -(-len(samples) // per_row) * cell_height), _BACKGROUND)
    pen = PIL.ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        font = _font(22 if number == 0 and len(heading) > 1 else 15)
        colour = _ALARM if line.endswith(_SEE_BELOW) else _INK
        text = _shortened(pen, line, font, width - 2 * _MARGIN)
        pen.text((_MARGIN, _MARGIN - 6 + 32 * number), text, colour, font)
    for number, entry in enumerate(entries):
        column, row = divmod(number, legend_rows)
        _draw_entry(sheet, pen, (_MARGIN + column * _ENTRY_WIDTH, top + row * _ENTRY_HEIGHT), entry)
    # Train ids without a class do not occur; the rows of "ignore" and unlisted values are overdrawn with stripes.
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
    span, height = pictures * tile[0], tile[1]
    if sample.image is None:
        _draw_frame(pen, (left, upper, span, height), sample.problem)
    else:
        sheet.paste(sample.image, corner)
        width, height = sample.image.size
        if sample.label is not None:
            sheet.paste(_overlay(sample, palette), (left + width, upper))
        elif pictures == 2:
            _draw_frame(pen, (left + width, upper, width, height), sample.problem)
    alarm = sample.problem if sample.label is not None else ""  # otherwise it stands in the frame
    room = span - pen.textlength(f"  {sample.note}  {alarm}", _font(14))
    name = _shortened(pen, sample.name, _font(14), room)
    for text, colour in ((name, _INK), (sample.note, _FAINT), (alarm, _ALARM)):
        pen.text((left, upper + height + 3), text, colour, _font(14))
        left += pen.textlength(f"{text}  ", _font(14))


def _draw_frame(pen: PIL.ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str) -> None:
    left, upper, width, height = box
    pen.rectangle((left, upper, left + width - 1, upper + height - 1), (235, 235, 235), _FAINT)
    text = _shortened(pen, text, _font(14), width - 16)
    pen.text((left + 8, upper + height // 2 - 8), text, _ALARM, _font(14))


def _draw_entry(sheet: PIL.Image.Image, pen: PIL.ImageDraw.ImageDraw, corner: tuple[int, int], entry: _Entry) -> None:
    left, upper = corner
    box = (left, upper + 2, left + 25, upper + 19)
    if isinstance(entry.colour, np.ndarray):
        sheet.paste(PIL.Image.fromarray(_striped((18, 26), entry.colour).astype(np.uint8)), box[:2])
        pen.rectangle(box, None, _FAINT)
    else:
        pen.rectangle(box, tuple(entry.colour), _FAINT)
    share = entry.share
    number = "none" if share == 0 else "< 0.1 %" if share < 0.001 else f"{share:.1%}".replace("%", " %")
    ink = _ALARM if entry.colour is _ALARM_STRIPES else _FAINT if share == 0 else _INK
    name = left + 96
    pen.text((name - 10, upper + 1), number, ink, _font(15), anchor="ra")
    text = _shortened(pen, entry.text, _font(15), left + _ENTRY_WIDTH - 16 - name)
    pen.text((name, upper + 1), text, ink, _font(15))


def _legend(
    label_map: LabelMap | None, label_space: LabelSpace | None, pixels: np.ndarray, unlisted: set[int]
) -> list[_Entry]:
    """In train-id order; then "ignored", and last what the map does not list, if there is any."""
    if label_map is None or label_space is None:
        return []
    total = max(1, int(pixels.sum()))
    entries = []
    for train_id, (name, colour) in enumerate(zip(label_space.classes, label_space.palette, strict=True)):
        stored = np.flatnonzero(label_map.known & (label_map.table == train_id)).tolist()
        origin = f" (from {_listed(stored)})" if stored not in ([], [train_id]) else ""
        entries.append(_Entry(colour, f"{train_id} {name}{origin}", int(pixels[train_id]) / total))
    stored = np.flatnonzero(label_map.known & (label_map.table == IGNORE_INDEX)).tolist()
    origin = f" (from {_listed(stored)})" if stored not in ([], [IGNORE_INDEX]) else ""
    entries.append(_Entry(_STRIPES, f"ignored{origin}", int(pixels[IGNORE_INDEX]) / total))
    if unlisted:
        text = f"not in the map: {_listed(sorted(unlisted))}"
        entries.append(_Entry(_ALARM_STRIPES, text, int(pixels[_UNLISTED]) / total))
    return entries


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
