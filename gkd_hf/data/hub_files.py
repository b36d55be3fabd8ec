"""Which files make up the splits of a data set on the Hub, and how its parquet shards get here: verified."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, get_session

from gkd_hf.errors import InputError
from gkd_hf.models.pull import listed_files, pull, pull_file

_FOOTER_BYTES = 128 * 1024  # of 256 rows in groups of their own, and more
# What datasets reads to tell splits from files; the shards themselves need not be there for that.
_DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json")


@dataclass(frozen=True)
class HubFiles:
    """One commit of a data set on the Hub.

    Attributes:
        location: Hub id. commit: full hash.
        shards: split → its parquet files, in the order of the data set; None if it is not stored as parquet, or so
            that datasets has to filter it.
        num_rows: split → rows, of the splits whose number the data set's card tells.
    """

    location: str
    commit: str
    shards: dict[str, tuple[str, ...]] | None
    num_rows: dict[str, int]

    remote: ClassVar[bool] = True

    def path(self, name: str) -> Path:
        """Return a shard in the Hub's cache, fetched if it is not there; raises `InputError` as `pull_file`."""
        return pull_file(self.location, name, commit=self.commit, kind="dataset")

    def title(self, name: str) -> str:
        """What messages call a shard."""
        return f"{name} of '{self.location}'"

    def footer(self, name: str) -> pq.FileMetaData:
        """Return what a shard's footer tells, without the shard where the Hub sends parts of files.

        It is not verified: `ShardRows` compares it with the shard's own, once that is here.

        Raises:
            InputError: as `path`, and a shard that is no parquet file.
        """
        cached = try_to_load_from_cache(self.location, name, revision=self.commit, repo_type="dataset")
        # Otherwise the whole shard is fetched, with more patience, and verified.
        with contextlib.suppress(pa.ArrowException, HTTPError, OSError):
            return pq.read_metadata(cached if isinstance(cached, str) else self._end(name))
        path = self.path(name)
        try:
            return pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.title(name)} is not a readable parquet file ({error}): remove it or write it again"
            ) from error

    def _end(self, name: str) -> pa.BufferReader:
        """The end of a shard on the Hub, with all of its footer."""
        if constants.is_offline_mode():
            raise OSError("offline")
        end = self._last(name, _FOOTER_BYTES)
        needed = int.from_bytes(end[-8:-4], "little") + 8
        return pa.BufferReader(end if needed <= len(end) else self._last(name, needed))

    def _last(self, name: str, size: int) -> bytes:
        url = hf_hub_url(self.location, name, repo_type="dataset", revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes=-{size}"}
        # Streamed, so that a server that would send all of the shard is not listened to.
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as answer:
            if answer.status_code != 206:
                raise OSError(f"answer {answer.status_code} to the request for a part of {name}")
            return answer.read()


@functools.cache
def hub_files(location: str, revision: str | None = None) -> HubFiles:
    """Find out what a data set on the Hub consists of, from the Hub, or with HF_HUB_OFFLINE from its cache.

    What a branch stands for is asked once in a process, so that the rows of a run are all of one commit.

    Raises:
        InputError: as `pull`, and a data set that datasets cannot make out.
    """
    folder = pull(location, _DESCRIPTIONS, revision=revision, kind="dataset")
    names = listed_files(location, folder.name, kind="dataset")
    if names is None:
        raise InputError(
            f"the cache does not tell which files '{location}' has at commit {folder.name}: unset HF_HUB_OFFLINE and "
            "start again"
        )
    if not any(name.endswith(".parquet") for name in names):
        return HubFiles(location, folder.name, None, {})
    shards, num_rows = _resolve(location, folder, names)
    return HubFiles(location, folder.name, shards, num_rows)


def _resolve(
    location: str, folder: Path, names: Iterable[str]
) -> tuple[dict[str, tuple[str, ...]] | None, dict[str, int]]:
    """Let datasets sort the files into splits, on empty files of the same names."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    with tempfile.TemporaryDirectory() as temporary:
        # Its name gets into messages.
        sketch = Path(temporary).resolve() / location
        for name in names:
            if ".." in PurePosixPath(name).parts:
                continue  # no such file can be in a repo, and none is written outside the folder
            (sketch / name).parent.mkdir(parents=True, exist_ok=True)
            if name in _DESCRIPTIONS:
                shutil.copyfile(folder / name, sketch / name)
            else:
                (sketch / name).touch()
        try:
            builder = datasets.load_dataset_builder(str(sketch))
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).replace(str(sketch), location).split())[:300] or type(error).__name__
            raise InputError(f"datasets cannot make out what '{location}' consists of: {reason}") from error
        num_rows = {name: split.num_examples for name, split in (builder.info.splits or {}).items()}
        num_rows = {name: count for name, count in num_rows.items() if count}
        if not isinstance(builder, Parquet) or builder.config.filters is not None:
            return None, num_rows
        shards = {
            str(split): tuple(Path(file).relative_to(sketch).as_posix() for file in files)
            for split, files in builder.config.data_files.items()
        }
        return shards, num_rows
