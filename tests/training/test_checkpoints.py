"""Checkpoints: whole or not there, damaged ones told of and passed over, limits kept, disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from gkd_hf import InputError
from gkd_hf.training import checkpoints
from gkd_hf.training.checkpoints import damage, last_complete_checkpoint, standing
from tests.training.test_trainers import assert_equal, distillation_trainer, segmentation_trainer, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    distillation_trainer(folder, save_total_limit=None).train()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(("checkpoint-", "."))}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_records_its_files(trained: Path) -> None:
    assert names(trained) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    record = json.loads((trained / "checkpoint-6/complete.json").read_text())
    assert (record["step"], record["engine"], record["processes"]) == (6, "plain", 1)
    there = {path.name for path in (trained / "checkpoint-6").iterdir()}
    assert set(record["files"]) == there - {"complete.json"}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= there
    assert standing(trained) == checkpoints.Standing(trained / "checkpoint-6", {})
    assert last_complete_checkpoint(trained / "nothing") is None


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda c: os.truncate(c / "model.safetensors", 1000), r"model\.safetensors: 1000 bytes, not \d+"),
    "flipped": (lambda c: flip(c / "optimizer.pt"), r"optimizer\.pt: crc32 \w{8}, not \w{8}"),
    "empty": (
        lambda c: [path.unlink() for path in c.iterdir()],
        r"complete\.json is missing: it was interrupted.* an older version",
    ),
    "without random numbers": (lambda c: (c / "rng_state.pth").unlink(), r"rng_state\.pth is missing"),
    "record torn": (lambda c: (c / "complete.json").write_text('{"step": 6, "fil'), r"complete\.json is broken"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_checkpoint_is_told_of_and_passed_over(
    kind: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, why = SPOILT[kind]
    spoil(folder / "checkpoint-6")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    again = distillation_trainer(folder, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint-6 is damaged (") and lines[0].endswith("): going on from checkpoint-4")
    assert re.search(why, lines[0]), lines[0]
    # The damaged one of the same step is replaced, and it is the one that stays.
    assert names(folder) == {"checkpoint-6"} and damage(folder / "checkpoint-6") is None


def test_going_on_before_a_damaged_checkpoint_gives_the_same_weights(folder: Path) -> None:
    whole = distillation_trainer(folder)
    whole.train(resume_from_checkpoint=True)  # nothing left to train: the weights of step 6
    flip(folder / "checkpoint-6" / "model.safetensors")
    flip(folder / "checkpoint-4" / "optimizer.pt")
    again = distillation_trainer(folder)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(whole))


def test_with_every_checkpoint_damaged_a_person_decides(folder: Path) -> None:
    for step in (2, 4, 6):
        flip(folder / f"checkpoint-{step}" / "model.safetensors")
    message = r"no checkpoint in '.*' is whole: checkpoint-6 \(model.*checkpoint-4.*checkpoint-2.*remove them to begin"
    with pytest.raises(InputError, match=message):
        distillation_trainer(folder).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"cannot resume from '.*checkpoint-4': model\.safetensors: crc32"):
        distillation_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(InputError, match=r"cannot resume from '.*checkpoint-9': there is no such folder"):
        distillation_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-9"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"engine": "fsdp"}, "was saved sharded by FSDP, this run trains without sharding"),
        ({"engine": "deepspeed"}, "was saved by DeepSpeed, this run trains without sharding"),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused(record: dict[str, str], message: str, folder: Path) -> None:
    path = folder / "checkpoint-6" / "complete.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    with pytest.raises(InputError, match=message):
        distillation_trainer(folder).train(resume_from_checkpoint=True)
    message = "was saved without sharding .*, this run trains sharded by FSDP; launch it as it was begun"
    with pytest.raises(InputError, match=message):
        checkpoints.check_resumable(folder / "checkpoint-4", "fsdp", 2)


def test_deepspeed_goes_on_with_as_many_processes_only(folder: Path) -> None:
    path = folder / "checkpoint-6" / "complete.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "deepspeed", "processes": 4}))
    checkpoints.check_resumable(path.parent, "deepspeed", 4)
    with pytest.raises(InputError, match="DeepSpeed saved it on 4 processes and cannot go on with 2; launch 4"):
        checkpoints.check_resumable(path.parent, "deepspeed", 2)


class Killed(BaseException):
    """Nothing of the trainer runs after this."""


def kill_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Make the process's n-th call that changes a checkpoint folder its last one."""
    count = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            real(*args, **kwargs)

        return run

    patch.setattr(checkpoints.os, "replace", counted(os.replace))
    patch.setattr(checkpoints.os, "fsync", counted(os.fsync))
    patch.setattr(checkpoints.shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_kill_at_any_moment_of_a_save_leaves_what_there_was(
    again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """checkpoint-6 is put in place, and older ones go, until a call that changes the disk is the process's last."""
    found = []
    for call in range(1, 100):
        run = folder.parent / f"killed-{call}"
        shutil.copytree(folder, run)
        (run / ".saving").mkdir()
        os.replace(run / "checkpoint-6", run / ".saving" / "checkpoint-6")
        (run / ".saving" / "checkpoint-6" / "complete.json").unlink()
        if again:
            shutil.copytree(folder / "checkpoint-6", run / "checkpoint-6")
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            try:
                checkpoints.put_in_place(run, 6, "plain", 1)
                checkpoints.rotate(run, 6, 1)
                break
            except Killed:
                pass
        checkpoints.clear_saving(run)  # as the next start does
        left = standing(run)
        assert not left.passed_over and not (run / ".saving").exists()
        found.append(left.checkpoint.name)
    assert names(run) == {"checkpoint-6"}
    assert len(found) > 10 and found[-1] == "checkpoint-6"
    assert found == sorted(found) and set(found) == ({"checkpoint-6"} if again else {"checkpoint-4", "checkpoint-6"})


def test_the_same_step_is_saved_again(folder: Path) -> None:
    trainer = distillation_trainer(folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert damage(folder / "checkpoint-6") is None
    # killed between the two renames: the old one is put back
    (folder / ".saving").mkdir()
    os.replace(folder / "checkpoint-6", folder / ".saving" / "replaced-checkpoint-6")
    checkpoints.clear_saving(folder)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6") and not (folder / ".saving").exists()


def test_going_back_removes_the_future_that_is_given_up(folder: Path) -> None:
    trainer = distillation_trainer(folder, max_steps=5, save_steps=3, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert names(folder) == {"checkpoint-5"}


def test_a_training_begins_in_a_folder_without_checkpoints(folder: Path, tmp_path: Path) -> None:
    (folder / "bad_rows.0.jsonl").touch()
    message = r"holds checkpoint-6 of an earlier training: resume_from_checkpoint=True goes on from there; to begin"
    other = shutil.copytree(folder / "checkpoint-2", tmp_path / "other" / "checkpoint-2")
    for resume in (None, False, str(other)):
        with pytest.raises(InputError, match=message):
            distillation_trainer(folder, max_steps=2).train(resume_from_checkpoint=resume)
    assert names(folder) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"} and (folder / "bad_rows.0.jsonl").exists()


@pytest.mark.parametrize(("limit", "kept"), [(1, {6}), (2, {4, 6}), (None, {2, 4, 6})])
def test_the_limit_is_kept(limit: int | None, kept: set[int], tmp_path: Path) -> None:
    distillation_trainer(tmp_path, save_total_limit=limit).train()
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_best_model_is_kept_and_loaded(
    ema_decay: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "mean_miou",
        "save_total_limit": 2,
        "ema_decay": ema_decay,
    }
    trainer = segmentation_trainer(tmp_path, **settings)
    scores, seen = iter([1.0, 3.0, 2.0]), []

    def evaluate(**kwargs: Any) -> dict[str, float]:
        with trainer.averaged():
            seen.append(weights(trainer))
        metrics = {"eval_mean_miou": next(scores)}
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert_equal(weights(trainer), seen[1])
    assert not torch.equal(seen[1]["decode_head.classifier.weight"], seen[2]["decode_head.classifier.weight"])
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    # Also where the run was killed when it had only that to load.
    again = segmentation_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), seen[1])


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"output_dir '.*run' cannot be written \(.+\): choose a folder"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_one_folder_is_not_written_by_every_host(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save_on_each_node would write every checkpoint once per host"):
        distillation_trainer(tmp_path, save_on_each_node=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "{folder}/.saving/checkpoint-2/x"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nothing/settings.json"), False),
        (PermissionError(errno.EACCES, "Permission denied", "/nothing/settings.json"), False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
        (OSError("a service gave no answer"), False),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_only_what_is_the_disks_is_told_as_the_disks(
    error: OSError, told: bool, wrapped: bool, tmp_path: Path
) -> None:
    if error.filename is not None:
        error = type(error)(error.errno, error.strerror, error.filename.format(folder=tmp_path))
    raised = CheckpointException("", {1: (error, traceback.StackSummary())}) if wrapped else error
    with pytest.raises(InputError if told else type(raised)) as caught:  # noqa: SIM117
        with checkpoints.refused_writes(tmp_path, 2, True):
            raise raised
    assert told or caught.value is raised


FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
out = Path(sys.argv[1])
out.mkdir(exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}k", "tmpfs", out], check=True)
from gkd_hf.errors import InputError
from gkd_hf.training.checkpoints import last_complete_checkpoint
from tests.training.test_trainers import distillation_trainer
first = distillation_trainer(out, max_steps=2)
first.train()
size = sum(path.stat().st_size for path in (out / "checkpoint-2").iterdir())
for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.95):
    free = shutil.disk_usage(out).free
    (out / "filler").write_bytes(bytes(int(free - share * size)))
    try:
        distillation_trainer(out).train(resume_from_checkpoint=True)
    except InputError as error:
        print(error)
    print(last_complete_checkpoint(out), sorted(path.name for path in out.iterdir()))
    (out / "filler").unlink()
distillation_trainer(out).train(resume_from_checkpoint=True)
print(last_complete_checkpoint(out))
"""


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    allowed = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(allowed, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    command = [
        "unshare",
        "--mount",
        "--map-root-user",
        sys.executable,
        "-c",
        FULL_DISK,
        str(tmp_path / "out"),
        "20000",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    lines = [line for line in run.stdout.splitlines() if not line.startswith("{")]
    assert len(lines) == 13
    for told, left in zip(lines[:12:2], lines[1:12:2], strict=True):
        assert told.startswith("the checkpoint of step 4 could not be written to"), told
        assert "No space left on device" in told and told.endswith("it goes on from checkpoint-2")
        assert left.split()[0].endswith("checkpoint-2") and ".saving" not in left
    assert lines[12].endswith("checkpoint-6")
