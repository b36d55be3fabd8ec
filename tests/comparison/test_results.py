"""The figures, tables and pictures of a comparison, and the check against stored ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gkd_hf.comparison import schedule
from gkd_hf.comparison.cells import Cell
from gkd_hf.comparison.check import check_against, read_stored
from gkd_hf.comparison.definition import Comparison
from gkd_hf.comparison.definition_file import read_comparison
from gkd_hf.comparison.results import collect
from gkd_hf.comparison.run import plan, select, write
from gkd_hf.comparison.table import markdown, terminal_table
from gkd_hf.errors import InputError
from tests.comparison.conftest import PlayedRuns, write_comparison

VARIANTS = {
    "alone": {"title": "student alone", "set": {"method": "mse"}},
    "gkd": {"title": "GKD", "tune": {"stages.task.learning_rate": [1e-3, 2e-3]}},
    "step": {"shown": False, "set": {"stages.task.max_steps": 9}},
}


def figures(cell: Cell) -> tuple[float, dict[str, float]]:
    better = 10.0 if cell.variant.name == "gkd" else 0.0
    source = 60.0 + cell.seed + (5.0 if cell.tuned.get("stages.task.learning_rate") == 2e-3 else 0.0)
    return source, {"toy_city:night": 30.0 + better + 2 * cell.seed, "toy_city:fog": 40.0 + 2 * better + 2 * cell.seed}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Finished, but for a seed of the reference."""
    groups = {"methods": ["gkd"], "for comparison": ["alone"]}
    path = write_comparison(tmp_path_factory.mktemp("played"), VARIANTS, seeds=[0, 1, 2], groups=groups)
    comparison = read_comparison(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "POLL", 0)
        PlayedRuns(figures, {"alone, seed 2": (1, "broken")}).play(comparison)
    return comparison


@pytest.fixture(scope="module")
def results(comparison: Comparison) -> dict[str, Any]:
    return collect(select(comparison, None, None), ["python", "scripts/compare_methods.py", "c.yaml"])


def test_figures(results: dict[str, Any]) -> None:
    gkd, alone = results["variants"]["gkd"], results["variants"]["alone"]
    assert results["domains"] == ["toy_city:night", "toy_city:fog"]
    assert gkd["seeds"]["1"] | {"command": ""} == {
        "source": 66.0, "mean_target": 52.0, "domains": {"toy_city:night": 42.0, "toy_city:fog": 62.0},
        "seconds": {"task_agnostic": 90.0, "task": 30.0}, "steps": {"task_agnostic": 3, "task": 3}, "command": "",
    }  # fmt: skip
    assert gkd["mean"] == {"source": 66.0, "mean_target": 52.0, "toy_city:night": 42.0, "toy_city:fog": 62.0}
    assert gkd["std"]["mean_target"] == pytest.approx(2.0)
    # Seed by seed: the seed that the reference lacks does not count.
    assert gkd["gain"] == {"source": 5.0, "mean_target": 15.0, "toy_city:night": 10.0, "toy_city:fog": 20.0}
    assert gkd["chosen"] == {"stages.task.learning_rate": 2e-3}
    assert [trial["source"] for trial in gkd["tuning"]] == [60.0, 65.0]
    assert list(alone["seeds"]) == ["0", "1"]
    assert alone["std"]["mean_target"] == pytest.approx(2**0.5)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_tables(results: dict[str, Any]) -> None:
    text = markdown(results)
    assert "| method | source toy_city | night | fog | mean unseen | gain |" in text
    assert "| GKD | **66.0 ± 1.0** | **42.0 ± 2.0** | **62.0 ± 2.0** | **52.0 ± 2.0** | +15.0 |" in text
    assert "| student alone | 60.5 ± 0.7 | 31.0 ± 1.4 | 41.0 ± 1.4 | 36.0 ± 1.4 |  |" in text
    assert "- student alone: 2 of 3 seeds" in text
    assert "| **task.learning_rate 0.002** | **65.0** |" in text
    assert "| step |" not in text.partition("## Training")[0]
    shown = terminal_table(results)
    assert "52.0 ± 2.0*" in shown
    assert "student alone: 2 of 3 seeds" in shown
    assert "step" not in shown
    assert shown.index("methods") < shown.index("GKD") < shown.index("for comparison") < shown.index("│ student alone")


