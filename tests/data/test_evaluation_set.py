from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gkd_hf.data.domains import LabelSpace, label_space
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows, open_rows
from gkd_hf.data.streaming import EvaluationSet, collate_evaluation
from gkd_hf.data.transforms import EvaluationTransform
from gkd_hf.errors import InputError

from .samples import encode, make_rows, row_image

SPACE = LabelSpace("two", ("left", "right"), ((0, 0, 0), (255, 255, 255)))
HALF = (0.5, 0.5, 0.5)


def make_set(
    folder: Path | None, size: tuple[int, int] | None = (12, 6), rows: Rows | None = None, **options: object
) -> EvaluationSet:
    rows = open_rows(folder, "test") if rows is None else rows
    settings = {"label_map": label_map("identity", 2), "label_space": SPACE, "domain": "city"} | options
    return EvaluationSet(rows, EvaluationTransform(HALF, HALF, size), **settings)


def streamed(count: int) -> datasets.IterableDataset:
    """Rows that are no shards."""
    rows = [row | {key: {"bytes": row[key], "path": None} for key in ("image", "label")} for row in make_rows(count)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def loaded(dataset: EvaluationSet, workers: int = 0) -> tuple[list[str], list[dict]]:
    ids, bad_rows = [], []
    for batch in DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate_evaluation):
        ids += batch["id"]
        bad_rows += batch["bad_rows"]
    return ids, bad_rows


def test_samples_keep_the_native_label_and_image(write_folder):
    dataset = make_set(write_folder(make_rows(3), split="test"))
    samples = list(dataset)
    assert [sample["id"] for sample in samples] == ["row000", "row001", "row002"]
    sample = samples[2]
    assert sample["pixel_values"].shape == (3, 6, 12)
    assert sample["pixel_values"].dtype == torch.uint8
    values = dataset.normalised(sample["pixel_values"])
    assert torch.allclose(values[0], torch.full((6, 12), 2 / 255 / 0.5 - 1))
    assert dataset.normalised(values) is values
    assert sample["labels"].shape == (8, 8) and sample["labels"].dtype == torch.uint8
    assert sample["labels"][0].tolist() == [0] * 4 + [1] * 4
    assert sample["image"].shape == (8, 8, 3) and sample["image"].dtype == np.uint8
    assert (dataset.domain, dataset.label_space) == ("city", SPACE)
    batch = collate_evaluation(samples)
    assert batch["pixel_values"].shape == (3, 3, 6, 12) and len(batch["labels"]) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_images_come_with_the_first_samples_alone(write_folder, workers):
    dataset = make_set(write_folder(make_rows(6, images={0: b"junk"}), split="test"), bad_row_limit=0.5)
    options = {"batch_size": 2, "num_workers": workers, "collate_fn": collate_evaluation}
    with_image, pixels = {}, {}
    for pictures in (None, 1, 0):
        batches = list(DataLoader(dataset.shard(0, 1, pictures), **options))
        ids = [name for batch in batches for name in batch["id"]]
        images = [image for batch in batches for image in batch["image"]]
        with_image[pictures] = {name for name, image in zip(ids, images, strict=True) if image is not None}
        pixels[pictures] = dict(zip(ids, (part for batch in batches for part in batch["pixel_values"]), strict=True))
        assert pixels[pictures].keys() == pixels[None].keys()
        assert all(torch.equal(part, pixels[None][name]) for name, part in pixels[pictures].items())
    assert len(with_image[None]) == 5 and with_image[0] == set()
    # Of two readers one has the rows 0 and 2, of which the first is bad, the other begins with row 1.
    assert with_image[1] == ({"row001"} if workers == 0 else {"row001", "row002"})


def test_the_share_is_what_a_bar_needs(write_folder):
    whole = make_set(write_folder(make_rows(7), split="test"))
    assert [whole.shard(rank, 3).share for rank in range(3)] == [3, 2, 2]
    limited = make_set(write_folder(make_rows(7), split="test"), limit=4)
    assert [limited.shard(rank, 3).share for rank in range(3)] == [2, 1, 1]
    assert make_set(None, rows=streamed(7)).share is None
    assert make_set(None, rows=streamed(7), num_rows=7).shard(1, 3).share == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_rows_are_shared_out_too(workers):
    dataset = make_set(None, rows=streamed(7), limit=6)
    shares = [loaded(dataset.shard(rank, 2), workers)[0] for rank in range(2)]
    assert [sorted(share) for share in shares] == [
        [f"row{number:03d}" for number in range(rank, 6, 2)] for rank in range(2)
    ]


