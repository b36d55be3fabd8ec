"""The order of the rows over all passes: a pure function of data set, seed and position.

A pass is drawn by row groups, since reading one row reads its group. The groups of all shards are permuted and the
rows of each shuffled; the sequence of all rows so drawn is begun at a random row, as a ring, and cut into lanes of
equal length; the pass takes one row of each lane in turn. So every row is at every position equally often, whatever
the sizes of the groups; a group's rows in one lane are as many positions apart as there are lanes; and no more groups
than lanes are in use at a time, which the cache of `ShardRows` holds. A group that a cut divides may be read once for
each part. With groups of one row, as prepared shards have them, this is a uniform permutation of the rows.

Where shards are fetched as they are reached, they are permuted and taken in sets of no fewer rows than a shuffle
buffer would hold, and this is done within each set, so that training begins before all of them are here. A folder is
one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gkd_hf.data.rows import CACHE_BYTES, ShardRows

_LANES = (8, 1024)


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        rows: int64, the indices of all rows in their order.
        set_ends: int64, where each set of shards ends in it.
        set_shards: the shards of each set.
    """

    rows: np.ndarray
    set_ends: np.ndarray
    set_shards: list[np.ndarray]


def draw_pass(rows: ShardRows, seed: int, number: int, source: int = 0, *, set_rows: int = 2048) -> Pass:
    """Draw pass ``number``; each pass and source has its own, always the same for the same arguments.

    Args:
        set_rows: least number of rows in a set of shards that have to be fetched.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, source)))
    sizes, firsts = rows.group_rows, rows.group_rows.cumsum() - rows.group_rows
    if not rows.store.remote:
        order = _lanes_in_turn(sizes, firsts, num_lanes(rows), rng)
        return Pass(order, np.array([len(order)]), [np.arange(len(rows.shards))])
    shards = rng.permutation(len(rows.shards))
    # A set ends with the shard that fills it; what is left at the end of a pass joins the last one.
    ends = rows.shard_rows[shards].cumsum()
    cuts, filled = [], 0
    for place, end in enumerate(ends[:-1], start=1):
        if end - filled >= set_rows and ends[-1] - end >= set_rows:
            cuts.append(place)
            filled = end
    set_shards = np.split(shards, cuts)
    shard_ends = rows.shard_groups.cumsum()
    orders = []
    for members in set_shards:
        groups = np.concatenate([np.arange(shard_ends[m] - rows.shard_groups[m], shard_ends[m]) for m in members])
        orders.append(_lanes_in_turn(sizes[groups], firsts[groups], num_lanes(rows), rng))
    return Pass(np.concatenate(orders), np.cumsum([len(order) for order in orders]), set_shards)


def num_lanes(rows: ShardRows) -> int:
    """How many groups are in use at a time: a power of two, so that readers in turn share no lane where batches allow.

    At most half of the cache is asked for: least-recently-used groups, read in turn, all miss as soon as one does not
    fit.
    """
    sizes, stored = rows.group_rows, rows.stored_group_rows
    # A lane is in a group for as long as that has rows: of groups that differ, the large ones are more often in use.
    # A group is held whole, also where few of its rows are kept.
    in_use = rows.num_bytes * int((sizes * stored).sum())
    wanted = CACHE_BYTES // 2 * int(sizes.sum()) * int(stored.sum()) // max(1, in_use)
    least, most = _LANES
    return max(least, min(most, 1 << max(0, int(wanted).bit_length() - 1)))


def _lanes_in_turn(sizes: np.ndarray, firsts: np.ndarray, lanes: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle rows given by groups: ``sizes`` and index of the first row of each."""
    dealt = rng.permutation(len(sizes))
    sizes, firsts = sizes[dealt], firsts[dealt]
    count = int(sizes.sum())
    group = np.repeat(np.arange(len(sizes)), sizes)
    inside = np.arange(count) - np.repeat(sizes.cumsum() - sizes, sizes)
    drawn = firsts[group] + inside[np.lexsort((rng.random(count), group))]
    drawn = np.roll(drawn, rng.integers(max(1, count)))
    # Lanes next to each other may share a group, so their turns are permuted; those whose turn comes first are longer.
    turns = rng.permutation(lanes)
    lengths = (count - 1 - turns) // lanes + 1
    turn, step = np.arange(count) % lanes, np.arange(count) // lanes
    begins = np.empty(lanes, np.int64)
    begins[turns] = lengths.cumsum() - lengths
    return drawn[begins[turn] + step]


class ShardOrder:
    """The endless sequence of the rows of shards: pass 0, then pass 1 in another order, ….

    Every process and worker that builds this with the same arguments sees the same sequence; any position is reached
    at once, and only the rows asked for are read.

    Args:
        rows: of one split.
        seed: of the run.
        shuffle: a new order in each pass, or the stored order in every pass.
        source: which of a mixture's sources it is.
        set_rows: as of `draw_pass`.
    """

    def __init__(self, rows: ShardRows, *, seed: int, shuffle: bool, source: int = 0, set_rows: int = 2048) -> None:
        self._rows = rows
        self._shuffle = shuffle
        # A reader that replaces a bad row at the end of a pass looks into the next one and back.
        self._pass = lru_cache(2)(lambda number: draw_pass(rows, seed, number, source, set_rows=set_rows))
        self._expected: tuple[int, int] | None = None

    @property
    def num_rows(self) -> int:
        """Rows in one pass."""
        return len(self._rows)

    def row(self, position: int) -> dict:
        """Return the raw row at ``position``, over all passes."""
        if self._rows.store.remote:
            self._expect(position)
        return self._rows[self._index(position)]

    def place(self, position: int) -> tuple[str, int]:
        """Return the name of the row's shard, and the row counted from 0 within it."""
        return self._rows.place(self._index(position))

    def _index(self, position: int) -> int:
        number, offset = divmod(position, len(self._rows))
        return int(self._pass(number).rows[offset]) if self._shuffle else offset

    def _expect(self, position: int) -> None:
        """Let the shards of this set and of the next one be fetched."""
        number, offset = divmod(position, len(self._rows))
        if not self._shuffle:
            here = self._rows.shard(offset)
            if self._expected != (0, here):
                self._expected = (0, here)
                self._rows.expect(range(here, min(here + 2, len(self._rows.shards))))
            return
        drawn = self._pass(number)
        here = int(drawn.set_ends.searchsorted(offset, side="right"))
        if self._expected != (number, here):
            self._expected = (number, here)
            self._rows.expect(int(shard) for members in drawn.set_shards[here : here + 2] for shard in members)
