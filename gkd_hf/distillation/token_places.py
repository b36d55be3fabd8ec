"""Where the tokens of very many views are: keys and places in sorted arrays, 24 bytes for each view."""

from __future__ import annotations

import numpy as np

from gkd_hf.data.views import KEY_BYTES

_KEY = np.dtype((np.bytes_, KEY_BYTES))
_UNSORTED = 2**16  # keys that may wait in a dictionary, at some 200 bytes each, before they are sorted in


class TokenPlaces:
    """Shard and row of each key; the first place that a key was given stays its own.

    ``len``, ``key in places`` and ``places.get(key)`` as of a dictionary. What has just been added lies in one; when
    that is full it is sorted into the arrays, which are then made anew, so a lookup is a binary search.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, _KEY)
        self._where = np.empty((0, 2), np.int32)
        self._recent: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._recent)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def get(self, key: bytes) -> tuple[int, int] | None:
        """Return (shard, row), or None."""
        place = self._recent.get(key)
        if place is None and len(self._keys):
            wanted = np.frombuffer(key, _KEY)
            found = int(np.searchsorted(self._keys, wanted)[0])
            if found < len(self._keys) and self._keys[found] == wanted[0]:
                shard, row = self._where[found].tolist()
                place = (shard, row)
        return place

    def add(self, keys: bytes, shard: int) -> None:
        """Add the keys of a shard, one after the other in ``keys``, each in its row."""
        for row in range(len(keys) // KEY_BYTES):
            key = keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]
            if key not in self:
                self._recent[key] = (shard, row)
        if len(self._recent) >= max(_UNSORTED, len(self._keys) // 32):
            self._sort_in()

    def drop(self, shard: int) -> None:
        """Forget the keys of a shard."""
        self._recent = {key: place for key, place in self._recent.items() if place[0] != shard}
        others = self._where[:, 0] != shard
        self._keys, self._where = self._keys[others], self._where[others]

    def _sort_in(self) -> None:
        keys = np.frombuffer(b"".join(self._recent), _KEY)
        where = np.array(list(self._recent.values()), np.int32)
        order = np.argsort(keys)
        keys, where = keys[order], where[order]
        before = np.searchsorted(self._keys, keys)
        self._keys = np.insert(self._keys, before, keys)
        self._where = np.insert(self._where, before, where, axis=0)
        self._recent = {}
