"""What every raw layout shares: finding files, pairing images with labels, and reading label encodings."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from gkd_hf.data.decoding import CorruptImage, decode_image, decode_label
from gkd_hf.data.domains import LabelSpace, label_space
from gkd_hf.data.label_maps import LabelMap, label_map
from gkd_hf.errors import InputError

_NAMED_FILES = 3  # so many file names make an error clear; more would hide it


class BadSample(InputError):
    """What is wrong is one sample's own content, such as a damaged file or a label value that nobody defined.

    Attributes:
        reason: for lists of such samples: the column, a colon and what is wrong with it, without the file's name;
            what differs between samples of one reason stands in parentheses.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)  # both, or it could not leave a worker process
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RawSample:
    """One sample where it lies on the disk.

    Attributes:
        id: unique in its domain and split.
        image, label: the files; no label where the data has none.
        crop: (left, top, right, bottom) in pixels, if the sample is a piece of both files.
    """

    id: str
    image: Path
    label: Path | None
    crop: tuple[int, int, int, int] | None = None


class RawLayout(ABC):
    """How one domain lies on the disk as its publishers distribute it.

    Attributes:
        domain: name in ``domains.DOMAINS``.
        description: the folders and encodings as distributed, in a few lines, for help texts and errors.
        splits: the names of the splits the data set has, as ``Domain.splits`` uses them.
        domain_label_map: name of the map from the ids in its label files to train ids (``label_maps.LABEL_MAPS``).
    """

    domain: str
    description: str
    splits: tuple[str, ...]
    domain_label_map: str = "identity"

    @abstractmethod
    def samples(self, root: Path, split: str) -> list[RawSample]:
        """Return the samples of a split, sorted by id.

        Raises ``InputError`` for an unknown split, for missing folders, and for an image without label or a label
        without image.
        """

    def splits_in(self, root: Path) -> tuple[str, ...]:
        """Return those of ``splits`` that can be read from ``root``; others would be an error or are not made."""
        return self.splits

    def read_image(self, sample: RawSample) -> tuple[bytes, str]:
        """Return the bytes of a sample's image and the suffix of its format, such as ``.jpg``.

        They are the file's own bytes, unless the sample is a crop. Raises ``InputError`` for an unreadable file, and
        ``BadSample`` for a crop of a damaged one; damage to a file that is not decoded stays unseen.
        """
        return file_bytes(sample.image), sample.image.suffix.lower()

    def read_label(self, sample: RawSample) -> np.ndarray:
        """Return a sample's train ids, H×W uint8, 255 = ignore.

        Raises ``WrongLabel`` for values that the data set does not define, and as `read_stored`.
        """
        path = self.label_of(sample)
        return self.id_map(sample).apply(self.read_stored(sample), str(path))

    def read_stored(self, sample: RawSample) -> np.ndarray:
        """Return a sample's label in the data set's own ids, H×W integers.

        Raises ``InputError`` for a file that is missing or cannot be read, ``BadSample`` for one that is damaged, and
        ``WrongLabel`` for colours in place of ids.
        """
        return stored_ids(self.label_of(sample))

    def id_map(self, sample: RawSample) -> LabelMap:
        """Return the map from what `read_stored` gives to train ids."""
        return self.train_ids

    @functools.cached_property
    def train_ids(self) -> LabelMap:
        """The map from the ids in this data set's label files to train ids."""
        return label_map(self.domain_label_map, len(self.label_space.classes))

    @property
    def label_space(self) -> LabelSpace:
        """The classes; raises ``InputError`` for a domain without its own."""
        return label_space(self.domain)

    def label_of(self, sample: RawSample) -> Path:
        """Return the label file of ``sample``; raises ``InputError`` if it has none."""
        if sample.label is None:
            raise InputError(f"{self.domain}: sample '{sample.id}' ({sample.image}) has no label")
        return sample.label

    def file_size(self, path: Path) -> int:
        """Return the bytes of a sample's file; raises ``InputError`` if it is not there."""
        try:
            return path.stat().st_size
        except OSError as error:
            raise InputError(f"raw file {path} cannot be read: {error.strerror}") from error

    def folder(self, root: Path, *choices: str) -> Path:
        """Return the first folder of ``choices`` under ``root``; raises ``InputError`` telling what is there."""
        for choice in choices:
            if (root / choice).is_dir():
                return root / choice
        wanted = " or ".join(f"{choice}/" for choice in choices)
        if not root.is_dir():
            raise InputError(f"{self.domain}: the folder {root} does not exist; {self.expectation}")
        raise InputError(f"{self.domain}: {root} holds no {wanted}; it holds {contents(root)}; {self.expectation}")

    def check_split(self, split: str) -> None:
        """Raise ``InputError`` unless ``split`` is one of ``splits``."""
        if split not in self.splits:
            raise InputError(f"{self.domain} has no split '{split}'; it has {', '.join(self.splits)}")

    @property
    def expectation(self) -> str:
        """The end of an error about missing files, on one line."""
        lines = (" ".join(line.split()) for line in self.description.splitlines())
        return f"expected is the layout as distributed: {'; '.join(lines)}"

    def collect(
        self,
        folder: Path,
        endings: Iterable[str],
        *,
        prefix: str = "",
        recursive: bool = False,
        relative: bool = False,
    ) -> dict[str, Path]:
        """Return key → file of all files in ``folder`` that are called ``prefix`` + key + one of ``endings``.

        Endings are compared without case, the first that fits counts; hidden files are passed over. ``relative`` puts
        the sub-folders into the key. Raises ``InputError`` if there is no such file, or if two files have one key.
        """
        endings = tuple(endings)
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            name = path.name
            ending = next((ending for ending in endings if name.lower().endswith(ending.lower())), None)
            if ending is None or not name.startswith(prefix) or name.startswith(".") or not path.is_file():
                continue
            key = name[len(prefix) : -len(ending)]
            if relative:
                key = (path.relative_to(folder).parent / key).as_posix()
            if key in found:
                raise InputError(f"{self.domain}: {found[key]} and {path} are both called '{key}'; remove one of them")
            found[key] = path
        if not found:
            wanted = " or ".join(f"{prefix}*{ending}" for ending in endings)
            below = " or below it" if recursive else ""
            raise InputError(
                f"{self.domain}: no file called {wanted} in {folder}{below}; it holds {contents(folder)}; "
                f"{self.expectation}"
            )
        return found

    def pair(self, images: Mapping[str, Path], labels: Mapping[str, Path]) -> list[RawSample]:
        """Return one sample for each key, sorted; raises ``InputError`` for keys that are in one of the two only."""
        for have, lack, kinds in ((images, labels, ("image", "label")), (labels, images, ("label", "image"))):
            alone = [str(have[key]) for key in sorted(have.keys() - lack.keys())]
            if alone:
                raise InputError(
                    f"{self.domain}: {len(alone)} {kinds[0]}(s) without {kinds[1]}: {named(alone)}; "
                    f"add the missing {kinds[1]}s or remove these files"
                )
        return [RawSample(key, images[key], labels[key]) for key in sorted(images)]


