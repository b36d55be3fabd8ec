"""Rows from the Hub: shards come when they are reached, verified and once; what goes wrong is one clear line."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import make_rows, row_image, write_shard

from .repos import sha256
from .server import LoopbackHub

Files = dict[str, bytes]
Process = Callable[..., subprocess.CompletedProcess[str]]
SHARDS, ROWS = 4, 8

READ = """
import hashlib, itertools, json, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import datasets
from torch.utils.data import DataLoader
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.shards import count_rows, open_rows
from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError
from gkd_hf.models import pull
from gkd_hf.training.label_check import look_at_first_rows

pull.FIRST_WAIT, pull.TRIES = 0.01, 2
for pause in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):
    setattr(datasets.config, f"STREAMING_{pause}_RETRY_INTERVAL", 0.01)

def digests(rows):
    return [hashlib.sha256(row["image"]["bytes"]).hexdigest()[:8] for row in rows]

def told(read, *arguments):
    try:
        return read(*arguments)
    except InputError as error:
        return f"InputError: {error}"

def rows(name, **settings):
    return digests(open_rows(name, "train", **settings))

def opened(name):
    open_rows(name, "train")

def first_rows(name):
    look_at_first_rows(open_rows(name, "train"), "city", name, "train", label_map("identity", 2))

def keep(image, rng):
    import numpy, torch
    return {"pixel_values": torch.tensor(image.getpixel((0, 0))[0])}

def loaded(name, workers, passes=2):
    data = open_rows(name, "train", columns=("image",))
    stream = SampleStream(data, keep, seed=0, micro_batch_size=2, domain="city", num_rows=count_rows(name, "train"))
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=list)
    batches = itertools.islice(loader, 4 * passes)
    return [int(sample["pixel_values"]) for batch in batches for sample in batch]

def in_processes(name, workers, count):
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        return [each.result() for each in [pool.submit(told, loaded, name, workers) for _ in range(count)]]

if __name__ == "__main__":
    results = []
    for call, *arguments in json.loads(sys.argv[1]):
        results.append(told(globals()[call], *arguments))
        print("---", file=sys.stderr, flush=True)
    print(json.dumps(results))
