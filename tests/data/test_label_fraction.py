"""A fraction of the labels: which rows they are, and that nothing else is read, whoever reads."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_hf.data.label_fraction import kept_images, kept_rows, labelled_subset, left_out
from gkd_hf.data.mixing import Source
from gkd_hf.data.ordering import num_lanes
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError
from gkd_hf.training.stream_position import order_facts

from .samples import make_rows
from .test_ordering import EXAMPLES, READERS, Elsewhere, Readers, in_memory, red, watched_reads, write_shards
from .test_streamed_order import streamed

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


@pytest.mark.parametrize(
    ("num_images", "fraction", "kept"),
    [
        (24966, 1 / 16, 1561),
        (24966, 1 / 2, 12483),
        (100, 0.07, 7),  # in floating point 7.000000000000001
        (6, 5 / 6, 5),
        (10, 1 / 3, 4),
        (5, 1 / 16, 1),
        (10, 1e-9, 1),
        (10, 1.0, 10),
    ],
)
def test_a_fraction_of_the_images_is_rounded_up(num_images: int, fraction: float, kept: int) -> None:
    assert kept_images(num_images, fraction) == kept


def test_a_smaller_fraction_is_part_of_a_larger_one() -> None:
    drawn = [set(kept_rows(1000, fraction, 3).tolist()) for fraction in (*FRACTIONS, 1.0)]
    assert [len(rows) for rows in drawn] == [63, 125, 250, 500, 1000]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(drawn))
    assert drawn[0] != set(kept_rows(1000, 1 / 16, 4).tolist())
    # Published runs name their images by fraction and seed: these must stay what they are.
    assert kept_rows(40, 1 / 4, 0).tolist() == [2, 10, 13, 14, 15, 20, 23, 30, 35, 38]


def test_rows_are_drawn_evenly() -> None:
    times = np.zeros(50)
    for seed in range(2000):
        times[kept_rows(50, 0.2, seed)] += 1
    expected = 2000 * 0.2
    assert (np.abs(times - expected) < 5 * np.sqrt(expected * 0.8)).all()


@EXAMPLES
@given(
    shards=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    group=st.integers(1, 5),
    fraction=st.sampled_from([*FRACTIONS, 0.9]),
    seed=st.integers(0, 2**40),
    readers=READERS,
    stops=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_every_reader_sees_the_kept_rows_alone(shards, group, fraction, seed, readers, stops):
    with tempfile.TemporaryDirectory() as folder:
        count = write_shards(Path(folder), shards, group)
        kept = kept_rows(count, fraction, 7).tolist()
        rows = labelled_subset(open_rows(folder, "train", columns=("image",)), fraction, 7, "here")
        assert [row["id"] for row in rows] == [f"row{number}" for number in kept]
        stream = SampleStream(rows, red, seed=seed, micro_batch_size=1)
        batch = readers.world * readers.micro
        batches = sum(stops) + -(-2 * len(kept) // batch)
        expected = Readers(1, 0, 1).see(stream, 0, batches * batch)
        for start in (0, len(kept)):
            assert sorted(row for _, row, _ in expected[start : start + len(kept)]) == kept
        seen, first, second = [], stops[0], sum(stops)  # interrupted after so many batches, twice
        for start, end in ((0, first), (first, second), (second, batches)):
            patched, reads = watched_reads()
            with patched:
                seen += readers.see(stream, start * batch, end - start)
            assert [kept[index] for index in sorted(reads)] == sorted(row for _, row, _ in seen[start * batch :])
        assert seen == expected


def test_only_row_groups_that_hold_kept_rows_are_read(tmp_path, monkeypatch):
    write_shards(tmp_path, [20, 0, 20, 20], group=2)
    whole = open_rows(tmp_path, "train", columns=("image",))
    rows = labelled_subset(whole, 1 / 16, 0, "here")
    kept = kept_rows(60, 1 / 16, 0)
    read = set()
    plain = ShardRows._read

    def noting(self: ShardRows, shard: int, group: int):
        read.add((self.shards[shard].name, group))
        return plain(self, shard, group)

    monkeypatch.setattr(ShardRows, "_read", noting)
    list(itertools.islice(SampleStream(rows, red, seed=0, micro_batch_size=1), 20))
    assert len(rows) == 4
    assert read == {(name, row // 2) for name, row in map(whole.place, kept.tolist())}


def test_a_subset_is_a_sequence_that_travels(tmp_path):
    write_shards(tmp_path, [3, 0, 4, 5], group=2)
    whole = open_rows(tmp_path, "train", columns=("image",))
    rows = whole.subset(np.array([9, 1, 11]))
    for each in (rows, pickle.loads(pickle.dumps(rows))):
        assert [row["id"] for row in each] == ["row1", "row9", "row11"]
        assert [each.place(index) for index in range(3)] == [whole.place(index) for index in (1, 9, 11)]
        assert [each.shards[each.shard(index)].name for index in range(3)] == [
            f"train-0000{number}.parquet" for number in (0, 3, 3)
        ]
        with pytest.raises(IndexError):
            each[3]
    assert rows.shard_rows.tolist() == [1, 2] and whole.shard_rows.tolist() == [3, 0, 4, 5]
    assert [row["id"] for row in rows.subset(np.array([2, 0]))] == ["row1", "row11"]


def test_kept_and_left_out_are_all(tmp_path):
    write_shards(tmp_path, [9, 8], group=3)
    whole = open_rows(tmp_path, "train", columns=("image",))
    kept, others = labelled_subset(whole, 1 / 4, 5, "here"), left_out(whole, 1 / 4, 5)
    names = [row["id"] for rows in (kept, others) for row in rows]
    assert len(kept) == 5 and sorted(names) == sorted(row["id"] for row in whole)
    assert left_out(whole, 0.99, 5) is None


@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_without_a_kept_row_are_not_fetched(tmp_path, shuffle):
    write_shards(tmp_path, [5] * 8, group=1)
    whole = open_rows(tmp_path, "train", columns=("image",))
    asked: list[str] = []
    rows = labelled_subset(ShardRows(Elsewhere(str(tmp_path), asked), whole.shards, whole.columns), 1 / 16, 2, "hub")
    wanted = {whole.place(index)[0] for index in kept_rows(40, 1 / 16, 2).tolist()}
    stream = SampleStream(rows, red, seed=1, micro_batch_size=1, buffer_size=1, shuffle=shuffle)
    samples = list(itertools.islice(stream, 6))
    rows._fetcher.join()
    assert {int(sample["pixel_values"][0]) for sample in samples} == set(kept_rows(40, 1 / 16, 2).tolist())
    assert set(asked) == wanted and len(wanted) < 8


def test_fraction_one_changes_nothing(tmp_path):
    write_shards(tmp_path, [9], group=3)
    rows = open_rows(tmp_path, "train", columns=("image",))
    stored = streamed(4)
    assert labelled_subset(rows, 1.0, 9, "here") is rows and labelled_subset(stored, 1.0, 9, "here") is stored
    assert labelled_subset(rows, 0.95, 9, "here") is rows  # rounded up to all nine


def test_streamed_rows_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        labelled_subset(streamed(4), 1 / 16, 0, "'gtav' (org/gtav)")
    message = str(caught.value)
    assert message.startswith("stages.task.label_fraction is 0.0625, but the rows of 'gtav' (org/gtav) can neither be")
    assert "store it as such" in message and "\n" not in message


def test_the_position_tells_one_subset_from_another(tmp_path, write_folder):
    folder = write_folder(make_rows(40), per_shard=20)

    def facts(fraction: float, seed: int) -> dict:
        rows = labelled_subset(open_rows(folder, "train"), fraction, seed, "here")
        return order_facts(SampleStream.mixed([Source(rows, "city")], red, seed=0, micro_batch_size=1))

    assert facts(1 / 4, 0) == facts(1 / 4, 0)
    others = [facts(1 / 4, 1), facts(1 / 2, 0), facts(1.0, 0)]
    assert all(other["domains"] != facts(1 / 4, 0)["domains"] for other in others)
    assert facts(1 / 4, 1)["domains"][0]["rows"] == facts(1 / 4, 0)["domains"][0]["rows"] == 10


def test_groups_are_held_whole_where_few_of_their_rows_are_kept() -> None:
    whole = in_memory([5] * 64, num_bytes=64 * 2**20)
    assert num_lanes(whole.subset(np.arange(0, 320, 5))) == num_lanes(whole) == 64
