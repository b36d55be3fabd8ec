from __future__ import annotations

import pickle
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HTTPError

from gkd_hf.data import hub_files, shards
from gkd_hf.data.hub_files import HubFiles
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.shards import Rows, count_rows, open_rows, readable
from gkd_hf.errors import InputError
from gkd_hf.training.label_check import LabelledSplit, check_labels, look_at_first_rows

from .samples import make_rows, row_image, write_shard


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a local folder must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def ids(rows: Rows) -> list[str]:
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

    monkeypatch.setattr(shards, "hub_files", lambda location, revision: HubFiles(location, "0" * 40, None, {}))
    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(InputError) as caught:
        open_rows("org/name", "train")
    message = str(caught.value)
    assert "https://huggingface.co/datasets/org/name" in message
    assert "Available splits: ['test']" in message and "\n" not in message


def test_a_hub_data_set_goes_through_the_same_checks(monkeypatch, tmp_path, write_folder):
    folder = write_folder(make_rows(4), per_shard=2)
    names = tuple(sorted(path.name for path in folder.glob("*.parquet")))
    bare = {"image": pa.array([row_image(5), None], type=pa.binary()), "label": [1, 2], "id": [7, 8]}
    pq.write_table(pa.table(bare), folder / "bare.parquet")
    pq.write_table(pq.read_table(folder / names[0]).slice(0, 0), folder / "empty.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 but not really")
    splits = {"train": names, "other": (names[0], "bare.parquet"), "none": ("empty.parquet",)}
    splits |= {"bare": ("empty.parquet", "bare.parquet"), "broken": ("broken.parquet",)}
    asked = {}

    def files(location: str, revision: str | None) -> HubFiles:
        asked.update(location=location, revision=revision)
        return HubFiles(location, "c" * 40, splits, {"train": 4})

    monkeypatch.setattr(shards, "hub_files", files)
    monkeypatch.setattr(HubFiles, "_last", lambda self, name, size: (folder / name).read_bytes()[-size:])
    monkeypatch.setattr(hub_files, "pull_file", lambda location, name, *, commit, kind: folder / name)
    rows = open_rows("org/name", "train", revision="v1")
    assert asked == {"location": "org/name", "revision": "v1"}
    assert ids(rows) == ["row000", "row001", "row002", "row003"]
    assert list(rows) == list(open_rows(write_folder(make_rows(4), name="same"), "train"))
    assert (count_rows("org/name", "train"), count_rows("org/name", "other")) == (4, None)
    bare_rows = list(open_rows("org/name", "bare", columns=("image",)))
    assert bare_rows == [{"image": {"bytes": row_image(5), "path": None}, "id": 7}, {"image": None, "id": 8}]
    with pytest.raises(InputError, match=f"{names[0]} of 'org/name': column 'mask' is missing"):
        open_rows("org/name", "train", columns=("image", "mask"))
    with pytest.raises(InputError, match="bare.parquet of 'org/name': column 'label' holds int64, not image bytes"):
        open_rows("org/name", "other")
    with pytest.raises(InputError, match="no rows in split 'none' of https://huggingface.co/datasets/org/name"):
        open_rows("org/name", "none")
    with pytest.raises(InputError, match="broken.parquet of 'org/name' is not a readable parquet file"):
        open_rows("org/name", "broken")
    with pytest.raises(InputError, match="no such split, did you mean 'train'.*splits: train, other"):
        open_rows("org/name", "trains")


def test_a_footer_is_asked_for_in_parts_and_compared_with_the_shard(monkeypatch, write_folder):
    folder = write_folder(make_rows(6), per_shard=3)
    (first, second) = sorted(path.name for path in folder.glob("*.parquet"))
    asked = []

    def last(self: HubFiles, name: str, size: int) -> bytes:
        asked.append(size)
        return (folder / first).read_bytes()[-size:]

    splits = {"train": (first, second)}
    monkeypatch.setattr(shards, "hub_files", lambda location, revision: HubFiles(location, "c" * 40, splits, {}))
    monkeypatch.setattr(HubFiles, "_last", last)
    monkeypatch.setattr(hub_files, "_FOOTER_BYTES", 100)
    fetched = []
    monkeypatch.setattr(
        hub_files, "pull_file", lambda location, name, *, commit, kind: fetched.append(name) or folder / name
    )
    rows = open_rows("org/name", "train")
    needed = int.from_bytes((folder / first).read_bytes()[-8:-4], "little") + 8
    assert sorted(asked) == [100, 100, needed, needed] and not fetched
    assert len(rows) == 6 and rows[4]["id"] == "row004" and fetched == [second]
    write_shard(folder / second, make_rows(2))
    with pytest.raises(InputError, match=f"{second} of 'org/name' is not what it was when the run began"):
        open_again = pickle.loads(pickle.dumps(rows))
        open_again[4]
    # What is no footer, or no answer, makes the shard itself be fetched.
    for answer in (b"x" * 100, OSError("answer 200 to the request for a part")):
        fetched.clear()

        def wrong(self: HubFiles, name: str, size: int, answer: bytes | OSError = answer) -> bytes:
            if isinstance(answer, OSError):
                raise answer
            return answer

        monkeypatch.setattr(HubFiles, "_last", wrong)
        assert len(open_rows("org/name", "train")) == 5
        assert sorted(fetched) == [first, second]


def test_whatever_reading_fails_with_becomes_one_line():
    def failing(error: Exception):
        yield 1
        raise error

    for error in (pa.ArrowInvalid("a\nb"), OSError("a\nb"), HTTPError("a\nb"), EOFError("a\nb"), ValueError("a\nb")):
        rows = readable(failing(error), "here")
        assert next(rows) == 1
        with pytest.raises(InputError, match=r"^here: the data cannot be read on \(a b\); check the shards"):
            next(rows)
    with pytest.raises(InputError, match="^as it was$"):
        list(readable(failing(InputError("as it was")), "here"))


def test_a_damaged_page_is_told_by_whoever_meets_it_first(tmp_path, write_folder):
    folder = write_folder(make_rows(6), name="damaged")
    (shard,) = folder.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    start = pq.read_metadata(shard).row_group(0).column(0).data_page_offset
    content[start : start + 12] = b"\xff" * 12  # the page's header
    shard.write_bytes(content)
    identity = label_map("identity", 2)
    split = LabelledSplit("city", str(folder), "train", open_rows(folder, "train"), identity, None)
    for read in (
        lambda: look_at_first_rows(split.rows, "city", str(folder), "train"),
        lambda: check_labels([split], tmp_path / "memory.json"),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(f"{shard}: the data cannot be read on from row 0 (")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "memory.json").exists()
