from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from gkd_hf.data.decoding import EncodedImage, decode_image
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.data.streaming import SampleStream, collate
from gkd_hf.data.transforms import DistillationTransform, SegmentationTransform
from gkd_hf.errors import InputError

from .samples import encode, make_rows

TWO_CLASSES = label_map("identity", 2)


class RowNumber:
    """A transform that shows which row was decoded and the first random number of its generator."""

    def __call__(self, image: PIL.Image.Image, rng: np.random.Generator, label: np.ndarray | None = None) -> dict:
        sample = {"pixel_values": torch.tensor([float(image.getpixel((0, 0))[0]), rng.random()], dtype=torch.float64)}
        return sample if label is None else {**sample, "labels": torch.from_numpy(label.astype(np.int64))}


def make_stream(folder: Path, **options: object) -> SampleStream:
    settings = {"seed": 3, "micro_batch_size": 1, "domain": "city"} | options
    return SampleStream(open_rows(folder, "train"), RowNumber(), **settings)


def first(stream: SampleStream, count: int) -> list[tuple[int, int, float]]:
    """(g, row, random number) of the first samples."""
    return [
        (sample["index"], int(sample["pixel_values"][0]), float(sample["pixel_values"][1]))
        for sample in itertools.islice(stream, count)
    ]


