"""The order of the rows over all passes: a pure function of data set, seed and position.

A pass is drawn by row groups, since reading one row reads its group. The groups of all shards are permuted and dealt
to lanes in turn; the rows of each are shuffled; the pass takes one row of each lane in turn. So a group's rows are as
many positions apart as there are lanes, and as many groups are in use at a time, which the cache of `ShardRows` holds.
With groups of one row, as prepared shards have them, this is a uniform permutation of the rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gkd_hf.data.rows import CACHE_BYTES, ShardRows

_LANES = (8, 1024)


def pass_order(rows: ShardRows, seed: int, number: int, source: int = 0) -> np.ndarray:
    """Return the indices of all rows (int64) in the order of pass ``number``; each pass and source has its own."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, source)))
    ends = rows.group_rows.cumsum()
    return _lanes_in_turn(rows.group_rows, ends - rows.group_rows, num_lanes(rows), rng)


def num_lanes(rows: ShardRows) -> int:
    """How many groups are in use at a time: a power of two, so that readers in turn share no lane where batches allow.

    At most half of the cache is asked for: least-recently-used groups, read in turn, all miss as soon as one does not
    fit.
    """
    wanted = CACHE_BYTES // 2 * len(rows.group_rows) // max(1, rows.num_bytes)
    least, most = _LANES
    return max(least, min(most, 1 << max(0, int(wanted).bit_length() - 1)))


def _lanes_in_turn(sizes: np.ndarray, firsts: np.ndarray, lanes: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle rows given by groups: ``sizes`` and index of the first row of each."""
    dealt = rng.permutation(len(sizes))
    sizes, firsts = sizes[dealt], firsts[dealt]
    group = np.repeat(np.arange(len(sizes)), sizes)
    inside = np.arange(len(group)) - np.repeat(sizes.cumsum() - sizes, sizes)
    shuffled = inside[np.lexsort((rng.random(len(group)), group))]
    # Where each group begins in its lane: after the groups that were dealt to it before.
    rounds = np.pad(sizes, (0, -len(sizes) % lanes)).reshape(-1, lanes)
    begins = (rounds.cumsum(axis=0) - rounds).ravel()[: len(sizes)]
    turn = np.lexsort((group % lanes, begins[group] + inside))
    return (firsts[group] + shuffled)[turn]


class ShardOrder:
    """The endless sequence of the rows of shards: pass 0, then pass 1 in another order, ….

    Every process and worker that builds this with the same arguments sees the same sequence; any position is reached
    at once, and only the rows asked for are read.

    Args:
        rows: of one split.
        seed: of the run.
        shuffle: a new order in each pass, or the stored order in every pass.
        source: which of a mixture's sources it is.
    """

    def __init__(self, rows: ShardRows, *, seed: int, shuffle: bool, source: int = 0) -> None:
        self._rows = rows
        self._shuffle = shuffle
        # A reader that replaces a bad row at the end of a pass looks into the next one and back.
        self._pass = lru_cache(2)(lambda number: pass_order(rows, seed, number, source))

    @property
    def num_rows(self) -> int:
        """Rows in one pass."""
        return len(self._rows)

    def row(self, position: int) -> dict:
        """Return the raw row at ``position``, over all passes."""
        return self._rows[self._index(position)]

    def place(self, position: int) -> tuple[str, int]:
        """Return the name of the row's shard, and the row counted from 0 within it."""
        return self._rows.place(self._index(position))

    def _index(self, position: int) -> int:
        number, offset = divmod(position, len(self._rows))
        return int(self._pass(number)[offset]) if self._shuffle else offset
