"""A user's own data: a folder of images and one of masks, a list of classes, and a map of ids where it takes one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gkd_hf.data.domains import LabelSpace, own_label_space
from gkd_hf.data.label_maps import LabelMap, label_map
from gkd_hf.data.raw_layouts.base import RawLayout, RawSample, contents, named
from gkd_hf.errors import InputError


def is_custom(domain: str) -> bool:
    """Whether a domain is the user's own: "custom" or "custom:NAME"."""
    return domain.partition(":")[0] == "custom"


_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_classes(given: str | None) -> list[str] | None:
    """Return the names in "a,b,c" or in a file of one name a line; None for None; raises ``InputError``."""
    if given is None:
        return None
    names = _content(given).splitlines() if _is_file(given, (".txt", ".csv", ".json", ".names")) else given.split(",")
    return [name.strip() for name in names if name.strip()]


def read_id_map(given: str | None) -> dict[int, int] | None:
    """Return stored id → train id of "7:0,8:1" or of a JSON file; None for None; raises ``InputError``."""
    if given is None:
        return None
    is_file = _is_file(given, (".json", ".txt"))
    try:
        if is_file:
            pairs = json.loads(_content(given), object_pairs_hook=list)
            if not all(type(train) is int for _, train in pairs):
                raise ValueError("not whole numbers")
        else:
            pairs = [pair.split(":") for pair in given.split(",")]
        found = [(int(stored), int(train)) for stored, train in pairs]
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"id map {given}: give stored:train ids such as 7:0,8:1, or a JSON file of them") from error
    ids = [stored for stored, _ in found]
    if len(set(ids)) < len(ids):
        twice = next(stored for stored in ids if ids.count(stored) > 1)
        raise InputError(f"id map {given}: stored id {twice} is listed twice; list each once")
    return dict(found)


def _is_file(given: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is meant; raises ``InputError`` where one is named that is not there."""
    if os.path.isfile(given):
        return True
    if "," not in given and given.lower().endswith(suffixes):
        raise InputError(f"there is no file '{given}': give one that is there, or the entries themselves, by commas")
    return False


def _content(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")  # some editors put a mark before the first name
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as text ({error})") from error


_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_KNOWN = tuple(name for names in _SPLIT_FOLDERS.values() for name in names)


def _choices(root: Path, names: Sequence[str]) -> list[tuple[Path, Path]]:
    """Where the images and masks of a split may be whose folder has one of these names."""
    around = [(root / name / "images", root / name / "masks") for name in names]
    return around + [(root / "images" / name, root / "masks" / name) for name in names]


def _in_splits(root: Path) -> bool:
    return any(folder.is_dir() for pair in _choices(root, _KNOWN) for folder in pair)


def _refuse_strangers(root: Path) -> None:
    """Raise ``InputError`` for images and masks beside the folders of the splits: nobody would read them."""
    for kind in ("images", "masks"):
        found = [path.parent for path in root.glob(f"*/{kind}") if path.is_dir() and path.parent.name not in _KNOWN]
        for path in (root / kind).glob("*"):
            if path.name not in _KNOWN and (path.is_dir() or path.suffix.lower() in _SUFFIXES):
                found.append(path)
        for path in sorted(found):
            if not path.name.startswith("."):
                raise InputError(
                    f"{path} belongs to no split: beside {', '.join(_KNOWN)} nothing else is read; rename or remove it"
                )


class CustomLayout(RawLayout):
    """``images/`` and ``masks/`` whose files have the same names but for the suffix, folders below them included.

    Splits are folders around them (``train/images/a.jpg``, ``train/masks/a.png``) or directly below them
    (``images/train/a.jpg``, ``masks/train/a.png``), called train, val(idation) or test; without, all is "train".

    Args:
        classes: names in train-id order.
        id_map: stored id → train id or 255; None if the masks hold train ids (255: ignore).

    Raises:
        InputError: classes missing, repeated or too many; a map with ids that do not exist.
    """

    domain = "custom"
    splits = ("train", "validation", "test")
    description = "images/ and masks/ with the same file names but for the suffix, or both within train/, val/ …"

    def __init__(self, classes: Sequence[str], id_map: Mapping[int, int] | None = None) -> None:
        repeated = sorted({name for name in classes if list(classes).count(name) > 1})
        if not classes or repeated or not all(name.strip() for name in classes):
            what = f"'{repeated[0]}' is named twice" if repeated else "none is named, or one without a name"
            raise InputError(f"classes of your own data: {what}; name each once, in the order of their train ids")
        self._space = own_label_space(classes)
        self._map = label_map("identity" if id_map is None else id_map, len(classes))

    @property
    def label_space(self) -> LabelSpace:
        """The classes that were given."""
        return self._space

    @property
    def train_ids(self) -> LabelMap:
        """The map that was given."""
        return self._map

    def splits_in(self, root: Path) -> tuple[str, ...]:
        """Return the splits that are there; raises ``InputError`` for none, and for folders that are of no split."""
        found = tuple(split for split in self.splits if self._folders(root, split) is not None)
        if not found:
            raise InputError(f"{root} holds {contents(root) if root.is_dir() else 'nothing'}; {self.expectation}")
        if _in_splits(root):
            _refuse_strangers(root)
        return found

    def samples(self, root: Path, split: str) -> list[RawSample]:
        """Return the pairs of a split, sorted by name; raises ``InputError`` for an image or a mask without other."""
        self.check_split(split)
        folders = self._folders(root, split)
        if folders is None:
            raise InputError(f"{root} has no split '{split}'; {self.expectation}")
        images, masks = (self._files(folder) for folder in folders)
        return self.pair(images, masks)

    def _folders(self, root: Path, split: str) -> tuple[Path, Path] | None:
        choices = _choices(root, _SPLIT_FOLDERS[split])
        if split == "train" and not _in_splits(root):
            choices.append((root / "images", root / "masks"))
        there = [pair for pair in choices if pair[0].is_dir() or pair[1].is_dir()]
        if len(there) > 1:
            raise InputError(f"{there[0][0]} and {there[1][0]} are both the split '{split}': put all into one of them")
        for images, masks in there:
            folder, other = (images, masks) if images.is_dir() else (masks, images)
            if not other.is_dir():
                raise InputError(
                    f"{folder} is there but {other} is not: an image and its mask have the same name, the images "
                    "below images/ and the masks below masks/"
                )
        return there[0] if there else None

    def _files(self, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in _SUFFIXES or path.name.startswith(".") or not path.is_file():
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise InputError(f"{found[key]} and {path} have the same name but for the suffix: remove one of them")
            found[key] = path
        if not found:
            others = named(sorted({path.suffix or path.name for path in folder.rglob("*") if path.is_file()}))
            raise InputError(f"{folder} holds no image ({', '.join(_SUFFIXES)}), only: {others or 'nothing'}")
        return found
