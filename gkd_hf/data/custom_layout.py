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
    """Return the names in "a,b,c" or in a file of one name a line; None for None."""
    if given is None:
        return None
    names = _content(given).splitlines() if os.path.isfile(given) else given.split(",")
    return [name.strip() for name in names if name.strip()]


def read_id_map(given: str | None) -> dict[int, int] | None:
    """Return stored id → train id of "7:0,8:1" or of a JSON file; None for None; raises ``InputError``."""
    if given is None:
        return None
    try:
        if os.path.isfile(given):
            return {int(stored): int(train) for stored, train in json.loads(_content(given)).items()}
        return {int(stored): int(train) for stored, train in (pair.split(":") for pair in given.split(","))}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"id map {given}: give stored:train ids such as 7:0,8:1, or a JSON file of them") from error


def _content(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as text ({error})") from error


class CustomLayout(RawLayout):
    """``images/`` and ``masks/`` whose files have the same names but for the suffix, folders below them included.

    Splits are folders around them (``train/images/a.jpg``, ``train/masks/a.png``) or directly below them
    (``images/train/a.jpg``, ``masks/train/a.png``), called train, validation or test; without, all is "train".

    Args:
        classes: names in train-id order.
        id_map: stored id → train id or 255; None if the masks hold train ids (255: ignore).

    Raises:
        InputError: classes missing, repeated or too many; a map with ids that do not exist.
    """

    domain = "custom"
    splits = ("train", "validation", "test")
    description = (
        "images/ and masks/ with the same file names but for the suffix, or both within train/, validation/ …"
    )

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
        """Return the splits that are there."""
        found = tuple(split for split in self.splits if self._folders(root, split) is not None)
        if not found:
            raise InputError(f"{root} holds {contents(root) if root.is_dir() else 'nothing'}; {self.expectation}")
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
        choices = [
            (root / split / "images", root / split / "masks"),
            (root / "images" / split, root / "masks" / split),
        ]
        if split == "train" and not any(
            folder.is_dir() for name in self.splits for folder in (root / "images" / name, root / name / "images")
        ):
            choices.append((root / "images", root / "masks"))
        for images, masks in choices:
            if images.is_dir():
                if not masks.is_dir():
                    raise InputError(f"{images} is there but {masks} is not: put the masks there, named as the images")
                return images, masks
        return None

    def _files(self, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in _SUFFIXES or path.name.startswith("."):
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise InputError(f"{found[key]} and {path} have the same name but for the suffix: remove one of them")
            found[key] = path
        if not found:
            others = named(sorted({path.suffix or path.name for path in folder.rglob("*") if path.is_file()}))
            raise InputError(f"{folder} holds no image ({', '.join(_SUFFIXES)}), only: {others or 'nothing'}")
        return found
