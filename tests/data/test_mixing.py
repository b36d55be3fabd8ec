"""Several sources in one stream, by their images or by weights."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_hf.data.domains import MIXING_BLOCK
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.mixing import MixedOrder, Source, quotas
from gkd_hf.data.rows import Shard, ShardFolder, ShardRows
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError

from .samples import make_rows
from .test_ordering import EXAMPLES, READERS, in_memory, pixel, red, write_shards


def seen(stream: SampleStream, count: int) -> list[tuple[int, int, float]]:
    return [
        (sample["index"], int(sample["pixel_values"][0]), float(sample["pixel_values"][1]))
        for sample in itertools.islice(stream, count)
    ]


@EXAMPLES
@given(
    sources=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any), min_size=1, max_size=4),
    weights=st.none() | st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    group=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    readers=READERS,
    stops=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_mixtures_cover_their_passes_and_resume_exactly(sources, weights, group, seed, readers, stops):
    with tempfile.TemporaryDirectory() as folder:
        mixture, owners, first = [], {}, 0
        for place, shards in enumerate(sources):
            end = write_shards(Path(folder, str(place)), shards, group, first)
            owners |= dict.fromkeys(range(first, end), place)
            rows = open_rows(Path(folder, str(place)), "train", columns=("image",))
            mixture.append(Source(rows, str(place), weight=weights and weights[place]))
            first = end
        stream = SampleStream.mixed(mixture, red, seed=seed, micro_batch_size=1)
        assert stream.num_rows == first and stream.domains == tuple(str(place) for place in range(len(sources)))
        batch = readers.world * readers.micro
        batches = sum(stops) + -(-2 * first // batch)
        expected = seen(stream, batches * batch)
        orders = [[row for _, row, _ in expected]]
        if weights is not None and len(sources) > 1:  # each source goes through its own passes
            orders = [[row for row in orders[0] if owners[row] == place] for place in range(len(sources))]
        for place, order in enumerate(orders):
            size = first if len(orders) == 1 else sum(sources[place])
            rows = range(first) if len(orders) == 1 else [row for row, owner in owners.items() if owner == place]
            passes = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
            assert all(sorted(one) == list(rows) for one in passes)
            assert size < 9 or len(passes) < 2 or passes[0] != passes[1]
        cuts = (0, stops[0], sum(stops), batches)
        parts = [readers.see(stream, start * batch, end - start) for start, end in itertools.pairwise(cuts)]
        assert [sample for part in parts for sample in part] == expected


@EXAMPLES
@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), block=st.integers(0, 10**6))
def test_each_block_holds_every_quota(weights, block):
    found = quotas(weights, [""] * len(weights))
    assert found.sum() == MIXING_BLOCK
    assert np.abs(found - MIXING_BLOCK * np.array(weights) / sum(weights)).max() < 1
    sources = [Source(in_memory([1] * 7), str(place), weight=weight) for place, weight in enumerate(weights)]
    order = MixedOrder(sources, seed=1, shuffle=True, buffer_size=1)
    if len(weights) > 1:
        drawn = [order.source(MIXING_BLOCK * block + place) for place in range(MIXING_BLOCK)]
        assert np.bincount(drawn, minlength=len(weights)).tolist() == found.tolist()


def test_by_images_any_row_comes_first_equally_often():
    counts = np.zeros(6)
    for seed in range(1800):
        sources = [Source(in_memory([1] * size), str(size)) for size in (1, 2, 3)]
        order = MixedOrder(sources, seed=seed, shuffle=True, buffer_size=1)
        source = order.source(0)
        counts[(0, 1, 3)[source] + order.orders[source]._index(0)] += 1
    assert ((counts - 300) ** 2 / 300).sum() < 20.5  # χ², 5, 0.1 %


def test_sources_have_orders_of_their_own():
    rows = ShardRows(ShardFolder("/nowhere"), [Shard("s", np.ones(50, np.int32), 0)], ["image"])
    order = MixedOrder([Source(rows, "a"), Source(rows, "b")], seed=0, shuffle=True, buffer_size=1)
    one, other = ([each._index(place) for place in range(50)] for each in order.orders)
    assert sorted(one) == sorted(other) and one != other


def test_streamed_rows_mix_with_shards(tmp_path):
    write_shards(tmp_path, [6, 5], 2)
    cells = [{"image": {"bytes": pixel(number), "path": None}} for number in range(11, 18)]
    streamed = datasets.Dataset.from_list(cells).to_iterable_dataset()
    shards = Source(open_rows(tmp_path, "train", columns=("image",)), "shards")
    for weights, num_rows in ((None, None), ((3, 1), 7)):
        sources = [shards, Source(streamed, "streamed", num_rows=num_rows)]
        if weights:
            sources = [
                Source(s.rows, s.domain, weight=w, num_rows=s.num_rows) for s, w in zip(sources, weights, strict=True)
            ]
        stream = SampleStream.mixed(sources, red, seed=2, micro_batch_size=1)
        expected = seen(stream, 54)
        if weights is None:
            assert stream.num_rows is None
            assert sorted(row for _, row, _ in expected[18:36]) == list(range(18))
        assert seen(stream.shard(2, 0, 1, start=40), 14) == expected[40:]


def test_bad_rows_are_judged_by_their_own_domain(write_folder):
    good = open_rows(write_folder(make_rows(250), name="good"), "train")
    bad = open_rows(write_folder(make_rows(20, images={3: b"x", 4: b"y"}), name="bad"), "train")
    sources = [Source(good, "good"), Source(bad, "bad")]
    stream = SampleStream.mixed(sources, red, seed=0, micro_batch_size=1)
    with pytest.raises(InputError, match="domain 'bad': 2 bad rows among 20, more than the 1.0%"):
        seen(stream, 270)
    tolerant = SampleStream.mixed(sources, red, seed=0, micro_batch_size=1, bad_row_limit=0.1)
    entries = [entry for sample in itertools.islice(tolerant, 540) for entry in sample["bad_rows"]]
    assert {(entry["domain"], entry["row"]) for entry in entries} == {("bad", 3), ("bad", 4)}
    tolerant.check_bad_rows(entries)
    with pytest.raises(InputError, match="domain 'bad'"):
        stream.check_bad_rows(entries)


def test_what_cannot_be_mixed_is_said():
    rows = in_memory([1] * 4)

    def mixed(*sources: Source) -> SampleStream:
        return SampleStream.mixed(sources, red, seed=0, micro_batch_size=1)

    with pytest.raises(InputError, match="no source: give one or more domains"):
        mixed()
    with pytest.raises(InputError, match="domain 'a' is mixed with itself"):
        mixed(Source(rows, "a"), Source(rows, "a"))
    with pytest.raises(InputError, match="domain 'a' has a weight and 'b' has none"):
        mixed(Source(rows, "a", weight=1.0), Source(rows, "b"))
    with pytest.raises(InputError, match="domain 'b' has a label map and 'a' has none"):
        mixed(Source(rows, "a"), Source(rows, "b", label_map("identity", 2)))
    with pytest.raises(InputError, match="domain 'b' has the weight nan"):
        mixed(Source(rows, "a", weight=1.0), Source(rows, "b", weight=float("nan")))
    with pytest.raises(InputError, match="domain 'b' has a weight of less than 1/1024"):
        mixed(Source(rows, "a", weight=1.0), Source(rows, "b", weight=1e-5))
