"""Fixed views: a function of seed, image and number alone, whatever order, workers and processes see them in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from gkd_hf.data.mixing import Source
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import SampleStream, collate
from gkd_hf.data.transforms import DistillationTransform, Erasing
from gkd_hf.data.views import view_keys
from gkd_hf.errors import InputError

from .samples import encode, make_rows
from .test_streaming import RowNumber, first, loaded, make_stream

ROWS = 12
STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def folder(write_folder: Callable[..., Path]) -> Path:
    return write_folder(make_rows(ROWS))


def seen(samples: list[tuple[int, int, float]]) -> dict[int, list[float]]:
    """The random numbers of each row, pass by pass."""
    found: dict[int, list[float]] = {}
    for _, row, number in samples:
        found.setdefault(row, []).append(number)
    return found


def test_passes_take_the_views_in_turn(folder: Path) -> None:
    for numbers in seen(first(make_stream(folder, views=3), 7 * ROWS)).values():
        assert len(set(numbers)) == 3
        assert numbers[3:6] == numbers[:3]
        assert numbers[6] == numbers[0]


def test_a_view_hangs_on_seed_image_and_number_alone(folder: Path, write_folder: Callable[..., Path]) -> None:
    views = seen(first(make_stream(folder, views=2), 2 * ROWS))
    rows = make_rows(ROWS)
    elsewhere = write_folder([*rows[6:], *rows[:6]], per_shard=5, name="elsewhere")
    streamed = SampleStream(
        datasets.load_dataset(str(folder), split="train", streaming=True),
        RowNumber(),
        seed=3,
        micro_batch_size=1,
        views=2,
    )
    for other in (
        make_stream(folder, views=2, shuffle=False),
        make_stream(elsewhere, views=2),
        make_stream(folder, views=5),
        streamed,
    ):
        assert seen(first(other, 2 * ROWS)) == views
    assert not {n for numbers in views.values() for n in numbers} & {
        n for numbers in seen(first(make_stream(folder, views=2, seed=4), 2 * ROWS)).values() for n in numbers
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_processes_and_resumption_see_the_same_views(folder: Path, workers: int) -> None:
    whole = first(make_stream(folder, views=2), 40)
    shares = [make_stream(folder, views=2).shard(2, rank, 2, start=4) for rank in range(2)]
    parts = [loaded(share, 18, workers) for share in shares]
    merged = [sample for batch in range(9) for part in parts for sample in part[2 * batch : 2 * batch + 2]]
    assert merged == whole[4:]


def test_in_a_mixture_each_source_counts_its_own_passes(folder: Path, write_folder: Callable[..., Path]) -> None:
    other = write_folder(
        [
            {**row, "image": encode(np.full((8, 8, 3), (100 + n, 7, 0), np.uint8))}
            for n, row in enumerate(make_rows(3))
        ],
        name="other",
    )
    sources = [
        Source(open_rows(place, "train"), name, None, weight)
        for place, name, weight in ((folder, "many", 3.0), (other, "few", 1.0))
    ]
    stream = SampleStream.mixed(sources, RowNumber(), seed=3, micro_batch_size=1, views=2)
    found = seen(first(stream, 200))
    few = [numbers for row, numbers in found.items() if row >= 100]
    assert len(few) == 3
    for numbers in found.values():
        assert len(numbers) > 2
        assert len(set(numbers)) == 2
        assert numbers[2] == numbers[0] != numbers[1]


def test_a_row_that_cannot_be_read_leaves_the_views_of_others_alone(write_folder: Callable[..., Path]) -> None:
    rows = make_rows(120)
    whole = seen(first(make_stream(write_folder(rows), views=1), 120))
    broken = write_folder([{**row, "image": b"" if n == 5 else row["image"]} for n, row in enumerate(rows)], name="b")
    found = seen(first(make_stream(broken, views=1), 120))
    assert 5 not in found
    assert all(set(numbers) == set(whole[row]) for row, numbers in found.items())


def test_fewer_views_than_one_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="views is 0: give 1 fixed view"):
        make_stream(folder, views=0)


def pixels(folder: Path, size: int = 16, passes: int = 1, **options: object) -> list[dict]:
    stream = SampleStream(
        open_rows(folder, "train"),
        DistillationTransform(size, *STATISTICS, erase_probability=0.5),
        **({"seed": 3, "micro_batch_size": 1, "views": 2, "shuffle": False} | options),
    )
    return list(itertools.islice(stream, passes * ROWS))


def keys(samples: list[dict], grid: tuple[int, int] = (2, 2)) -> list[bytes]:
    batch = collate(samples)
    return view_keys(batch["pixel_values"], batch["erasing"], grid)


def test_keys_tell_every_view_from_every_other(write_folder: Callable[..., Path]) -> None:
    noise = np.random.default_rng(0)
    images = {n: encode(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for n in range(ROWS)}
    folder = write_folder(make_rows(ROWS, images=images))
    own = keys(pixels(folder, passes=4))
    assert own[2 * ROWS :] == own[: 2 * ROWS]  # the same two views again
    others = [
        keys(pixels(folder), (1, 4)),
        keys(pixels(folder, size=24)),
        keys(pixels(folder, seed=4)),
    ]
    known = [*own[: 2 * ROWS], *(key for each in others for key in each)]
    assert len(set(known)) == len(known) == 5 * ROWS


def test_keys_tell_types_erased_rectangles_and_noise_apart() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    erased = [None, Erasing(0, 0, 2, 2, 7), Erasing(0, 0, 2, 2, 8), Erasing(1, 0, 2, 2, 7)]
    found = [view_keys(image, [each], (1, 1))[0] for each in erased]
    found += view_keys(image.float(), [], (1, 1)) + view_keys(image.reshape(1, 3, 2, 8), [None], (1, 1))
    assert len(set(found)) == 6
    assert view_keys(image, [], (1, 1)) == found[:1]
