"""A comparison whose runs are played: every stage is "trained" by writing its folder, and every run has figures."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd_hf.comparison import schedule
from gkd_hf.comparison.cells import Cell
from gkd_hf.comparison.definition import Comparison
from gkd_hf.comparison.definition_file import read_comparison
from gkd_hf.comparison.places import Places

STAGE = {"image_size": 32, "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3}
RECIPE = {
    "student": {"encoder": {"model_type": "resnet"}},
    "teacher": {"name": "toy"},
    "stages": {
        "task_agnostic": {"data": "toy_city:pool", **STAGE},
        "task": {"data": "toy_city", **STAGE, "decode_head": "linear"},
    },
    "evaluate": ["toy_city:night", "toy_city:fog"],
    "output_dir": "unused",
}


def write_comparison(folder: Path, variants: dict[str, Any], **keys: Any) -> Path:
    """Write recipe.yaml and a comparison of it; return the comparison's path."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    content = {"recipe": "recipe.yaml", "output_dir": str(folder / "out"), "seeds": [0, 1]}
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(content | {"variants": copy.deepcopy(variants)} | keys, sort_keys=False))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write_comparison` in the test's own folder."""
    return partial(write_comparison, tmp_path)


@pytest.fixture
def read(write: Callable[..., Path]) -> Callable[..., Comparison]:
    """Write a comparison and read it."""
    return lambda variants, **keys: read_comparison(write(variants, **keys))


@dataclass
class PlayedRun:
    """A run that trains one stage each time it is asked whether it has ended."""

    runs: PlayedRuns
    cell: Cell
    pid: int = -1
    ended: int | None = None

    def poll(self) -> int | None:
        if self.ended is not None:
            return self.ended
        label = self.cell.label
        if label in self.runs.failures:
            code, words = self.runs.failures[label]
            self.cell.log.write_text(f"[task] begins\n{words}\n")
            return self._end(code)
        for name, folder in self.cell.stages.items():
            if not folder.finished:
                folder.begin()
                folder.finish(lambda place: (place / "model.safetensors").write_text(label), summary(name))
                (folder.path / "heads.safetensors").write_text(label)
                self.runs.trained.append((label, name))
                return None
        self._report()
        return self._end(0)

    def _end(self, code: int) -> int:
        self.ended = code
        self.runs.active.remove(self)
        return code

    def _report(self) -> None:
        source, targets = self.runs.figures(self.cell)
        recipe = self.cell.recipe
        report = {
            "source": "toy_city",
            "source_result": {"miou": source},
            "targets": {name: {"miou": targets[name]} for name in recipe.evaluate},
            "mean_target_miou": sum(map(targets.get, recipe.evaluate)) / len(recipe.evaluate)
            if recipe.evaluate
            else None,
            "settings": recipe.as_dict(),
        }
        (self.cell.folder / "encoder").mkdir(exist_ok=True)
        (self.cell.folder / "encoder" / "config.json").write_text("{}")
        name = "report.json" if recipe.stages.task else "card.json"
        (self.cell.folder / name).write_text(json.dumps(report))

    def terminate(self) -> None:
        self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        return self.ended


def summary(name: str) -> dict[str, Any]:
    return {"steps": 3, "skipped_rows": [], "facts": {"seconds": {"task_agnostic": 90.0}.get(name, 30.0)}}


def by_seed(cell: Cell) -> tuple[float, dict[str, float]]:
    """Figures of a run: source, and every target."""
    return 60.0 + cell.seed, {"toy_city:night": 30.0 + 2 * cell.seed, "toy_city:fog": 40.0 + 2 * cell.seed}


@dataclass
class PlayedRuns:
    """Starts played runs and remembers what was done."""

    figures: Callable[[Cell], tuple[float, dict[str, float]]] = by_seed
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    trained: list[tuple[str, str]] = field(default_factory=list)
    active: list[PlayedRun] = field(default_factory=list)
    most_active: int = 0
    told: list[str] = field(default_factory=list)
    places: list[dict[str, str]] = field(default_factory=list)

    def start(self, cell: Cell, environment: dict[str, str]) -> PlayedRun:
        run = PlayedRun(self, cell)
        self.started.append(cell.label)
        self.active.append(run)
        self.most_active = max(self.most_active, len(self.active))
        self.places.append(environment)
        return run

    def play(self, comparison: Comparison, jobs: int = 1, **selection: Any) -> schedule.Schedule:
        selected = {"names": comparison.variants, "seeds": comparison.seeds} | selection
        played = schedule.Schedule(comparison, **selected)
        played.run(Places(jobs, (), 1), self.told.append, lambda: None, self.start)
        return played


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> PlayedRuns:
    monkeypatch.setattr(schedule, "POLL", 0)
    return PlayedRuns()
