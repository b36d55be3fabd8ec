"""The fixture that writes small data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .samples import write_shard


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as ``train-*.parquet`` shards of at most ``per_shard`` rows; returns the folder."""

    def write(rows: list[dict], per_shard: int = 10, split: str = "train", name: str = "data_set") -> Path:
        parts = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
        for number, part in enumerate(parts):
            write_shard(tmp_path / name / f"{split}-{number:05d}-of-{len(parts):05d}.parquet", part)
        return tmp_path / name

    return write
