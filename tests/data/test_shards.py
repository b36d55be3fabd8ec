from __future__ import annotations

import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.errors import InputError

from .samples import make_rows, row_image, write_shard


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a local folder must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def ids(rows: datasets.IterableDataset) -> list[str]:
    return [row["id"] for row in rows]


@pytest.mark.parametrize("layout", ["train-0.parquet", "data/train-0.parquet", "train/deep/down/any.parquet"])
def test_layouts(tmp_path, no_network, layout):
    write_shard(tmp_path / layout, make_rows(3))
    rows = open_rows(str(tmp_path), "train")
    assert ids(rows) == ["row000", "row001", "row002"]
    first = next(iter(rows))
    assert first["image"] == {"bytes": row_image(0), "path": None}
    assert count_rows(str(tmp_path), "train") == 3


def test_several_shards_and_only_the_wanted_columns(write_folder, no_network):
    folder = write_folder(make_rows(25), name="odd [1] name*")
    assert ids(open_rows(folder, "train")) == [f"row{number:03d}" for number in range(25)]
    assert count_rows(folder, "train") == 25
    assert set(next(iter(open_rows(folder, "train", columns=("image",))))) == {"image", "id"}


def test_raw_bytes_columns_and_no_id(tmp_path):
    table = pa.table({"image": pa.array([row_image(5)], type=pa.binary()), "extra": [1]})
    pq.write_table(table, tmp_path / "train-0.parquet")
    rows = list(open_rows(tmp_path, "train", columns=("image",)))
    assert rows == [{"image": {"bytes": row_image(5), "path": None}}]


def test_what_is_wrong_is_said(tmp_path, write_folder):
    with pytest.raises(InputError, match="data folder /nowhere/at/all does not exist"):
        open_rows("/nowhere/at/all", "train")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, not a folder"):
        open_rows(tmp_path / "file", "train")
    folder = write_folder(make_rows(3), split="validation")
    with pytest.raises(InputError, match="no parquet shards of split 'train'.*splits found there: validation"):
        open_rows(folder, "train")
    unlabelled = write_folder([{"image": row_image(0), "labels": 1}], name="unlabelled")
    with pytest.raises(InputError, match="column 'label' is missing, did you mean 'labels'.*present: image, labels"):
        open_rows(unlabelled, "train")
    with pytest.raises(InputError, match="column 'image' holds int64, not image bytes"):
        pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "train-0.parquet")
        open_rows(tmp_path, "train", columns=("image",))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train-0.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="bad/train-0.parquet is not a readable parquet file"):
        open_rows(tmp_path / "bad", "train")
    empty = tmp_path / "empty" / "train-0.parquet"
    empty.parent.mkdir()
    pq.write_table(pq.read_table(next(folder.glob("*.parquet"))).slice(0, 0), empty)
    with pytest.raises(InputError, match="no rows in split 'train'"):
        open_rows(tmp_path / "empty", "train")


def test_a_hub_failure_names_the_page(monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise ValueError("Bad split: train. Available\nsplits: ['test']")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(InputError) as caught:
        open_rows("org/name", "train")
    message = str(caught.value)
    assert "https://huggingface.co/datasets/org/name" in message
    assert "Available splits: ['test']" in message and "\n" not in message


def test_a_hub_data_set_goes_through_the_same_checks(monkeypatch, write_folder):
    folder = write_folder(make_rows(4))
    load = datasets.load_dataset
    asked = {}

    def from_folder(name: str, *, split: str, streaming: bool, revision: str | None) -> datasets.IterableDataset:
        asked.update(name=name, split=split, streaming=streaming, revision=revision)
        return load("parquet", data_files={split: str(folder / "*.parquet")}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    rows = open_rows("org/name", "train", revision="v1")
    assert asked == {"name": "org/name", "split": "train", "streaming": True, "revision": "v1"}
    assert next(iter(rows))["image"]["bytes"] == row_image(0)
    with pytest.raises(InputError, match="column 'mask' is missing"):
        open_rows("org/name", "train", columns=("image", "mask"))
