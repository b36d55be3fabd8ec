"""What decides the outcome of every stage of a recipe, and the folders that remember it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from gkd_hf.methods import METHODS, ONE_STAGE_METHODS
from gkd_hf.training.one_stage import TEACHER_HEAD
from gkd_hf.training.recipe import DistillationRecipe, Recipe, StageRecipe, TaskRecipe
from gkd_hf.training.recipe_data import RecipeData, is_rendered
from gkd_hf.training.stage_folder import StageFolder


def stage_folders(recipe: Recipe, data: RecipeData) -> dict[str, StageFolder]:
    """The folder of every stage and baseline, with what decides its outcome; nothing is written.

    Raises:
        InputError: a folder holds the same stage begun with other settings.
    """
    folders, before = {}, "none"
    output_dir = Path(recipe.output_dir)
    shared = {"seed": recipe.seed, "student": dataclasses.asdict(recipe.student)}
    for name, stage in recipe.stages:
        own = dataclasses.asdict(stage)
        settings = shared | {"stages": {name: own}, "data": _data_settings(recipe, data, stage)}
        if isinstance(stage, DistillationRecipe):
            # Tokens that are kept are rounded, wherever that is.
            own["teacher_cache"] = None if stage.teacher_cache is None else "bf16"
            settings |= {"method": recipe.method} | _teacher_settings(recipe)
        else:
            trained = {key: value for key, value in own.items() if not key.startswith("baseline_")}
            # What is trained end to end, or on the frozen teacher, is so whatever freeze_encoder says of the method.
            whole, head = (_without_freezing(keys) for keys in (own, trained))
            if recipe.needs_teacher_head:
                head = settings | {"stages": {name: head}, "teacher": _one_stage_teacher(recipe)}
                folders[TEACHER_HEAD] = StageFolder(output_dir / "stages" / TEACHER_HEAD, head)
            end_to_end = settings | {"stages": {name: whole}}
            for baseline in recipe.baselines:
                folders[baseline] = StageFolder(
                    output_dir / "baselines" / baseline, end_to_end | _method_settings(recipe, baseline)
                )
            if METHODS[recipe.method].kind != "label_free":
                settings = end_to_end | _method_settings(recipe, recipe.method)
            elif stage.freeze_encoder:
                settings |= {"stages": {name: trained}}
        settings |= {"stage_before": before}
        folders[name] = StageFolder(output_dir / "stages" / name, settings)
        # What follows hangs on all that went before: a stage run again makes the later ones out of date.
        before = f"{name}, settings {folders[name].digest}"
    return folders


def _teacher_settings(recipe: Recipe) -> dict[str, Any]:
    """The teacher's keys, or those of several teachers by their places."""
    if recipe.teachers is None:
        return {"teacher": dataclasses.asdict(recipe.teacher)}
    return {"teachers": {str(number): dataclasses.asdict(each) for number, each in enumerate(recipe.teachers)}}


def _method_settings(recipe: Recipe, method: str) -> dict[str, Any]:
    """What a method that learns the task from the first step on adds; nothing for the student alone."""
    if method not in ONE_STAGE_METHODS:
        return {}
    teacher = {"method": method, "teacher": _one_stage_teacher(recipe)}
    return teacher | {method: recipe.method_settings(method)}


def _one_stage_teacher(recipe: Recipe) -> dict[str, Any]:
    """The teacher's keys but `standardise`, which the label-free stages alone look at."""
    return {key: value for key, value in dataclasses.asdict(recipe.teacher).items() if key != "standardise"}


def _without_freezing(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != "freeze_encoder"}


def _data_settings(recipe: Recipe, data: RecipeData, stage: StageRecipe) -> dict[str, Any]:
    """What decides a stage's samples, beside the stage's own keys; of several domains by name."""
    found = {name: _domain_settings(recipe, data, name, stage) for name in stage.domains}
    return found if len(found) > 1 else found[stage.data]


def _domain_settings(recipe: Recipe, data: RecipeData, name: str, stage: StageRecipe) -> dict[str, Any]:
    if is_rendered(recipe, name):
        # Where the scenes are depends on output_dir, which may be moved; what they are does not.
        toy_city = dataclasses.asdict(recipe.data.toy_city)
        del toy_city["test_images"]
        return {"toy_city": toy_city}
    place = data.location(name)
    root = os.path.abspath(place) if os.path.isdir(place) else place
    settings = {"root": root, "revision": data.revision(name)}
    if isinstance(stage, TaskRecipe):
        settings |= {"label_map": recipe.data.label_maps.get(name), "classes": recipe.data.classes}
    return settings
