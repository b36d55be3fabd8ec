"""Open a folder of parquet shards, or a data set on the Hub, as undecoded rows."""

from __future__ import annotations

import glob
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from gkd_hf.data.hub_files import HubFiles, hub_files
from gkd_hf.data.rows import IMAGE_COLUMNS, Shard, ShardFolder, ShardRows
from gkd_hf.errors import InputError, nearest
from gkd_hf.models.pull import hub_error, with_retries

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_READ_ROWS = 16
# For each read of a streamed file, on top of the tries of the Hub's client; datasets logs them. Its own 20 are many
# minutes in which a run that will not go on does not end.
datasets.config.STREAMING_READ_MAX_RETRIES = 3

Rows = ShardRows | datasets.IterableDataset
Item = TypeVar("Item")


def open_rows(
    location: str | os.PathLike,
    split: str,
    *,
    columns: Sequence[str] = IMAGE_COLUMNS,
    revision: str | None = None,
) -> Rows:
    """Open one split as rows whose ``image`` and ``label`` cells are undecoded ``{"bytes", "path"}``.

    The rows of a folder are `ShardRows`.

    Of a Hub data set stored as parquet, each shard is fetched whole when reading reaches it and is used only once its
    content has the hash that the Hub lists. It stays in the Hub's cache (HF_HUB_CACHE), so that later passes, other
    processes, later runs and HF_HUB_OFFLINE=1 read it from there: all that is read needs that much disk. Within a
    process each shard is verified once. A process that wants a shard which another is fetching waits for it.

    Any other Hub data set, such as a folder of images, is streamed by datasets: nothing of it is kept, and what comes
    is NOT verified.

    Args:
        location: a folder holding ``{split}-*.parquet``, ``data/{split}-*.parquet`` or any ``*.parquet`` below a
            folder called ``split`` (the first of these that exists), or a Hub id ``org/name``. A local folder is
            opened without any network access.
        columns: the columns that must exist; only they, and ``id`` if there is one, are read.
        revision: branch, tag or commit of a Hub data set.

    Raises ``InputError`` for a missing folder, no or unreadable shards, a missing column, a column that holds no image
    bytes, no rows, and a Hub data set that cannot be opened, after some tries if the Hub is only busy. Reading the
    rows raises it too, for a shard that cannot be fetched or is still damaged after it was fetched again; other
    errors of reading become one by `readable`.
    """
    location = os.fspath(location)
    if is_hub_id(location):
        return _open_hub(location, split, columns, revision)
    store = ShardFolder(location)
    names = [Path(shard).relative_to(location).as_posix() for shard in find_shards(location, split)]
    shards, common = [], None
    for name in names:
        metadata = _checked(store.path(name), columns, store.title(name))
        shards.append(Shard.described(name, metadata))
        present = metadata.schema.to_arrow_schema().names
        common = present if common is None else [column for column in common if column in present]
    if not any(shard.group_rows.any() for shard in shards):
        raise InputError(f"no rows in split '{split}' of {location}: its {len(shards)} shard(s) are all empty")
    return ShardRows(store, shards, _wanted_columns(common, columns, location))


def count_rows(location: str | os.PathLike, split: str, *, revision: str | None = None) -> int | None:
    """Return the number of rows from the shards' metadata or the Hub's split information; ``None`` if unknown."""
    location = os.fspath(location)
    if not is_hub_id(location):
        return sum(_metadata(shard).num_rows for shard in find_shards(location, split))
    files = _hub_files(location, split, revision)
    if files.shards is not None:
        return files.num_rows.get(split)
    builder = _from_hub(
        files,
        split,
        lambda: datasets.load_dataset_builder(location, revision=files.commit),
        f"asking for '{location}'",
    )
    splits = builder.info.splits
    return splits[split].num_examples or None if splits and split in splits else None


def readable(rows: Iterable[Item], where: str) -> Iterator[Item]:
    """Yield what ``rows`` yields; whatever reading it fails with is raised as one `InputError` that names ``where``.

    Every reader goes through this: rows are read from disk or the network while they are iterated.
    """
    try:
        yield from rows
    except InputError:
        raise
    except (pa.ArrowException, OSError, EOFError, HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{where}: the data cannot be read on ({reason}); check the shards or the connection"
        ) from error


def is_hub_id(location: str) -> bool:
    """Whether ``location`` is read as a Hub id ``org/name``: it looks like one, and no such path exists here."""
    return not os.path.exists(location) and _HUB_ID.fullmatch(location) is not None and location[0] != "."


def find_shards(location: str, split: str) -> list[str]:
    """Return the paths of a folder's shards of one split, sorted; raises ``InputError`` if there are none."""
    folder = Path(location)
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(
            f"data folder {location} {kind}: give a folder of parquet shards, or a Hub id such as org/name"
        )
    candidates = (
        lambda: folder.glob(f"{glob.escape(split)}-*.parquet"),
        lambda: (folder / "data").glob(f"{glob.escape(split)}-*.parquet"),
        lambda: (folder / split).rglob("*.parquet"),
    )
    for candidate in candidates:
        if shards := sorted(str(path) for path in candidate()):
            return shards
    found = sorted({path.name.split("-")[0] for path in folder.rglob("*-*.parquet")})
    hint = nearest(split, found) or (f"; splits found there: {', '.join(found)}" if found else "")
    raise InputError(
        f"no parquet shards of split '{split}' in {location} (looked for {split}-*.parquet, "
        f"data/{split}-*.parquet and {split}/**/*.parquet){hint}"
    )


