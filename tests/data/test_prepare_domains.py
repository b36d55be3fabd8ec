"""Every distributed domain from its raw layout to stored train ids, pixel by pixel."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data.prepare import prepare
from gkd_hf.data.raw_layouts import RAW_LAYOUTS, isprs, raw_layout
from gkd_hf.data.shards import open_rows
from gkd_hf.errors import InputError

from .raw_trees import TREES


def pixels(cell: dict) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(cell["bytes"])))


@pytest.mark.parametrize("domain", RAW_LAYOUTS)
def test_what_is_stored_is_what_the_raw_files_mean(domain: str, tmp_path: Path) -> None:
    expected = TREES[domain](tmp_path / "raw")
    manifest = prepare(domain, tmp_path / "raw", tmp_path / "out", workers=1, progress=False, max_bad=0)
    assert list(manifest.splits) == list(expected)
    layout = raw_layout(domain)
    for split, labels in expected.items():
        raw = {sample.id: sample for sample in layout.samples(tmp_path / "raw", split)}
        columns = ("image", "label") if manifest.labels else ("image",)
        rows = {row["id"]: row for row in open_rows(tmp_path / "out", split, columns=columns)}
        assert list(rows) == sorted(labels)
        for name, row in rows.items():
            if labels[name] is None:
                assert manifest.classes is None
            else:
                assert pixels(row["label"]).tolist() == labels[name]
            sample = raw[name]
            if sample.crop is None:
                assert row["image"]["bytes"] == sample.image.read_bytes()
            else:
                left, top, right, bottom = sample.crop
                whole = np.asarray(PIL.Image.open(sample.image))
                assert (pixels(row["image"]) == whole[top:bottom, left:right]).all()
                assert pixels(row["image"])[0, 0].tolist() == [left, left + 2, left + 4]  # bands in the file's order
    if manifest.labels:
        assert manifest.classes == layout.label_space.classes
        stored = Counter(i for labels in expected["train" if "train" in expected else "test"].values()
                         for row in labels for i in row)  # fmt: skip
        split = manifest.splits["train" if "train" in expected else "test"]
        assert split.pixels == tuple(stored[i] for i in range(len(manifest.classes)))
        assert split.ignored_pixels == stored[255]


def test_a_tile_is_decoded_once_for_all_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TREES["potsdam_rgb"](tmp_path / "raw")
    for folder, name in (("2_Ortho_RGB", "2_13_RGB"), ("5_Labels_all_noBoundary", "2_13_label_noBoundary")):
        tile = PIL.Image.new("RGB", (1500, 1100), (255, 255, 255))
        tile.save(tmp_path / "raw" / folder / f"top_potsdam_{name}.tif")
    decoded: Counter[str] = Counter()
    read = isprs.rgb_image

    def counted(path: Path, column: str) -> PIL.Image.Image:
        decoded[path.name] += 1
        return read(path, column)

    isprs._rgb_tile.cache_clear()
    monkeypatch.setattr(isprs, "rgb_image", counted)
    monkeypatch.setattr("gkd_hf.data.raw_rows._FIRST_LOOK", 1)  # and not at this tile
    prepared = prepare("potsdam_rgb", tmp_path / "raw", tmp_path / "out", splits=["validation"], workers=1)
    assert prepared.splits["validation"].rows == 13 + 9
    assert decoded["top_potsdam_2_13_RGB.tif"] == decoded["top_potsdam_2_13_label_noBoundary.tif"] == 1


def test_a_split_that_is_not_there_is_left_out_on_demand(tmp_path: Path) -> None:
    TREES["cityscapes"](tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "leftImg8bit" / "val")
    with pytest.raises(InputError, match=r"holds no leftImg8bit/val/.* name those that are there \(--splits\)"):
        prepare("cityscapes", tmp_path / "raw", tmp_path / "out", workers=1, progress=False)
    made = prepare("cityscapes", tmp_path / "raw", tmp_path / "out", splits=["train"], workers=1, progress=False)
    assert list(made.splits) == ["train"]
