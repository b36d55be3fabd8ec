"""A small raw tree of every distributed domain, and the train ids that must come of it, worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io

from .raw_files import photo, save, save_png16
from .test_raw_layouts_other import CAMVID, FRAMES, POTSDAM_TRAIN, POTSDAM_VALIDATION, SIX_COLOURS, VAIHINGEN

Expected = dict[str, dict[str, list[list[int]] | None]]
"""Split → id → rows of train ids, None without label."""

X = 255
# Train ids of Cityscapes' label ids 0 to 33, which GTAV shares; it has 34 (licence plates) too.
CITYSCAPES = [X] * 7 + [0, 1, X, X, 2, 3, 4, X, X, X, 5, X, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, X, X, 16, 17, 18]
SYNTHIA = [X, 10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17, X, X, 6, 9, 12, 14, 15, 16, 3, X]
TRAIN_IDS = [*range(19), X]
# The 66 names of config_v1.2.json in its order, then some that two rules fit, of which the first counts.
VISTAS = """
Bird 255, Ground Animal 255, Curb 1, Fence 4, Guard Rail 255, Barrier 255, Wall 3, Bike Lane 0, Crosswalk - Plain 0,
Curb Cut 1, Parking 0, Pedestrian Area 1, Rail Track 255, Road 0, Service Lane 0, Sidewalk 1, Bridge 255, Building 2,
Tunnel 255, Person 11, Bicyclist 12, Motorcyclist 12, Other Rider 12, Lane Marking - Crosswalk 0,
Lane Marking - General 0, Mountain 255, Sand 255, Sky 10, Snow 255, Terrain 9, Vegetation 8, Water 255, Banner 255,
Bench 255, Bike Rack 255, Billboard 255, Catch Basin 255, CCTV Camera 255, Fire Hydrant 255, Junction Box 255,
Mailbox 255, Manhole 255, Phone Booth 255, Pothole 255, Street Light 5, Pole 5, Traffic Sign Frame 7, Utility Pole 5,
Traffic Light 6, Traffic Sign (Back) 7, Traffic Sign (Front) 7, Trash Can 255, Bicycle 18, Boat 255, Bus 15, Car 13,
Caravan 255, Motorcycle 17, On Rails 16, Other Vehicle 255, Trailer 255, Truck 14, Wheeled Slow 255, Car Mount 255,
Ego Vehicle 255, Unlabeled 255,
On Rails (Front) 7, Rider on Rails 16, Pole Rider 12, Curb Pole 5, Parking Curb 1, Road Curb 1, Traffic Light Pole 5
"""


def _cityscapes(root: Path) -> Expected:
    for split, name in (("train", "ulm_000001_000019"), ("val", "lindau_000000_000019")):
        folder = f"{split}/{name.split('_')[0]}"
        photo(root / f"leftImg8bit/{folder}/{name}_leftImg8bit.png", (34, 1))
        save(root / f"gtFine/{folder}/{name}_gtFine_labelIds.png", [range(34)])
        save(root / f"gtFine/{folder}/{name}_gtFine_instanceIds.png", [range(34)])
    return {
        "train": {"ulm_000001_000019": [CITYSCAPES]},
        "validation": {"lindau_000000_000019": [CITYSCAPES]},
    }


def _gtav(root: Path) -> Expected:
    palette = [0, 0, 0] * 7 + [128, 64, 128, 244, 35, 232] + [9, 9, 9] * 247
    for number in (1, 2, 3):
        photo(root / f"images/{number:05d}.png", (35, 1))
        save(root / f"labels/{number:05d}.png", [range(35)], palette)
    photo(root / "images/00004.png", (6, 1))
    colours = [(128, 64, 128), (0, 0, 142), (0, 0, 0), (119, 11, 32), (153, 153, 153), (81, 0, 81)]
    save(root / "labels/00004.png", [colours])
    lists = {"trainIds": [[1], [4]], "valIds": [[3]], "testIds": [[2]]}
    scipy.io.savemat(root / "split.mat", {key: np.array(ids) for key, ids in lists.items()})
    stored = [CITYSCAPES + [X]]
    return {
        "train": {"00001": stored, "00004": [[0, 13, X, 18, 5, X]]},
        "validation": {"00003": stored},
        "test": {"00002": stored},
    }


def _synthia(root: Path) -> Expected:
    label = np.zeros((1, 23, 3), dtype=np.int64)
    label[..., 0] = range(23)
    label[..., 1] = np.arange(23) * 2801  # instances use all 16 bits
    photo(root / "RGB/0000000.png", (23, 1))
    save_png16(root / "GT/LABELS/0000000.png", label)
    photo(root / "GT/COLOR/0000000.png", (23, 1))
    return {"train": {"0000000": [SYNTHIA]}}


def _urbansyn(root: Path) -> Expected:
    photo(root / "rgb/rgb_0001.png", (20, 1))
    save(root / "ss/ss_0001.png", [range(20)])
    return {"train": {"0001": [TRAIN_IDS]}}


def _bdd100k(root: Path) -> Expected:
    for split in ("train", "val"):
        photo(root / f"images/10k/{split}/{split}-7c39d841.jpg", (20, 1))
        save(root / f"labels/sem_seg/masks/{split}/{split}-7c39d841.png", [TRAIN_IDS])
    return {"train": {"train-7c39d841": [TRAIN_IDS]}, "validation": {"val-7c39d841": [TRAIN_IDS]}}


def _mapillary(root: Path) -> Expected:
    pairs = [entry.strip().rpartition(" ") for entry in VISTAS.split(",")]
    names, ids = [name for name, _, _ in pairs], [int(number) for _, _, number in pairs]
    for split in ("training", "validation"):
        photo(root / f"{split}/images/{split}_6unQ6a3DnQ.jpg", (len(ids), 1))
        save(root / f"{split}/labels/{split}_6unQ6a3DnQ.png", [range(len(ids))], [7, 8, 9] * 256)
    (root / "config_v1.2.json").write_text(json.dumps({"labels": [{"readable": name} for name in names]}))
    return {"train": {"training_6unQ6a3DnQ": [ids]}, "validation": {"validation_6unQ6a3DnQ": [ids]}}


def _acdc(condition: str) -> Callable[[Path], Expected]:
    def build(root: Path) -> Expected:
        for each in (condition, "haze"):
            for split in ("train", "val"):
                frame = f"{each}/{split}/GOPR0351/{split}_frame_000159"
                photo(root / f"rgb_anon/{frame}_rgb_anon.png", (20, 1))
                save(root / f"gt/{frame}_gt_labelTrainIds.png", [TRAIN_IDS])
                save(root / f"gt/{frame}_gt_labelIds.png", [range(7, 27)])
        return {"train": {"train_frame_000159": [TRAIN_IDS]}, "validation": {"val_frame_000159": [TRAIN_IDS]}}

    return build


def _isprs(images: str, labels: str, tiles: dict[str, list[object]], *, index: bool) -> Callable[[Path], Expected]:
    """Tiles of 7×1 pixels but for the first, which is 514×1: two pieces, whose last columns differ."""

    def build(root: Path) -> Expected:
        expected: Expected = {split: {} for split in tiles}
        for split, names in tiles.items():
            for number, tile in enumerate(names):
                width = 514 if split == "train" and number == 0 else 7
                ids = (np.arange(width) * 3 % 7).tolist()  # 6: none of the six classes
                bands = np.stack([np.arange(width) % 250 + band for band in (0, 2, 4)], axis=-1)
                save(root / images.format(tile), [bands])
                stored = [[0 if i == 6 else i + 1 for i in ids]] if index else [[SIX_COLOURS[i] for i in ids]]
                save(root / labels.format(tile), stored)
                train_ids = [X if i == 6 else i for i in ids]
                for left in (0, 2) if width > 512 else (0,):
                    expected[split][f"{tile}_00000_{left:05d}"] = [train_ids[left : left + 512]]
        return expected

    return build


def _imagenet(root: Path) -> Expected:
    for name in ("train/n01440764/n01440764_10026.JPEG", "val/ILSVRC2012_val_00000001.JPEG"):
        photo((root / name).with_suffix(".jpg"), (5, 3)).rename(root / name)
    return {"train": {"n01440764/n01440764_10026": None}, "validation": {"ILSVRC2012_val_00000001": None}}


def _camvid(domain: str) -> Callable[[Path], Expected]:
    def build(root: Path) -> Expected:
        colours = [tuple(map(int, entry.split()[:3])) for entry in CAMVID.split(";")]
        ids = [int(entry.split()[4]) for entry in CAMVID.split(";")]
        for frame in (frame for frames in FRAMES.values() for frame in frames):
            photo(root / f"701_StillsRaw_full/{frame}.png", (32, 1))
            save(root / f"LabeledApproved_full/{frame}_L.png", [colours])
        return {
            split: {frame: [ids] for frame in frames} for (name, split), frames in FRAMES.items() if name == domain
        }

    return build


_POTSDAM = {"train": POTSDAM_TRAIN, "validation": POTSDAM_VALIDATION}
TREES: dict[str, Callable[[Path], Expected]] = {
    "gtav": _gtav,
    "synthia": _synthia,
    "urbansyn": _urbansyn,
    "cityscapes": _cityscapes,
    "bdd100k": _bdd100k,
    "mapillary": _mapillary,
    **{f"acdc_{condition}": _acdc(condition) for condition in ("night", "fog", "rain", "snow")},
    "potsdam_rgb": _isprs(
        "2_Ortho_RGB/top_potsdam_{}_RGB.tif",
        "5_Labels_all_noBoundary/top_potsdam_{}_label_noBoundary.tif",
        _POTSDAM,
        index=False,
    ),
    "potsdam_irrg": _isprs(
        "3_Ortho_IRRG/top_potsdam_{}_IRRG.tif", "5_Labels_all/top_potsdam_{}_label.png", _POTSDAM, index=True
    ),
    "vaihingen_irrg": _isprs(
        "top/top_mosaic_09cm_area{}.tif",
        "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE/top_mosaic_09cm_area{}_noBoundary.tif",
        VAIHINGEN,
        index=False,
    ),
    "imagenet": _imagenet,
    "camvid_day": _camvid("camvid_day"),
    "camvid_dusk": _camvid("camvid_dusk"),
}