def _metadata(shard: str | Path, name: str = "") -> pq.FileMetaData:
    try:
        return pq.read_metadata(shard)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name or shard} is not a readable parquet file ({error}): remove it or write it again"
        ) from error


def _checked(shard: str | Path, columns: Sequence[str], name: str) -> pq.FileMetaData:
    """Read a shard's metadata; check that it has the columns, and images where they belong."""
    metadata = _metadata(shard, name)
    schema = metadata.schema.to_arrow_schema()
    _wanted_columns(schema.names, columns, name)
    for column in columns:
        if column in IMAGE_COLUMNS and not _holds_images(schema.field(column).type):
            raise InputError(
                f"{name}: column '{column}' holds {schema.field(column).type}, not image bytes; "
                "write it as datasets.Image() or as raw bytes"
            )
    return metadata


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _wanted_columns(present: Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    missing = [column for column in columns if column not in present]
    if missing:
        raise InputError(
            f"{where}: column '{missing[0]}' is missing{nearest(missing[0], present)} "
            f"(columns present: {', '.join(present) or 'none'})"
        )
    return [*columns, "id"] if "id" in present and "id" not in columns else list(columns)


def _undecoded(rows: datasets.IterableDataset, columns: Sequence[str]) -> datasets.IterableDataset:
    for column in columns:
        if column in IMAGE_COLUMNS:
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _hub_files(location: str, split: str, revision: str | None) -> HubFiles:
    try:
        return hub_files(location, revision)
    except InputError as error:
        raise InputError(_cannot_open(location, split, str(error))) from error


def _open_hub(location: str, split: str, columns: Sequence[str], revision: str | None) -> datasets.IterableDataset:
    files = _hub_files(location, split, revision)
    if files.shards is None:
        return _stream(files, split, columns)
    shards = files.shards.get(split)
    if shards is None:
        known = ", ".join(files.shards)
        raise InputError(
            _cannot_open(location, split, f"it has no such split{nearest(split, files.shards)} (splits: {known})")
        )
    # One shard is fetched to learn the columns, more only if it is empty.
    for shard in shards:
        name = _shard_name(files, shard)
        path = files.fetch(shard)
        metadata = _checked(path, columns, name)
        if metadata.num_rows:
            break
    else:
        raise _no_rows(location, split)
    schema = metadata.schema.to_arrow_schema()
    wanted = _wanted_columns(schema.names, columns, name)
    stored = datasets.Features.from_arrow_schema(schema)
    features = {
        column: datasets.Image(decode=False) if column in IMAGE_COLUMNS else stored[column] for column in wanted
    }
    # The list of shards is what datasets shuffles.
    return datasets.IterableDataset.from_generator(
        _rows_of_shards,
        features=datasets.Features(features),
        gen_kwargs={"files": files, "columns": tuple(wanted), "shards": list(shards)},
    )


def _rows_of_shards(files: HubFiles, columns: Sequence[str], shards: Sequence[str]) -> Iterator[dict]:
    for shard in shards:
        path, name = files.fetch(shard), _shard_name(files, shard)
        _checked(path, columns, name)
        with pq.ParquetFile(path) as file:
            for batch in readable(file.iter_batches(batch_size=_READ_ROWS, columns=list(columns)), name):
                for row in batch.to_pylist():
                    yield {column: _image_cell(row[column], column) for column in columns}


def _image_cell(cell: object, column: str) -> object:
    """A cell as `datasets.Image` stores it, of a column that may hold bare bytes."""
    return {"bytes": cell, "path": None} if column in IMAGE_COLUMNS and isinstance(cell, bytes) else cell


def _stream(files: HubFiles, split: str, columns: Sequence[str]) -> datasets.IterableDataset:
    location = files.location
    if constants.is_offline_mode():
        why = (
            "it is not stored as parquet shards, so it is streamed from the Hub and no copy is kept here, and "
            "HF_HUB_OFFLINE is set: unset it"
        )
        raise InputError(_cannot_open(location, split, why))
    rows = _from_hub(
        files,
        split,
        lambda: datasets.load_dataset(location, split=split, streaming=True, revision=files.commit),
        f"opening '{location}'",
    )
    # Image columns are cast before the first row is read: no picture is decoded to learn the columns.
    rows = _undecoded(rows, [name for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)])
    where = f"{location}, split '{split}'"
    # Of a copy: the threads with which datasets reads pictures do not live on in a forked worker, which would wait.
    first = next(readable(pickle.loads(pickle.dumps(rows)), where), None)
    if first is None:
        raise _no_rows(location, split)
    wanted = _wanted_columns(list(first), columns, where)
    return _undecoded(rows.select_columns(wanted), wanted)


def _from_hub(files: HubFiles, split: str, action: Callable[[], Item], what: str) -> Item:
    try:
        return with_retries(action, what)
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx each have their own kinds
        explained = hub_error(error, files.location, kind="dataset", revision=files.commit)
        raise InputError(_cannot_open(files.location, split, str(explained))) from error


def _shard_name(files: HubFiles, shard: str) -> str:
    return f"{shard} of '{files.location}'"


def _no_rows(location: str, split: str) -> InputError:
    return InputError(f"no rows in split '{split}' of {constants.ENDPOINT}/datasets/{location}")


def _cannot_open(location: str, split: str, why: str) -> str:
    return f"cannot open split '{split}' of '{location}' (no folder of that name is here): {why}"
