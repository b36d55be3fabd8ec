"""Aerial tiles, CamVid and ImageNet as distributed, in small."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from gkd_hf.data.raw_layouts import raw_layout
from gkd_hf.errors import InputError

from .raw_files import names, photo, save, train_ids

POTSDAM_TRAIN = [f"{row}_{column}" for row in (2, 3, 4, 5) for column in (10, 11, 12)]
POTSDAM_TRAIN += [f"{row}_{column}" for row in (6, 7) for column in range(7, 13)]
POTSDAM_VALIDATION = [
    "2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13",
]  # fmt: skip
SIX_COLOURS = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0)]


def potsdam(root: Path, *, bands: str = "RGB", eroded: bool = True, index: bool = False) -> Path:
    """Write all 38 tiles of Potsdam, 7×1 pixels each."""
    folder, end = {"RGB": ("2_Ortho_RGB", "RGB"), "IRRG": ("3_Ortho_IRRG", "IRRG")}[bands]
    suffix = "_noBoundary" if eroded else ""
    for tile in POTSDAM_TRAIN + POTSDAM_VALIDATION:
        photo(root / folder / f"top_potsdam_{tile}_{end}.tif", (7, 1))
        (root / folder / f"top_potsdam_{tile}_{end}.tfw").write_text("0.05")
        label = root / f"5_Labels_all{suffix}" / f"top_potsdam_{tile}_label{suffix}"
        if index:
            save(label.with_name(label.name + ".png"), [[1, 2, 3, 4, 5, 6, 0]])
        else:
            save(label.with_name(label.name + ".tif"), [SIX_COLOURS])
    return root


@pytest.mark.parametrize("bands", ["RGB", "IRRG"])
@pytest.mark.parametrize("eroded", [True, False])
@pytest.mark.parametrize("index", [True, False])
def test_potsdam(tmp_path: Path, bands: str, eroded: bool, index: bool):
    potsdam(tmp_path, bands=bands, eroded=eroded, index=index)
    layout = raw_layout(f"potsdam_{bands.lower()}")
    train = layout.samples(tmp_path, "train")
    assert names(train) == sorted(f"{tile}_00000_00000" for tile in POTSDAM_TRAIN)
    assert names(layout.samples(tmp_path, "validation")) == sorted(f"{t}_00000_00000" for t in POTSDAM_VALIDATION)
    assert train_ids(layout, train[0]) == [0, 1, 2, 3, 4, 5, 255]
    with pytest.raises(InputError, match=r"holds no (2_Ortho_RGB|3_Ortho_IRRG)/; it holds"):
        raw_layout("potsdam_irrg" if bands == "RGB" else "potsdam_rgb").samples(tmp_path, "train")


def test_potsdam_errors(tmp_path: Path):
    potsdam(tmp_path)
    layout = raw_layout("potsdam_rgb")
    sample = next(sample for sample in layout.samples(tmp_path, "train") if sample.id.startswith("2_10_"))
    for tile in ("2_10", "7_12"):
        (tmp_path / f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif").unlink()
    with pytest.raises(InputError, match=r"2 label\(s\) without image: .*top_potsdam_2_10_label_noBoundary.tif"):
        layout.samples(tmp_path, "train")
    for tile in ("2_10", "7_12"):
        (tmp_path / f"5_Labels_all_noBoundary/top_potsdam_{tile}_label_noBoundary.tif").unlink()
    with pytest.raises(InputError, match=r"2 of the 24 tiles of 'train' are not in .*: 2_10, 7_12;"):
        layout.samples(tmp_path, "train")
    photo(sample.image, (7, 1))
    save(sample.label, [SIX_COLOURS])
    photo(tmp_path / "2_Ortho_RGB/top_potsdam_7_12_RGB.tif", (7, 1))
    with pytest.raises(InputError, match=r"1 image\(s\) without label: .*top_potsdam_7_12_RGB.tif"):
        layout.samples(tmp_path, "train")
    photo(tmp_path / "2_Ortho_RGB/top_potsdam_9_9_RGB.tif", (7, 1))
    with pytest.raises(InputError, match=r"top_potsdam_9_9_RGB.tif: no tile of the benchmark is called 9_9"):
        layout.samples(tmp_path, "validation")


def test_potsdam_label_of_another_size(tmp_path: Path):
    potsdam(tmp_path)
    photo(tmp_path / "2_Ortho_RGB/top_potsdam_2_10_RGB.tif", (6, 1))
    with pytest.raises(InputError, match=r"top_potsdam_2_10_RGB.tif has 6×1 pixels, its label .* 7×1"):
        raw_layout("potsdam_rgb").samples(tmp_path, "train")


@pytest.mark.parametrize("suffix", ["", "_noBoundary"])
def test_the_two_inexact_potsdam_labels_are_read_and_no_other(tmp_path: Path, suffix: str):
    potsdam(tmp_path, eroded=bool(suffix))
    layout = raw_layout("potsdam_rgb")
    samples = {sample.id.rsplit("_", 2)[0]: sample for sample in layout.samples(tmp_path, "train")}
    inexact = [[(225, 227, 227), (3, 2, 250), (9, 222, 221), (0, 250, 4), (252, 255, 0), (240, 20, 9), (5, 6, 7)]]
    for tile in ("4_12", "6_7"):
        save(samples[tile].label, inexact)
        assert train_ids(layout, samples[tile]) == [0, 1, 2, 3, 4, 5, 255]
    save(samples["4_11"].label, inexact)
    with pytest.raises(InputError, match=rf"top_potsdam_4_11_label{suffix}.tif: 7 pixel\(s\) .* \(0, 250, 4\)"):
        layout.read_label(samples["4_11"])


def test_a_tile_is_cut_without_losing_or_inventing_a_pixel(tmp_path: Path):
    potsdam(tmp_path)
    width, height = 1100, 600  # neither is a multiple of 512
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    classes = random.integers(0, 7, (height, width))
    save(tmp_path / "2_Ortho_RGB/top_potsdam_3_13_RGB.tif", pixels)
    save(tmp_path / "5_Labels_all_noBoundary/top_potsdam_3_13_label_noBoundary.tif", np.array(SIX_COLOURS)[classes])
    layout = raw_layout("potsdam_rgb")
    pieces = [sample for sample in layout.samples(tmp_path, "validation") if sample.id.startswith("3_13_")]
    assert [(piece.id, piece.crop) for piece in pieces] == [
        ("3_13_00000_00000", (0, 0, 512, 512)),
        ("3_13_00000_00512", (512, 0, 1024, 512)),
        ("3_13_00000_00588", (588, 0, 1100, 512)),
        ("3_13_00088_00000", (0, 88, 512, 600)),
        ("3_13_00088_00512", (512, 88, 1024, 600)),
        ("3_13_00088_00588", (588, 88, 1100, 600)),
    ]
    seen = np.zeros((height, width), dtype=bool)
    expected = np.where(classes == 6, 255, classes)
    for piece in pieces:
        left, top, right, bottom = piece.crop
        data, suffix = layout.read_image(piece)
        assert suffix == ".png"
        assert (np.asarray(PIL.Image.open(io.BytesIO(data))) == pixels[top:bottom, left:right]).all()
        assert (layout.read_label(piece) == expected[top:bottom, left:right]).all()
        seen[top:bottom, left:right] = True
    assert seen.all()


def test_a_tile_of_potsdam_has_144_pieces():
    from gkd_hf.data.raw_layouts.isprs import _spans

    assert len(_spans(6000)) == 12
    assert _spans(6000)[-2:] == [(5120, 5632), (5488, 6000)]
    assert _spans(512) == [(0, 512)]
    assert _spans(1024) == [(0, 512), (512, 1024)]
    assert _spans(100) == [(0, 100)]


VAIHINGEN = {
    "train": [1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37],
    "validation": [2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38],
}


@pytest.mark.parametrize("end", ["_eroded_COMPLETE", "_COMPLETE"])
def test_vaihingen(tmp_path: Path, end: str):
    truth = tmp_path / f"ISPRS_semantic_labeling_Vaihingen_ground_truth{end}"
    suffix = "_noBoundary" if "eroded" in end else ""
    for area in VAIHINGEN["train"] + VAIHINGEN["validation"]:
        photo(tmp_path / f"top/top_mosaic_09cm_area{area}.tif", (7, 1))
        photo(tmp_path / f"dsm/dsm_09cm_matching_area{area}.tif", (7, 1))
        save(truth / f"top_mosaic_09cm_area{area}{suffix}.tif", [SIX_COLOURS])
    layout = raw_layout("vaihingen_irrg")
    for split, areas in VAIHINGEN.items():
        samples = layout.samples(tmp_path, split)
        assert names(samples) == sorted(f"{area}_00000_00000" for area in areas)
        assert train_ids(layout, samples[-1]) == [0, 1, 2, 3, 4, 5, 255]
    save(samples[0].label, [[(255, 0, 255)] * 7])
    with pytest.raises(InputError, match=r"7 pixel\(s\) have colours of no class: \(255, 0, 255\)"):
        layout.read_label(samples[0])


# label_colors.txt of the data set, and the class of eleven (255 = void) that each of its 32 belongs to.
CAMVID = """
64 128 64 Animal 9; 192 0 128 Archway 1; 0 128 192 Bicyclist 10; 0 128 64 Bridge 1; 128 0 0 Building 1;
64 0 128 Car 8; 64 0 192 CartLuggagePram 9; 192 128 64 Child 9; 192 192 128 Column_Pole 2; 64 64 128 Fence 7;
128 0 192 LaneMkgsDriv 3; 192 0 64 LaneMkgsNonDriv 3; 128 128 64 Misc_Text 6; 192 0 192 MotorcycleScooter 10;
128 64 64 OtherMoving 8; 64 192 128 ParkingBlock 4; 64 64 0 Pedestrian 9; 128 64 128 Road 3;
128 128 192 RoadShoulder 4; 0 0 192 Sidewalk 4; 192 128 128 SignSymbol 6; 128 128 128 Sky 0;
64 128 192 SUVPickupTruck 8; 0 0 64 TrafficCone 2;
0 64 64 TrafficLight 6; 192 64 128 Train 8; 128 128 0 Tree 5; 192 128 192 Truck_Bus 8; 64 0 64 Tunnel 1;
192 192 0 VegetationMisc 5; 0 0 0 Void 255; 64 192 0 Wall 1
"""
FRAMES = {
    ("camvid_day", "train"): ["0006R0_f00930", "0016E5_00390", "0016E5_07957", "0016E5_08161"],
    ("camvid_day", "validation"): ["0016E5_07959", "0016E5_08159"],
    ("camvid_day", "test"): ["Seq05VD_f00000", "Seq05VD_f05100"],
    ("camvid_dusk", "test"): ["0001TP_006690", "0001TP_010380"],
}


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    colours = [tuple(map(int, entry.split()[:3])) for entry in CAMVID.split(";")]
    assert len(set(colours)) == 32
    for frame in (frame for frames in FRAMES.values() for frame in frames):
        photo(tmp_path / f"701_StillsRaw_full/{frame}.png", (32, 1))
        save(tmp_path / f"LabeledApproved_full/{frame}_L.png", [colours])
    return tmp_path


def test_camvid(camvid: Path):
    expected = [int(entry.split()[4]) for entry in CAMVID.split(";")]
    for (domain, split), frames in FRAMES.items():
        layout = raw_layout(domain)
        samples = layout.samples(camvid, split)
        assert names(samples) == frames
        assert train_ids(layout, samples[0]) == expected
    save(samples[0].label, [[(1, 1, 1), (0, 0, 0)]])
    with pytest.raises(InputError, match=r"0001TP_006690_L.png: 1 pixel\(s\) have colours of no class: \(1, 1, 1\)"):
        layout.read_label(samples[0])
    with pytest.raises(InputError, match="camvid_dusk has no split 'train'; it has test"):
        layout.samples(camvid, "train")
    for path in (*camvid.glob("*/0001TP_*"),):
        path.unlink()
    with pytest.raises(InputError, match="none of the 8 frames in .* belongs to 'test'"):
        layout.samples(camvid, "test")


def test_the_one_faulty_camvid_label_is_void_where_it_is_faulty(tmp_path: Path):
    for frame in ("Seq05VD_f02610", "Seq05VD_f02640"):
        photo(tmp_path / f"701_StillsRaw_full/{frame}.png", (2, 1))
        save(tmp_path / f"LabeledApproved_full/{frame}_L.png", [[(26, 26, 26), (128, 64, 128)]])
    layout = raw_layout("camvid_day")
    faulty, other = layout.samples(tmp_path, "test")
    assert train_ids(layout, faulty) == [255, 3]
    with pytest.raises(InputError, match=r"f02640_L.png: 1 pixel\(s\) have colours of no class: \(26, 26, 26\)"):
        layout.read_label(other)


@pytest.mark.skipif("GKD_REFERENCE_DATA" not in os.environ, reason="GKD_REFERENCE_DATA is not set")
def test_camvid_splits_are_those_of_the_reference_copy(tmp_path: Path):
    root = Path(os.environ["GKD_REFERENCE_DATA"]) / "data" / "camvid"
    published: dict[tuple[str, str], list[str]] = {}
    for domain, split in FRAMES:
        files = sorted((root / domain.removeprefix("camvid_")).glob(f"{split}-*.parquet"))
        published[domain, split] = [i for file in files for i in pq.read_table(file, columns=["id"])["id"].to_pylist()]
    for frame in (frame for frames in published.values() for frame in frames):
        for path in (f"701_StillsRaw_full/{frame}.png", f"LabeledApproved_full/{frame}_L.png"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
    for (domain, split), frames in published.items():
        assert names(raw_layout(domain).samples(tmp_path, split)) == sorted(frames)


def test_imagenet(tmp_path: Path):
    for name in ("n01440764/n01440764_10026", "n01443537/n01443537_2"):
        photo((tmp_path / "train" / name).with_suffix(".png")).rename((tmp_path / "train" / name).with_suffix(".JPEG"))
    layout = raw_layout("imagenet")
    assert layout.splits_in(tmp_path) == ("train",)
    samples = layout.samples(tmp_path, "train")
    assert names(samples) == ["n01440764/n01440764_10026", "n01443537/n01443537_2"]
    assert layout.read_image(samples[0])[1] == ".jpeg"
    with pytest.raises(InputError, match="sample 'n01440764/n01440764_10026' .* has no label"):
        layout.read_label(samples[0])
    with pytest.raises(InputError, match="holds no val/; it holds train/"):
        layout.samples(tmp_path, "validation")
    photo(tmp_path / "val/ILSVRC2012_val_00000001.jpg")
    assert layout.splits_in(tmp_path) == ("train", "validation")
    assert names(layout.samples(tmp_path, "validation")) == ["ILSVRC2012_val_00000001"]
    (tmp_path / "val/ILSVRC2012_val_00000001.jpg").unlink()
    with pytest.raises(InputError, match=r"no file called \*.jpeg or \*.jpg or \*.png in .*val or below it"):
        layout.samples(tmp_path, "validation")
