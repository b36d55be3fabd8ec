"""Maps from the ids stored in label images to train ids, by name or from a recipe.

The named maps are those of the data sets' own publications, as used by GKD (arXiv 2603.02554). A value that a map
does not list is an error, never silently "ignore": a wrong map must be seen before a night of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gkd_hf.data.bad_rows import WrongLabel
from gkd_hf.data.domains import CITYSCAPES_CLASSES, IGNORE_INDEX, MAX_CLASSES
from gkd_hf.errors import InputError, nearest

# Marks "not in the map" inside the lookup table, so that one gather finds both the ids and the strangers.
_UNKNOWN = MAX_CLASSES

_CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
_SYNTHIA_IDS = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
    20: 16, 12: 17, 11: 18,
}  # fmt: skip

MAPILLARY_NAMES = (
    "Bird", "Ground Animal", "Curb", "Fence", "Guard Rail", "Barrier", "Wall", "Bike Lane", "Crosswalk - Plain",
    "Curb Cut", "Parking", "Pedestrian Area", "Rail Track", "Road", "Service Lane", "Sidewalk", "Bridge", "Building",
    "Tunnel", "Person", "Bicyclist", "Motorcyclist", "Other Rider", "Lane Marking - Crosswalk",
    "Lane Marking - General", "Mountain", "Sand", "Sky", "Snow", "Terrain", "Vegetation", "Water", "Banner", "Bench",
    "Bike Rack", "Billboard", "Catch Basin", "CCTV Camera", "Fire Hydrant", "Junction Box", "Mailbox", "Manhole",
    "Phone Booth", "Pothole", "Street Light", "Pole", "Traffic Sign Frame", "Utility Pole", "Traffic Light",
    "Traffic Sign (Back)", "Traffic Sign (Front)", "Trash Can", "Bicycle", "Boat", "Bus", "Car", "Caravan",
    "Motorcycle", "On Rails", "Other Vehicle", "Trailer", "Truck", "Wheeled Slow", "Car Mount", "Ego Vehicle",
    "Unlabeled",
)  # fmt: skip
"""Readable names of Mapillary Vistas v1.2 in id order (config_v1.2.json)."""

_MAPILLARY_RULES = (
    (("trafficsign", "front", "back"), "traffic sign"),
    (("onrail",), "train"),
    (("cyclist", "rider"), "rider"),
    (("pole", "streetlight"), "pole"),
    (("curb", "pedestrianarea"), "sidewalk"),
    (("crosswalkplain", "parking", "bikelane", "servicelane", "lanemarking"), "road"),
)


def cityscapes_ids_from_names(names: Iterable[str]) -> dict[int, int]:
    """Map Mapillary-like readable class names (in id order) to Cityscapes' train ids; the first rule wins."""
    exact = {name.replace(" ", ""): index for index, name in enumerate(CITYSCAPES_CLASSES)}
    table = {}
    for index, name in enumerate(names):
        key = name.lower().replace(" ", "").replace("-", "")
        if key in exact:
            table[index] = exact[key]
            continue
        target = next((target for words, target in _MAPILLARY_RULES if any(word in key for word in words)), None)
        table[index] = IGNORE_INDEX if target is None else CITYSCAPES_CLASSES.index(target)
    return table


def _ignoring(ids: Mapping[int, int], known: Iterable[int]) -> dict[int, int]:
    """Complete ``ids``: every other value that the data set is known to use becomes "ignore"."""
    return dict.fromkeys(known, IGNORE_INDEX) | dict(ids)


