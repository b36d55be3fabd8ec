"""Bad raw samples while a data set is prepared: left out and listed up to a share, beyond it one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gkd_hf.data.manifest import Manifest
from gkd_hf.data.prepare import prepare, verify
from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.errors import InputError

from .samples import encode, row_image, row_label

COUNT = 40
BAD = {  # sample → (folder, content, reason without its details)
    3: (
        "images",
        encode(np.arange(64**2 * 3).reshape(64, 64, 3).astype(np.uint8), "JPEG")[:-200],
        "image: image file is truncated",
    ),
    4: ("images", b"", "image: zero bytes"),
    5: ("images", b"a page of a portal", "image: not an image"),
    11: ("images", row_image(11, size=9), "label: another size"),
    17: ("masks", row_label(17)[:45], "label: "),
    23: ("masks", encode(np.full((8, 8), 7, np.uint8)), "label: values outside the map"),
    29: ("masks", encode(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), "label: colours in place of ids"),
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number in range(COUNT):
        for kind, content in (("images", row_image(number)), ("masks", row_label(number))):
            path = tmp_path / "raw" / kind / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return tmp_path / "raw"


def spoil(raw: Path, numbers: object) -> None:
    for number in numbers:
        kind, content, _ = BAD[number]
        (raw / kind / f"{number:03d}.png").write_bytes(content)


def prepared(raw: Path, out: Path, **others: object) -> Manifest:
    given = {"classes": ("left", "right"), "shard_rows": 3, "workers": 1, "progress": False, "max_bad": 0.2}
    return prepare("custom", raw, out, **given | others)


def refusal(raw: Path, out: Path, **others: object) -> str:
    with pytest.raises(InputError) as caught:
        prepared(raw, out, **others)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_samples_are_left_out_and_listed(raw: Path, tmp_path: Path) -> None:
    spoil(raw, BAD)
    manifest = prepared(raw, tmp_path / "out")
    train = manifest.splits["train"]
    assert [entry["id"] for entry in train.left_out] == [f"{number:03d}" for number in BAD]
    for entry, (_, _, reason) in zip(train.left_out, BAD.values(), strict=True):
        assert entry["reason"].startswith(reason) and str(tmp_path) not in entry["reason"]
    assert train.left_out[3]["reason"] == "label: another size (label 8×8, image 9×9)"
    assert train.left_out[5]["reason"].startswith("label: values outside the map (7; ")
    kept = [number for number in range(COUNT) if number not in BAD]
    assert train.rows == count_rows(tmp_path / "out", "train") == len(kept)
    assert [row["id"] for row in open_rows(tmp_path / "out", "train")] == [f"{number:03d}" for number in kept]
    assert Manifest.read(tmp_path / "out") == manifest and verify(tmp_path / "out") == []
    # 3, 4 and 5 are a shard, which is there and empty.
    assert pq.read_metadata(tmp_path / "out" / "train-00001-of-00014.parquet").num_rows == 0
    assert "Left out of train, as listed in `manifest.json`: 1 × image: " in (tmp_path / "out/README.md").read_text()
    prepared(raw, tmp_path / "two", workers=2, max_bad=0.5)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    # Finished or not, the folder is measured by what is allowed now.
    for _ in range(2):
        assert "of its 40 samples are bad (or more), and only 10 % " in refusal(raw, tmp_path / "out", max_bad=0.1)
        (tmp_path / "out/manifest.json").unlink(missing_ok=True)
    assert prepared(raw, tmp_path / "out") == manifest


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_samples_stop_with_one_line(raw: Path, tmp_path: Path, workers: int) -> None:
    spoil(raw, (4, 11))
    told = refusal(raw, tmp_path / "out", max_bad=0.025, workers=workers)
    for part in (
        "custom, split 'train': 2 of its 40 samples",
        "only 2.5 %",
        "1 × image: zero bytes",
        "1 × label: another size",
    ):
        assert part in told
    assert "004 [image: zero bytes], 011 [label: another size (label 8×8, image 9×9)]" in told
    assert not list((tmp_path / "out").glob(".*"))
    assert prepared(raw, tmp_path / "out", max_bad=0.05).splits["train"].rows == 38  # and goes on


def test_a_wrong_map_is_told_before_anything_is_written(raw: Path, tmp_path: Path) -> None:
    for id_map, found in (({0: 0}, 1), ({0: 1, 2: 0}, 1), ({1: 0}, 0)):
        told = refusal(raw, tmp_path / "out", id_map=id_map)
        assert (
            "8 of 8 samples that were looked at first are bad, and only 20 % may be left out: 8 × label: values"
            in told
        )
        assert f"[label: values outside the map ({found}; " in told and not list((tmp_path / "out").iterdir())


def test_files_that_cannot_be_read_are_no_bad_samples(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "030.png":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert "images/030.png cannot be read (Input/output error)" in refusal(raw, tmp_path / "out", max_bad=0.9)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_the_share_is_one(raw: Path, tmp_path: Path, share: float) -> None:
    assert "max_bad is" in refusal(raw, tmp_path / "out", max_bad=share)


def test_a_row_group_holds_one_row_and_the_footer_is_small(raw: Path, tmp_path: Path) -> None:
    prepared(raw, tmp_path / "out", shard_rows=256)
    metadata = pq.read_metadata(tmp_path / "out" / "train-00000-of-00001.parquet")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [1] * COUNT and metadata.serialized_size < 500 * COUNT
    for column in (groups[0].column(index) for index in range(groups[0].num_columns)):
        assert (column.compression, column.is_stats_set) == ("UNCOMPRESSED", False)
        assert not any("DICTIONARY" in encoding for encoding in column.encodings)
