"""The street data sets as distributed, in small: exact names and encodings, and train ids worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data.raw_layouts import raw_layout
from gkd_hf.errors import InputError


def save(path: Path, pixels: object, mode: str | None = None, palette: list[int] | None = None) -> Path:
    """Write an image file; ``pixels`` is H×W or H×W×3, ``palette`` makes it a palette image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    if palette is not None:
        image = image.copy()
        image.putpalette(palette)
    image.save(path)
    return path


def photo(path: Path, size: tuple[int, int] = (4, 1)) -> Path:
    """Write a photograph of (width, height)."""
    return save(path, np.full((size[1], size[0], 3), 90))


def ids(layout: object, sample: object) -> list[int]:
    """The train ids of a label of one row."""
    label = layout.read_label(sample)
    assert label.dtype == np.uint8 and label.ndim == 2
    return label.reshape(-1).tolist()


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    for split, name in (("train", "aachen_000000_000019"), ("train", "ulm_000001_000019"), ("val", "lindau_000000_1")):
        city = name.split("_")[0]
        photo(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", (20, 1))
        folder = tmp_path / f"gtFine/{split}/{city}"
        stored = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0]
        save(folder / f"{name}_gtFine_labelIds.png", [stored])
        save(folder / f"{name}_gtFine_instanceIds.png", [[1] * 20])
        photo(folder / f"{name}_gtFine_color.png", (20, 1))
        (folder / f"{name}_gtFine_polygons.json").write_text("{}")
    return tmp_path


def test_cityscapes(cityscapes: Path):
    layout = raw_layout("cityscapes")
    train = layout.samples(cityscapes, "train")
    assert [sample.id for sample in train] == ["aachen_000000_000019", "ulm_000001_000019"]
    assert ids(layout, train[1]) == [*range(19), 255]
    data, suffix = layout.read_image(train[0])
    assert (data, suffix) == (train[0].image.read_bytes(), ".png")
    assert [sample.id for sample in layout.samples(cityscapes, "validation")] == ["lindau_000000_1"]


def test_cityscapes_errors(cityscapes: Path):
    layout = raw_layout("cityscapes")
    with pytest.raises(InputError, match="no split 'test'; it has train, validation"):
        layout.samples(cityscapes, "test")
    with pytest.raises(InputError, match="does not exist"):
        layout.samples(cityscapes / "nowhere", "train")
    with pytest.raises(InputError, match=r"holds no leftImg8bit/train/; it holds gtFine/, leftImg8bit/"):
        (cityscapes / "leftImg8bit/train").rename(cityscapes / "leftImg8bit/training")
        layout.samples(cityscapes, "train")
    (cityscapes / "leftImg8bit/training").rename(cityscapes / "leftImg8bit/train")
    sample = layout.samples(cityscapes, "train")[0]
    save(sample.label, [[7, 77]])
    with pytest.raises(InputError, match=r"aachen_000000_000019_gtFine_labelIds.png.*77"):
        layout.read_label(sample)
    sample.label.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"aachen_000000_000019_gtFine_labelIds.png"):
        layout.read_label(sample)
    sample.label.unlink()
    with pytest.raises(InputError, match=r"1 image\(s\) without label: .*aachen_000000_000019_leftImg8bit.png"):
        layout.samples(cityscapes, "train")
    save(sample.label, [[7]])
    sample.image.unlink()
    with pytest.raises(InputError, match=r"1 label\(s\) without image: .*aachen_000000_000019_gtFine_labelIds.png"):
        layout.samples(cityscapes, "train")
    with pytest.raises(InputError, match=r"aachen_000000_000019_leftImg8bit.png cannot be read"):
        layout.read_image(sample)


def test_toy_city_has_nothing_to_prepare():
    with pytest.raises(InputError, match="'toy_city' has no files to prepare"):
        raw_layout("toy_city")
    with pytest.raises(InputError, match="unknown domain"):
        raw_layout("cityscape")
