"""From a data set as distributed to parquet shards of images and train ids: parallel, resumable, the same every time.

Shards are written by several processes, each under a temporary name that becomes the final one when all is on disk; a
finished shard says in its footer what it was made with, and is never written again. Which rows a shard holds is fixed
before the first is written, so that neither the number of processes nor a kill changes a byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gkd_hf.data.custom_layout import CustomLayout, is_custom
from gkd_hf.data.dataset_card import card_text
from gkd_hf.data.manifest import MANIFEST, Manifest, Shard, Split, verify
from gkd_hf.data.preview import CONTACT, NO_SPACE, raw_sheet, save_sheet
from gkd_hf.data.raw_layouts import RawLayout, RawSample, raw_layout
from gkd_hf.data.raw_rows import Limit
from gkd_hf.data.rows_layout import RowsLayout, splits_of_shards
from gkd_hf.data.shard_processes import cores, write_all
from gkd_hf.data.shard_writer import Job, Part, read_facts, whole_file
from gkd_hf.data.shards import is_hub_id
from gkd_hf.errors import InputError

__all__ = ["Manifest", "prepare", "verify"]

CARD = "README.md"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")
_LOCK_SECONDS = 5.0  # workers of a killed run live on for a moment


def prepare(
    domain: str,
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: RawLayout | None = None,
    splits: Sequence[str] | None = None,
    shard_rows: int = 256,
    row_group_rows: int = 1,
    re_encode: str | None = None,
    max_bad: float = 0.01,
    workers: int | None = None,
    classes: Sequence[str] | None = None,
    id_map: Mapping[int, int] | None = None,
    contact: str | os.PathLike | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Manifest:
    """Write a data set as ``OUT/SPLIT-00000-of-00012.parquet``, with a card (README.md) and, last, manifest.json.

    Columns: image and label (the encoded file and a name; the label a PNG of train ids, null without labels), id and
    domain. Images keep their bytes unless ``re_encode`` is given or the sample is a piece of a larger image. A run
    that was killed, or that filled the disk, goes on where it stopped when it is started again; a finished folder is
    left as it is.

    Args:
        domain: name in ``domains.DOMAINS``, or "custom" or "custom:NAME" for one's own data.
        root: the folder in which the data set was unpacked; for one's own data also a Hub id or a folder of parquet
            shards, see ``RowsLayout``. out: the folder of the shards.
        layout: how the data lies in ``root``; by default that of the domain.
        splits: those to prepare; by default all that the domain has, of one's own data all that are in ``root``.
        shard_rows: samples in a shard. row_group_rows: samples in a row group, the least that can be read: one, so
            that samples read in random order cost no more than in the stored one.
        re_encode: None, "png" or "jpeg:QUALITY" (1 to 100).
        max_bad: share of each split's samples that may be bad (see ``raw_rows``) and are then left out and listed in
            the manifest; more of them are an error. A few are looked at before the first shard is written.
        workers: processes; by default one for each core.
        classes, id_map: as for ``CustomLayout``, of one's own data only.
        contact: where to draw a contact sheet (PNG) of the first split, before anything else is written.
        revision: branch, tag or commit of a Hub id.

    Raises:
        InputError: raw data that is not there, too many bad samples, a folder made with other settings or in use, a
            full disk.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    _check_numbers(shard_rows, row_group_rows, re_encode, max_bad, workers)
    if layout is None and is_custom(domain):
        _check_apart(root, out)
    layout = layout or _layout_of(domain, root, classes, id_map, revision)
    samples = _samples(layout, root, splits)
    names = _class_names(layout, samples)
    settings = {
        "domain": domain,
        "splits": {split: len(found) for split, found in samples.items()},
        "shard_rows": shard_rows,
        "row_group_rows": row_group_rows,
        "re_encode": re_encode,
        "classes": names,
        "id_map": None if id_map is None else {str(stored): id_map[stored] for stored in sorted(id_map)},
        "raw_files": _digest(layout, root, samples),
    }
    classes_there = None if names is None else len(names)
    limit = Limit(domain, settings["splits"], max_bad, None if contact is None else str(contact))
    job = Job(layout, domain, classes_there, row_group_rows, re_encode, limit, settings)
    parts = _parts(out, samples, shard_rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone_in(out):
            manifest = _check_folder(out, settings, parts)
            if contact is not None:
                split, found = next(iter(samples.items()))
                save_sheet(raw_sheet(layout, found, f"{domain}, split '{split}', {len(found):,} images"), contact)
            if manifest is not None and (out / CARD).exists() and all(part.target.exists() for part in parts):
                for name, split in manifest.splits.items():
                    limit.check(name, split.left_out)
                return manifest
            limit.check_first(layout, samples, classes_there)
            found = write_all(parts, job, workers or cores(), progress)
            manifest = _manifest(domain, names, settings, parts, found)
            for name, text in ((CARD, card_text(manifest)), (MANIFEST, manifest.to_json())):
                with whole_file(out / name) as file:
                    file.write(text.encode())
    except OSError as error:
        raise _trouble(error, out, parts) from error
    return manifest


# -- what will be written ---------------------------------------------------------------------------------------------


def _samples(layout: RawLayout, root: Path, splits: Sequence[str] | None) -> dict[str, list[RawSample]]:
    wanted = splits or layout.splits_in(root)
    try:
        return {split: layout.samples(root, split) for split in wanted}
    except InputError as error:
        if splits or len(wanted) == 1 or "holds no " not in str(error):
            raise
        raise InputError(
            f"{error}. All of {', '.join(wanted)} are wanted: name those that are there (--splits) to leave out others"
        ) from error


def _check_numbers(
    shard_rows: int, row_group_rows: int, re_encode: str | None, max_bad: float, workers: int | None
) -> None:
    for name, value in (("shard_rows", shard_rows), ("row_group_rows", row_group_rows), ("workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be 1 or greater")
    if not 0 <= max_bad < 1:
        raise InputError(f"max_bad is {max_bad:g}: it is a share of the samples, 0 or more and below 1")
    good = re_encode in (None, "png") or re.fullmatch(r"jpeg:([1-9]\d?|100)", str(re_encode))
    if not good:
        raise InputError(f"re_encode is '{re_encode}': it is png, or jpeg:QUALITY with 1 to 100, such as jpeg:95")


def _check_apart(root: Path, out: Path) -> None:
    """What is drawn and written must not become an image of the next run."""
    for images in (root / "images", root / "masks"):
        if out.resolve().is_relative_to(images.resolve()):
            raise InputError(f"the folder to write, {out}, is within {images}: choose one outside of the raw data")


def _layout_of(
    domain: str, root: Path, classes: Sequence[str] | None, id_map: Mapping[int, int] | None, revision: str | None
) -> RawLayout:
    if is_custom(domain):
        if is_hub_id(str(root)) or splits_of_shards(root):
            return RowsLayout(root, classes or (), id_map, revision=revision)
        return CustomLayout(classes or (), id_map)
    if classes is not None or id_map is not None:
        raise InputError(f"domain '{domain}' has its own classes and ids: they are given for 'custom' only")
    return raw_layout(domain)


def _class_names(layout: RawLayout, samples: Mapping[str, Sequence[RawSample]]) -> list[str] | None:
    """The classes, or None if no sample has a label; within a split either all have one or none."""
    for split, found in samples.items():
        if not found:
            raise InputError(f"split '{split}' has no samples: leave it out")
        without = [sample for sample in found if sample.label is None]
        if without and len(without) < len(found):
            raise InputError(f"split '{split}': {without[0].image} and {len(without) - 1} others have no label")
        identities = [sample.id for sample in found]
        if len(set(identities)) < len(identities):
            twice = next(name for name in identities if identities.count(name) > 1)
            raise InputError(f"split '{split}': two samples are called '{twice}'")
    labelled = any(found[0].label is not None for found in samples.values())
    return list(layout.label_space.classes) if labelled else None


def _digest(layout: RawLayout, root: Path, samples: Mapping[str, Sequence[RawSample]]) -> str:
    """SHA-256 over names, sizes and crops of all raw files; the same wherever ``root`` is."""
    digest, sizes = hashlib.sha256(), {}
    for split, found in samples.items():
        for sample in found:
            entry: list[Any] = [split, sample.id, sample.crop]
            for path in (sample.image, sample.label):
                if path is not None and path not in sizes:
                    sizes[path] = layout.file_size(path)
                entry += [None, None] if path is None else [os.path.relpath(path, root), sizes[path]]
            digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def _parts(out: Path, samples: Mapping[str, Sequence[RawSample]], shard_rows: int) -> list[Part]:
    parts = []
    for split, found in samples.items():
        shards = -(-len(found) // shard_rows)
        for number in range(shards):
            rows = tuple(found[number * shard_rows : (number + 1) * shard_rows])
            target = out / f"{split}-{number:05d}-of-{shards:05d}.parquet"
            parts.append(Part(target, split, rows, rows[0].label is not None))
    return parts


# -- what is there already --------------------------------------------------------------------------------------------


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the folder for this process and its workers; the system lets go of it when they are gone."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        give_up = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise InputError(f"{out} is being written by another process: wait for it, or stop it") from error
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _check_folder(out: Path, settings: Mapping[str, Any], parts: Sequence[Part]) -> Manifest | None:
    """Check that what is there fits, and remove what a killed run left; return the manifest if there is one."""
    manifest = Manifest.read(out)
    if manifest is not None:
        _check_settings(out, manifest.settings, settings)
    for path in sorted(out.glob("*.parquet")):
        _check_settings(path, read_facts(path)["settings"], settings)
    if manifest is None and (out / CARD).exists() and not any(part.target.exists() for part in parts):
        raise InputError(f"{out} holds a {CARD} and is no prepared data set: choose an empty or new folder")
    for path in out.glob(".*.tmp"):
        name = path.name[1 : -len(".tmp")]
        if _SHARD.fullmatch(name) or name in (CARD, MANIFEST, CONTACT):
            path.unlink()
    return manifest


def _check_settings(where: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name in asked:
        if there.get(name) != asked[name]:
            what = (
                "raw files of other names or sizes"
                if name == "raw_files"
                else f"{name} = {_shown(there.get(name))}, not {_shown(asked[name])}"
            )
            raise InputError(f"{where} was made with {what}: give the same again, or choose another folder")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "…"


# -- what came of it -------------------------------------------------------------------------------------------------


def _manifest(
    domain: str,
    classes: Sequence[str] | None,
    settings: Mapping[str, Any],
    parts: Sequence[Part],
    found: Sequence[Mapping[str, Any]],
) -> Manifest:
    splits = {}
    for split in settings["splits"]:
        shards = [(part, facts) for part, facts in zip(parts, found, strict=True) if part.split == split]
        column = {key: [facts[key] for _, facts in shards] for key in shards[0][1]}
        labelled = column["pixels"][0] is not None
        splits[split] = Split(
            rows=sum(column["rows"]),
            image_bytes=sum(column["image_bytes"]),
            label_bytes=sum(column["label_bytes"]),
            smallest=tuple(map(min, zip(*filter(None, column["smallest"]), strict=True))),
            largest=tuple(map(max, zip(*filter(None, column["largest"]), strict=True))),
            pixels=tuple(map(sum, zip(*column["pixels"], strict=True))) if labelled else None,
            ignored_pixels=sum(column["ignored_pixels"]) if labelled else None,
            left_out=tuple(entry for listed in column["left_out"] for entry in listed),
            shards=tuple(
                Shard(part.target.name, facts["rows"], facts["bytes"], facts["sha256"]) for part, facts in shards
            ),
        )
    return Manifest(domain, classes and "train_ids", classes and tuple(classes), splits, settings)


def _trouble(error: OSError, out: Path, parts: Sequence[Part]) -> InputError:
    """What to tell about a folder that cannot be written."""
    if error.errno not in NO_SPACE:
        return InputError(f"{error.filename or out} cannot be written: {error.strerror or error}")
    finished = [part for part in parts if part.target.exists()]
    rows = sum(len(part.samples) for part in finished)
    used = sum(part.target.stat().st_size for part in finished)
    left = sum(len(part.samples) for part in parts) - rows
    need = f"about {used / rows * left / 2**20:,.0f} MiB more are needed" if rows else "not one shard fits"
    return InputError(
        f"the disk of {out} is full ({error.strerror}): {len(finished)} of {len(parts)} shards are finished and stay, "
        f"{need}; make room and run the same command again"
    )
