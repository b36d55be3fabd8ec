"""The files of skipped rows: each row once, whatever killed the run before."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkd_hf.errors import InputError
from gkd_hf.training.skipped_rows import SkippedRows, skipped_rows


def entry(row: int) -> dict:
    return {"domain": "city", "id": f"row{row}", "reason": "image: zero bytes", "shard": "a.parquet", "row": row}


def test_each_row_is_written_once_over_restarts(tmp_path: Path) -> None:
    first = SkippedRows(tmp_path / "run", 0)
    assert first.add([entry(1), entry(2)]) and not first.add([entry(2)])
    again = SkippedRows(tmp_path / "run", 0)
    assert not again.add([entry(1)]) and again.add([entry(3), entry(3)])
    assert len((tmp_path / "run" / "bad_rows.0.jsonl").read_text().splitlines()) == 3
    assert SkippedRows(tmp_path / "run", 1).add([entry(1), entry(4)])
    assert skipped_rows(tmp_path / "run") == [entry(1), entry(2), entry(3), entry(4)]


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_line_that_was_not_finished_is_left_out_and_written_again(kept: int, tmp_path: Path) -> None:
    SkippedRows(tmp_path, 0).add([entry(1)])
    path = tmp_path / "bad_rows.0.jsonl"
    line = path.read_bytes()
    path.write_bytes(line + line.replace(b"row1", b"row2").replace(b": 1}", b": 2}").rstrip()[:kept])
    assert skipped_rows(tmp_path) == [entry(1)]
    assert SkippedRows(tmp_path, 0).add([entry(1), entry(2)])
    assert skipped_rows(tmp_path) == [entry(1), entry(2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    rows = SkippedRows(tmp_path, 0)
    (tmp_path / "bad_rows.0.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="bad_rows.0.jsonl': the skipped rows cannot be written .No space left") as e:
        rows.add([entry(1)])
    assert "\n" not in str(e.value)