def loaded(stream: SampleStream, count: int, workers: int, context: str | None = None) -> list[tuple[int, int, float]]:
    loader = DataLoader(
        stream,
        batch_size=stream.micro_batch_size,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context=context,
    )
    batches = itertools.islice(loader, -(-count // stream.micro_batch_size))
    samples = [sample for batch in batches for sample in batch][:count]
    return [(s["index"], int(s["pixel_values"][0]), float(s["pixel_values"][1])) for s in samples]


def rows_of(samples: list[tuple[int, int, float]]) -> list[int]:
    return [row for _, row, _ in samples]


def test_every_pass_holds_every_row_once_in_another_order(write_folder):
    folder = write_folder(make_rows(30))
    samples = first(make_stream(folder), 90)
    passes = [rows_of(samples[start : start + 30]) for start in (0, 30, 60)]
    assert all(sorted(order) == list(range(30)) for order in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert list(range(30)) not in passes
    assert [index for index, _, _ in samples] == list(range(90))
    assert len({number for _, _, number in samples}) == 90
    assert first(make_stream(folder), 90) == samples
    assert rows_of(first(make_stream(folder, seed=4), 30)) != passes[0]
    assert rows_of(first(make_stream(folder, shuffle=False), 35)) == [*range(30), *range(5)]


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_order_does_not_depend_on_processes_or_workers(write_folder, micro_batch_size, world_size):
    folder = write_folder(make_rows(10), per_shard=3)
    stream = make_stream(folder)
    expected = first(stream, 36)
    for workers in (0, 1, 2):
        per_rank = [
            loaded(stream.shard(micro_batch_size, rank, world_size), 36 // world_size, workers)
            for rank in range(world_size)
        ]
        merged = [
            sample
            for step in range(0, 36 // world_size, micro_batch_size)
            for rank in range(world_size)
            for sample in per_rank[rank][step : step + micro_batch_size]
        ]
        assert merged == expected, f"{workers} workers"
        if world_size == 2:
            assert not {sample[0] for sample in per_rank[0]} & {sample[0] for sample in per_rank[1]}


def test_a_spawned_worker_sees_the_same(write_folder):
    stream = make_stream(write_folder(make_rows(10), per_shard=3), micro_batch_size=2, label_map=TWO_CLASSES)
    assert loaded(stream, 14, 1, "spawn") == first(stream, 14)
    assert first(pickle.loads(pickle.dumps(stream)), 14) == first(stream, 14)


@pytest.mark.parametrize("start", [4, 12, 28])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_exactly_also_in_the_third_pass(write_folder, start, workers):
    folder = write_folder(make_rows(10), per_shard=4)
    stream = make_stream(folder)
    expected = first(stream, 40)
    resumed = stream.shard(2, 0, 1, start=start)
    assert loaded(resumed, 12, workers) == expected[start : start + 12]
    second_rank = resumed.shard(2, 1, 2, start=start + 8)
    assert loaded(second_rank, 2, workers) == expected[start + 10 : start + 12]


def test_what_is_skipped_is_not_decoded(write_folder, monkeypatch):
    decoded = []
    plain = EncodedImage.decode
    monkeypatch.setattr(EncodedImage, "decode", lambda image: decoded.append(image) or plain(image))
    stream = make_stream(write_folder(make_rows(10)))
    first(stream.shard(1, 0, 1, start=25), 3)
    assert len(decoded) == 3
    decoded.clear()
    first(stream.shard(2, 1, 4, start=8), 4)
    assert len(decoded) == 4


def test_a_set_smaller_than_one_batch(write_folder):
    stream = make_stream(write_folder(make_rows(3)), micro_batch_size=8)
    rows = rows_of(first(stream, 8))
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    for workers in (0, 2):
        assert loaded(stream, 24, workers) == first(stream, 24)


def test_impossible_shares_are_refused(write_folder):
    stream = make_stream(write_folder(make_rows(4)))
    with pytest.raises(InputError, match="cannot resume at sample 6: it is not a multiple of the batch of 2 on 2"):
        stream.shard(2, 0, 2, start=6)
    with pytest.raises(InputError, match="rank 2 of 2"):
        stream.shard(2, 2, 2)


def test_samples_and_batches(write_folder):
    rows = open_rows(write_folder(make_rows(6)), "train")
    mean = std = (0.5, 0.5, 0.5)
    unlabelled = SampleStream(rows, DistillationTransform(16, mean, std), seed=0, micro_batch_size=2)
    batch = next(iter(DataLoader(unlabelled, batch_size=2, collate_fn=collate)))
    assert set(batch) == {"pixel_values", "erasing", "bad_rows"} and len(batch["erasing"]) == 2
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["pixel_values"].dtype == torch.uint8
    assert unlabelled.normalised(batch).dtype == torch.float32
    transform = SegmentationTransform(16, mean, std, short_sides=(16, 24))
    labelled = SampleStream(rows, transform, seed=0, micro_batch_size=2, label_map=TWO_CLASSES)
    batch = next(iter(DataLoader(labelled, batch_size=2, collate_fn=collate)))
    assert batch["labels"].shape == (2, 16, 16) and batch["labels"].dtype == torch.uint8
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].unique().tolist() == [0, 1]
    assert batch["bad_rows"] == []


def test_batches_of_workers_are_those_of_none_and_erased_alike(write_folder):
    transform = DistillationTransform(24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    stream = SampleStream(open_rows(write_folder(make_rows(6)), "train"), transform, seed=1, micro_batch_size=4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    erased = 0
    loaders = [DataLoader(stream, batch_size=4, collate_fn=collate, num_workers=workers) for workers in (0, 2)]
    for alone, passed_on, _ in zip(*loaders, range(6), strict=False):
        assert torch.equal(alone["pixel_values"], passed_on["pixel_values"])
        assert alone["erasing"] == passed_on["erasing"]
        pixels = stream.normalised(passed_on)
        assert torch.equal(pixels, stream.normalised(alone))
        for image, erasing, values in zip(passed_on["pixel_values"], passed_on["erasing"], pixels, strict=True):
            whole = (image / 255 - mean) / std
            different = (values - whole).abs().amax(0) > 1e-5
            assert different.sum() == (0 if erasing is None else erasing.width * erasing.height)
            erased += erasing is not None
    assert 0 < erased < 24


def test_full_shared_memory_ends_with_one_line(write_folder, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    rows = open_rows(write_folder(make_rows(6)), "train")
    stream = SampleStream(rows, DistillationTransform(16, (0, 0, 0), (1, 1, 1)), seed=0, micro_batch_size=2)
    with pytest.raises(
        InputError, match="^a batch of 1536 bytes .* shared memory .*No space left.*--shm-size"
    ) as caught:
        next(iter(DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=1)))
    assert "\n" not in str(caught.value)


def test_corrupt_rows_are_replaced_reported_and_do_not_disturb_resuming(write_folder):
    truncated = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), "JPEG")[:900]
    folder = write_folder(make_rows(250, images={5: truncated, 100: b""}), per_shard=50)
    stream = make_stream(folder, label_map=TWO_CLASSES)
    raw = rows_of(first(make_stream(write_folder(make_rows(250), per_shard=50, name="whole")), 500))
    samples = list(itertools.islice(stream, 500))
    seen = [int(sample["pixel_values"][0]) for sample in samples]
    for place, row in enumerate(raw[:-1]):
        assert seen[place] == (raw[place + 1] if row in (5, 100) else row)
    reported = {(row["domain"], row["id"]): row["reason"] for sample in samples for row in sample["bad_rows"]}
    assert set(reported) == {("city", "row005"), ("city", "row100")}
    assert "truncated" in reported["city", "row005"] and "zero bytes" in reported["city", "row100"]
    assert [place for place, sample in enumerate(samples) if sample["bad_rows"]] == [
        place for place, row in enumerate(raw) if row in (5, 100)
    ]
    place = raw.index(5)
    resumed = next(iter(stream.shard(1, 0, 1, start=place)))
    assert torch.equal(resumed["pixel_values"], samples[place]["pixel_values"])
    batch = collate(samples[place - 1 : place + 1])
    assert batch["bad_rows"] == samples[place]["bad_rows"]


def test_one_corrupt_row_never_stops_a_small_set_but_two_do(write_folder):
    one = make_stream(write_folder(make_rows(10, images={3: b"x"}), name="one"))
    assert len(first(one, 50)) == 50
    two = make_stream(write_folder(make_rows(10, images={3: b"x", 4: b"y"}), name="two"))
    with pytest.raises(InputError) as caught:
        first(two, 50)
    message = str(caught.value)
    assert "domain 'city': 2 bad rows among 10" in message and "row003" in message and "row004" in message


def test_a_rotten_set_stops_early_and_a_corrupt_label_counts_too(write_folder):
    labels = dict.fromkeys(range(0, 250, 2), b"rotten")
    stream = make_stream(write_folder(make_rows(250, labels=labels)), label_map=TWO_CLASSES)
    taken = []
    with pytest.raises(InputError, match="bad rows among 250.*label: not an image"):
        taken.extend(stream)
    with pytest.raises(InputError, match="bad rows"):
        first(make_stream(write_folder(make_rows(5, images=dict.fromkeys(range(5), b"")), name="all")), 1)


def test_a_missing_label_column_is_named(write_folder):
    rows = open_rows(write_folder(make_rows(4)), "train", columns=("image",))
    stream = SampleStream(rows, RowNumber(), seed=0, micro_batch_size=1, domain="city", label_map=TWO_CLASSES)
    with pytest.raises(InputError, match="domain 'city': no column 'label'.*present: image, id"):
        first(stream, 1)


@pytest.mark.skipif("GKD_REFERENCE_DATA" not in os.environ, reason="GKD_REFERENCE_DATA is not set")
def test_camvid_streams_and_resumes():
    folder = Path(os.environ["GKD_REFERENCE_DATA"]) / "data" / "camvid" / "day"
    assert count_rows(folder, "train") == 305
    transform = SegmentationTransform(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), short_sides=(64, 96, 128))
    stream = SampleStream(
        open_rows(folder, "train"), transform, seed=0, micro_batch_size=5, label_map=label_map("identity", 11)
    )
    whole = list(itertools.islice(stream, 320))
    tail = list(itertools.islice(stream.shard(5, 0, 1, start=300), 20))
    for one, other in zip(whole[300:], tail, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])
    assert torch.cat([sample["labels"] for sample in whole]).unique().tolist() == [*range(11), 255]
    assert not any(sample["bad_rows"] for sample in whole)


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("JPEG", 8)])
def test_a_jpeg_decoded_for_its_crop_shows_what_the_whole_one_would(write_folder, monkeypatch, kind, tolerance):
    rows, columns = np.mgrid[:151, :203]
    picture = np.dstack([columns, rows, rows + columns // 2]).astype(np.uint8)
    data = encode(picture, kind, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {}))
    folder = write_folder(make_rows(4, images=dict.fromkeys(range(4), data)))
    sizes = []
    decode = EncodedImage.decode_crop

    def noting(image: EncodedImage, *crop: Any) -> tuple:
        part, box = decode(image, *crop)
        sizes.append(part.size)
        return part, box

    monkeypatch.setattr(EncodedImage, "decode_crop", noting)
    transform = DistillationTransform(32, (0, 0, 0), (1, 1, 1), rand_augment=False)
    stream = SampleStream(open_rows(folder, "train"), transform, seed=5, micro_batch_size=1)
    whole = decode_image({"bytes": data, "path": None}, "")
    for index, sample in zip(range(24), stream, strict=False):
        expected = transform(whole, np.random.default_rng([5, index]))["pixel_values"]
        assert (sample["pixel_values"].int() - expected.int()).abs().max() <= tolerance
    assert {size[0] for size in sizes} == ({203} if kind == "PNG" else {203, 102, 51})
    assert (min(size[1] for size in sizes if size[0] == 203) < 151) == (kind == "JPEG")