"""


def data_set(folder: Path, first: int = 0) -> Files:
    """Eight rows in four shards, as the Hub would have them."""
    split = {"name": "train", "num_bytes": 1, "num_examples": ROWS}
    made = {"README.md": f"---\ndataset_info: {json.dumps({'splits': [split]})}\n---\n".encode()}
    rows = make_rows(first + ROWS)[first:]
    for number in range(SHARDS):
        write_shard(folder / "shard.parquet", rows[2 * number : 2 * number + 2])
        made[f"data/train-{number:05d}-of-{SHARDS:05d}.parquet"] = (folder / "shard.parquet").read_bytes()
    return made


@pytest.fixture
def read(hub_process: Process, tmp_path: Path) -> Callable[..., Any]:
    """Call functions of `READ`, one after the other, in one process; what each logs is under `logs`."""
    script = tmp_path / "read.py"
    script.write_text(READ)

    def run(*calls: tuple[Any, ...], **settings: Any) -> list[Any]:
        done = hub_process(script, json.dumps(calls), **settings)
        run.logs = done.stderr.split("---\n")
        return json.loads(done.stdout.splitlines()[-1])

    return run


def fetched(hub: LoopbackHub) -> list[str]:
    """Paths of the shards that were fetched whole."""
    got = [(path, status) for method, path, status in hub.requests if method == "GET"]
    return [path for path, status in got if path.startswith("/storage/") and status != 206]


def shard(files: Files, number: int) -> str:
    """Where the storage has a shard."""
    return f"^/storage/{sha256(files[f'data/train-{number:05d}-of-{SHARDS:05d}.parquet'])}"


TWICE = sorted(2 * list(range(ROWS)))
DIGESTS = [sha256(row_image(number))[:8] for number in range(ROWS)]


def test_a_damaged_shard_is_never_used(hub: LoopbackHub, read: Callable[..., Any], tmp_path: Path) -> None:
    files = data_set(tmp_path)
    hub.add_dataset("org/rows", files)
    hub.inject("flip", method="GET", path=shard(files, 2), whole=True)
    assert read(("rows", "org/rows")) == [DIGESTS]
    assert hub.faults.left() == []
    assert "data/train-00002-of-00004.parquet of 'org/rows' came damaged" in read.logs[0]
    assert len(fetched(hub)) == SHARDS + 1
    # Also when it was damaged later, on the disk; and then nothing but that shard is asked for.
    blob = next((tmp_path / "home/hub/datasets--org--rows/blobs").glob(shard(files, 1).rpartition("/")[2]))
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-9] + b"x" + blob.read_bytes()[-8:])
    said = read(("rows", "org/rows"), ("loaded", "org/rows", 2))
    assert said[0] == DIGESTS and sorted(said[1]) == TWICE
    assert len(fetched(hub)) == SHARDS + 2
    asked = len(hub.requests)
    assert read(("rows", "org/rows"), HF_HUB_OFFLINE="1") == [DIGESTS]
    assert len(hub.requests) == asked


def test_processes_and_workers_share_what_one_of_them_fetches(
    hub: LoopbackHub, read: Callable[..., Any], tmp_path: Path
) -> None:
    files = data_set(tmp_path)
    hub.add_dataset("org/rows", files)
    hub.inject("flip", method="GET", path=shard(files, 1), whole=True)
    hub.inject("delay", method="GET", path="^/storage/", times=SHARDS, seconds=0.5, whole=True)
    (orders,) = read(("in_processes", "org/rows", 2, 2))
    assert orders[0] == orders[1], read.logs
    assert sorted(orders[0]) == TWICE
    assert len(fetched(hub)) == SHARDS + 1


def test_faults_while_rows_are_read(hub: LoopbackHub, read: Callable[..., Any], tmp_path: Path) -> None:
    faults: dict[int | str, str] = {
        503: "the Hub answered 503 (it is busy or down) to every try to fetch 'org/503'",
        401: "the Hub refuses access to 'org/401' (401",
        "drop": "cannot reach ",
        "truncate": "",
        "flip": "data/train-00001-of-00004.parquet of 'org/flip' came damaged twice",
    }
    calls = []
    for number, fault in enumerate(faults):
        files = data_set(tmp_path, ROWS * number)
        hub.add_dataset(f"org/{fault}", files)
        hub.inject(fault, method="GET", path=shard(files, 1), times=math.inf)
        calls.append(("first_rows", f"org/{fault}"))
    files = data_set(tmp_path, 100)
    hub.add_dataset("org/lazy", files)
    # Also in a worker.
    said = read(("opened", "org/lazy"), *calls, ("loaded", "org/flip", 1))
    assert said[0] is None
    # The footers were enough: one part of each shard.
    parts = [path for method, path, status in hub.requests if (method, status) == ("GET", 206)]
    assert sum(path in shard(files, number) for path in parts for number in range(SHARDS)) == SHARDS
    assert not [path for path in fetched(hub) if any(path in shard(files, number) for number in range(SHARDS))]
    for place, (fault, told) in enumerate(faults.items()):
        line, log = said[1 + place], read.logs[1 + place]
        assert line.startswith(f"InputError: {told}") and "\n" not in line, (fault, line)
        assert log.count("trying again in") == (1 if fault in (503, "drop", "truncate") else 0), (fault, log)
    assert said[-1] == said[-2]
    assert not list((tmp_path / "home/hub/datasets--org--flip").rglob("train-00001*.parquet"))


def test_pictures_that_are_no_parquet_are_streamed(hub: LoopbackHub, read: Callable[..., Any]) -> None:
    pictures = {f"train/{number}.png": row_image(number) for number in range(3)}
    hub.add_dataset("org/pictures", pictures | {"README.md": b"# Pictures"})
    hub.add_dataset("org/broken", {f"train/{number}.png": row_image(number + 3) for number in range(3)})
    hub.inject(403, method="GET", path="^/datasets/org/broken/resolve/.*/2.png", times=math.inf)
    unlabelled, samples, broken = read(
        ("rows", "org/pictures"), ("loaded", "org/pictures", 1), ("loaded", "org/broken", 0)
    )
    assert "column 'label' is missing" in unlabelled
    assert set(samples) == {0, 1, 2}
    assert broken.startswith("InputError: ") and "the data cannot be read on" in broken and "\n" not in broken
    (said,) = read(("rows", "org/pictures"), HF_HUB_OFFLINE="1")
    assert "not stored as parquet shards" in said and "HF_HUB_OFFLINE is set" in said
