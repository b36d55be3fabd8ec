"""Open a folder of parquet shards, or a data set on the Hub, as a stream of undecoded rows."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from gkd_hf.errors import InputError, nearest
from gkd_hf.models.pull import hub_error, with_retries

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
IMAGE_COLUMNS = ("image", "label")


def open_rows(
    location: str | os.PathLike,
    split: str,
    *,
    columns: Sequence[str] = IMAGE_COLUMNS,
    revision: str | None = None,
) -> datasets.IterableDataset:
    """Open one split as a stream of rows whose ``image`` and ``label`` cells are undecoded ``{"bytes", "path"}``.

    Args:
        location: a folder holding ``{split}-*.parquet``, ``data/{split}-*.parquet`` or any ``*.parquet`` below a
            folder called ``split`` (the first of these that exists), or a Hub id ``org/name``. A local folder is
            opened without any network access.
        columns: the columns that must exist; only they, and ``id`` if there is one, are read.
        revision: branch, tag or commit of a Hub data set.

    Raises ``InputError`` for a missing folder, no or unreadable shards, a missing column, a column that holds no image
    bytes, no rows, and a Hub data set that cannot be opened, after some tries if the Hub is only busy.
    """
    location = os.fspath(location)
    if is_hub_id(location):
        rows, present = _open_hub(location, split, revision)
        wanted = _wanted_columns(present, columns, f"{location}, split '{split}'")
        rows = rows.select_columns(wanted)
    else:
        shards = find_shards(location, split)
        present, num_rows = _inspect(shards, columns)
        if num_rows == 0:
            raise InputError(f"no rows in split '{split}' of {location}: its {len(shards)} shard(s) are all empty")
        wanted = _wanted_columns(present, columns, shards[0])
        # The builder takes patterns, so a folder called "run[1]" has to be escaped.
        files = [glob.escape(shard) for shard in shards]
        rows = datasets.load_dataset(
            "parquet", data_files={"train": files}, split="train", streaming=True, columns=wanted
        )
        # One unit per row group: shuffling then mixes across each file, not only across files.
        rows = rows.reshard()
    for column in wanted:
        if column in IMAGE_COLUMNS:
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def count_rows(location: str | os.PathLike, split: str, *, revision: str | None = None) -> int | None:
    """Return the number of rows from the shards' metadata or the Hub's split information; ``None`` if unknown."""
    location = os.fspath(location)
    if not is_hub_id(location):
        return sum(_metadata(shard).num_rows for shard in find_shards(location, split))
    try:
        builder = with_retries(
            lambda: datasets.load_dataset_builder(location, revision=revision), f"asking for '{location}'"
        )
    except Exception as error:
        raise _hub_error(location, split, revision, error) from error
    splits = builder.info.splits
    return splits[split].num_examples or None if splits and split in splits else None


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


def _metadata(shard: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(shard)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{shard} is not a readable parquet file ({error}): remove it or write it again") from error


def _inspect(shards: list[str], columns: Sequence[str]) -> tuple[list[str], int]:
    """Check every shard's metadata; return the columns that all shards have and the number of rows."""
    num_rows, common = 0, None
    for shard in shards:
        metadata = _metadata(shard)
        num_rows += metadata.num_rows
        schema = metadata.schema.to_arrow_schema()
        _wanted_columns(schema.names, columns, shard)
        for column in columns:
            if column in IMAGE_COLUMNS and not _holds_images(schema.field(column).type):
                raise InputError(
                    f"{shard}: column '{column}' holds {schema.field(column).type}, not image bytes; "
                    "write it as datasets.Image() or as raw bytes"
                )
        common = schema.names if common is None else [name for name in common if name in schema.names]
    return common or [], num_rows


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


def _open_hub(location: str, split: str, revision: str | None) -> tuple[datasets.IterableDataset, list[str]]:
    try:
        rows, first = with_retries(lambda: _first_row(location, split, revision), f"opening '{location}'")
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx each have their own kinds
        raise _hub_error(location, split, revision, error) from error
    if first is None:
        raise InputError(f"no rows in split '{split}' of https://huggingface.co/datasets/{location}")
    return rows, list(first)


def _first_row(
    location: str, split: str, revision: str | None
) -> tuple[datasets.IterableDataset, dict[str, object] | None]:
    rows = datasets.load_dataset(location, split=split, streaming=True, revision=revision)
    # Image columns are cast before the first row is read: no picture is decoded to learn the columns.
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows, next(iter(rows), None)


def _hub_error(location: str, split: str, revision: str | None, error: Exception) -> InputError:
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        # datasets drops what the Hub had said: ask again, for that alone.
        try:
            HfApi().auth_check(location, repo_type="dataset")
            HfApi().dataset_info(location, revision=revision)
        except HfHubHTTPError as cause:
            error = cause
        except (HTTPError, OSError):
            pass  # no connection now: what datasets said must do
    explained = hub_error(error, location, kind="dataset", revision=revision)
    return InputError(f"cannot open split '{split}' of '{location}' (no folder of that name is here): {explained}")
