"""kill −9 in the middle of every stage, the same command again: nothing is repeated and every weight is bit-equal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from gkd_hf.models.loading import load_encoder
from gkd_hf.training.checkpoints import checkpoint_step, last_complete_checkpoint
from tests.tiny import ENCODERS

ROOT = Path(__file__).parents[2]
STAGES = ("task_agnostic", "domain_agnostic", "task")
STEPS = 40


def write_recipe(folder: Path) -> Path:
    load_encoder(ENCODERS["dinov2"])[0].save_pretrained(folder / "teacher")
    stage = {
        "image_size": 32,
        "batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "logging_steps": 4,
        "workers": 1,
    }
    distil = stage | {"rand_augment": True, "query_warmup_steps": 7}
    recipe = {
        "student": {"encoder": ENCODERS["resnet"]},
        "teacher": {"name": str(folder / "teacher")},
        "stages": {
            "task_agnostic": distil | {"data": "toy_city:pool"},
            "domain_agnostic": distil | {"data": "toy_city+toy_city:pool", "weights": [1, 3], "query_warmup_steps": 0},
            "task": stage | {"data": "toy_city", "decode_head": "linear", "window": 32, "stride": 32},
        },
        "evaluate": ["toy_city:night"],
        "data": {"toy_city": {"size": 32, "pool_images": 24, "train_images": 16, "test_images": 4}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/run_gkd.py"), str(recipe), f"output_dir={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A session of its own, so that the kill takes its loader workers along.
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return output


def kill_in(stage: Path, process: subprocess.Popen) -> int:
    """Kill once the stage has a checkpoint; return the step it will go on from."""
    deadline = time.monotonic() + 120
    while last_complete_checkpoint(stage) is None:
        assert process.poll() is None and time.monotonic() < deadline, f"never got to {stage}"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (stage / "finished.json").exists()
    return checkpoint_step(last_complete_checkpoint(stage))


def test_killed_in_every_stage_and_bit_equal(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(recipe, whole)
    for stage in STAGES:
        step = kill_in(broken / "stages" / stage, start(recipe, broken))
        assert 0 < step < STEPS, "killed too late to prove anything"
        before = STAGES[: STAGES.index(stage)]
        # what was finished stays: same files, same times
        for done in before:
            assert (broken / "stages" / done / "finished.json").exists()
    times = {
        stage: (broken / "stages" / stage / "model" / "model.safetensors").stat().st_mtime_ns for stage in STAGES[:2]
    }
    output = finish(start(recipe, broken))
    assert "[task_agnostic] finished before" in output and "[domain_agnostic] finished before" in output
    assert f"[task] {STEPS} steps of 4 × toy_city, going on from step {step}" in output
    for stage, changed in times.items():
        assert (broken / "stages" / stage / "model" / "model.safetensors").stat().st_mtime_ns == changed
    finish(undisturbed)
    for artefact in ("encoder", "segmenter", *(f"stages/{stage}/model" for stage in STAGES)):
        ours = load_file(broken / artefact / "model.safetensors")
        expected = load_file(whole / artefact / "model.safetensors")
        assert ours.keys() == expected.keys()
        assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    reports = [(folder / "report.json").read_text().replace(str(folder), "OUT") for folder in (whole, broken)]
    assert reports[0] == reports[1]
