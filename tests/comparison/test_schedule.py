"""Which runs are made, in which order, with which values, and what they take over from one another."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from gkd_hf.comparison.cells import Cell, choose
from gkd_hf.comparison.definition import Comparison
from gkd_hf.comparison.places import Places
from gkd_hf.comparison.results import collect
from gkd_hf.comparison.schedule import Schedule
from gkd_hf.errors import InputError
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.sigterm import Preempted
from tests.comparison.conftest import PlayedRun, PlayedRuns

Read = Callable[..., Comparison]
RATE = "stages.task.learning_rate"
TUNED = {"gkd": {"tune": {RATE: [1e-3, 2e-3, 4e-3]}}}


def test_a_stage_with_the_same_settings_is_trained_once(read: Read, runs: PlayedRuns, tmp_path: Path) -> None:
    comparison = read({"gkd": {}, "other_head": {"set": {"stages.task.decode_head": "upernet"}}}, seeds=[0])
    runs.play(comparison)
    assert runs.trained == [("gkd, seed 0", "task_agnostic"), ("gkd, seed 0", "task"), ("other_head, seed 0", "task")]
    first, second = (tmp_path / "out" / name / "seed0/stages/task_agnostic" for name in ("gkd", "other_head"))
    assert (first / "model/model.safetensors").samefile(second / "model/model.safetensors")
    assert (second / "heads.safetensors").read_text() == "gkd, seed 0"
    assert not (first / "heads.safetensors").samefile(second / "heads.safetensors")  # a run writes into its own
    assert not (first / "model").samefile(second / "model")
    assert "other_head, seed 0: started (task_agnostic: as another run has trained it)" in runs.told


def test_what_was_checked_of_labels_is_known_to_the_runs_that_follow(
    read: Read, runs: PlayedRuns, tmp_path: Path
) -> None:
    runs.play(read({"gkd": {}}, seeds=[0]))
    (tmp_path / "out/gkd/seed0/checked_labels.json").write_text('{"mine/train": {"rows": 3}}')
    runs.play(read({"gkd": {}}))
    assert json.loads((tmp_path / "out/gkd/seed1/checked_labels.json").read_text()) == {"mine/train": {"rows": 3}}


def test_another_seed_shares_nothing(read: Read, runs: PlayedRuns) -> None:
    runs.play(read({"gkd": {}}))
    assert len(runs.trained) == 4


def test_a_run_waits_while_another_trains_its_stage(read: Read, runs: PlayedRuns) -> None:
    comparison = read({"gkd": {}, "other_head": {"set": {"stages.task.decode_head": "upernet"}}, "mse": {"set": {
        "method": "mse"}}}, seeds=[0])  # fmt: skip
    runs.play(comparison, jobs=3)
    assert runs.started == ["gkd, seed 0", "mse, seed 0", "other_head, seed 0"]
    assert sorted(runs.trained) == sorted({("gkd, seed 0", "task_agnostic"), ("gkd, seed 0", "task"),
                                           ("mse, seed 0", "task_agnostic"), ("mse, seed 0", "task"),
                                           ("other_head, seed 0", "task")})  # fmt: skip
    assert runs.most_active == 3  # it waits for the stage, not for the end of the run that trains it


def test_no_more_runs_at_once_than_wanted(read: Read, runs: PlayedRuns) -> None:
    runs.play(read({"gkd": {}, "mse": {"set": {"method": "mse"}}}), jobs=2)
    assert runs.most_active == 2


def better_on_the_source(cell: Cell) -> tuple[float, dict[str, float]]:
    """The middle rate is best on the source, the last on the targets."""
    rate = cell.tuned.get(RATE, 1e-3)
    return {1e-3: 60.0, 2e-3: 70.0, 4e-3: 65.0}[rate], {"toy_city:night": 1e4 * rate, "toy_city:fog": 1e4 * rate}


def test_tuning_goes_by_the_source_and_never_reads_a_target(read: Read, runs: PlayedRuns, tmp_path: Path) -> None:
    runs.figures = better_on_the_source
    played = runs.play(read(TUNED | {"as_gkd": {"set": {"method": "mse"}, "tuned_as": "gkd"}}))
    assert played.choice(played.comparison.variants["gkd"]).values == {RATE: 2e-3}
    assert [cell.recipe.stages.task.learning_rate for cell in played.finals("as_gkd")] == [2e-3, 2e-3]
    for cell in played.trials["gkd"]:
        assert cell.recipe.evaluate == []
        assert {(use.domain, use.role) for use in RecipeData(cell.recipe).uses()} == {
            ("toy_city:pool", "train"), ("toy_city", "train"), ("toy_city", "test")}  # fmt: skip
        assert cell.seed == 0
    # The final run of the first seed finds all that its candidate has trained.
    assert ("gkd, seed 0", "task") not in runs.trained
    assert ("gkd, seed 1", "task") in runs.trained
    assert (tmp_path / "out/gkd/seed0/stages/task/finished.json").is_file()
    assert sum(name == "task_agnostic" for label, name in runs.trained if label.startswith("gkd")) == 2


def test_the_first_of_equals_is_chosen_and_what_diverged_is_passed_over() -> None:
    figures = [({"x": 1}, None), ({"x": 2}, 50.0), ({"x": 3}, 50.0), ({"x": 4}, 49.0)]
    assert choose(figures).values == {"x": 2}
    assert choose(figures).tried == tuple(figures)
    assert choose(figures[:1]) is None


def test_a_candidate_that_diverges_is_an_answer(read: Read, runs: PlayedRuns) -> None:
    words = "error: the loss is not finite at step 2 (total nan)"
    runs.failures = {"gkd, tuning task.learning_rate 0.002": (3, words)}
    played = runs.play(read(TUNED))
    assert played.choice(played.comparison.variants["gkd"]).values == {RATE: 1e-3}
    assert played.finished() == played.total() == 5
    assert not played.failed
    again = PlayedRuns()
    again.play(played.comparison)
    assert again.started == []


def test_a_candidate_that_is_refused_has_not_diverged(read: Read, runs: PlayedRuns) -> None:
    runs.failures = {"gkd, tuning task.learning_rate 0.002": (2, "error: a finite number of images is needed")}
    played = runs.play(read(TUNED))
    assert len(played.failed) == 1
    assert not any(cell.diverged for cell in played.trials["gkd"])


def test_a_larger_grid_whose_new_value_wins_stops_only_that_method(read: Read, runs: PlayedRuns) -> None:
    variants = {"gkd": {"tune": {RATE: [1e-3]}}, "other": {"set": {"method": "mse"}}}
    runs.figures = better_on_the_source
    runs.play(read(variants, seeds=[0]))
    variants["gkd"]["tune"][RATE].append(2e-3)
    runs.told.clear()
    played = runs.play(read(variants), jobs=3)
    assert set(played.failed) == {played.comparison.folder("gkd", 0)}
    told = [line for line in runs.told if "failed" in line]
    assert len(told) == 1
    assert told[0].startswith("gkd, seed 0: failed: ")
    assert "stages.task.learning_rate = 0.001, the recipe now says 0.002" in told[0]
    assert {"gkd, seed 1", "other, seed 1"} <= set(runs.started)
    assert played.total() - played.finished() == 1


START = {"late": {"start_from": "early"}, "last": {"start_from": "late"}, "early": {"set": {"method": "mse"}}}


def test_what_started_from_a_run_with_other_settings_is_not_finished(
    read: Read, runs: PlayedRuns, tmp_path: Path
) -> None:
    runs.play(read(START, seeds=[0]))
    assert len(runs.started) == 3
    again = PlayedRuns()
    again.play(read(START, seeds=[0]))
    assert again.started == []
    shutil.rmtree(tmp_path / "out/early/seed0")
    again.play(read(START, seeds=[0]))
    assert again.started == ["early, seed 0"]  # trained anew as before
    shutil.rmtree(tmp_path / "out/early/seed0")
    changed = read(START | {"early": {"set": {"method": "mse", RATE: 7e-3}}}, seeds=[0])
    schedule = Schedule(changed, changed.variants, [0])
    assert schedule.finished() == 0
    with pytest.raises(InputError, match=r"late, seed 0: 'early', .* has other settings now: remove .*/late/seed0 to"):
        schedule.check()
    again = PlayedRuns()
    again.play(changed)
    assert again.started == ["early, seed 0"]
    assert again.told[-1].startswith("late, seed 0: failed: 'early', whose encoder")
    for name in ("late", "last"):
        shutil.rmtree(tmp_path / "out" / name)
    again = PlayedRuns()
    again.play(changed)
    assert again.started == ["late, seed 0", "last, seed 0"]


def test_a_stage_trained_from_another_encoder_is_not_taken_over(read: Read, runs: PlayedRuns, tmp_path: Path) -> None:
    twin = {"twin": {"start_from": "early", "set": {RATE: 5e-3}}}
    runs.play(read(START, seeds=[0]))
    shutil.rmtree(tmp_path / "out/early")
    changed = read(START | twin | {"early": {"set": {"method": "mse", RATE: 7e-3}}}, seeds=[0])
    runs.trained.clear()
    runs.play(changed, names=["twin"])
    assert ("twin, seed 0", "task_agnostic") in runs.trained


def test_finished_runs_without_a_record_of_their_start_get_one(read: Read, runs: PlayedRuns, tmp_path: Path) -> None:
    runs.play(read(START, seeds=[0]))
    record = tmp_path / "out/late/seed0/started_from.txt"
    written = record.read_text()
    record.unlink()
    runs.started.clear()
    runs.play(read(START, seeds=[0]))
    assert runs.started == []
    assert record.read_text() == written


def test_a_run_that_outlived_its_parent_is_waited_for(read: Read, runs: PlayedRuns, tmp_path: Path) -> None:
    comparison = read({"gkd": {}, "mse": {"set": {"method": "mse"}}}, seeds=[0])
    cell = Schedule(comparison, ["gkd"], [0]).known()[0]
    cell.prepare("")
    orphan, lock = PlayedRun(runs, cell), FileLock(cell.folder / ".lock")
    runs.active.append(orphan)
    lock.acquire()

    def start(other: Cell, environment: dict[str, str]) -> PlayedRun:
        assert other.label == "mse, seed 0"
        while orphan.poll() is None:
            pass
        lock.release()
        return PlayedRuns.start(runs, other, environment)

    runs.start = start
    runs.play(comparison, jobs=2)
    assert runs.started == ["mse, seed 0"]
    waiting = [line for line in runs.told if line.startswith("gkd, seed 0: another program is running it")]
    assert len(waiting) == 1
    assert "gkd, seed 0: source 60.0, mean of unseen 35.0" in runs.told


def test_a_candidate_that_crashes_leaves_the_choice_open(read: Read, runs: PlayedRuns) -> None:
    runs.failures = {"gkd, tuning task.learning_rate 0.002": (1, "RuntimeError: out of memory")}
    comparison = read(TUNED | {"other": {"set": {"method": "mse"}}})
    played = runs.play(comparison)
    assert played.choice(comparison.variants["gkd"]) is None
    assert [label for label in runs.started if label.startswith("gkd, seed")] == []
    assert "other, seed 1" in runs.started
    assert any("failed (exit code 1" in line and line.endswith("RuntimeError: out of memory") for line in runs.told)
    runs.failures.clear()
    played = runs.play(comparison)
    assert played.finished() == played.total()


def test_a_failed_run_stops_only_what_starts_from_it(read: Read, runs: PlayedRuns) -> None:
    variants = {"late": {"start_from": "early"}, "early": {"set": {"stages.task": None, "evaluate": [],
                                                                   "source_test": False}, "shown": False}}  # fmt: skip
    runs.failures = {"early, seed 0": (1, "broken")}
    played = runs.play(read(variants))
    assert runs.started == ["early, seed 0", "early, seed 1", "late, seed 1"]
    assert len(played.failed) == 1
    assert played.total() - played.finished() == 2


def test_only_what_is_missing_is_run(read: Read, runs: PlayedRuns) -> None:
    runs.play(read({"gkd": {}}))
    runs.started.clear()
    runs.play(read({"gkd": {}, "mse": {"set": {"method": "mse"}}}, seeds=[0, 1, 2]))
    assert runs.started == ["gkd, seed 2", "mse, seed 0", "mse, seed 1", "mse, seed 2"]


def test_a_run_begun_with_other_settings_is_refused(read: Read, runs: PlayedRuns) -> None:
    runs.play(read({"gkd": {}}))
    changed = read({"gkd": {"set": {"stages.task.max_steps": 9}}})
    with pytest.raises(InputError, match=r"gkd, seed 0: .*stages.task.max_steps = 3, the recipe now says 9"):
        Schedule(changed, ["gkd"], [0]).check()


def test_what_only_changes_how_it_runs_leaves_it_finished(read: Read, runs: PlayedRuns, tmp_path: Path) -> None:
    runs.play(read(START))
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    runs.started.clear()
    comparison = read(START, output_dir=str(moved))
    runs.play(comparison)
    assert runs.started == []
    results = collect(Schedule(comparison, comparison.variants, comparison.seeds), ["x"])
    assert results["variants"]["last"]["seeds"]["1"]["steps"] == {"task_agnostic": 3, "task": 3}


def test_sigterm_ends_the_runs(read: Read, runs: PlayedRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    terminate = PlayedRun.terminate
    monkeypatch.setattr(PlayedRun, "terminate", lambda run: (ended.append(run.cell.label), terminate(run)))
    start = runs.start

    def start_and_signal(cell: Cell, environment: dict[str, str]) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(cell, environment)

    runs.start = start_and_signal
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted):
        runs.play(read({"gkd": {}}), jobs=2)
    assert ended == ["gkd, seed 0"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_where_runs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    places = Places(3, ("4", "7"), 2)
    assert [places.environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "7", "4"]
    assert places.environment(0)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert places.environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Places.here(None).jobs == 2
    assert Places.here(None).devices == ("4", "7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("gkd_hf.data.shard_processes.cores", lambda: 8)
    assert Places.here(None) == Places(8, (), 1)
    assert Places.here(2) == Places(2, (), 4)
