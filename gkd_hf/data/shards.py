"""Open a folder of parquet shards, or a data set on the Hub, as undecoded rows."""

from __future__ import annotations

import glob
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from gkd_hf.data.hub_files import HubFiles, hub_files
from gkd_hf.data.rows import IMAGE_COLUMNS, Shard, ShardFolder, ShardRows, ShardStore
from gkd_hf.errors import InputError, nearest
from gkd_hf.models.pull import hub_error, with_retries

if TYPE_CHECKING:
    import datasets  # half a second that a plan does not need; imported where data sets of the Hub are asked for

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOOTERS_AT_ONCE = 8
_READ_RETRIES = 3

Rows: TypeAlias = "ShardRows | datasets.IterableDataset"
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

    So are those of a Hub data set stored as parquet. To open it takes the shards' footers alone; each shard is fetched
    whole when reading reaches it and is used only once its content has the hash that the Hub lists. It stays in the
    Hub's cache (HF_HUB_CACHE), so that later passes, other processes, later runs and HF_HUB_OFFLINE=1 read it from
    there: all that is read needs that much disk. Within a process each shard is verified once. A process that wants a
    shard which another is fetching waits for it.

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
    footers = [_metadata(store.path(name)) for name in names]
    rows = _shard_rows(store, names, footers, columns)
    if not len(rows):
        raise InputError(f"no rows in split '{split}' of {location}: its {len(names)} shard(s) are all empty")
    return rows


def count_rows(location: str | os.PathLike, split: str, *, revision: str | None = None) -> int | None:
    """Return the number of rows from the shards' metadata or the Hub's split information; ``None`` if unknown."""
    location = os.fspath(location)
    if not is_hub_id(location):
        return sum(_metadata(shard).num_rows for shard in find_shards(location, split))
    files = _hub_files(location, split, revision)
    if files.shards is not None:
        return files.num_rows.get(split)
    import datasets

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


def limit_read_retries() -> None:
    """Have datasets give up reading streamed rows after three tries, in this process.

    They are for each read of a file, on top of the tries of the Hub's client; datasets logs them. Its own 20 are many
    minutes in which a run that will not go on does not end. Whoever reads calls this: a worker that is spawned knows
    nothing of what its parent has set.
    """
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = min(datasets.config.STREAMING_READ_MAX_RETRIES, _READ_RETRIES)


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


def _metadata(shard: str | Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(shard)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{shard} is not a readable parquet file ({error}): remove it or write it again") from error


def _shard_rows(
    store: ShardStore, names: Sequence[str], footers: Sequence[pq.FileMetaData], columns: Sequence[str]
) -> ShardRows:
    """Check that all shards have the columns, and images where they belong; return their rows."""
    common = None
    for name, footer in zip(names, footers, strict=True):
        schema = footer.schema.to_arrow_schema()
        _wanted_columns(schema.names, columns, store.title(name))
        for column in columns:
            if column in IMAGE_COLUMNS and not _holds_images(schema.field(column).type):
                raise InputError(
                    f"{store.title(name)}: column '{column}' holds {schema.field(column).type}, not image bytes; "
                    "write it as datasets.Image() or as raw bytes"
                )
        common = schema.names if common is None else [column for column in common if column in schema.names]
    shards = [Shard.described(name, footer) for name, footer in zip(names, footers, strict=True)]
    return ShardRows(store, shards, _wanted_columns(common or [], columns, ""))


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
    import datasets

    for column in columns:
        if column in IMAGE_COLUMNS:
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _hub_files(location: str, split: str, revision: str | None) -> HubFiles:
    try:
        return hub_files(location, revision)
    except InputError as error:
        raise InputError(_cannot_open(location, split, str(error))) from error


def _open_hub(location: str, split: str, columns: Sequence[str], revision: str | None) -> Rows:
    files = _hub_files(location, split, revision)
    if files.shards is None:
        return _stream(files, split, columns)
    names = files.shards.get(split)
    if names is None:
        known = ", ".join(files.shards)
        raise InputError(
            _cannot_open(location, split, f"it has no such split{nearest(split, files.shards)} (splits: {known})")
        )
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        footers = list(pool.map(files.footer, names))
    rows = _shard_rows(files, names, footers, columns)
    if not len(rows):
        raise _no_rows(location, split)
    return rows


def _stream(files: HubFiles, split: str, columns: Sequence[str]) -> datasets.IterableDataset:
    location = files.location
    if constants.is_offline_mode():
        why = (
            "it is not stored as parquet shards, so it is streamed from the Hub and no copy is kept here, and "
            "HF_HUB_OFFLINE is set: unset it"
        )
        raise InputError(_cannot_open(location, split, why))
    import datasets

    limit_read_retries()
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


def _no_rows(location: str, split: str) -> InputError:
    return InputError(f"no rows in split '{split}' of {constants.ENDPOINT}/datasets/{location}")


def _cannot_open(location: str, split: str, why: str) -> str:
    return f"cannot open split '{split}' of '{location}' (no folder of that name is here): {why}"
