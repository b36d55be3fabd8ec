"""The runs of a comparison: one for each variant and seed, and one for each candidate of a tuning."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from gkd_hf.comparison.definition import Comparison, Variant, has_place
from gkd_hf.comparison.sharing import (
    finished_stages,
    origin_of,
    record_origin,
    settings_key,
    take_over,
    take_over_label_checks,
)
from gkd_hf.errors import InputError
from gkd_hf.training.one_stage import TEACHER_HEAD
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.stage_folder import StageFolder
from gkd_hf.training.stage_settings import stage_folders

# Where and how it is run, not what.
_FREE = ("output_dir", "hub", "timeout_minutes")


@dataclass(frozen=True)
class Cell:
    """One complete run of a recipe.

    Attributes:
        comparison: the one that it belongs to.
        variant: the method.
        seed: of the run.
        tuned: hyper-parameters by recipe key: those to try, or those that were chosen.
        trial: whether it is a candidate of a tuning, which is measured on the source alone.
    """

    comparison: Comparison
    variant: Variant
    seed: int
    tuned: Mapping[str, Any]
    trial: bool = False

    @property
    def label(self) -> str:
        """What it is called in a line of progress."""
        if self.trial:
            return f"{self.variant.name}, tuning {values_text(self.tuned)}"
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Its output folder. That of a candidate is named by its values, so that a grid can grow; without "=", which
        would make its path an override of a recipe.
        """
        if not self.trial:
            return self.comparison.folder(self.variant.name, self.seed)
        name = re.sub(r"[^\w.,+-]+", "_", ",".join(f"{key} {value}" for key, value in self.tuned.items()))
        return self.comparison.output_dir / self.variant.name / "tuning" / name

    @property
    def log(self) -> Path:
        """What its process has printed."""
        return self.folder / "log.txt"

    @cached_property
    def recipe(self) -> Recipe:
        """Its recipe; raises `InputError` as `Comparison.recipe`."""
        return self.comparison.recipe(self.variant, self.seed, self.folder, self.tuned, source_only=self.trial)

    @cached_property
    def stages(self) -> dict[str, StageFolder]:
        """Its stages' folders; raises `InputError` if one was begun with other settings."""
        try:
            return stage_folders(self.recipe, RecipeData(self.recipe))
        except InputError as error:
            raise InputError(f"{self.label}: {error}") from error

    @cached_property
    def _by_settings(self) -> dict[str, StageFolder]:
        return {settings_key(folder): folder for folder in self.stages.values()}

    @property
    def applied(self) -> dict[str, Any]:
        """Those of its hyper-parameters whose section its recipe has."""
        return {key: value for key, value in self.tuned.items() if has_place(self.recipe, key)}

    def digest(self, origin: str) -> str:
        """A short name of what decides its encoder, wherever the comparison's folder is.

        Args:
            origin: the digest of the run that it starts from; "" for one that starts from none.
        """
        student = self.recipe.student
        if self.variant.start_from is not None:
            student = dataclasses.replace(student, encoder=self.variant.start_from)
        # In no folder that exists: that a stage was begun with other settings is told elsewhere.
        nowhere = str(self.folder / "cell.yaml" / "nowhere")
        recipe = dataclasses.replace(self.recipe, student=student, output_dir=nowhere)
        last = list(stage_folders(recipe, RecipeData(self.recipe)).values())[-1]
        return hashlib.sha256(f"{last.digest} {origin}".encode()).hexdigest()[:16]

    def missing(self) -> set[str]:
        """`settings_key` of its stages that are not finished."""
        return {key for key, folder in self._by_settings.items() if not folder.finished}

    def summaries(self) -> dict[str, dict[str, Any]]:
        """What was recorded at the end of its stages, of those that are finished."""
        names = [name for name, _ in self.recipe.stages]
        if self.recipe.needs_teacher_head:
            names.insert(-1, TEACHER_HEAD)
        records = {name: self.folder / "stages" / name / "finished.json" for name in names}
        return {name: json.loads(record.read_text("utf-8")) for name, record in records.items() if record.is_file()}

    def result(self, origin: str) -> dict[str, Any] | None:
        """The content of its report, or what stands for it without a task stage; None if it is not finished.

        Args:
            origin: the digest of the run that it starts from; "" for one that starts from none.
        """
        has_task = self.recipe.stages.task is not None
        if self._has_another_origin(origin):
            return None
        try:
            found = json.loads((self.folder / ("report.json" if has_task else "card.json")).read_text("utf-8"))
            wanted = self._of_the_result(self.recipe.as_dict())
            # Read as a recipe, settings of an older report have the keys that came later, at their defaults.
            if (
                self._of_the_result({key: found["settings"].get(key) for key in self.recipe.as_dict()}) != wanted
                and self._of_the_result(load_recipe(found["settings"]).as_dict()) != wanted
            ):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
            return None
        return found if (self.folder / "encoder" / "config.json").is_file() else None

    def _of_the_result(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a result depends on, as JSON has them."""
        settings = json.loads(json.dumps({key: value for key, value in settings.items() if key not in _FREE}))
        if self.variant.start_from is not None:
            # The comparison's folder may be moved: of the encoder's path, which run it is of counts.
            settings["student"]["encoder"] = Path(str(settings["student"]["encoder"])).parts[-3:]
        return settings

    def _has_another_origin(self, origin: str) -> bool:
        """Whether the run that it started from has been trained with other settings since."""
        return self.variant.start_from is not None and origin_of(self.folder) not in (None, origin)

    def remember_origin(self, origin: str) -> None:
        """Record the digest of the run that it started from, where no record of that was kept yet."""
        if self.variant.start_from is not None and origin_of(self.folder) is None:
            record_origin(self.folder, origin)

    def check(self, origin: str | None) -> None:
        """Raise `InputError` if it was begun with other settings, or from an encoder that was trained with others.

        Args:
            origin: the digest of the run that it starts from; None if that is not known yet.
        """
        begun = any((folder.path / "settings.json").is_file() for folder in self.stages.values())
        if begun and origin is not None and self._has_another_origin(origin):
            raise InputError(
                f"{self.label}: '{self.variant.start_from}', whose encoder it started from, has other settings now: "
                f"remove {self.folder} to run it again"
            )

    def prepare(self, origin: str) -> list[str]:
        """Write what the run is started with; return the stages that other runs have trained for it.

        Args:
            origin: the digest of the run that it starts from; "" for one that starts from none.

        Raises:
            InputError: as `check`.
        """
        self.check(origin)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.variant.start_from is not None:
            record_origin(self.folder, origin)
        data = self.folder / "data"
        if not data.is_symlink() and not data.exists():
            data.symlink_to(os.path.relpath(self.comparison.output_dir / "data", self.folder))
        text = yaml.safe_dump(self.recipe.as_dict(), sort_keys=False, allow_unicode=True)
        (self.folder / "cell.yaml").write_text(text, encoding="utf-8")
        take_over_label_checks(self.comparison.output_dir, self.folder)
        return take_over(self.stages, finished_stages(self.comparison.output_dir, origin))

    @property
    def diverged(self) -> bool:
        """Whether it has been tried, and its loss did not stay finite: it would not another time."""
        return (self.folder / "diverged.txt").is_file()

    def give_up(self, why: str) -> None:
        """Remember that its loss did not stay finite."""
        (self.folder / "diverged.txt").write_text(f"{why}\n", encoding="utf-8")

    def last_words(self) -> str:
        """The last line of its log, to be told where it failed."""
        if not self.log.is_file():
            return "it left no log"
        lines = self.log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


@dataclass(frozen=True)
class Choice:
    """What a tuning found: `values` that gave the best mIoU on the source, and every candidate's figure."""

    values: Mapping[str, Any]
    tried: tuple[tuple[Mapping[str, Any], float | None], ...]


def trials(comparison: Comparison, variant: Variant) -> list[Cell]:
    """The candidates of a variant's tuning, with the first seed; none where nothing is tuned."""
    if not variant.tune:
        return []
    return [Cell(comparison, variant, comparison.seeds[0], values, trial=True) for values in variant.candidates()]


def choose(figures: Sequence[tuple[Mapping[str, Any], float | None]]) -> Choice | None:
    """The candidate with the best figure, the first of equals.

    Args:
        figures: each candidate's values and its mIoU on the source; None for one that cannot be trained, whose loss
            is not finite.

    Returns:
        None where no candidate has a figure.
    """
    best = None
    for values, figure in figures:
        if figure is not None and (best is None or figure > best[1]):
            best = (values, figure)
    return None if best is None else Choice(best[0], tuple(figures))


def source_miou(result: Mapping[str, Any]) -> float | None:
    """Mean IoU on the source's held-out split, in percent."""
    held_out = result.get("source_result")
    return None if held_out is None else held_out["miou"]


def values_text(values: Mapping[str, Any]) -> str:
    """Hyper-parameters in one line."""
    return ", ".join(f"{key.removeprefix('stages.')} {value}" for key, value in values.items())
