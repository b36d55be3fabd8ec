"""SIGTERM: a checkpoint at the end of the step while a stage trains, an end at once at any other time."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers import TrainerCallback

from gkd_hf.training import ending, preemption, sigterm
from gkd_hf.training.checkpoints import last_complete_checkpoint
from gkd_hf.training.sigterm import Preempted, ending_at_once
from tests.distributed.launched import Launched, children
from tests.training.test_trainers import (
    assert_equal,
    distillation_trainer,
    evaluation_set,
    segmentation_trainer,
    weights,
)


class SignalAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def mine(number: int, frame: FrameType | None) -> None:
    """A handler that was there before."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, mine)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("step", [3, 6])
def test_a_stage_saves_at_the_end_of_its_step(step: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = distillation_trainer(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "broken"
    trainer = distillation_trainer(folder, save_steps=100)
    trainer.add_callback(SignalAt(step))
    with pytest.raises(Preempted) as ended:
        trainer.train()
    assert ended.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is mine
    assert last_complete_checkpoint(folder) == str(folder / f"checkpoint-{step}")
    lines = [line for line in capfd.readouterr().err.splitlines() if "SIGTERM" in line]
    assert lines == [f"SIGTERM: saved {folder}/checkpoint-{step}; the same command goes on from there"]
    again = distillation_trainer(folder, save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(whole))


@pytest.mark.parametrize("streamed", [True, False])
def test_loader_workers_outlive_a_signal_to_all(streamed: bool, tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, dataloader_num_workers=1)
    if not streamed:
        stream = iter(trainer.train_dataset.shard(1, rank=0, world_size=1))
        trainer.train_dataset = [{"pixel_values": next(stream)["pixel_values"].float()} for _ in range(24)]
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for _ in range(2):  # a scheduler may say it again
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.2)
    for _ in range(4):  # more than were fetched before
        assert len(next(batches)["pixel_values"]) == 4
    assert worker.is_alive()
    of_torch = signal.getsignal(signal.SIGCHLD)
    try:
        sigterm.end_workers()  # or the program's end would wait for one that hangs
        worker.join(timeout=30)  # torch's handler would raise an error here
        assert worker.exitcode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGCHLD, of_torch)


def test_loader_workers_of_evaluations_outlive_it_too(tmp_path: Path) -> None:
    trainer = segmentation_trainer(tmp_path / "task", dataloader_num_workers=1)
    trainer.eval_dataset = {"toy_city:night": evaluation_set(10)}
    predictions, asked = trainer._predictions, []

    def signalled(*args: Any) -> Any:
        if not asked:
            asked.extend(multiprocessing.active_children())
            os.kill(asked[0].pid, signal.SIGTERM)
            asked[0].join(timeout=1)
        return predictions(*args)

    trainer._predictions = signalled
    assert trainer.evaluate_domains(examples=0)["toy_city:night"].images == 10 and len(asked) == 1
    other = distillation_trainer(tmp_path / "distil")
    for loader in (other.get_eval_dataloader([{}] * 4), other.get_test_dataloader([{}] * 4)):
        assert loader.base_dataloader.worker_init_fn.func is sigterm.outlive_sigterm


class SignalAtTheEnd(TrainerCallback):
    """Sends this process SIGTERM when it has trained."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_a_signal_after_the_last_step(saves: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = distillation_trainer(tmp_path, max_steps=1, save_strategy=saves)
    trainer.add_callback(SignalAtTheEnd())
    if saves == "steps":
        with pytest.raises(Preempted):
            trainer.train()
        told = f"saved {tmp_path}/checkpoint-1; the same command goes on from there"
    else:
        assert trainer.train().global_step == 1
        told = "came when the training was done"
    assert (last_complete_checkpoint(tmp_path) is not None) == (saves == "steps")
    assert [line for line in capfd.readouterr().err.splitlines() if "SIGTERM" in line] == [f"SIGTERM: {told}"]


@pytest.mark.parametrize("in_a_step", [True, False])
def test_a_process_blocked_in_its_step_leaves(in_a_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked where no handler of Python is called; a save or an evaluation, though, may take its time."""
    libc, mutex, codes = ctypes.CDLL(None), ctypes.create_string_buffer(64), []

    def left(code: int = -1) -> None:
        codes.append(code)
        libc.pthread_mutex_unlock(mutex)

    monkeypatch.setattr(preemption, "several", lambda: True)
    monkeypatch.setattr(preemption, "leave", left)
    monkeypatch.setattr(preemption, "STEP_PATIENCE", 0.1)
    watch = preemption.Preemption()
    signals = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    rescue = threading.Timer(30 if in_a_step else 2.5, left)
    with pytest.raises(Preempted), ending_at_once(), watch.watching():
        if in_a_step:
            watch.on_step_begin()
        signals.start()
        rescue.start()
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
        rescue.cancel()
    assert codes[0] == (1 if in_a_step else -1)
    assert watch.received


def test_without_a_signal_the_handler_comes_back_too(tmp_path: Path) -> None:
    distillation_trainer(tmp_path, max_steps=2).train()
    assert signal.getsignal(signal.SIGTERM) is mine and not sigterm.sigterm_came()


def test_outside_of_training_the_program_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        raise AssertionError("went on")

    with ending_at_once():
        assert ending.exit_code(interrupted) == 0
    assert signal.getsignal(signal.SIGTERM) is mine
    assert capfd.readouterr().err == "SIGTERM: ended; the same command goes on where this run stood\n"


def test_what_falls_over_because_of_the_signal_does_not_hide_it(capfd: pytest.CaptureFixture[str]) -> None:
    def worker_gone() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with ending_at_once():
        assert ending.exit_code(worker_gone) == 0
    assert capfd.readouterr().err.endswith("the same command goes on where this run stood\n")
    for in_training in (False, True):  # where the training was to save and did not
        with pytest.raises(RuntimeError, match="by itself"), ending_at_once():
            sigterm.note_sigterm(in_training, in_training)
            ending.exit_code(lambda: (_ for _ in ()).throw(RuntimeError("by itself")))


def test_a_disk_that_is_full_elsewhere_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with open("/dev/full", "w") as file:
            file.write("something")

    if not os.path.exists("/dev/full"):
        pytest.skip("nothing is full here")
    assert ending.exit_code(write) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: [Errno 28] No space left on device") and line.count("\n") == 1


def test_a_run_is_ended_twice_and_goes_on(tmp_path: Path) -> None:
    """While it renders its data, and while it trains, with its loader's workers hit by the same signal."""
    from tests.cli.test_kill_and_resume import write_recipe

    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    stage = out / "stages" / "task_agnostic"
    long = "stages.task_agnostic.max_steps=400"

    run = Launched(0, tmp_path / "early", "scripts/run_gkd.py", recipe, f"output_dir={out}", long)
    run.until(lambda: "[data] rendering" in run.output(), "rendering")
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 0
    assert run.output().endswith("SIGTERM: ended; the same command goes on where this run stood\n"), run.output()
    assert not stage.exists()

    run = Launched(0, tmp_path / "late", "scripts/run_gkd.py", recipe, f"output_dir={out}", long)
    run.until(lambda: last_complete_checkpoint(stage), "checkpoint")
    assert children(run.process.pid), "no loader worker"
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 0
    last = last_complete_checkpoint(stage)
    assert run.output().endswith(f"SIGTERM: saved {last}; the same command goes on from there\n"), run.output()
    assert "Traceback" not in run.output() and not (stage / "finished.json").exists()
    assert not (stage / ".saving").exists()
