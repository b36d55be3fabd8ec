"""A procedural street world in many styles: the data that needs no download.

Eight classes (road, sidewalk, building, vegetation, sky, pole, car, person). One style, ``clear_day``, is the source;
``night``, ``fog``, ``rain``, ``snow``, ``other_city`` and ``other_camera`` are unseen targets; ``pool`` is a broad mix
of mild weather, wild colours and cameras without labels of interest, for distillation. A user adds a look with
:func:`register_style`.

    images, labels = render("night", 8, size=64, seed=0)
    rows = toy_city("clear_day", 1000, size=64, seed=0)        # a datasets.IterableDataset
    write_shards("cache/toy", "clear_day", "train", 1000, size=64, seed=0)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from tqdm.auto import tqdm

from gkd_hf.data.toy_city_photometry import develop, take
from gkd_hf.data.toy_city_scene import Scene
from gkd_hf.data.toy_city_styles import PRESETS, SOURCE_STYLE, Geometry, Palette, Style
from gkd_hf.data.toy_city_surfaces import CLASSES, PARTS
from gkd_hf.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets

__all__ = [
    "CLASSES",
    "PARTS",
    "SOURCE_STYLE",
    "STYLES",
    "TARGET_STYLES",
    "is_written",
    "Geometry",
    "Palette",
    "Style",
    "register_style",
    "render",
    "toy_city",
    "write_shards",
]

STYLES: dict[str, Style] = dict(PRESETS)
TARGET_STYLES = ("night", "fog", "rain", "snow", "other_city", "other_camera")
WORLD_VERSION = 1  # raised whenever the same seed would give another picture

_BATCH = 16  # small enough for the cache of one core
_ROWS_PER_SHARD = 512


def register_style(name: str, style: Style) -> None:
    """Make ``style`` known as ``name`` (also as the domain ``toy_city:name``).

    Raises:
        InputError: the name is taken by another style, or holds characters other than letters, digits and ``_``.
    """
    if not name.isidentifier():
        raise InputError(f"toy city style {name!r}: use letters, digits and '_' only, not starting with a digit")
    if STYLES.get(name, style) != style:
        raise InputError(f"toy city style {name!r} exists already; choose another name")
    STYLES[name] = style


def _style(style: str | Style) -> Style:
    if isinstance(style, Style):
        return style
    if style not in STYLES:
        raise InputError(
            f"unknown toy city style {style!r}{nearest(style, STYLES)}; known: {', '.join(STYLES)} "
            "(register_style adds one)"
        )
    return STYLES[style]


def _checked(style: str | Style, count: int, size: int) -> Style:
    found = _style(style)
    if size < 32:
        raise InputError(f"toy city: size is {size}, must be at least 32 pixels")
    if count < 1:
        raise InputError(f"toy city: count is {count}, must be at least 1")
    return found


def _key(style: Style) -> int:
    return int.from_bytes(hashlib.sha256(repr(style).encode()).digest()[:8], "little")


def render(
    style: str | Style, count: int, *, size: int = 64, seed: int = 0, start: int = 0, extras: bool = False
) -> tuple[np.ndarray, ...]:
    """Render samples ``start … start + count - 1``; sample ``i`` depends on ``(seed, style, i, size)`` alone.

    Args:
        style: name of a registered style, or a :class:`Style`.
        size: height and width in pixels, at least 32.
        extras: also return the fine parts (see ``PARTS``) and the depth.

    Returns:
        images uint8 ``count × size × size × 3`` and labels uint8 ``count × size × size``; with ``extras`` a third
        item, ``{"parts": uint8 count × size × size, "depth": float32 count × size × size, metres}``.

    Raises:
        InputError: unknown style, ``size`` below 32, ``count`` below 1 or ``start`` below 0.
    """
    found = _checked(style, count, size)
    if start < 0:
        raise InputError(f"toy city: start is {start}, must be at least 0")
    key, done = _key(found), []
    for first in range(start, start + count, _BATCH):
        shots = []
        for number in range(first, min(first + _BATCH, start + count)):
            rng = np.random.default_rng([seed, key, number])
            shots.append(take(found, Scene(found, size, rng), rng))
        done.append(develop(shots))
    images, labels, parts, depth = (np.concatenate(column) for column in zip(*done, strict=True))
    return (images, labels, {"parts": parts, "depth": depth}) if extras else (images, labels)


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _name(style: str | Style) -> str:
    return style if isinstance(style, str) else f"style{_key(style):016x}"[:13]


def _rows(style: str | Style, shards: list[tuple[int, int]], size: int, seed: int) -> Iterator[dict]:
    """Encoded rows of the index ranges ``shards``; a module-level function so that workers can receive it."""
    for begin, end in shards:
        for first in range(begin, end, _BATCH):
            images, labels = render(style, min(_BATCH, end - first), size=size, seed=seed, start=first)
            for offset, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield {
                    "image": {"bytes": _png(image), "path": None},
                    "label": {"bytes": _png(label), "path": None},
                    "id": f"{_name(style)}-{seed}-{first + offset:06d}",
                }


def _ranges(count: int) -> list[tuple[int, int]]:
    shards = max(min(4, count), -(-count // _ROWS_PER_SHARD))
    cuts = [count * shard // shards for shard in range(shards + 1)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def toy_city(style: str | Style, count: int, *, size: int = 64, seed: int = 0) -> datasets.IterableDataset:
    """Samples ``0 … count - 1`` of :func:`render` as PNG bytes in the columns ``image``, ``label`` and ``id``.

    Raises:
        InputError: as :func:`render`.
    """
    style = style if isinstance(style, str) and _checked(style, count, size) else _checked(style, count, size)
    import datasets

    return datasets.IterableDataset.from_generator(
        _rows, features=_features(), gen_kwargs={"style": style, "shards": _ranges(count), "size": size, "seed": seed}
    )


def _features() -> datasets.Features:
    import datasets

    undecoded = datasets.Image(decode=False)
    return datasets.Features({"image": undecoded, "label": undecoded, "id": datasets.Value("string")})


def is_written(folder: str | os.PathLike, split: str) -> bool:
    """Whether :func:`write_shards` has come to its end for this split."""
    return _manifest(Path(folder), split).exists()


def _manifest(folder: Path, split: str) -> Path:
    return folder / f".{split}.json"


def write_shards(
    folder: str | os.PathLike,
    style: str | Style,
    split: str,
    count: int,
    *,
    size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write the rows of :func:`toy_city` to ``folder`` as ``{split}-xxxxx-of-xxxxx.parquet``.

    Each shard is written under a temporary name and renamed when whole; a manifest, written last, records what the
    split holds. A call that finds its manifest writes nothing; after a kill only the missing shards are written.

    Raises:
        InputError: as :func:`render`, or ``folder`` holds a split of this name made with other settings.
    """
    found = _checked(style, count, size)
    folder = Path(folder)
    made_with = {"style": f"{_key(found):016x}", "count": count, "size": size, "seed": seed, "world": WORLD_VERSION}
    manifest, draft = _manifest(folder, split), folder / f".{split}.draft.json"
    for record in (manifest, draft):
        if record.exists() and json.loads(record.read_text()) != made_with:
            raise InputError(
                f"{folder}: the split {split!r} there was made with other settings ({record.read_text().strip()}); "
                "choose another folder or remove it"
            )
    if manifest.exists():
        return
    if any(folder.glob(f"{split}-*.parquet")) and not draft.exists():
        raise InputError(f"{folder} holds {split}-*.parquet files that are no toy city; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(draft, json.dumps(made_with).encode())
    ranges = _ranges(count)
    with tqdm(total=count, desc=f"toy city {_name(style)} {split}", unit="image", disable=not progress) as bar:
        for shard, (begin, end) in enumerate(ranges):
            target = folder / f"{split}-{shard:05d}-of-{len(ranges):05d}.parquet"
            if not target.exists():
                rows = list(_rows(style, [(begin, end)], size, seed))
                table = pyarrow.Table.from_pylist(rows, schema=_features().arrow_schema)
                buffer = io.BytesIO()
                pyarrow.parquet.write_table(table, buffer, compression="none")
                _write_whole(target, buffer.getvalue())
            bar.update(end - begin)
    os.replace(draft, manifest)


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
