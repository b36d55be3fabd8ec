"""A sharded checkpoint goes on with another number of processes; without sharding it is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.launched import ROOT, own_environment, run_launched

RESHARDED = "tests/distributed/run_resharded.py"


def test_shards_go_on_with_more_and_with_fewer_processes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_launched(RESHARDED, whole, processes=2, preset="fsdp2")
    record = json.loads((whole / "checkpoint-2" / "complete.json").read_text())
    assert (record["engine"], record["processes"]) == ("fsdp", 2)
    assert {name for name in record["files"] if name.startswith("rng_state")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert sum(name.endswith(".distcp") for name in record["files"]) == 4  # model and optimiser, of two processes
    expected = load_file(whole / "weights.2.safetensors")
    for processes in (4, 1):
        out = tmp_path / str(processes)
        shutil.copytree(whole / "checkpoint-2", out / "checkpoint-2")
        run_launched(RESHARDED, out, processes=processes, preset="fsdp2")
        record = json.loads((out / "checkpoint-4" / "complete.json").read_text())
        assert (record["engine"], record["processes"]) == ("fsdp", processes)
        weights = load_file(out / f"weights.{processes}.safetensors")
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.allclose(weight.float(), expected[name].float(), atol=1e-5), (processes, name)

    out = tmp_path / "plain"
    shutil.copytree(whole / "checkpoint-2", out / "checkpoint-2")
    run = subprocess.run(
        [sys.executable, str(ROOT / RESHARDED), str(out)],
        capture_output=True,
        text=True,
        env=own_environment(WORLD_SIZE="1"),
        timeout=240,
        check=False,
    )
    assert run.returncode == 2
    told = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "was saved sharded by FSDP, this run trains without sharding" in told[0]