def test_a_reader_reads_its_own_rows(write_folder, monkeypatch):
    read = []
    plain = ShardRows.__getitem__
    monkeypatch.setattr(ShardRows, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    assert len(list(make_set(write_folder(make_rows(11), split="test")).shard(1, 3))) == 4
    assert read == [1, 4, 7, 10]


def test_unequal_sizes_stay_a_list(write_folder):
    rows = make_rows(2, images={1: row_image(1, 10)}, labels={1: encode(np.zeros((10, 10), np.uint8))})
    batch = collate_evaluation(list(make_set(write_folder(rows, split="test"), size=None)))
    assert [tuple(image.shape) for image in batch["pixel_values"]] == [(3, 8, 8), (3, 10, 10)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_image_once_on_one_rank(write_folder, workers):
    dataset = make_set(write_folder(make_rows(11), per_shard=4, split="test"))
    shares = [loaded(dataset.shard(rank, 3), workers)[0] for rank in range(3)]
    assert [sorted(share) for share in shares] == [
        [f"row{number:03d}" for number in range(rank, 11, 3)] for rank in range(3)
    ]
    limited = make_set(write_folder(make_rows(11), per_shard=4, split="test"), limit=5)
    assert sorted(loaded(limited, workers)[0]) == [f"row{number:03d}" for number in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("corrupt", [0, 4, 9])
def test_a_corrupt_row_is_left_out_and_counted_wherever_it_stands(write_folder, corrupt, workers):
    folder = write_folder(make_rows(10, images={corrupt: b"junk"}), split="test")
    ids, bad_rows = loaded(make_set(folder), workers)
    assert sorted(ids) == [f"row{number:03d}" for number in range(10) if number != corrupt]
    assert [(row["domain"], row["id"]) for row in bad_rows] == [("city", f"row{corrupt:03d}")]


def test_a_share_of_corrupt_rows_only_still_reports_them(write_folder):
    folder = write_folder(make_rows(3, images={1: b"junk"}), split="test")
    ids, bad_rows = loaded(make_set(folder).shard(1, 3))
    assert ids == [] and [row["id"] for row in bad_rows] == ["row001"]
    assert loaded(make_set(folder).shard(4, 5)) == ([], [])


def test_too_many_corrupt_rows_stop(write_folder):
    folder = write_folder(make_rows(20, images={1: b"x", 2: b"y"}), split="test")
    with pytest.raises(InputError, match="2 bad rows among 20, more than the 1.0%"):
        list(make_set(folder))
    assert len(list(make_set(folder, bad_row_limit=0.1))) == 18


def test_wrong_use_is_explained(write_folder):
    with pytest.raises(InputError, match="limit is 0"):
        make_set(write_folder(make_rows(3), split="test"), limit=0)


def test_a_wrong_label_is_left_out_too(write_folder):
    labels = {3: encode(np.full((8, 8), 9, np.uint8)), 5: encode(np.zeros((4, 4), np.uint8))}
    ids, bad_rows = loaded(
        make_set(write_folder(make_rows(7, labels=labels), per_shard=4, split="test"), bad_row_limit=0.3)
    )
    assert len(ids) == 5 and [(entry["id"], entry["row"]) for entry in bad_rows] == [("row003", 3), ("row005", 1)]
    assert bad_rows[0]["reason"] == "label: values outside the map (9; 'identity' lists 0–1, 255)"
    assert bad_rows[1]["reason"] == "label: of another size than its image (4×4, the image 8×8)"


@pytest.mark.skipif("GKD_REFERENCE_DATA" not in os.environ, reason="GKD_REFERENCE_DATA is not set")
def test_camvid_dusk():
    folder = Path(os.environ["GKD_REFERENCE_DATA"]) / "data" / "camvid" / "dusk"
    space = label_space("camvid_dusk")
    dataset = EvaluationSet(
        open_rows(folder, "test"),
        EvaluationTransform(HALF, HALF),
        label_map=label_map("identity", 11),
        label_space=space,
        domain="camvid_dusk",
    )
    samples = list(dataset)
    assert len(samples) == 124
    assert {tuple(sample["pixel_values"].shape) for sample in samples} == {(3, 360, 480)}
    assert torch.stack([sample["labels"] for sample in samples]).unique().tolist() == [*range(11), 255]
