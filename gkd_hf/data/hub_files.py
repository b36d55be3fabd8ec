"""Which files make up the splits of a data set on the Hub, and how its parquet shards get here: verified."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet

from gkd_hf.errors import InputError
from gkd_hf.models.pull import listed_files, pull, pull_file

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

    def fetch(self, shard: str) -> Path:
        """Return a shard in the Hub's cache, fetched if it is not there; raises `InputError` as `pull_file`."""
        return pull_file(self.location, shard, commit=self.commit, kind="dataset")


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
