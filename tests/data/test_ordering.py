"""The order of rows, whatever the shards, processes, workers and interruptions."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkd_hf.data import ordering
from gkd_hf.data.ordering import draw_pass, num_lanes
from gkd_hf.data.rows import Shard, ShardFolder, ShardRows
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError

from .samples import encode, make_rows, write_shard

EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@functools.cache
def pixel(number: int) -> bytes:
    return encode(PIL.Image.new("RGB", (1, 1), (number, 0, 0)))


def red(image: PIL.Image.Image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.tensor([image.getpixel((0, 0))[0], rng.random()], dtype=torch.float64)}


def write_shards(folder: Path, shards: list[int], group: int, first: int = 0) -> int:
    """Shards of so many rows; returns the number after the last row."""
    for place, count in enumerate(shards):
        rows = [{"image": pixel(first + number), "id": f"row{first + number}"} for number in range(count)]
        write_shard(folder / f"train-{place:05d}.parquet", rows or [{"image": b"", "id": ""}], group=group)
        if not rows:
            path = folder / f"train-{place:05d}.parquet"
            pq.write_table(pq.read_table(path).slice(0, 0), path)
        first += count
    return first


def in_memory(groups: list[int], num_bytes: int = 0) -> ShardRows:
    """Rows that are nowhere, for what only asks how many there are."""
    return ShardRows(ShardFolder("/nowhere"), [Shard("s", np.array(groups, np.int32), num_bytes)], ["image"])


Seen = tuple[int, int, float]  # position, row, random number


class Readers:
    """What a run of so many processes and workers sees, all of them in this process, in the loaders' turns."""

    def __init__(self, world: int, workers: int, micro: int) -> None:
        self.world, self.workers, self.micro = world, workers, micro
        self._worker: SimpleNamespace | None = None

    def see(self, stream: SampleStream, start: int, batches: int) -> list[Seen]:
        shares = [
            list(self._loader(stream.shard(self.micro, r, self.world, start), batches)) for r in range(self.world)
        ]
        return [sample for batch in zip(*shares, strict=True) for share in batch for sample in share]

    def _loader(self, stream: SampleStream, batches: int) -> Iterator[list[Seen]]:
        with mock.patch.object(torch.utils.data, "get_worker_info", lambda: self._worker):
            readers = [iter(stream) for _ in range(max(1, self.workers))]
            for batch in range(batches):
                number = batch % len(readers)
                self._worker = SimpleNamespace(id=number, num_workers=self.workers) if self.workers else None
                yield [self._seen(sample) for sample in itertools.islice(readers[number], self.micro)]

    def _seen(self, sample: dict[str, Any]) -> Seen:
        row, number = sample["pixel_values"].tolist()
        return sample["index"], int(row), number


READERS = st.builds(Readers, st.integers(1, 4), st.integers(0, 3), st.integers(1, 3))


def watched_reads() -> Any:
    """A list of the rows that are read from now on, until it is left."""
    reads: list[int] = []
    plain = ShardRows.__getitem__
    return mock.patch.object(
        ShardRows, "__getitem__", lambda self, index: reads.append(index) or plain(self, index)
    ), reads