_NAMED: dict[str, dict[int, int]] = {
    "gtav": _ignoring(_CITYSCAPES_IDS, range(35)),
    "cityscapes": _ignoring(_CITYSCAPES_IDS, range(35)),
    "synthia": _ignoring(_SYNTHIA_IDS, range(23)),
    "urbansyn": {value: value for value in range(19)} | {19: IGNORE_INDEX},
    "mapillary": cityscapes_ids_from_names(MAPILLARY_NAMES),
    "isprs": {0: IGNORE_INDEX} | {value: value - 1 for value in range(1, 7)},
}
LABEL_MAPS = ("identity", *_NAMED)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A lookup table from stored ids to train ids (0..C-1, 255 = ignore).

    Attributes:
        name: for messages.
        table: uint8, 256 or 65,536 entries: the train id of each stored id.
        known: bool, same length: whether the map lists that stored id.
    """

    name: str
    table: np.ndarray
    known: np.ndarray
    _lookup: np.ndarray = field(init=False, repr=False)
    _keeps: int | None = field(init=False, repr=False)  # the map changes nothing in 0 … keeps - 1 and 255

    def __post_init__(self) -> None:
        kept = self.known[:256] & (self.table[:256] == np.arange(256))
        first = int(np.argmin(kept)) if not kept.all() else 255
        object.__setattr__(self, "_keeps", first if kept[IGNORE_INDEX] else None)
        object.__setattr__(self, "_lookup", np.where(self.known, self.table, _UNKNOWN).astype(np.uint8))

    def apply(self, label: np.ndarray, where: str) -> np.ndarray:
        """Return the train ids (uint8) of ``label`` (any integer type, H×W); ``label`` itself where none changes.

        Raises ``WrongLabel`` naming ``where`` and at most ten of the values that the map does not list.
        """
        if label.dtype == np.uint8:
            if self._keeps is not None and int((label + np.uint8(1)).max(initial=0)) <= self._keeps:
                return label
            mapped = np.frombuffer(label.tobytes().translate(self._lookup[:256].tobytes()), dtype=np.uint8)
            mapped = mapped.reshape(label.shape)
        else:
            inside = (label >= 0) & (label < len(self._lookup))
            mapped = np.where(inside, self._lookup.take(label, mode="clip"), np.uint8(_UNKNOWN))
        if (mapped == _UNKNOWN).any():
            values = np.unique(label[mapped == _UNKNOWN])
            shown = ", ".join(str(value) for value in values[:10]) + (", …" if len(values) > 10 else "")
            raise WrongLabel(
                f"{where}: label value(s) {shown} are not in the label map '{self.name}' "
                f"(it lists {self._listed()}); correct the label map in the recipe or the label image",
                f"label: values outside the map ({shown}; '{self.name}' lists {self._listed()})",
            )
        return mapped

    def _listed(self) -> str:
        values = np.flatnonzero(self.known)
        runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def label_map(name_or_mapping: str | Mapping[int, int], num_classes: int) -> LabelMap:
    """Return the map called by name (``LABEL_MAPS``) or given as ``{stored id: train id}``.

    Stored id 255 is "ignore" in every map unless the mapping says otherwise. Raises ``InputError`` for an unknown
    name, for what is neither name nor mapping, for a stored id outside 0..65535, and for a train id that is neither in
    0..``num_classes``-1 nor 255.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise InputError(f"{num_classes} classes: between 1 and {MAX_CLASSES} are possible")
    if isinstance(name_or_mapping, str):
        name = name_or_mapping
        if name == "identity":
            ids: Mapping[int, int] = {value: value for value in range(num_classes)}
        elif name in _NAMED:
            ids = _NAMED[name]
        else:
            hint = nearest(name, LABEL_MAPS) or f": known are {', '.join(LABEL_MAPS)}"
            raise InputError(f"unknown label map '{name}'{hint} (or give a mapping of stored ids to train ids)")
    elif isinstance(name_or_mapping, Mapping):
        name, ids = "of the recipe", name_or_mapping
    else:
        raise InputError(
            f"a label map is a name ({', '.join(LABEL_MAPS)}) or a mapping of stored ids to train ids, such as "
            f"{{7: 0, 8: 1}}, not {'null' if name_or_mapping is None else repr(name_or_mapping)}"
        )
    return _from_ids(name, {IGNORE_INDEX: IGNORE_INDEX} | dict(ids), num_classes)


def _from_ids(name: str, ids: Mapping[int, int], num_classes: int) -> LabelMap:
    for stored, train in ids.items():
        if isinstance(stored, bool) or not isinstance(stored, int) or not 0 <= stored <= 65535:
            raise InputError(f"label map '{name}': stored id {stored!r} is not a whole number in 0..65535")
        in_range = isinstance(train, int) and not isinstance(train, bool) and 0 <= train < num_classes
        if not in_range and train != IGNORE_INDEX:
            raise InputError(
                f"label map '{name}': stored id {stored} goes to {train!r}, but there are {num_classes} classes; "
                f"train ids are 0..{num_classes - 1} or {IGNORE_INDEX} (ignore)"
            )
    size = 256 if max(ids) < 256 else 65536
    table = np.full(size, IGNORE_INDEX, dtype=np.uint8)
    known = np.zeros(size, dtype=bool)
    stored = np.fromiter(ids.keys(), dtype=np.int64, count=len(ids))
    table[stored] = np.fromiter(ids.values(), dtype=np.int64, count=len(ids))
    known[stored] = True
    return LabelMap(name, table, known)