def test_files(comparison: Comparison) -> None:
    results = write(select(comparison, None, None), ["x"])
    folder = comparison.output_dir
    assert read_stored(folder / "results.json") == results
    assert (folder / "results.md").read_text() == markdown(results)
    with Image.open(folder / "results.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert not list(folder.glob(".results*"))


def test_files_before_anything_is_finished(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    comparison = read_comparison(write_comparison(tmp_path, VARIANTS, seeds=[0]))
    results = write(select(comparison, None, None), ["x"])
    assert "GKD: 0 of 1 seeds" in markdown(results)
    assert (tmp_path / "out" / "results.png").is_file()


def test_plan(comparison: Comparison) -> None:
    text = plan(select(comparison, None, None))
    assert "11 runs" in text
    assert "10 finished" in text
    assert "tuning task.learning_rate 0.002: finished, source 65.0" in text
    assert "hyper-parameters: task.learning_rate 0.002" in text
    assert "seed 2: to run" in text
    assert plan(select(comparison, ["gkd"], ["1"])).startswith("3 runs")


def test_selections_that_do_not_exist(comparison: Comparison) -> None:
    with pytest.raises(InputError, match="no variant 'gdk', did you mean 'gkd'"):
        select(comparison, ["gdk"], None)
    with pytest.raises(InputError, match="no seed 7"):
        select(comparison, None, ["7"])


def test_check(results: dict[str, Any]) -> None:
    now = copy.deepcopy(results)
    table, within = check_against(now, results)
    assert within
    assert table.count(" yes ") == 10  # the source and the mean over the unseen domains
    # Twice the standard deviation of the stored seeds: 4 points for GKD, 2.8 for the reference.
    now["variants"]["gkd"]["seeds"]["0"]["mean_target"] += 3.9
    assert check_against(now, results)[1]
    now["variants"]["gkd"]["seeds"]["0"]["mean_target"] += 0.2
    table, within = check_against(now, results)
    assert not within
    assert table.count(" NO ") == 1
    assert check_against(now, results | {"spread": 5.0})[1]
    assert not check_against(now, results | {"spread": 0.5})[1]
    now = copy.deepcopy(results)
    now["variants"]["gkd"]["seeds"]["0"]["source"] -= 2.5
    table, within = check_against(now, results)
    assert not within
    assert table.count(" NO ") == 1


def test_check_of_what_is_missing(results: dict[str, Any]) -> None:
    now = copy.deepcopy(results)
    del now["variants"]["gkd"]["seeds"]["1"]
    del now["variants"]["alone"]
    table, within = check_against(now, results)
    assert not within
    assert table.count(" missing ") == table.count(" NO ") == 6
    # Of what is selected nothing is missing.
    table, within = check_against(now, results, ["gkd"], [0, 2])
    assert within
    assert table.count(" yes ") == 4
    assert "only gkd\n" in table
    assert table.endswith("only seed 0, 2")
    assert not check_against(now, results, ["gkd"])[1]


def test_values_that_a_variant_has_no_place_for_are_not_told_as_chosen(tmp_path: Path, runs: PlayedRuns) -> None:
    rate, task_rate = "stages.task_agnostic.learning_rate", "stages.task.learning_rate"
    without = {"set": {"stages.task_agnostic": None}}
    variants = {
        "gkd": {"tune": {rate: [1e-3], task_rate: [2e-3]}},
        "no_1a": without | {"tuned_as": "gkd"},
        "mse": {"tune": {rate: [4e-3]}, "set": {"method": "mse"}},
        "mse_no_1a": {"set": {"method": "mse", **without["set"]}, "tuned_as": "mse"},
    }
    comparison = read_comparison(write_comparison(tmp_path, variants, seeds=[0]))
    played = runs.play(comparison)
    results = collect(played, ["x"])
    chosen = {name: entry["chosen"] for name, entry in results["variants"].items()}
    assert chosen == {"gkd": {rate: 1e-3, task_rate: 2e-3}, "no_1a": {task_rate: 2e-3},
                      "mse": {rate: 4e-3}, "mse_no_1a": {}}  # fmt: skip
    text = markdown(results)
    assert "no_1a: as gkd (task.learning_rate 0.002)." in text
    assert "mse_no_1a: as mse (nothing of it applies)." in text
    assert "| **task_agnostic.learning_rate 0.001, task.learning_rate 0.002** |" in text
    text = plan(played)
    assert "hyper-parameters: task.learning_rate 0.002\n" in text
    assert "hyper-parameters: those of mse do not apply\n" in text


def test_check_against_something_else(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to check"):
        check_against(results, {"variants": {}})
    other = tmp_path / "other.json"
    variants = copy.deepcopy(results["variants"])
    variants["gkd"]["seeds"]["0"]["source"] = "35"
    for content in ([1], results | {"spread": "x"}, results | {"spread": True}, results | {"variants": variants}):
        other.write_text(json.dumps(content))
        with pytest.raises(InputError, match="is no results.json"):
            read_stored(other)
    with pytest.raises(InputError, match="cannot be read"):
        read_stored(tmp_path / "none.json")