@EXAMPLES
@given(
    shards=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    group=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    readers=READERS,
    stops=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_passes_cover_all_rows_and_resumed_runs_see_what_they_would_have_seen(shards, group, seed, readers, stops):
    with tempfile.TemporaryDirectory() as folder:
        count = write_shards(Path(folder), shards, group)
        stream = SampleStream(open_rows(folder, "train", columns=("image",)), red, seed=seed, micro_batch_size=1)
        batch = readers.world * readers.micro
        batches = sum(stops) + -(-2 * count // batch)
        expected = [
            (index, int(sample["pixel_values"][0]), float(sample["pixel_values"][1]))
            for index, sample in enumerate(itertools.islice(stream, batches * batch))
        ]
        passes = [[row for _, row, _ in expected[start : start + count]] for start in (0, count)]
        assert all(sorted(order) == list(range(count)) for order in passes)
        assert count < 9 or passes[0] != passes[1]

        first, second = stops[0], sum(stops)  # interrupted after so many batches, twice
        seen = []
        for start, end in ((0, first), (first, second), (second, batches)):
            patched, reads = watched_reads()
            with patched:
                seen += readers.see(stream, start * batch, end - start)
            # A reader reads what it yields: nothing of what is skipped, nothing of what others yield.
            assert sorted(reads) == sorted(row for _, row, _ in seen[start * batch :])
        assert seen == expected


@EXAMPLES
@given(
    shards=st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=8), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    weight=st.integers(0, 2**34),
)
def test_a_pass_is_a_permutation_whatever_the_row_groups(shards, seed, weight):
    described = [Shard(str(place), np.array(groups, np.int32), weight) for place, groups in enumerate(shards)]
    rows = ShardRows(ShardFolder("/nowhere"), described, ["image"])
    order = draw_pass(rows, seed, 0).rows
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert (order == draw_pass(rows, seed, 0).rows).all()
    places = [rows.place(index) for index in range(len(rows))]
    assert places == [(str(place), row) for place, groups in enumerate(shards) for row in range(sum(groups))]


def test_rows_of_their_own_group_come_in_any_order_equally_often():
    rows, seeds = in_memory([1] * 4), 2400
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(seeds):
        order = tuple(draw_pass(rows, seed, 1).rows.tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((found - seeds / 24) ** 2 / (seeds / 24) for found in counts.values()) < 49.7  # χ², 23, 0.1 %


class Elsewhere(ShardFolder):
    """A folder whose shards count as fetched."""

    remote = True

    def __init__(self, folder: str, asked: list[str]) -> None:
        super().__init__(folder)
        self.__dict__["asked"] = asked

    def path(self, name: str) -> Path:
        self.__dict__["asked"].append(name)
        return super().path(name)


def test_shards_that_are_fetched_are_taken_in_sets():
    shards = [Shard(str(place), np.ones(10, np.int32), 0) for place in range(11)]
    rows = ShardRows(Elsewhere("/nowhere", []), shards, ["image"])
    drawn = draw_pass(rows, 5, 0, set_rows=25)
    assert sorted(drawn.rows.tolist()) == list(range(110))
    assert drawn.set_ends.tolist() == [30, 60, 110]
    starts = [0, *drawn.set_ends[:-1]]
    for start, end, members in zip(starts, drawn.set_ends, drawn.set_shards, strict=True):
        assert set(drawn.rows[start:end] // 10) == set(members)
    assert [members.tolist() for members in draw_pass(rows, 5, 1, set_rows=25).set_shards] != [
        members.tolist() for members in drawn.set_shards
    ]
    assert draw_pass(rows, 5, 0, set_rows=2048).set_ends.tolist() == [110]


@pytest.mark.parametrize("shuffle", [True, False])
def test_only_the_sets_of_shards_in_sight_are_fetched(tmp_path, shuffle):
    write_shards(tmp_path, [10] * 8, group=1)
    rows = open_rows(tmp_path, "train", columns=("image",))
    asked: list[str] = []
    elsewhere = ShardRows(Elsewhere(str(tmp_path), asked), rows.shards, rows.columns)
    stream = SampleStream(elsewhere, red, seed=1, micro_batch_size=1, buffer_size=20, shuffle=shuffle)
    for count in (5, 80, 160):
        samples = list(itertools.islice(stream, count))
        assert len({int(sample["pixel_values"][0]) for sample in samples}) == min(count, 80)
        elsewhere._fetcher.join()
        assert len(set(asked)) == (8 if count > 5 else 4 if shuffle else 2)


def test_rows_of_a_large_group_stand_a_lane_apart():
    rows = in_memory([5] * 64, num_bytes=2**40)
    assert num_lanes(rows) == 8
    order = draw_pass(rows, 0, 0).rows
    places = np.argsort(order).reshape(64, 5)
    apart = np.diff(np.sort(places), axis=1)
    # The cuts between the 8 lanes and where the ring begins divide at most 8 groups.
    divided = (apart != 8).any(axis=1)
    assert divided.sum() <= 8 and ((apart != 8).sum(axis=1) <= 1).all()
    assert (apart[divided].max(axis=1) > 256).all()  # the end of one lane, the beginning of the next
    assert (np.diff(places, axis=1) < 0).any()  # not in stored order
    assert num_lanes(in_memory([5] * 64, num_bytes=64 * 2**20)) == 64
    assert num_lanes(in_memory([1] * 64)) == 1024


@pytest.mark.parametrize("num_bytes", [0, 2**40], ids=["many lanes", "few lanes"])
@pytest.mark.parametrize("groups", [[100, 100, 30], [1000, 100], [7, 1, 50]], ids=str)
def test_rows_of_small_groups_come_at_any_time_of_a_pass(groups, num_bytes):
    rows, seeds = in_memory(groups, num_bytes), 1000
    small = int(np.argmin(groups))
    first = sum(groups[:small])
    times = np.empty((seeds, groups[small]))
    for seed in range(seeds):
        places = np.argsort(draw_pass(rows, seed, 0).rows)
        times[seed] = (places[first : first + groups[small]] + 0.5) / len(rows)
    assert abs(times.mean() - 0.5) < 0.04
    # One row of it, over the tenths of a pass.
    found = np.histogram(times[:, 0], bins=10, range=(0, 1))[0]
    expected = np.histogram((np.arange(len(rows)) + 0.5) / len(rows), bins=10, range=(0, 1))[0] * seeds / len(rows)
    assert ((found - expected) ** 2 / expected).sum() < 27.9  # χ², 9, 0.1 %


@pytest.mark.parametrize(
    "groups", [[1000] * 4 + [100] * 40, ([100] * 10 + [50]) * 10, [1000, 100]], ids=["4 + 40", "10 shards", "1 + 1"]
)
@pytest.mark.parametrize("lanes", [8, 32, 1024])
def test_a_batch_holds_as_many_groups_at_the_end_of_a_pass_as_before(monkeypatch, groups, lanes):
    rows = in_memory(groups)
    monkeypatch.setattr(ordering, "num_lanes", lambda _: lanes)
    owner = np.repeat(np.arange(len(groups)), groups)
    starts = (0, len(rows) // 2, len(rows) - 64)
    held = np.empty((100, len(starts)))
    for seed in range(len(held)):
        order = owner[draw_pass(rows, seed, 0).rows]
        held[seed] = [len(set(order[start : start + 64])) for start in starts]
    assert held.mean(axis=0).min() > 0.85 * held.mean(axis=0).max()


def test_rows_of_a_group_that_fills_lanes_are_not_neighbours():
    owner = np.repeat(np.arange(11), 100)
    order = owner[draw_pass(in_memory([100] * 11), 0, 0).rows]
    assert all(len(set(order[start : start + 64])) >= 9 for start in range(0, 1100 - 64, 64))


def test_lanes_are_fewer_where_most_rows_are_in_large_groups():
    assert num_lanes(in_memory([5] * 60 + [300], num_bytes=64 * 2**20)) == 8
    assert num_lanes(in_memory([5] * 120, num_bytes=64 * 2**20)) == 64


def test_each_group_is_read_once_for_each_part_in_a_pass(tmp_path, monkeypatch):
    write_shards(tmp_path, [50, 60, 50], group=5)
    monkeypatch.setattr(ordering, "CACHE_BYTES", 1)
    monkeypatch.setattr("gkd_hf.data.rows.CACHE_BYTES", 1)
    monkeypatch.setattr("gkd_hf.data.rows._OPEN_FILES", 1)
    read = []
    plain = ShardRows._read
    monkeypatch.setattr(ShardRows, "_read", lambda self, *group: read.append(group) or plain(self, *group))
    for seed, worker in itertools.product(range(4), range(2)):  # each of two workers has half of the eight lanes
        rows = open_rows(tmp_path, "train", columns=("image",))  # nothing of it is in the cache
        stream = SampleStream(rows, red, seed=seed, micro_batch_size=4)
        read.clear()
        monkeypatch.setattr(
            torch.utils.data,
            "get_worker_info",
            lambda: SimpleNamespace(id=worker, num_workers=2),  # noqa: B023
        )
        seen = [int(sample["pixel_values"][0]) for sample in itertools.islice(stream, 80)]
        # 20 rows in each of four lanes: four groups, or three and parts of two.
        assert len(set(seen)) == 80 and 16 <= len(read) <= 20, (seed, worker)


def test_rows_are_a_sequence_that_travels(tmp_path):
    import pickle

    write_shards(tmp_path, [3, 0, 4], group=2)
    rows = open_rows(tmp_path, "train", columns=("image",))
    assert len(rows) == 7 and [row["id"] for row in rows] == [f"row{number}" for number in range(7)]
    assert rows[5] == {"image": {"bytes": pixel(5), "path": None}, "id": "row5"} == pickle.loads(pickle.dumps(rows))[5]
    assert rows.place(5) == ("train-00002.parquet", 2)
    with pytest.raises(IndexError):
        rows[7]


def test_a_shard_that_changed_since_is_noticed(tmp_path):
    write_shards(tmp_path, [3, 4], group=2)
    rows = open_rows(tmp_path, "train", columns=("image",))
    write_shards(tmp_path, [3, 5], group=2)
    assert rows[2]["id"] == "row2"
    with pytest.raises(InputError, match="train-00001.parquet is not what it was when the run began"):
        rows[3]
    (tmp_path / "train-00001.parquet").unlink()
    with pytest.raises(
        InputError, match="train-00001.parquet: the data cannot be read on from row 0 .*check the shard"
    ):
        rows[3]


def test_what_an_image_column_may_hold(tmp_path):
    rows = make_rows(2)
    write_shard(tmp_path / "train-0.parquet", [{"image": row["image"]} for row in rows])
    (row, _) = open_rows(tmp_path, "train", columns=("image",))
    assert row == {"image": {"bytes": rows[0]["image"], "path": None}}