def named(names: Collection[object]) -> str:
    """Return a readable list of the first few names."""
    shown = ", ".join(str(name) for name in list(names)[:_NAMED_FILES])
    return shown + (", …" if len(names) > _NAMED_FILES else "")


def contents(folder: Path) -> str:
    """Return what an error says about the contents of an existing folder."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return named(names) or "nothing"


def file_bytes(path: Path) -> bytes:
    """Return a file's bytes; raises ``InputError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); download it again") from error


def stored_ids(path: Path) -> np.ndarray:
    """Return a label file's own ids, H×W (uint8, uint16 or int32); a palette image gives its indices.

    Raises ``InputError`` for a file that cannot be read, ``BadSample`` for a damaged one, ``WrongLabel`` for colours.
    """
    return ids_in(file_bytes(path), str(path))


def ids_in(cell: Mapping | bytes | None, where: str) -> np.ndarray:
    """Return the ids of an encoded label, H×W; raises as `stored_ids`, naming ``where``."""
    try:
        return decode_label(cell, where)
    except CorruptImage as error:
        raise BadSample(f"{where}: {error}; download the file again", str(error)) from error


def rgb_image(path: Path, column: str = "image") -> PIL.Image.Image:
    """Return a file of ``column`` (image, label) as an upright RGB image; raises as `stored_ids`."""
    data = file_bytes(path)
    try:
        return decode_image(data, str(path))
    except CorruptImage as error:
        reason = column + str(error).removeprefix("image")
        raise BadSample(f"{path}: {reason}; download the file again", reason) from error


def size_of(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image file; raises as `stored_ids`."""
    return _header(path, "image").size


def is_colour_coded(path: Path) -> bool:
    """Return whether a label file stores colours and not one id for each pixel; raises as `stored_ids`."""
    return _header(path, "label").mode in ("RGB", "RGBA")


def _header(path: Path, column: str) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            return image
    except Exception as error:  # Pillow's plug-ins raise many kinds of exceptions on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path} cannot be read ({error.strerror}); download it again") from error
        raise BadSample(f"{path} is not a readable image; download it again", f"{column}: not an image") from error


def ids_of_colours(
    rgb: np.ndarray, ids: Mapping[tuple[int, int, int], int], where: str, *, others: int | None = None
) -> np.ndarray:
    """Return the id (uint8, H×W) of each pixel's colour (uint8, H×W×3); ``others`` is that of unlisted colours.

    Raises ``BadSample`` naming ``where`` and the first unlisted colours if there is no id for them.
    """
    table = sorted((red << 16 | green << 8 | blue, value) for (red, green, blue), value in ids.items())
    codes = np.array([code for code, _ in table], dtype=np.int32)
    values = np.array([value for _, value in table], dtype=np.uint8)
    pixels = rgb[..., 0].astype(np.int32) << 16 | rgb[..., 1].astype(np.int32) << 8 | rgb[..., 2]
    at = np.searchsorted(codes, pixels).clip(max=len(codes) - 1)
    strange = codes[at] != pixels
    if strange.any() and others is None:
        colours = [(int(code) >> 16, int(code) >> 8 & 255, int(code) & 255) for code in np.unique(pixels[strange])]
        raise BadSample(
            f"{where}: {int(strange.sum())} pixel(s) have colours of no class: {named(colours)}; "
            "use the label file as distributed (not resized, not saved as JPEG)",
            f"label: colours of no class ({named(colours)})",
        )
    return values[at] if others is None else np.where(strange, np.uint8(others), values[at])
