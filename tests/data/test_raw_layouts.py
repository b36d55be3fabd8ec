"""The street data sets as distributed, in small: exact names and encodings, and train ids worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from gkd_hf.data.raw_layouts import raw_layout
from gkd_hf.errors import InputError

from .raw_files import names, photo, save, save_png16, train_ids


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
    assert train_ids(layout, train[1]) == [*range(19), 255]
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


CITYSCAPES_PALETTE = [0, 0, 0] * 7 + [128, 64, 128, 244, 35, 232] + [9, 9, 9] * 247


@pytest.fixture
def gtav(tmp_path: Path) -> Path:
    for name in ("00001", "00002", "00003", "24966"):
        photo(tmp_path / f"images/{name}.png", (8, 1))
        save(tmp_path / f"labels/{name}.png", [[7, 17, 18, 26, 33, 34, 4, 31]], CITYSCAPES_PALETTE)
    return tmp_path


def test_gtav_palette_indices_are_the_ids(gtav: Path):
    layout = raw_layout("gtav")
    assert layout.splits_in(gtav) == ("train",)
    samples = layout.samples(gtav, "train")
    assert names(samples) == ["00001", "00002", "00003", "24966"]
    assert train_ids(layout, samples[0]) == [0, 5, 255, 13, 18, 255, 255, 16]
    with pytest.raises(InputError, match="download split.mat"):
        layout.samples(gtav, "validation")


def test_gtav_in_colours(gtav: Path):
    layout = raw_layout("gtav")
    sample = layout.samples(gtav, "train")[0]
    save(sample.label, [[[128, 64, 128], [0, 0, 142], [0, 0, 0], [119, 11, 32], [153, 153, 153], [81, 0, 81]]])
    assert train_ids(layout, sample) == [0, 13, 255, 18, 5, 255]
    save(sample.label, [[[128, 64, 128], [1, 2, 3]]])
    with pytest.raises(InputError, match=r"00001.png: 1 pixel\(s\) have colours of no class: \(1, 2, 3\)"):
        layout.read_label(sample)


def test_every_class_has_its_colour_in_gtav(gtav: Path):
    layout = raw_layout("gtav")
    sample = layout.samples(gtav, "train")[0]
    save(sample.label, [layout.label_space.palette])
    assert train_ids(layout, sample) == list(range(19))


def test_gtav_published_lists(gtav: Path):
    layout = raw_layout("gtav")
    lists = {"trainIds": [[1], [24966]], "valIds": [[3]], "testIds": [[2]]}
    scipy.io.savemat(gtav / "split.mat", {key: np.array(ids) for key, ids in lists.items()})
    assert layout.splits_in(gtav) == ("train", "validation", "test")
    assert names(layout.samples(gtav, "train")) == ["00001", "24966"]
    assert names(layout.samples(gtav, "validation")) == ["00003"]
    assert names(layout.samples(gtav, "test")) == ["00002"]
    for folder in ("images", "labels"):
        (gtav / folder / "24966.png").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images .*'train' are not in .*images: 24966;"):
        layout.samples(gtav, "train")
    scipy.io.savemat(gtav / "split.mat", {"valIds": np.array([[3]])})
    with pytest.raises(InputError, match=r"split.mat has no list 'trainIds'"):
        layout.samples(gtav, "train")
    (gtav / "split.mat").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"split.mat is not a readable MATLAB file"):
        layout.samples(gtav, "train")


@pytest.mark.parametrize("folder", ["", "RAND_CITYSCAPES"])
def test_synthia_reads_the_class_from_16_bits(tmp_path: Path, folder: str):
    label = np.zeros((3, 7, 3), dtype=np.int64)
    label[..., 0] = [[3, 4, 2, 21, 5, 7, 15], [9, 6, 16, 1, 10, 17, 8], [18, 19, 20, 12, 11, 0, 22]]
    label[..., 1] = np.arange(21).reshape(3, 7) * 3001  # instances use all 16 bits
    photo(tmp_path / folder / "RGB/0000000.png", (7, 3))
    save_png16(tmp_path / folder / "GT/LABELS/0000000.png", label)
    layout = raw_layout("synthia")
    (sample,) = layout.samples(tmp_path, "train")
    assert sample.id == "0000000"
    assert layout.read_label(sample).tolist() == [
        [0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 255, 255]
    ]  # fmt: skip


def test_synthia_errors(tmp_path: Path):
    photo(tmp_path / "RGB/0000000.png", (2, 1))
    path = save_png16(tmp_path / "GT/LABELS/0000000.png", np.array([[[3, 0, 0], [23 + 256, 0, 0]]]))
    layout = raw_layout("synthia")
    (sample,) = layout.samples(tmp_path, "train")
    with pytest.raises(InputError, match=r"0000000.png: label value\(s\) 279 are not"):
        layout.read_label(sample)
    save(path, [[3, 4]])
    with pytest.raises(InputError, match=r"0000000.png has L pixels in place of 16-bit channels"):
        layout.read_label(sample)
    photo(path)
    with pytest.raises(InputError, match=r"0000000.png has RGB pixels in place of 16-bit channels"):
        layout.read_label(sample)
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"0000000.png is not a readable PNG"):
        layout.read_label(sample)


def test_urbansyn(tmp_path: Path):
    for number in ("0001", "7539"):
        photo(tmp_path / f"rgb/rgb_{number}.png")
        save(tmp_path / f"ss/ss_{number}.png", [[0, 11, 18, 19]])
    layout = raw_layout("urbansyn")
    samples = layout.samples(tmp_path, "train")
    assert names(samples) == ["0001", "7539"]
    assert train_ids(layout, samples[1]) == [0, 11, 18, 255]
    save(samples[0].label, [[20]])
    with pytest.raises(InputError, match=r"ss_0001.png: label value\(s\) 20 "):
        layout.read_label(samples[0])


def test_bdd100k(tmp_path: Path):
    for split, name in (("train", "0a0a0b1a-7c39d841"), ("val", "7d128593-0ccfea4c")):
        photo(tmp_path / f"images/10k/{split}/{name}.jpg")
        save(tmp_path / f"labels/sem_seg/masks/{split}/{name}.png", [[0, 18, 255, 5]])
        photo(tmp_path / f"labels/sem_seg/colormaps/{split}/{name}.png")
    layout = raw_layout("bdd100k")
    (train,) = layout.samples(tmp_path, "train")
    assert train_ids(layout, train) == [0, 18, 255, 5]
    assert layout.read_image(train) == (train.image.read_bytes(), ".jpg")
    (validation,) = layout.samples(tmp_path, "validation")
    assert validation.id == "7d128593-0ccfea4c"
    save(validation.label, [[19]])
    with pytest.raises(InputError, match=r"7d128593-0ccfea4c.png: label value\(s\) 19 "):
        layout.read_label(validation)


@pytest.mark.parametrize("condition", ["night", "fog", "rain", "snow"])
def test_acdc(tmp_path: Path, condition: str):
    for split, frame in (("train", "GOPR0351_frame_000159"), ("val", "GOPR0356_frame_000321")):
        recording = frame.split("_")[0]
        photo(tmp_path / f"rgb_anon/{condition}/{split}/{recording}/{frame}_rgb_anon.png")
        labels = tmp_path / f"gt/{condition}/{split}/{recording}"
        save(labels / f"{frame}_gt_labelTrainIds.png", [[0, 18, 255, 2]])
        save(labels / f"{frame}_gt_labelIds.png", [[7, 33, 0, 11]])
        save(labels / f"{frame}_gt_invIds.png", [[0, 0, 1, 0]])
    photo(tmp_path / f"rgb_anon/{condition}/test/GOPR0355/GOPR0355_frame_000138_rgb_anon.png")
    photo(tmp_path / f"rgb_anon/{condition}/train_ref/GOPR0351/GOPR0351_frame_000159_rgb_ref_anon.png")
    layout = raw_layout(f"acdc_{condition}")
    (train,) = layout.samples(tmp_path, "train")
    assert train.id == "GOPR0351_frame_000159"
    assert train_ids(layout, train) == [0, 18, 255, 2]
    assert names(layout.samples(tmp_path, "validation")) == ["GOPR0356_frame_000321"]
    other = raw_layout("acdc_fog" if condition != "fog" else "acdc_night")
    with pytest.raises(InputError, match=f"holds no rgb_anon/{other.domain[5:]}/train/; it holds gt/, rgb_anon/"):
        other.samples(tmp_path, "train")


# Readable names in another order than v1.2's own: the file's names count, not the positions.
VISTAS = [
    ("Road", 0), ("Wall", 3), ("Traffic Sign (Front)", 7), ("Traffic Sign (Back)", 7), ("Traffic Sign Frame", 7),
    ("On Rails", 16), ("Bicyclist", 12), ("Other Rider", 12), ("Utility Pole", 5), ("Street Light", 5),
    ("Curb Cut", 1), ("Pedestrian Area", 1), ("Crosswalk - Plain", 0), ("Lane Marking - Crosswalk", 0),
    ("Bike Lane", 0), ("Service Lane", 0), ("Parking", 0), ("Traffic Light", 6), ("Bicycle", 18), ("Trailer", 255),
    ("Unlabeled", 255),
]  # fmt: skip


@pytest.fixture(params=["labels", "v1.2/labels"])
def mapillary(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for split, key in (("training", "__CRyFzoDOXn6unQ6a3DnQ"), ("validation", "_1Gn_xkw7sa_i9GU4mkxxQ")):
        photo(tmp_path / f"{split}/images/{key}.jpg")
        save(tmp_path / f"{split}/{request.param}/{key}.png", [range(len(VISTAS))], [7, 8, 9] * 256)
    photo(tmp_path / "testing/images/_-_.jpg")
    labels = [{"name": f"x--{name}", "readable": name, "color": [1, 2, 3], "evaluate": True} for name, _ in VISTAS]
    config = "config.json" if request.param == "labels" else "config_v1.2.json"
    (tmp_path / config).write_text(json.dumps({"labels": labels, "version": 1.1, "mapping": "public"}))
    return tmp_path


def test_mapillary_rules_by_the_names_in_the_configuration(mapillary: Path):
    layout = raw_layout("mapillary")
    (train,) = layout.samples(mapillary, "train")
    assert train_ids(layout, train) == [train_id for _, train_id in VISTAS]
    (validation,) = layout.samples(mapillary, "validation")
    assert validation.id == "_1Gn_xkw7sa_i9GU4mkxxQ"
    save(validation.label, [[len(VISTAS)]], [7, 8, 9] * 256)
    with pytest.raises(InputError, match=r"_1Gn_xkw7sa_i9GU4mkxxQ.png: label value\(s\) 21 "):
        layout.read_label(validation)


@pytest.mark.parametrize("mapillary", ["labels"], indirect=True)
@pytest.mark.parametrize("content", ["{", "[]", '{"labels": [{"name": "x"}]}', '{"labels": [{"readable": "Bird"}]}'])
def test_mapillary_without_a_usable_configuration(mapillary: Path, content: str):
    (mapillary / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config.json (does not list labels|lists 1 labels and is not)"):
        raw_layout("mapillary").samples(mapillary, "train")
    (mapillary / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds neither config_v1.2.json nor config.json"):
        raw_layout("mapillary").samples(mapillary, "train")


def test_domains_without_a_publisher():
    for domain in ("toy_city", "toy_city:night", "custom"):
        with pytest.raises(InputError, match=f"'{domain}' is not distributed by anyone; the domains that are: gtav, "):
            raw_layout(domain)
    with pytest.raises(InputError, match="unknown domain"):
        raw_layout("cityscape")
