"""Preparing a data set: what the shards hold, that they are the same whatever happens, and what is refused."""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from gkd_hf.data.custom_layout import CustomLayout
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.manifest import Manifest
from gkd_hf.data.prepare import prepare, verify
from gkd_hf.data.raw_layouts import RawSample
from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError

from .layouts import SlowLayout
from .samples import encode, row_image, row_label

CLASSES = ("left", "right")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Nine training and two validation pairs."""
    for split, count in (("train", 9), ("validation", 2)):
        for number in range(count):
            for kind, content in (("images", row_image(number)), ("masks", row_label(number))):
                path = tmp_path / "raw" / split / kind / f"town{number % 2}" / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    return tmp_path / "raw"


def settings(**others: object) -> dict:
    return {"classes": CLASSES, "shard_rows": 2, "row_group_rows": 2, "workers": 1, "progress": False} | others


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_hold_the_raw_bytes_and_train_ids(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("custom:towns", raw, out, **settings(shard_rows=4, row_group_rows=3))
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "manifest.json",
        *(f"train-{number:05d}-of-00003.parquet" for number in range(3)),
        "validation-00000-of-00001.parquet",
    ]
    file = pq.ParquetFile(out / "train-00000-of-00003.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [3, 1]
    rows = file.read(columns=["image", "label", "id", "domain"]).to_pylist()
    assert [row["id"] for row in rows] == [f"town0/{number:03d}" for number in (0, 2, 4, 6)]
    assert rows[1]["image"] == {"bytes": row_image(2), "path": "town0_002.png"}
    assert rows[1]["domain"] == "custom:towns"
    label = PIL.Image.open(io.BytesIO(rows[1]["label"]["bytes"]))
    assert (label.format, label.mode) == ("PNG", "L") and np.asarray(label)[0].tolist() == [0] * 4 + [1] * 4
    train = manifest.splits["train"]
    assert (train.rows, train.smallest, train.largest) == (9, (8, 8), (8, 8))
    assert (train.pixels, train.ignored_pixels) == ((288, 288), 0)
    assert train.image_bytes == sum(len(row_image(number)) for number in range(9))
    assert manifest == Manifest.read(out) and manifest.labels == "train_ids" and manifest.classes == CLASSES
    assert verify(out) == []
    assert {"image", "label", "id", "domain"} == set(pq.read_schema(out / "train-00000-of-00003.parquet").names)


def test_datasets_shows_pictures_of_the_folder(raw: Path, tmp_path: Path) -> None:
    prepare("custom", raw, tmp_path / "out", **settings())
    for path in (str(tmp_path / "out"), "parquet"):
        given = {"data_files": str(tmp_path / "out" / "train-*.parquet")} if path == "parquet" else {}
        rows = datasets.load_dataset(path, split="train", cache_dir=str(tmp_path / "cache"), **given)
        assert isinstance(rows.features["image"], datasets.Image) and isinstance(
            rows.features["label"], datasets.Image
        )
        assert rows[0]["image"].getpixel((0, 0)) == (0, 7, 0) and rows.num_rows == 9
    builder = datasets.load_dataset_builder(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 9, "validation": 2}


def test_the_shards_stream(raw: Path, tmp_path: Path) -> None:
    prepare("custom", raw, tmp_path / "out", **settings())
    assert count_rows(tmp_path / "out", "train") == 9
    rows = open_rows(tmp_path / "out", "train")

    def keep(image: PIL.Image.Image, rng: np.random.Generator, label: np.ndarray) -> dict:
        return {"pixel_values": image.getpixel((0, 0))[0], "labels": int(label.sum())}

    stream = SampleStream(rows, keep, seed=1, micro_batch_size=1, label_map=label_map("identity", 2), num_rows=9)
    found = [sample for _, sample in zip(range(9), stream, strict=False)]
    assert sorted(sample["pixel_values"] for sample in found) == list(range(9))
    assert {sample["labels"] for sample in found} == {32} and not any(sample["bad_rows"] for sample in found)


def test_neither_workers_nor_place_change_a_byte(raw: Path, tmp_path: Path) -> None:
    prepare("custom", raw, tmp_path / "one", **settings())
    raw.rename(tmp_path / "moved")
    prepare("custom", tmp_path / "moved", tmp_path / "three", **settings(workers=3))
    assert files(tmp_path / "one") == files(tmp_path / "three")


@pytest.fixture
def killed() -> Iterator[random.Random]:
    """The source of the moments; whatever is running at the end of the test is killed."""
    yield random.Random(0)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(
    raw: Path, tmp_path: Path, killed: random.Random, workers: int
) -> None:
    out, given = tmp_path / "out", settings(workers=workers, layout=SlowLayout(CLASSES))
    prepare("custom", raw, tmp_path / "whole", **given)
    kills, kept, context = 0, {}, multiprocessing.get_context("forkserver")
    for _ in range(5):
        process = context.Process(target=prepare, args=("custom", raw, out), kwargs=given)
        process.start()
        process.join(killed.uniform(0.05, 0.4))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        finished = {path: path.stat().st_ino for path in out.glob("*.parquet")} if out.exists() else {}
        assert kept.items() <= finished.items()  # never written again
        kept = finished
    assert kills
    prepare("custom", raw, out, **given)
    assert kept.items() <= {path: path.stat().st_ino for path in out.glob("*.parquet")}.items()
    assert files(out) == files(tmp_path / "whole") and verify(out) == []


def test_left_over_temporary_files_are_removed_and_others_kept(raw: Path, tmp_path: Path) -> None:
    prepare("custom", raw, tmp_path / "out", **settings())
    whole = files(tmp_path / "out")
    for name in (".train-00003-of-00005.parquet.tmp", ".README.md.tmp", ".mine.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half")
    (tmp_path / "out" / "train-00003-of-00005.parquet").unlink()
    assert any("missing" in line for line in verify(tmp_path / "out"))
    prepare("custom", raw, tmp_path / "out", **settings())
    assert files(tmp_path / "out") == whole | {".mine.tmp": b"half"}


def test_verify_finds_what_was_changed(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "there is no folder" in _refusal(verify, out)
    prepare("custom", raw, out, **settings())
    shard = out / "train-00001-of-00005.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (out / "validation-00000-of-00001.parquet").write_bytes(b"short")
    (out / "train-00009-of-00010.parquet").write_bytes(shard.read_bytes())
    wrong = verify(out)
    assert [line.split(" ")[0] for line in wrong] == [
        "train-00001-of-00005.parquet",
        "validation-00000-of-00001.parquet",
        "train-00009-of-00010.parquet",
    ]
    assert "damaged" in wrong[0] and "5 bytes" in wrong[1] and "not in manifest.json" in wrong[2]
    counted = json.loads((out / "manifest.json").read_text())
    counted["splits"]["train"]["rows"] += 1
    (out / "manifest.json").write_text(json.dumps(counted))
    assert any("10 rows" in line for line in verify(out))


def _refusal(call, *arguments: object, **given: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"shard_rows": 3}, "shard_rows = 2, not 3"),
        ({"re_encode": "png"}, "re_encode = null"),
        ({"classes": ("left", "other")}, "classes = "),
        ({"id_map": {0: 0, 1: 255}}, "id_map = null"),
        ({"splits": ["train"]}, "splits = "),
    ],
)
def test_other_settings_for_the_same_folder_are_refused(raw: Path, tmp_path: Path, changed: dict, told: str) -> None:
    prepare("custom", raw, tmp_path / "out", **settings())
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()  # as after a kill
    assert told in _refusal(prepare, "custom", raw, tmp_path / "out", **settings(**changed))
    (tmp_path / "out" / "manifest.json").write_bytes(whole["manifest.json"])
    assert told in _refusal(prepare, "custom", raw, tmp_path / "out", **settings(**changed))
    assert files(tmp_path / "out") == whole


def test_other_raw_files_and_other_peoples_folders_are_refused(raw: Path, tmp_path: Path) -> None:
    prepare("custom", raw, tmp_path / "out", **settings())
    (raw / "train/images/town0/000.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8), compress_level=0))
    assert "raw files of other names or sizes" in _refusal(prepare, "custom", raw, tmp_path / "out", **settings())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    assert "no prepared data set" in _refusal(prepare, "custom", raw, tmp_path / "mine", **settings())
    assert (tmp_path / "mine/README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("splits", "train", "rows"), "10"),
        (("splits", "train", "shards", 0, "bytes"), 1.5),
        (("splits", "train", "pixels"), [1, None]),
        (("classes",), [1, 2]),
        (("classes",), None),
        (("labels",), "ids"),
        (("settings",), []),
    ],
)
def test_a_manifest_of_wrong_types_is_refused(raw: Path, tmp_path: Path, keys: tuple, value: object) -> None:
    prepare("custom", raw, tmp_path / "out", **settings(shard_rows=9))
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))
    assert "is not the manifest of a prepared data set" in _refusal(verify, tmp_path / "out")


def test_an_id_map_and_a_new_encoding(raw: Path, tmp_path: Path) -> None:
    given = settings(classes=["only"], id_map={0: 255, 1: 0}, re_encode="jpeg:95")
    manifest = prepare("custom", raw, tmp_path / "out", **given)
    assert (manifest.splits["validation"].pixels, manifest.splits["validation"].ignored_pixels) == ((64,), 64)
    row = next(iter(open_rows(tmp_path / "out", "validation")))
    assert row["image"]["bytes"][:2] == b"\xff\xd8" and row["image"]["path"] == "town0_000.jpg"
    told = _refusal(prepare, "custom", raw, tmp_path / "two", **settings(classes=["only"]))
    assert "label: values outside the map (1; " in told
    assert "jpeg:QUALITY" in _refusal(prepare, "custom", raw, tmp_path / "two", **settings(re_encode="jpeg:101"))


def test_a_flat_folder_is_the_training_split_and_every_image_needs_a_mask(tmp_path: Path) -> None:
    for kind, content in (("images", row_image(1)), ("masks", row_label(1))):
        (tmp_path / "raw" / kind).mkdir(parents=True)
        (tmp_path / "raw" / kind / "a.png").write_bytes(content)
    assert list(prepare("custom", tmp_path / "raw", tmp_path / "out", **settings()).splits) == ["train"]
    (tmp_path / "raw/masks/a.png").rename(tmp_path / "raw/masks/b.png")
    told = _refusal(prepare, "custom", tmp_path / "raw", tmp_path / "out", **settings())
    assert "without label" in told and "a.png" in told
    assert "named twice" in _refusal(prepare, "custom", tmp_path / "raw", tmp_path / "x", **settings(classes="aa"))


@pytest.mark.parametrize("around", [True, False])
def test_val_is_validation_and_no_folder_is_silently_left_out(tmp_path: Path, around: bool) -> None:
    def put(root: Path, *splits: str) -> Path:
        for split in splits:
            for kind, content in (("images", row_image(1)), ("masks", row_label(1))):
                folder = root / split / kind if around else root / kind / split
                folder.mkdir(parents=True)
                (folder / "a.png").write_bytes(content)
        return root

    layout = CustomLayout(CLASSES)
    found = put(tmp_path / "one", "train", "val")
    assert layout.splits_in(found) == ("train", "validation")
    assert [sample.image.parts[-3:].count("val") for sample in layout.samples(found, "validation")] == [1]
    for known, stranger in (("val", "training"), ("train", "valid")):
        told = _refusal(layout.splits_in, put(tmp_path / stranger, known, stranger))
        assert f"{stranger} belongs to no split" in told
    both = put(tmp_path / "both", "val", "validation")
    assert "are both the split 'validation'" in _refusal(layout.splits_in, both)
    (found / "images").mkdir(exist_ok=True)
    (found / "images" / "loose.jpg").write_bytes(row_image(2))
    assert "loose.jpg belongs to no split" in _refusal(layout.splits_in, found)


def test_an_imagenet_like_set_has_no_labels(tmp_path: Path) -> None:
    class Unlabelled(CustomLayout):
        def splits_in(self, root: Path) -> tuple[str, ...]:
            return ("train",)

        def samples(self, root: Path, split: str) -> list[RawSample]:
            return [RawSample(path.stem, path, None) for path in sorted(root.iterdir())]

    (tmp_path / "raw").mkdir()
    for number in range(3):
        (tmp_path / "raw" / f"{number}.png").write_bytes(row_image(number))
    manifest = prepare("custom", tmp_path / "raw", tmp_path / "out", **settings(layout=Unlabelled(CLASSES)))
    assert (manifest.labels, manifest.classes, manifest.splits["train"].pixels) == (None, None, None)
    rows = list(open_rows(tmp_path / "out", "train", columns=("image",)))
    assert [row["image"]["bytes"] for row in rows] == [row_image(number) for number in range(3)]
    assert "There are no labels" in (tmp_path / "out/README.md").read_text()


def test_a_folder_in_use_is_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr("gkd_hf.data.prepare._LOCK_SECONDS", 0.0)
    assert "another process" in _refusal(prepare, "custom", raw, tmp_path / "out", **settings())
    os.close(held)
    assert prepare("custom", raw, tmp_path / "out", **settings()).splits["train"].rows == 9
