"""The order of rows that are no shards and can only be read one after the other."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pytest
from huggingface_hub.errors import HTTPError

from gkd_hf.data.bad_rows import count_by_reason
from gkd_hf.data.streamed_order import StreamedOrder
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError
from gkd_hf.training.label_check import look_at_first_rows

from .samples import make_rows, row_image
from .test_streaming import RowNumber, first, loaded, rows_of


def streamed(count: int, shards: int = 4) -> datasets.IterableDataset:
    cells = [{"image": {"bytes": row["image"], "path": None}, "id": row["id"]} for row in make_rows(count)]
    return datasets.Dataset.from_list(cells).to_iterable_dataset(num_shards=shards)


def make_stream(rows: datasets.IterableDataset, **options: object) -> SampleStream:
    return SampleStream(rows, RowNumber(), **{"seed": 3, "micro_batch_size": 1, "domain": "city"} | options)


def test_rows_mix_across_shards_when_the_buffer_is_small():
    order = rows_of(first(make_stream(streamed(40), buffer_size=20), 80))
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40))
    assert order[:40] != order[40:]
    assert len({row // 10 for row in order[:10]}) > 1


def test_the_buffer_is_bounded_in_bytes(monkeypatch):
    plain = rows_of(first(make_stream(streamed(40, 1)), 40))
    monkeypatch.setattr("gkd_hf.data.streamed_order._BUFFER_BYTES", 3 * len(row_image(0)))
    order = rows_of(first(make_stream(streamed(40, 1)), 40))
    assert sorted(order) == list(range(40))
    assert order != plain


@pytest.mark.parametrize(("own", "used"), [(20, 3), (1, 1)])
def test_whoever_reads_does_not_try_for_many_minutes(own: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 is what a worker that was spawned starts with."""
    stream = make_stream(streamed(10))
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", own)
    first(stream, 1)
    assert used == datasets.config.STREAMING_READ_MAX_RETRIES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_rows", [None, 10])
def test_resuming_continues_exactly(workers, num_rows):
    stream = make_stream(streamed(10), num_rows=num_rows)
    expected = first(stream, 40)
    assert loaded(stream.shard(2, 0, 1, start=28), 12, workers) == expected[28:]
    assert loaded(stream.shard(2, 1, 2, start=12), 2, workers) == expected[14:16]


def test_known_passes_are_skipped_without_reading(monkeypatch):
    passes = []
    plain = StreamedOrder.one_pass
    monkeypatch.setattr(StreamedOrder, "one_pass", lambda self, number=0: passes.append(number) or plain(self, number))
    first(make_stream(streamed(10), num_rows=10).shard(1, 0, 1, start=70), 5)
    assert passes == [7]


def test_a_wrong_number_of_rows_is_noticed():
    with pytest.raises(InputError, match="domain 'city' gave 10 rows in pass 0 but 11 were expected"):
        first(make_stream(streamed(10), num_rows=11), 12)


def test_rows_without_an_id_are_named_by_their_bytes():
    cells = [{"image": {"bytes": row["image"], "path": None}} for row in make_rows(250, images={5: b"x", 6: b"y"})]
    stream = make_stream(datasets.Dataset.from_list(cells).to_iterable_dataset())
    reported = [entry for _, sample in zip(range(500), stream, strict=False) for entry in sample["bad_rows"]]
    assert len({entry["id"] for entry in reported}) == 2
    assert all(entry["id"].startswith("sha1:") and entry["shard"] is entry["row"] is None for entry in reported)
    same = datasets.Dataset.from_list([{"image": {"bytes": b"", "path": None}}] * 5).to_iterable_dataset()
    with pytest.raises(InputError, match="no readable row in a whole pass"):
        first(make_stream(same, bad_row_limit=1.0), 1)


def without_ids(images: dict[int, bytes]) -> datasets.IterableDataset:
    cells = [{"image": {"bytes": row["image"], "path": None}} for row in make_rows(100, images=images)]
    return datasets.Dataset.from_list(cells).to_iterable_dataset(num_shards=4)


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_that_are_empty_alike_count_one_by_one(shuffle):
    half = make_stream(without_ids(dict.fromkeys(range(50), b"")), shuffle=shuffle)
    with pytest.raises(InputError, match="bad rows among 100.* more than the 1.0% .* × image: zero bytes"):
        first(half, 100)
    with pytest.raises(InputError, match="4 bad rows among the first 4"):
        look_at_first_rows(half.sources[0].rows, "city", "somewhere", "train")
    few = make_stream(without_ids(dict.fromkeys((3, 40, 99), b"")), shuffle=shuffle, bad_row_limit=0.03)
    entries = [entry for _, sample in zip(range(400), few, strict=False) for entry in sample["bad_rows"]]
    assert len(entries) >= 12 and len({entry["id"] for entry in entries}) == 3  # the same three in every pass
    assert count_by_reason(entries) == {"image: zero bytes": 3}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [HTTPError("Server\ndisconnected"), pa.ArrowInvalid("Corrupt\nsnappy data")])
def test_a_stream_that_breaks_off_is_told_in_one_line(error, workers):
    def breaking_off():
        yield from ({"image": {"bytes": row_image(number), "path": None}} for number in range(3))
        raise error

    rows = datasets.IterableDataset.from_generator(breaking_off)
    stream = make_stream(rows, shuffle=False)
    with pytest.raises(InputError) as caught:
        loaded(stream, 5, workers)
    reason = " ".join(str(error).split())
    told = f"domain 'city': the data cannot be read on ({reason}); check the shards or the connection"
    assert str(caught.value) == told
