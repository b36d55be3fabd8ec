"""A fixed part of a data set's labelled images, for training with fewer labels (arXiv 2603.02554, 1/16 to 1/2)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows
from gkd_hf.errors import InputError

_SUBSET = 2**32 - 1  # tells this seed from those of the orders, whose keys have two parts
_LARGEST_DENOMINATOR = 10**6


def kept_images(num_images: int, fraction: float) -> int:
    """Return ⌈fraction · num_images⌉, at least 1.

    Args:
        num_images: ≥ 1.
        fraction: in (0, 1]; taken as the ratio of whole numbers (up to a million) that it stands for, so that 0.07 of
            100 images are 7, not 8.
    """
    return max(1, math.ceil(Fraction(fraction).limit_denominator(_LARGEST_DENOMINATOR) * num_images))


def kept_rows(num_rows: int, fraction: float, seed: int) -> np.ndarray:
    """Draw rows without replacement: int64, rising, `kept_images` of them.

    They are the first of one permutation of all rows, which seed and number of rows decide: those of a smaller
    fraction are among those of a larger one.
    """
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_SUBSET,))).permutation(num_rows)
    return np.sort(order[: kept_images(num_rows, fraction)])


def labelled_subset(rows: Rows, fraction: float, seed: int, where: str) -> Rows:
    """Return the rows to train on, a function of the rows, the fraction and the seed alone; all for fraction 1.

    Only their row groups are read, and only shards that hold one of them are fetched. Of a Hub data set with many rows
    in each shard that may still be every shard.

    Args:
        rows: of the whole split.
        fraction: in (0, 1].
        seed: ≥ 0, which images they are; not the run's.
        where: domain and place of the rows, for messages.

    Raises ``InputError`` for rows that are streamed, which cannot be picked.
    """
    if fraction == 1:
        return rows
    if not isinstance(rows, ShardRows):
        raise InputError(
            f"stages.task.label_fraction is {fraction:g}, but the rows of {where} can neither be counted nor picked: "
            "it is not stored as parquet shards; store it as such (scripts/prepare_domain.py does), or leave "
            "label_fraction at 1"
        )
    kept = kept_rows(len(rows), fraction, seed)
    return rows if len(kept) == len(rows) else rows.subset(kept)


def left_out(rows: ShardRows, fraction: float, seed: int) -> ShardRows | None:
    """Return the rows that `labelled_subset` leaves out; None if it takes them all."""
    others = np.setdiff1d(np.arange(len(rows)), kept_rows(len(rows), fraction, seed))
    return rows.subset(others) if len(others) else None
