"""What is missing or wrong in a raw data set gives one clear line, whichever data set it is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from gkd_hf.data.domains import DOMAINS
from gkd_hf.data.raw_layouts import RAW_LAYOUTS, raw_layout
from gkd_hf.errors import InputError

from .raw_files import photo, save, save_png16

# Domain → split, and the files of its three samples (* stands for a, b and c).
TREES = {
    "cityscapes": ("train", "leftImg8bit/train/ulm/*_leftImg8bit.png", "gtFine/train/ulm/*_gtFine_labelIds.png"),
    "gtav": ("train", "images/*.png", "labels/*.png"),
    "synthia": ("train", "RGB/*.png", "GT/LABELS/*.png"),
    "urbansyn": ("train", "rgb/rgb_*.png", "ss/ss_*.png"),
    "bdd100k": ("validation", "images/10k/val/*.jpg", "labels/sem_seg/masks/val/*.png"),
    "mapillary": ("validation", "validation/images/*.jpg", "validation/labels/*.png"),
    "acdc_night": (
        "validation", "rgb_anon/night/val/GOPR1/*_rgb_anon.png", "gt/night/val/GOPR1/*_gt_labelTrainIds.png",
    ),
    "camvid_dusk": ("test", "701_StillsRaw_full/0001TP_*.png", "LabeledApproved_full/0001TP_*_L.png"),
}  # fmt: skip


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    split, image, label = TREES[request.param]
    for name in "abc":
        photo(tmp_path / image.replace("*", name))
        path = tmp_path / label.replace("*", name)
        if request.param == "synthia":
            save_png16(path, np.full((1, 2, 3), 200))
        elif request.param == "camvid_dusk":
            save(path, [[(200, 1, 2), (0, 0, 0)]])
        else:
            save(path, [[200, 0]])
    readable = [{"readable": "Road"}, {"readable": "Sky"}]
    (tmp_path / "config_v1.2.json").write_text(json.dumps({"labels": readable}))
    return request.param, tmp_path


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_label_without_image_and_image_without_label(tree: tuple[str, Path]):
    domain, root = tree
    split, image, label = (part.replace("*", "b") for part in TREES[domain])
    layout = raw_layout(domain)
    assert len(layout.samples(root, split)) == 3
    kept = (root / label).read_bytes()
    (root / label).unlink()
    with pytest.raises(InputError) as caught:
        layout.samples(root, split)
    one_line(caught, f"{domain}: 1 image(s) without label: {root / image};")
    (root / label).write_bytes(kept)
    (root / image).unlink()
    with pytest.raises(InputError) as caught:
        layout.samples(root, split)
    one_line(caught, f"{domain}: 1 label(s) without image: {root / label};")


def test_unknown_values_and_damaged_labels_name_the_file(tree: tuple[str, Path]):
    domain, root = tree
    layout = raw_layout(domain)
    sample = layout.samples(root, TREES[domain][0])[0]
    with pytest.raises(InputError) as caught:
        layout.read_label(sample)
    one_line(caught, str(sample.label), "200")
    for damage in (b"", b"no image", sample.label.read_bytes()[:40]):
        sample.label.write_bytes(damage)
        with pytest.raises(InputError) as caught:
            layout.read_label(sample)
        one_line(caught, str(sample.label))
    sample.label.unlink()
    with pytest.raises(InputError) as caught:
        layout.read_label(sample)
    one_line(caught, str(sample.label))


@pytest.mark.parametrize("domain", RAW_LAYOUTS)
def test_missing_folders_say_what_was_looked_for_and_what_is_there(tmp_path: Path, domain: str):
    layout = raw_layout(domain)
    split = layout.splits[0]
    (tmp_path / "holiday").mkdir()
    with pytest.raises(InputError) as caught:
        layout.samples(tmp_path, split)
    one_line(
        caught, f"{domain}: {tmp_path} holds no ", "it holds holiday/;", "expected is the layout as distributed: "
    )
    with pytest.raises(InputError) as caught:
        layout.samples(tmp_path / "nowhere", split)
    one_line(caught, f"{domain}: the folder {tmp_path / 'nowhere'} does not exist")
    with pytest.raises(InputError) as caught:
        layout.samples(tmp_path, "testing")
    one_line(caught, f"{domain} has no split 'testing'; it has {split}")


def test_empty_folders_are_named(tree: tuple[str, Path]):
    domain, root = tree
    split, image, _ = TREES[domain]
    for name in "abc":
        path = root / image.replace("*", name)
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(InputError) as caught:
        raw_layout(domain).samples(root, split)
    one_line(caught, f"{domain}: no file called ", "; it holds ")


def test_hidden_files_are_passed_over(tree: tuple[str, Path]):
    domain, root = tree
    split, image, _ = TREES[domain]
    path = root / image.replace("*", "a")
    path.with_name(f"._{path.name}").write_bytes(b"left behind by another system")
    assert len(raw_layout(domain).samples(root, split)) == 3


@pytest.mark.parametrize("domain", RAW_LAYOUTS)
def test_layouts_and_domains_agree_and_travel_to_other_processes(domain: str):
    layout = raw_layout(domain)
    assert set(DOMAINS[domain].splits.values()) == set(layout.splits)
    assert set(layout.splits_in(Path("nowhere"))) <= set(layout.splits)
    assert pickle.loads(pickle.dumps(layout)).description == layout.description
    assert set(DOMAINS) - set(RAW_LAYOUTS) == {"toy_city", "custom"}
