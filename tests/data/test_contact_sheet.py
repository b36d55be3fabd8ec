from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

import gkd_hf.data.contact_sheet as module
from gkd_hf.data.contact_sheet import contact_sheet
from gkd_hf.data.domains import LabelSpace
from gkd_hf.data.label_maps import label_map
from gkd_hf.errors import InputError

from .samples import encode, make_rows

RED, GREEN = (250, 0, 0), (0, 250, 0)
SPACE = LabelSpace("two", ("left side", "right side"), (RED, GREEN))
IDENTITY = label_map("identity", 2)


def colours(sheet: PIL.Image.Image) -> set[tuple[int, int, int]]:
    return {tuple(pixel) for pixel in np.unique(np.asarray(sheet).reshape(-1, 3), axis=0).tolist()}


def cells(rows: list[dict]) -> list[dict]:
    """As ``open_rows`` gives them."""
    return [
        {
            name: {"bytes": value, "path": None} if name != "id" and value is not None else value
            for name, value in row.items()
        }
        for row in rows
    ]


def half_ignored(size: int = 8) -> bytes:
    label = np.full((size, size), 255, dtype=np.uint8)
    label[:, : size // 2] = 1
    return encode(label)


def test_a_label_is_drawn_beside_its_image_in_the_classes_colours():
    white = encode(np.full((8, 8, 3), 255, dtype=np.uint8))
    sheet = contact_sheet(cells(make_rows(1, images={0: white})), IDENTITY, SPACE)
    pixels = np.asarray(sheet)
    # 0.65 of the class colour over 0.35 of white, rounded down
    for colour, side in ((RED, "left"), (GREEN, "right")):
        blended = tuple(int(0.35 * 255 + 0.65 * channel) for channel in colour)
        found = np.argwhere((abs(pixels.astype(int) - blended) <= 1).all(-1))
        assert len(found) > 20_000, side
        top, left = found.min(0)
        bottom, right = found.max(0)
        assert (bottom - top + 1) == 268 and 130 <= right - left + 1 <= 134
    assert {RED, GREEN} <= colours(sheet)  # the legend


def test_ignored_pixels_are_striped_and_counted_in_the_legend():
    rows = cells(make_rows(1, labels={0: half_ignored()}))
    striped = np.asarray(contact_sheet(rows, IDENTITY, SPACE)).reshape(-1, 3)
    plain = np.asarray(contact_sheet(cells(make_rows(1)), IDENTITY, SPACE)).reshape(-1, 3)
    for stripe in ((20, 20, 20), (250, 250, 250)):
        more = (striped == stripe).all(-1).sum() - (plain == stripe).all(-1).sum()
        assert 15_000 < more < 20_000  # a quarter of 268 × 268, stripes of both kinds


def test_a_folder_is_sampled_at_even_distances_and_reads_few_rows(write_folder, monkeypatch):
    folder = write_folder(make_rows(40), per_shard=10)
    seen = []
    decode = module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda cell, where: seen.append(where[-6:]) or decode(cell, where))
    contact_sheet(folder, IDENTITY, SPACE, 4)
    assert seen == ["row005", "row015", "row025", "row035"]
    seen.clear()
    contact_sheet(folder, IDENTITY, SPACE, 100)
    assert seen == [f"row{number:03d}" for number in range(40)]


def test_images_without_labels_are_shown_alone(write_folder):
    rows = [{"image": row["image"], "id": row["id"]} for row in make_rows(5)]
    with_labels = contact_sheet(write_folder(make_rows(5), name="labelled"), IDENTITY, SPACE)
    alone = contact_sheet(write_folder(rows, name="unlabelled"), None, None, title="pool")
    assert alone.mode == "RGB" and alone.height < with_labels.height
    with pytest.raises(InputError, match="no column 'label'.*no label map"):
        contact_sheet(cells(rows), IDENTITY, SPACE)
    with pytest.raises(InputError, match="label space is missing"):
        contact_sheet(cells(rows), IDENTITY, None)


MAGENTA, RED_INK = (255, 0, 255), (200, 20, 20)


def test_values_outside_the_map_are_drawn_and_named_not_raised(write_folder):
    stored = np.full((8, 8), 7, dtype=np.uint8)
    stored[:, :4] = 255
    right = contact_sheet(write_folder(make_rows(3), name="right"), IDENTITY, SPACE)
    wrong = contact_sheet(write_folder(make_rows(3, labels={1: encode(stored)})), IDENTITY, SPACE)
    assert not colours(right) & {MAGENTA, RED_INK}
    pixels = np.asarray(wrong)
    assert 268 * 134 * 0.4 < (pixels == MAGENTA).all(-1).sum() < 268 * 134 * 0.6
    assert (pixels == RED_INK).all(-1).sum() > 200  # the heading, the legend and the row's caption
    for value, kind in ((300, np.uint16), (-1, np.int32), (70_000, np.int32)):
        image = PIL.Image.fromarray(np.full((8, 8), value, dtype=kind))
        label = encode(image, "TIFF" if value < 0 else "PNG" if value < 2**16 else "TIFF")
        assert MAGENTA in colours(contact_sheet(cells(make_rows(1, labels={0: label})), IDENTITY, SPACE))


def test_bad_labels_are_empty_frames_beside_their_images(monkeypatch):
    told = []
    monkeypatch.setattr(module, "_draw_frame", lambda pen, box, text: told.append(text))
    labels = {
        0: encode(np.zeros((8, 9), dtype=np.uint8)),
        1: encode(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)),
        2: b"a text",
    }
    rows = cells(make_rows(6, images={4: b""}, labels=labels))
    rows[3]["label"] = None
    rows[5]["problem"] = "label: colours of no class"
    contact_sheet(rows, IDENTITY, SPACE)
    for text, part in zip(
        told,
        (
            "label: 9 x 8, not the",
            "mode RGB",
            "label: not an image",
            "no label",
            "unreadable: image: zero bytes",
            "of no",
        ),
        strict=True,
    ):
        assert part in text


def test_a_map_for_other_classes_is_refused():
    with pytest.raises(InputError, match="leads to class 18, but label space 'two' has the classes 0..1"):
        contact_sheet(cells(make_rows(1)), label_map("cityscapes", 19), SPACE)


def test_an_unreadable_row_is_shown_as_such_but_not_all_of_them():
    rows = cells(make_rows(3, images={1: b"a text"}))
    assert (235, 235, 235) in colours(contact_sheet(rows, IDENTITY, SPACE))
    with pytest.raises(InputError, match="none of the 1 rows looked at is readable; unreadable: image"):
        contact_sheet(rows[1:2], IDENTITY, SPACE)
    with pytest.raises(InputError, match="no rows to show"):
        contact_sheet([], IDENTITY, SPACE)
    with pytest.raises(InputError, match="ask for 1 or more"):
        contact_sheet(rows, IDENTITY, SPACE, 0)


def test_any_shape_and_many_classes_fit_the_sheet():
    wide, tall = np.zeros((4, 900, 3), np.uint8), np.zeros((900, 4, 3), np.uint8)
    rows = make_rows(2, images={0: encode(wide), 1: encode(tall)})
    labels = {0: encode(wide[..., 0]), 1: encode(tall[..., 0])}
    rows = [{**row, "label": labels[number], "id": "a/very/long/name/" * 20} for number, row in enumerate(rows)]
    many = LabelSpace("many", tuple(f"class number {n}" for n in range(254)), ((9, 9, 9),) * 254)
    sheet = contact_sheet(cells(rows), label_map("identity", 254), many, title="x" * 500)
    assert sheet.width <= 1500
