"""A set of shards with every kind of bad or odd row: what is streamed, skipped, counted and told with its place."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from gkd_hf import (
    GKDSegmentationArguments,
    GKDSegmentationTrainer,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
)
from gkd_hf.data.bad_rows import count_by_reason
from gkd_hf.data.decoding import decode_image
from gkd_hf.data.domains import LabelSpace
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.row_decoder import RowDecoder
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import EvaluationSet, SampleStream, collate, collate_evaluation
from gkd_hf.data.transforms import DistillationTransform, EvaluationTransform, SegmentationTransform
from gkd_hf.errors import InputError
from gkd_hf.training.label_check import LabelledSplit, check_labels, look_at_first_rows
from tests.tiny import ENCODERS

from .samples import encode, make_rows, row_image

SIZE = 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SPACE = LabelSpace("two", ("left", "right"), ((250, 0, 0), (0, 250, 0)))
TWO_CLASSES = label_map("identity", 2)
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
LABEL = np.repeat([[0, 1]], SIZE, axis=0).repeat(SIZE // 2, axis=1).astype(np.uint8)
ROWS, PER_SHARD = 64, 10


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


def animation(kind: str) -> bytes:
    frames = [PIL.Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue", "green")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def damaged_png() -> bytes:
    data = bytearray(encode(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    data[200:260] = bytes(60)
    return bytes(data)


def palette(transparent: bool) -> bytes:
    image = PIL.Image.fromarray(LABEL, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encode(image, **({"transparency": 1} if transparent else {}))


def rotated() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encode(NOISE, exif=exif)


BIG_JPEG = encode(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
SKIPPED_IMAGES = {
    "truncated JPEG": (BIG_JPEG[: len(BIG_JPEG) // 2], "image: image file is truncated"),
    "text": (b"<html>404 Not Found</html>", "image: not an image"),
    "zero bytes": (b"", "image: zero bytes"),
    "none": (None, "image: zero bytes"),
    "bomb": (png_header(30_000, 30_000), "image: decompression bomb"),
    "floats": (encode(PIL.Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"), "image: floating-point pixels"),
    "damaged PNG": (damaged_png(), "image: "),
}
SKIPPED_LABELS = {
    "label is text": (b"no picture", "label: not an image"),
    "label has zero bytes": (b"", "label: zero bytes"),
    "label outside the map": (encode(LABEL + 5), "label: values outside the map (5, 6; 'identity' lists 0–1, 255)"),
    "label too small": (encode(LABEL[:, :6]), "label: of another size than its image (6×8, the image 8×8)"),
    "label in colours": (encode(np.dstack([LABEL, LABEL, 0 * LABEL])), "label: colours in place of ids (mode RGB)"),
}
GREY = np.repeat(NOISE[..., :1], 3, axis=-1)
RED = np.broadcast_to(np.uint8([255, 0, 0]), (SIZE, SIZE, 3))
COLOURS = np.uint8([[10, 20, 30], [200, 100, 50]])[LABEL]
CONVERTED: dict[str, tuple[bytes, np.ndarray]] = {
    "grey": (encode(NOISE[..., 0]), GREY),
    "16 bits": (encode(NOISE[..., 0].astype(np.uint16) * 256 + 77), GREY),
    "grey with alpha": (encode(np.dstack([NOISE[..., 0], 255 - NOISE[..., 0]])), GREY),
    "colour with alpha": (encode(np.dstack([NOISE, np.zeros((SIZE, SIZE), np.uint8)])), NOISE),
    "palette": (palette(False), COLOURS),
    "palette with transparency": (palette(True), COLOURS),
    "bilevel": (encode(PIL.Image.fromarray(LABEL.astype(bool))), np.repeat(LABEL[..., None] * 255, 3, axis=-1)),
    "CMYK": (encode(PIL.Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "TIFF"), RED),
    "EXIF-rotated": (rotated(), np.rot90(NOISE, -1)),
    "animated GIF": (animation("GIF"), RED),
    "animated PNG": (animation("PNG"), RED),
    "lossless WebP": (encode(NOISE, "WEBP", lossless=True), NOISE),
}
ODD_LABELS = {
    "label as grey RGB": encode(np.dstack([LABEL] * 3)),
    "label with a palette": palette(False),
    "label of 16 bits": encode(LABEL.astype(np.uint16)),
    "label of one bit": encode(PIL.Image.fromarray(LABEL.astype(bool))),
}


@pytest.fixture
def mixed(write_folder: Callable[..., Path]) -> tuple[Path, dict[str, str], dict[str, int]]:
    """The folder, the reason expected of each skipped row, and the place of each odd row among all."""
    rows = make_rows(ROWS)
    reasons, places = {}, {}
    slots = iter(range(1, ROWS, 2))  # a good row between any two
    for column, kinds in (("image", SKIPPED_IMAGES), ("label", SKIPPED_LABELS)):
        for name, (data, reason) in kinds.items():
            place = next(slots)
            rows[place] |= {column: data, "id": name}
            reasons[name], places[name] = reason, place
    for column, kinds in (("image", {k: v[0] for k, v in CONVERTED.items()}), ("label", ODD_LABELS)):
        for name, data in kinds.items():
            places[name] = next(slots)
            rows[places[name]] |= {column: data, "id": name}
    return write_folder(rows, per_shard=PER_SHARD), reasons, places


@pytest.mark.parametrize("name", CONVERTED)
def test_each_odd_image_becomes_the_stated_pixels(name: str):
    data, expected = CONVERTED[name]
    assert np.array_equal(np.asarray(decode_image({"bytes": data, "path": None}, "w")), expected)


def assert_placed(entry: dict, places: dict[str, int]) -> None:
    shard, row = divmod(places[entry["id"]], PER_SHARD)
    assert (entry["shard"], entry["row"]) == (f"train-{shard:05d}-of-00007.parquet", row), entry


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_through_every_kind_and_loses_the_stated_rows_only(mixed, workers):
    folder, reasons, places = mixed
    stream = SampleStream(
        open_rows(folder, "train"),
        SegmentationTransform(SIZE, MEAN, STD, short_sides=(SIZE,), photometric=False, max_class_fraction=1.0),
        seed=3, micro_batch_size=4, domain="city", label_map=TWO_CLASSES, bad_row_limit=0.2, num_rows=ROWS,
    )  # fmt: skip
    model = torch.nn.Conv2d(3, 2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reported, steps = [], 2 * ROWS // 4  # two passes
    for _, batch in zip(range(steps), DataLoader(stream, 4, collate_fn=collate, num_workers=workers), strict=False):
        pixels, labels = stream.transform.normalise(batch["pixel_values"]), batch["labels"].long()
        loss = torch.nn.functional.cross_entropy(model(pixels), labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        reported += batch["bad_rows"]
    assert {entry["id"] for entry in reported} == set(reasons)
    for entry in reported:
        assert entry["domain"] == "city" and entry["reason"].startswith(reasons[entry["id"]]), entry
        assert_placed(entry, places)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_sees_every_good_row_of_a_pass_and_lists_the_others(mixed, workers, monkeypatch, tmp_path):
    folder, reasons, places = mixed
    plain_crop, plain_loss = RowDecoder.crop, GKDSegmentationTrainer.compute_loss
    trained: list[str] = []

    def compute_loss(trainer: GKDSegmentationTrainer, model: torch.nn.Module, inputs: dict, *args, **options):
        trained.extend(inputs.pop("row"))
        return plain_loss(trainer, model, inputs, *args, **options)

    monkeypatch.setattr(RowDecoder, "crop", lambda self, row, *rest: plain_crop(self, row, *rest) | {"row": row["id"]})
    monkeypatch.setattr(GKDSegmentationTrainer, "compute_loss", compute_loss)
    stream = SampleStream(
        open_rows(folder, "train"),
        SegmentationTransform(32, MEAN, STD, short_sides=(32,), photometric=False, max_class_fraction=1.0),
        seed=3, micro_batch_size=4, domain="city", label_map=TWO_CLASSES, bad_row_limit=0.2,
    )  # fmt: skip
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
    arguments = GKDSegmentationArguments(
        output_dir=str(tmp_path / "run"), max_steps=ROWS // 4, per_device_train_batch_size=4, save_strategy="no",
        window=32, stride=32, use_cpu=True, disable_tqdm=True, dataloader_num_workers=workers,
    )  # fmt: skip
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=2)
    trainer = GKDSegmentationTrainer(model, arguments, stream)
    plain = trainer.data_collator
    trainer.data_collator = lambda samples: plain(samples) | {"row": [sample["row"] for sample in samples]}
    assert trainer.train().global_step == ROWS // 4
    names = {place: name for name, place in places.items()}
    assert set(trained) == {names.get(place, f"row{place:03d}") for place in range(ROWS)} - set(reasons)
    assert len(trained) == ROWS
    assert {entry["id"] for entry in trainer.bad_rows} == set(reasons)
    for entry in trainer.bad_rows:
        assert entry["reason"].startswith(reasons[entry["id"]])
        assert_placed(entry, places)
    counts = count_by_reason(trainer.bad_rows)
    assert len(trainer.bad_rows) == sum(counts.values()) == 12
    assert counts.pop("image: zero bytes") == 2 and set(counts.values()) == {1}


def test_evaluation_sees_every_row_but_the_stated_ones_and_each_is_counted_and_found(mixed):
    folder, reasons, places = mixed
    images = EvaluationSet(
        open_rows(folder, "train"), EvaluationTransform(MEAN, STD), label_map=TWO_CLASSES, label_space=SPACE,
        domain="city", bad_row_limit=0.2,
    )  # fmt: skip
    seen, reported = [], []
    for batch in DataLoader(images, 4, collate_fn=collate_evaluation):
        seen += batch["id"]
        reported += batch["bad_rows"]
        assert all(np.array_equal(label, LABEL) for label in batch["labels"])
    expected = make_rows(ROWS)
    for name, place in places.items():
        expected[place]["id"] = name
    assert seen == [row["id"] for row in expected if row["id"] not in reasons]
    counts = count_by_reason(reported + reported)  # a second pass changes nothing
    assert sum(counts.values()) == len(reasons) == 12
    assert counts.pop("image: zero bytes") == 2
    assert set(counts.values()) == {1} and len(counts) == 10
    for entry in reported:
        assert entry["reason"].startswith(reasons[entry["id"]])
        assert_placed(entry, places)


def test_more_than_the_limit_stops_with_the_reasons(mixed):
    stream = SampleStream(
        open_rows(mixed[0], "train"), lambda image, rng, label: {"pixel_values": torch.zeros(1)},
        seed=0, micro_batch_size=1, domain="city", label_map=TWO_CLASSES, bad_row_limit=0.05, num_rows=ROWS,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"domain 'city': \d bad rows among 64, more than the 5.0% that may be"):
        for _ in zip(range(2 * ROWS), stream, strict=False):
            pass


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wrong_map_stops_the_run_soon_and_says_why(write_folder, workers):
    folder = write_folder(make_rows(600, labels={row: encode(LABEL + 5 * (row % 9 > 0)) for row in range(600)}))
    stream = SampleStream(
        open_rows(folder, "train"), lambda image, rng, label: {"pixel_values": torch.zeros(1)},
        seed=0, micro_batch_size=1, domain="city", label_map=TWO_CLASSES,
    )  # fmt: skip
    seen = []
    with pytest.raises(InputError) as caught:
        seen.extend(DataLoader(stream, 1, collate_fn=collate, num_workers=workers))
    assert len(seen) < 10
    message = str(caught.value)
    assert message.startswith("domain 'city': 4 bad rows among 600, of which only 4 were looked at, more than ")
    assert (
        "the 1.0% that may be skipped: 4 × label: values outside the map. The first are row" in message
        and "\n" not in message
    )
    assert "-of-00060.parquet row " in message and "(5, 6; 'identity' lists 0–1, 255)" in message
    assert message.endswith("or correct the label map: a contact sheet of the data shows what its labels mean")


def test_rows_without_ids_are_told_apart_by_their_places(write_folder):
    rows = [{"image": row_image(number)} for number in range(7)]
    rows[2]["image"] = rows[5]["image"] = b"a text"
    stream = SampleStream(
        open_rows(write_folder(rows, per_shard=4), "train", columns=("image",)),
        lambda image, rng: {"pixel_values": torch.zeros(1)},
        seed=0, micro_batch_size=1, domain="pool", bad_row_limit=0.5,
    )  # fmt: skip
    reported = [entry for _, sample in zip(range(14), stream, strict=False) for entry in sample["bad_rows"]]
    assert {(entry["shard"], entry["row"]) for entry in reported} == {
        ("train-00000-of-00002.parquet", 2),
        ("train-00001-of-00002.parquet", 1),
    }
    assert len({entry["id"] for entry in reported}) == 1
    assert count_by_reason(reported) == {"image: not an image": 2}


def test_damage_that_stands_together_is_judged_among_all_rows(write_folder, tmp_path):
    folder = write_folder(make_rows(500, images=dict.fromkeys(range(4), b"")), per_shard=500)
    rows = open_rows(folder, "train")
    check_labels([LabelledSplit("city", str(folder), "train", rows, TWO_CLASSES, None)], tmp_path / "checked.json")
    images = EvaluationSet(rows, EvaluationTransform(MEAN, STD), label_map=TWO_CLASSES, label_space=SPACE, domain="c")
    assert len(list(images)) == 496
    stream = SampleStream(
        rows, lambda image, rng: {"pixel_values": torch.zeros(1)}, seed=0, micro_batch_size=1, shuffle=False
    )
    assert len(list(zip(range(500), stream, strict=False))) == 500


def test_the_first_rows_stop_a_run_only_if_all_are_bad(write_folder):
    shard = "train-00000-of-00001.parquet"
    some = write_folder(make_rows(500, images=dict.fromkeys(range(3), b"")), per_shard=500, name="some")
    look_at_first_rows(open_rows(some, "train"), "city", str(some), "train")
    every = write_folder(make_rows(500, images=dict.fromkeys(range(4), b"")), per_shard=500, name="every")
    with pytest.raises(InputError, match=f"'city': 4 bad rows among the first 4, .* are row000 in {shard} row 0 "):
        look_at_first_rows(open_rows(every, "train"), "city", str(every), "train")


def test_a_transform_that_is_made_of_ours_is_called(write_folder):
    class Red(DistillationTransform):
        def __call__(self, image: PIL.Image.Image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.full((3,), 7.0)}

    rows = open_rows(write_folder(make_rows(3)), "train", columns=("image",))
    stream = SampleStream(rows, Red(SIZE, MEAN, STD), seed=0, micro_batch_size=1)
    assert next(iter(stream))["pixel_values"].tolist() == [7.0] * 3
