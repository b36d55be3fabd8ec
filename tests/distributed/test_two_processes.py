"""Two gloo processes through `accelerate launch`: disjoint data, and one process's gradients, losses and counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_kill_and_resume import STAGES, write_recipe
from tests.distributed.launched import run_launched


def launch(stage: str, out: Path, processes: int, micro: int, accumulation: int = 1, stop: int = 4) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    script = "tests/distributed/run_stage.py"
    run_launched(script, stage, out, processes, micro, accumulation, stop, processes=processes)
    return out


@pytest.mark.parametrize("stage", ["distil", "task"])
def test_two_processes_equal_one(stage: str, tmp_path: Path) -> None:
    one = launch(stage, tmp_path / "one", 1, 8)
    two = launch(stage, tmp_path / "two", 2, 4)

    seen = [json.loads((two / f"seen.{rank}.json").read_text()) for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) >= 16 and not set(seen[0]) & set(seen[1])
    # Four steps of eight: each rank has its half of every global batch.
    assert sorted(seen[0][:16] + seen[1][:16]) == list(range(32))

    expected = load_file(one / "gradients.safetensors")
    gradients = load_file(two / "gradients.safetensors")
    assert gradients.keys() == expected.keys() and len(expected) > 0
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name

    results = [json.loads((two / f"result.{rank}.json").read_text()) for rank in (0, 1)]
    single = json.loads((one / "result.0.json").read_text())
    for ours, theirs in zip(results[0]["logs"], single["logs"], strict=True):
        for name in theirs:
            # the attention is looked at on rank 0's own samples
            if name.startswith("loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    if stage == "task":
        assert results[0]["confusion"] == results[1]["confusion"]
        assert results[0]["images"] == single["images"] == 5
        total = torch.tensor(results[0]["confusion"]).sum()
        assert total == torch.tensor(single["confusion"]).sum()


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    """The order hangs on no process."""
    one = launch("distil", tmp_path / "one", 1, 8)
    broken = launch("distil", tmp_path / "broken", 1, 8, stop=2)
    first = json.loads((broken / "seen.0.json").read_text())
    launch("distil", broken, 2, 4)
    then = [json.loads((broken / f"seen.{rank}.json").read_text()) for rank in (0, 1)]
    assert first[:16] == list(range(16))
    assert [then[0][:8], then[1][:8]] == [[*range(16, 20), *range(24, 28)], [*range(20, 24), *range(28, 32)]]
    expected = load_file(one / "weights.safetensors")
    for name, weight in load_file(broken / "weights.safetensors").items():
        assert torch.allclose(weight.float(), expected[name].float(), atol=1e-4), name


def test_a_recipe_runs_on_two_processes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    steps = [f"stages.{stage}.max_steps=4" for stage in STAGES] + ["stages.task_agnostic.query_warmup_steps=2"]
    output = run_launched("scripts/run_gkd.py", recipe, *steps, f"output_dir={tmp_path / 'out'}", processes=2)
    assert output.count("mIoU in percent") == 1  # one process speaks
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["targets"]["toy_city:night"]["images"] == 4
    for stage in STAGES:
        arguments = torch.load(tmp_path / f"out/stages/{stage}/checkpoint-4/training_args.bin", weights_only=False)
        assert (arguments.world_size, arguments.per_device_train_batch_size) == (2, 2)
        assert (tmp_path / f"out/stages/{stage}/checkpoint-4/rng_state_1.pth").exists()


def test_a_process_without_labels_does_not_stop_the_others(tmp_path: Path) -> None:
    """Mask2Former's loss averages its number of masks over processes; one of them may see ignored pixels alone."""
    run_launched("tests/distributed/run_void_rank.py", tmp_path / "gradients.safetensors", processes=2)
    gradients = load_file(tmp_path / "gradients.safetensors")
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())
