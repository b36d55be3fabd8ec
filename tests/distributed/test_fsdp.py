"""FSDP2 for real, over gloo on the CPU: the same steps, checkpoints to go on from, and whole models at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gkd_hf import GKDSegmentationTrainer, GKDStudentForSemanticSegmentation, GKDStudentModel
from tests.cli.test_kill_and_resume import STAGES, write_recipe
from tests.distributed import run_fsdp
from tests.distributed.launched import run_launched

STAGE_ONE = ["distil", "distil-accumulated", "distil-resnet", "distil-several", "distil-bf16"]
STAGE_TWO = ["task-linear", "task-upernet", "task-mask2former", "end-to-end"]
# Mask2Former's loss averages its number of masks over processes, not over the micro batches of one.
COMPARED = [case for case in (*STAGE_ONE, *STAGE_TWO, "one-stage") if case != "task-mask2former"]


@pytest.mark.parametrize(
    "processes, cases",
    [
        (
            2,
            [
                "dinov2",
                "resnet",
                "convnext",
                "swin",
                "mobilenet_v2",
                "vit-linear",
                "resnet-upernet",
                "vit-mask2former",
            ],
        ),
        (4, ["vit", "vit-dpt"]),
    ],
)
def test_a_step_by_torchs_own_sharding_is_the_unsharded_step(processes: int, cases: list[str], tmp_path: Path) -> None:
    """Parameters of student, heads and teacher are asserted to be DTensors, buffers not to be, where they run."""
    run_launched("tests/distributed/run_raw_sharding.py", tmp_path, *cases, processes=processes)
    for rank in range(processes):
        found = json.loads((tmp_path / f"found.{rank}.json").read_text())
        assert found["processes"] == processes and list(found["cases"]) == cases
        for case, values in found["cases"].items():
            assert values["layers"] >= 3, case
            assert values["loss"] <= 1e-6 and values["gradients"] <= 1e-5 and values["weights"] <= 1e-5, (case, values)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a launch that trained every case sharded over two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    cases = [*STAGE_ONE, *STAGE_TWO, "one-stage"]
    run_launched("tests/distributed/run_fsdp.py", folder, *cases, processes=2, preset="fsdp2")
    return folder


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same trainings by one process."""
    folder = tmp_path_factory.mktemp("unsharded")
    for case in COMPARED:
        (folder / case).mkdir()
        run_fsdp.run(case, folder / case, 1)
    return folder


def found(folder: Path, case: str) -> dict[str, Any]:
    return json.loads((folder / case / "found.json").read_text())


@pytest.mark.parametrize("case", COMPARED)
def test_losses_are_those_of_one_process(case: str, sharded: Path, unsharded: Path) -> None:
    ours, expected = found(sharded, case), found(unsharded, case)
    assert ours["sharded"] and ours["parameters"] and ours["optimiser"] and not expected["sharded"]
    assert len(ours["logs"]) == len(expected["logs"]) == run_fsdp.STEPS
    for log, other in zip(ours["logs"], expected["logs"], strict=True):
        assert log == pytest.approx(other, rel=1e-5)
    if case in STAGE_ONE:
        assert ours["teacher"] == (case != "distil-resnet")
        assert ours["teacher_dtype"] == expected["teacher_dtype"]
        assert ours["teacher_dtype"] == ("torch.bfloat16" if case == "distil-bf16" else "torch.float32")


@pytest.mark.parametrize("case", run_fsdp.RESUMED)
def test_checkpoints_are_sharded_and_resumed_bit_equal(case: str, sharded: Path, unsharded: Path) -> None:
    values = found(sharded, case)
    assert {"pytorch_model_fsdp_0", "optimizer_0", "trainer_state.json"} <= set(values["files"])
    assert not any(name.startswith("model") for name in values["files"])
    shards = list((sharded / case / "run" / f"checkpoint-{run_fsdp.STEPS}" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(shards) == 2
    for each in (values, found(unsharded, case)):
        assert each["resumed_differ"] == each["finished_differ"] == []


@pytest.mark.parametrize("case", [*STAGE_ONE, *STAGE_TWO])
def test_the_model_that_is_kept_is_whole(case: str, sharded: Path, tmp_path: Path) -> None:
    """One plain process loads it and gets from it what the sharded ones got."""
    folder = sharded / case / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    weights = load_file(sharded / case / "whole.safetensors")
    if case in STAGE_ONE:
        model = GKDStudentModel.from_pretrained(folder)
        weights = {
            name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")
        }
    else:
        model = GKDStudentForSemanticSegmentation.from_pretrained(folder)
    assert model.config.architectures == [type(model).__name__]
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, state[name])] == []
    if case in STAGE_ONE:
        return
    trainer = run_fsdp.make(case, tmp_path, 1)
    trainer = GKDSegmentationTrainer(model, trainer.args, trainer.train_dataset, trainer.eval_dataset)
    values = found(sharded, case)
    domain = trainer.evaluate_domains()["toy_city:night"]
    assert values["confusion"] == domain.confusion.tolist() and values["images"] == domain.images == 5
    assert values["metrics"] == pytest.approx(trainer.evaluate())
    # During training twice, if it was asked for, and at the end.
    assert values["evaluated"] == ([10, 20, 20] if case == "task-linear" else [20])


def test_a_recipe_runs_sharded(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    steps = [f"stages.{stage}.max_steps=4" for stage in STAGES] + ["stages.task_agnostic.query_warmup_steps=2"]
    output = run_launched(
        "tests/distributed/run_recipe_sharded.py",
        recipe,
        *steps,
        "teacher.sharding=always",
        f"output_dir={tmp_path / 'out'}",
        processes=2,
        preset="fsdp2",
    )
    assert output.count("mIoU in percent") == 1  # one process speaks
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["targets"]["toy_city:night"]["images"] == 4
    for stage in STAGES:
        folder = tmp_path / "out" / "stages" / stage
        assert (folder / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()
        assert (folder / "model" / "model.safetensors").is_file()
    heads = load_file(tmp_path / "out" / "stages" / "domain_agnostic" / "heads.safetensors")
    assert heads["feature.query.proj.weight"].shape == (32, 24)
