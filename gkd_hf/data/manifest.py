"""What a prepared data set holds: manifest.json, written last, and the check of the shards against it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gkd_hf.data.hub_files import hub_files
from gkd_hf.data.shards import is_hub_id
from gkd_hf.errors import InputError
from gkd_hf.models.pull import pull

MANIFEST = "manifest.json"
FORMAT = 2
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Shard:
    """One parquet file: its name within the folder, rows, size in bytes and SHA-256 (hexadecimal)."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        rows: samples. image_bytes, label_bytes: size of the encoded images and labels.
        smallest, largest: least and greatest (width, height) of the images, each side by itself.
        pixels: labelled pixels of each class, in train-id order; None for data without labels.
        ignored_pixels: pixels of the value 255; None for data without labels.
        left_out: bad samples, which no shard holds: ``{"id", "reason"}`` of each.
        shards: the files, in order.
    """

    rows: int
    image_bytes: int
    label_bytes: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    pixels: tuple[int, ...] | None
    ignored_pixels: int | None
    left_out: tuple[Mapping[str, str], ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What `prepare` made.

    Attributes:
        domain: name of the domain.
        labels: "train_ids" (what is stored needs no label map but "identity"), or None for data without labels.
        classes: names in train-id order; None for data without labels.
        splits: name → what it holds.
        settings: all that the shards depend on, the digest of the raw files' names and sizes included.
    """

    domain: str
    labels: str | None
    classes: tuple[str, ...] | None
    splits: Mapping[str, Split]
    settings: Mapping[str, Any]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of all splits."""
        return tuple(shard for split in self.splits.values() for shard in split.shards)

    def summary(self) -> str:
        """Images by split, files, and what was left out, in some words."""
        counts = ", ".join(f"{split.rows:,} {name}" for name, split in self.splits.items())
        left_out = [f"{len(split.left_out):,} {name}" for name, split in self.splits.items() if split.left_out]
        more = f"; bad samples left out, see {MANIFEST}: {', '.join(left_out)}" if left_out else ""
        return f"{counts} images in {len(self.shards)} files{more}"

    def to_json(self) -> str:
        """The text of manifest.json: the same for the same data, without times and paths."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def _check_types(self) -> None:
        """Raise `TypeError` for a value that `to_json` would not have written."""
        names = (self.domain, *(self.classes or ()), *(shard.name for shard in self.shards))
        texts = [*names, *(shard.sha256 for shard in self.shards)]
        numbers = [number for shard in self.shards for number in (shard.rows, shard.bytes)]
        for split in self.splits.values():
            numbers += [split.rows, split.image_bytes, split.label_bytes, *split.smallest, *split.largest]
            numbers += [] if split.pixels is None else [*split.pixels, split.ignored_pixels]
        for kind, values in ((str, texts), (int, numbers), (Mapping, [self.settings])):
            wrong = [value for value in values if not isinstance(value, kind) or isinstance(value, bool)]
            if wrong:
                raise TypeError(f"{wrong[0]!r} where {kind.__name__} is expected")
        if (self.labels, self.classes is None) not in (("train_ids", False), (None, True)):
            raise TypeError(f"labels are {self.labels!r} with classes {self.classes}")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest | None:
        """Return the manifest of a folder, or None if it has none.

        Raises:
            InputError: a manifest.json that is damaged, or that something else wrote.
        """
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise InputError(f"{path} has format {content['format']}, not {FORMAT}: prepare the data set again")
            splits = {name: _split(found) for name, found in content["splits"].items()}
            classes = content["classes"] and tuple(content["classes"])
            manifest = cls(content["domain"], content["labels"], classes, splits, content["settings"])
            manifest._check_types()
            return manifest
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not the manifest of a prepared data set ({type(error).__name__}: {error}): remove it and "
                "prepare the data set again"
            ) from error


def find_manifest(location: str | os.PathLike, revision: str | None = None) -> Manifest | None:
    """Return the manifest of a folder or of a data set on the Hub, fetched there; None if it has none.

    Raises:
        InputError: as `Manifest.read`, and a Hub id that cannot be read.
    """
    location = os.fspath(location)
    if not is_hub_id(location):
        return Manifest.read(location)
    commit = hub_files(location, revision).commit  # that of the rows, also if the branch has moved since
    return Manifest.read(pull(location, [MANIFEST], revision=commit, kind="dataset"))


def _split(found: Mapping[str, Any]) -> Split:
    values = dict(found)
    values["shards"] = tuple(Shard(**shard) for shard in found["shards"])
    values["left_out"] = tuple({"id": entry["id"], "reason": entry["reason"]} for entry in found["left_out"])
    values["smallest"], values["largest"] = tuple(found["smallest"]), tuple(found["largest"])
    values["pixels"] = None if found["pixels"] is None else tuple(found["pixels"])
    return Split(**values)


def file_sha256(path: str | os.PathLike, bar: tqdm | None = None) -> str:
    """SHA-256 of a file, hexadecimal; ``bar`` is moved by the bytes read. Raises `OSError`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if bar is not None:
                bar.update(len(block))
    return digest.hexdigest()


def verify(out: str | os.PathLike, *, progress: bool = False) -> list[str]:
    """Check a prepared folder against its manifest: every shard's presence, size, SHA-256 and rows, and strangers.

    Returns:
        What is wrong, one line each; empty if all is well.

    Raises:
        InputError: no folder, or a manifest that cannot be read.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}': prepare the data set first")
    manifest = Manifest.read(folder)
    if manifest is None:
        return [f"{folder} has no {MANIFEST}: preparing it never came to an end; run it again"]
    known = {shard.name for shard in manifest.shards}
    total = sum(shard.bytes for shard in manifest.shards)
    with (
        tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=not progress) as bar,
        ThreadPoolExecutor() as pool,  # hashing leaves the interpreter's lock alone
    ):
        found = list(pool.map(lambda shard: _wrong_with(folder, shard, bar), manifest.shards))
    wrong = [line for line in found if line]
    for name, split in manifest.splits.items():
        if split.rows != sum(shard.rows for shard in split.shards):
            wrong.append(f"{MANIFEST}: split '{name}' has {split.rows} rows, its shards together another number")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet" and path.name not in known:
            wrong.append(f"{path.name} is not in {MANIFEST}, yet readers would take it for a part: remove it")
        if path.name.startswith(".") and path.suffix == ".tmp":
            wrong.append(f"{path.name} was left over: remove it")
    return wrong


def _wrong_with(folder: Path, shard: Shard, bar: tqdm) -> str | None:
    path, again = folder / shard.name, "remove it and prepare the data set again"
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{shard.name} has {size:,} bytes in place of {shard.bytes:,}: {again}"
        if file_sha256(path, bar) != shard.sha256:
            return f"{shard.name} is damaged, its SHA-256 is another: {again}"
        rows = pq.read_metadata(path).num_rows
    except FileNotFoundError:
        return f"{shard.name} is missing: prepare the data set again"
    except (OSError, pa.ArrowException) as error:
        return f"{shard.name} cannot be read ({' '.join(str(error).split())}): {again}"
    return None if rows == shard.rows else f"{shard.name} has {rows} rows in place of {shard.rows}: {again}"
