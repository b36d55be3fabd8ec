"""scripts/compare_methods.py as typed: two methods with two seeds, ended in the middle and continued."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compare_methods.py"
STAGE = {"image_size": 32, "batch_size": 4, "max_steps": 2, "workers": 0, "logging_steps": 1}


@pytest.fixture(scope="module")
def compare_methods() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("compare_methods", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    recipe = {
        "student": {
            "encoder": {
                "model_type": "resnet",
                "layer_type": "basic",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
            }
        },
        "teacher": {"name": "toy"},
        "stages": {
            "domain_agnostic": STAGE | {"data": "toy_city", "learning_rate": 1e-3},
            "task": STAGE | {"data": "toy_city", "decode_head": "linear", "window": 64, "stride": 64},
        },
        "evaluate": ["toy_city:night"],
        "data": {"toy_city": {"train_images": 8, "test_images": 2}},
    }
    content = {
        "recipe": recipe,
        "output_dir": str(tmp_path / "out"),
        "seeds": [0, 1],
        "reference": "alone",
        "variants": {
            "alone": {"title": "student alone", "set": {"method": "none", "stages.domain_agnostic": None}},
            "gkd": {"title": "GKD", "set": {"method": "gkd"}},
        },
    }
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_comparison_ended_in_the_middle_goes_on(
    compare_methods: ModuleType, comparison: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(SCRIPT), str(comparison), "--jobs", "1"]
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    while process.poll() is None and "alone, seed 1: started" not in log.read_text():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 0
    assert "SIGTERM: ended; the same command goes on" in log.read_text()
    report = tmp_path / "out" / "alone" / "seed0" / "report.json"
    written = report.stat().st_mtime_ns
    so_far = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: list(each["seeds"]) for name, each in so_far["variants"].items()} == {"alone": ["0"], "gkd": []}

    stored = tmp_path / "stored.json"
    stored.write_text((tmp_path / "out" / "results.json").read_text())
    assert compare_methods.main([*command[2:], "--check", str(stored)]) == 0
    printed = capfd.readouterr().out
    assert "4 runs, 1 finished before" in printed
    assert "│ GKD " in printed
    assert "│ student alone   │    0 │ mean unseen │" in printed  # held against what was stored
    assert report.stat().st_mtime_ns == written
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for variant in results["variants"].values():
        assert list(variant["seeds"]) == ["0", "1"]
        for run in variant["seeds"].values():
            assert 0 <= run["domains"]["toy_city:night"] == run["mean_target"] <= 100
            assert run["steps"]["task"] == 2
    assert results["variants"]["gkd"]["seeds"]["1"]["steps"] == {"domain_agnostic": 2, "task": 2}
    assert (tmp_path / "out" / "gkd" / "seed1" / "data").resolve() == tmp_path / "out" / "data"


def test_a_typo_is_one_line(compare_methods: ModuleType, comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = comparison.read_text().replace("method: none", "methode: none")
    comparison.write_text(text)
    assert compare_methods.main([str(comparison), "--plan"]) == 2
    error = "error: variant 'alone': override 'methode=none': unknown key 'methode', did you mean 'method'?\n"
    assert capsys.readouterr().err == error
    assert not (comparison.parent / "out").exists()
