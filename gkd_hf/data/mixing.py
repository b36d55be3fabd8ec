"""One order of the rows of several sources, by their images or by given weights: a pure function of the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gkd_hf.data.domains import MIXING_BLOCK
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.ordering import ShardOrder
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import Rows
from gkd_hf.data.streamed_order import StreamedOrder
from gkd_hf.errors import InputError

_MIXING = 2**32 - 1  # tells the seed of the mixture from those of the sources


@dataclass(frozen=True)
class Source:
    """Rows of one domain.

    Attributes:
        rows: from ``open_rows``, or any ``IterableDataset`` with an ``image`` (and ``label``, ``id``) column.
        domain: name for messages and reports.
        label_map: labels are decoded, mapped and yielded only if given.
        weight: share of the samples, in proportion to those of the other sources; None: by images.
        num_rows: rows in one pass of an ``IterableDataset`` if known.
    """

    rows: Rows
    domain: str
    label_map: LabelMap | None = None
    weight: float | None = None
    num_rows: int | None = None

    @property
    def size(self) -> int | None:
        """Rows in one pass; None if nobody knows yet."""
        return len(self.rows) if isinstance(self.rows, ShardRows) else self.num_rows

    def order(self, seed: int, number: int, *, shuffle: bool, buffer_size: int) -> ShardOrder | StreamedOrder:
        """Return its own order, as the ``number``-th source."""
        if isinstance(self.rows, ShardRows):
            return ShardOrder(self.rows, seed=seed, shuffle=shuffle, source=number, set_rows=buffer_size)
        return StreamedOrder(
            self.rows,
            seed=seed,
            shuffle=shuffle,
            buffer_size=buffer_size,
            num_rows=self.num_rows,
            name=self.domain,
        )


def check_sources(sources: Sequence[Source]) -> None:
    """Raise ``InputError`` for no source, one domain twice, and weights or label maps of some sources only."""
    if not sources:
        raise InputError("no source: give one or more domains")
    names = [source.domain for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"domain '{twice}' is mixed with itself: name it once, with a weight if it shall come more often"
        )
    for what, given in (
        ("weight", [source.weight is not None for source in sources]),
        ("label map", [source.label_map is not None for source in sources]),
    ):
        if any(given) and not all(given):
            raise InputError(
                f"domain '{names[given.index(True)]}' has a {what} and '{names[given.index(False)]}' has none: give "
                "it for all that are mixed, or for none"
            )
    if sources[0].weight is not None:
        quotas([source.weight for source in sources], names)


def quotas(weights: Sequence[float], names: Sequence[str]) -> np.ndarray:
    """Positions of each source in a block of 1024, by largest remainder.

    Raises ``InputError`` for a weight that is not a finite number above 0, or too small to get one position.
    """
    for weight, name in zip(weights, names, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"domain '{name}' has the weight {weight:g}: give a number above 0, or leave it out")
    exact = np.array(weights, dtype=np.float64) / math.fsum(weights) * MIXING_BLOCK
    found = np.floor(exact).astype(np.int64)
    remainders = np.argsort(found - exact, kind="stable")
    found[remainders[: MIXING_BLOCK - found.sum()]] += 1
    for quota, name in zip(found, names, strict=True):
        if quota == 0:
            raise InputError(
                f"domain '{name}' has a weight of less than 1/{MIXING_BLOCK} of all: raise it, or leave it out"
            )
    return found


class MixedOrder:
    """The endless sequence of the rows of all sources.

    By images, one pass is the union: each row of each source once, in one shuffled order, which is uniform where each
    source's own is. By weights, each 1024 positions hold every source's quota, shuffled; each source goes through its
    own passes. Every process and worker that builds this with the same arguments sees the same sequence.

    Args:
        sources: checked by `check_sources`.
        seed: of the run.
        shuffle: if not, the sources follow one another in a pass or in a block, each in its stored order.
        buffer_size: of streamed sources.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, shuffle: bool, buffer_size: int) -> None:
        self._seed = seed
        self._shuffle = shuffle
        self._weights = [source.weight for source in sources]
        self._names = [source.domain for source in sources]
        self.orders = [
            source.order(seed, number, shuffle=shuffle, buffer_size=buffer_size)
            for number, source in enumerate(sources)
        ]
        self._shares: np.ndarray | None = None
        self._block = lru_cache(4)(self._drawn)

    @property
    def num_rows(self) -> int:
        """Rows of all sources in one pass."""
        return sum(order.num_rows for order in self.orders)

    def row_counts(self) -> list[Callable[[], int]]:
        """What tells the rows of each source; a streamed one may have to be read for it."""
        return [lambda order=order: order.num_rows for order in self.orders]

    def source(self, position: int) -> int:
        """Number of the source whose row stands at ``position``."""
        return self._find(position)[0]

    def row(self, position: int) -> dict:
        """Return the raw row at ``position``, which must not lie before ``release``d ones."""
        source, own = self._find(position)
        return self.orders[source].row(own)

    def place(self, position: int) -> tuple[str | None, int | None]:
        """Return the name of the row's shard and the row within it; None for both where it is streamed."""
        source, own = self._find(position)
        return self.orders[source].place(own)

    def pass_number(self, position: int) -> int:
        """Return which pass over its source the row at ``position`` belongs to, from 0 on."""
        source, own = self._find(position)
        return own // self.orders[source].num_rows

    def release(self, position: int) -> None:
        """Rows before ``position`` will not be asked for again."""
        for source, order in enumerate(self.orders):
            if isinstance(order, StreamedOrder):
                order.release(self._before(source, position))

    def _find(self, position: int) -> tuple[int, int]:
        if len(self.orders) == 1:
            return 0, position
        block, offset = divmod(position, self._length())
        source = int(self._block(block)[0][offset])
        return source, self._before(source, position)

    def _before(self, source: int, position: int) -> int:
        """How many positions of a source come before one: what that is in the source's own order."""
        if len(self.orders) == 1:
            return position
        block, offset = divmod(position, self._length())
        places = self._block(block)[1][source]
        return block * len(places) + int(places.searchsorted(offset))

    def _length(self) -> int:
        """Positions in which every source has its share: a pass by images, else a block."""
        if self._shares is None:
            by_images = self._weights[0] is None
            own = [order.num_rows for order in self.orders] if by_images else quotas(self._weights, self._names)
            self._shares = np.asarray(own, dtype=np.int64)
        return int(self._shares.sum())

    def _drawn(self, block: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The source at each position, and the positions of each source."""
        drawn = np.repeat(np.arange(len(self.orders), dtype=np.uint16), self._shares)
        if self._shuffle:
            np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(block, _MIXING))).shuffle(drawn)
        return drawn, [np.flatnonzero(drawn == source) for source in range(len(self.orders))]
