"""The contact sheet of a domain, from its raw files or prepared: what to look at before a night of training."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import PIL.Image

from gkd_hf.data.bad_rows import WrongLabel
from gkd_hf.data.contact_sheet import contact_sheet
from gkd_hf.data.custom_layout import CustomLayout, is_custom
from gkd_hf.data.domains import LabelSpace, domain, label_space, own_label_space
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.manifest import Manifest, find_manifest
from gkd_hf.data.raw_layouts import BadSample, RawLayout, RawSample
from gkd_hf.data.raw_rows import encoded, spread
from gkd_hf.data.shard_writer import whole_file
from gkd_hf.data.shards import is_hub_id
from gkd_hf.errors import InputError

CONTACT = "contact.png"
_COUNT = 12
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk says


def raw_sheet(layout: RawLayout, samples: Sequence[RawSample], title: str, count: int = _COUNT) -> PIL.Image.Image:
    """Draw samples at even distances, their labels in the data set's own ids beside the classes they are mapped to.

    Raises ``InputError`` if no image is readable, and for files that are missing or cannot be read.
    """
    labelled = samples[0].label is not None
    ids, space = (layout.id_map(samples[0]), layout.label_space) if labelled else (None, None)
    return contact_sheet(_raw_rows(layout, spread(samples, count)), ids, space, count, title=title)


def _raw_rows(layout: RawLayout, samples: Sequence[RawSample]) -> Iterator[dict]:
    for sample in samples:
        row = {"id": sample.id, "image": None, "label": None}
        try:
            row["image"] = {"bytes": layout.read_image(sample)[0], "path": None}
            if sample.label is not None:
                stored = PIL.Image.fromarray(layout.read_stored(sample))
                row["label"] = encoded(stored, "TIFF" if stored.mode == "I" else "PNG")
        except (BadSample, WrongLabel) as error:
            row["problem"] = error.reason
        yield row


def prepared_sheet(
    location: str | os.PathLike,
    name: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    id_map: Mapping[int, int] | None = None,
    split: str | None = None,
    revision: str | None = None,
    count: int = _COUNT,
) -> PIL.Image.Image:
    """Draw rows of a folder of shards or of a Hub data set.

    Args:
        location: folder or Hub id.
        name: the domain; only what `prepare` made says it itself.
        classes, id_map: of one's own data that `prepare` did not make.
        split: by default the first one. revision: of a Hub id.

    Raises:
        InputError: no domain or classes known, and as ``contact_sheet``.
    """
    manifest = find_manifest(location, revision)
    if manifest is not None and manifest.labels == "train_ids":
        ids, space = label_map("identity", len(manifest.classes)), _space(manifest)
    elif manifest is not None:
        ids, space = None, None
    elif name is None:
        raise InputError(f"{location} does not say which domain it is: name it, such as cityscapes or custom")
    elif is_custom(name):
        layout = CustomLayout(classes or (), id_map)
        ids, space = layout.train_ids, layout.label_space
    else:
        space = None if domain(name).label_space is None else label_space(name)
        ids = None if space is None else label_map(domain(name).label_map, len(space.classes))
    if manifest is not None:
        title, splits = manifest.domain, list(manifest.splits)
    else:
        title, splits = str(name), list(domain("custom" if is_custom(str(name)) else str(name)).splits.values())
    split = split or splits[0]
    return contact_sheet(location, ids, space, count, split=split, title=title, revision=revision)


def _space(manifest: Manifest) -> LabelSpace:
    """The domain's own colours, if it has these classes."""
    if not is_custom(manifest.domain):
        known = label_space(manifest.domain)
        if known.classes == manifest.classes:
            return known
    return own_label_space(manifest.classes)


def contact_file(out: str | os.PathLike, given: str | None, *, made: bool) -> Path:
    """Where a sheet is drawn: ``given``, or else in ``out``, or here where that is a Hub id.

    Args:
        out: the folder that is ``made``; if none is, what is looked at, a folder or a Hub id.
    """
    if given:
        return Path(given).expanduser()
    return Path(CONTACT) if not made and is_hub_id(os.fspath(out)) else Path(out).expanduser() / CONTACT


def save_sheet(sheet: PIL.Image.Image, file: str | os.PathLike) -> None:
    """Write a PNG, whole or not at all; raises ``InputError`` where that cannot be done."""
    try:
        with whole_file(Path(file)) as out:
            out.write(encoded(sheet, "PNG"))
    except OSError as error:
        reason = error.strerror or error
        what = "make room and run the same command again" if error.errno in NO_SPACE else "name another file"
        raise InputError(f"the contact sheet {file} cannot be written ({reason}): {what}") from error
