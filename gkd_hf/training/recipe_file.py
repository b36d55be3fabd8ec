"""Reading a recipe: a YAML file and `key.sub=value` overrides, checked against the keys and types of `Recipe`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from gkd_hf.errors import InputError, nearest
from gkd_hf.methods import LABEL_FREE_METHODS
from gkd_hf.training.recipe import (
    AfDCDRecipe,
    CWDRecipe,
    DataRecipe,
    DistillationRecipe,
    HubRecipe,
    KDRecipe,
    Recipe,
    StagesRecipe,
    StudentRecipe,
    TaskRecipe,
    TeacherRecipe,
    ToyCityRecipe,
    ViTKDRecipe,
    WeightedTeacherRecipe,
    canonical_name,
)
from gkd_hf.training.recipe_checks import check_recipe

# A mapping given for one of these replaces the recipe's: fields of two architectures or heads do not mix.
_TAKEN_WHOLE = ("student.encoder", "stages.task.decode_head")

_SECTIONS: dict[type, dict[str, type]] = {
    Recipe: {
        "student": StudentRecipe,
        "teacher": TeacherRecipe,
        "teachers": WeightedTeacherRecipe,
        "stages": StagesRecipe,
        "kd": KDRecipe,
        "cwd": CWDRecipe,
        "af_dcd": AfDCDRecipe,
        "vitkd": ViTKDRecipe,
        "data": DataRecipe,
        "hub": HubRecipe,
    },
    StagesRecipe: {"task_agnostic": DistillationRecipe, "domain_agnostic": DistillationRecipe, "task": TaskRecipe},
    DataRecipe: {"toy_city": ToyCityRecipe},
}


def load_recipe(path: str | os.PathLike | Mapping[str, Any] | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file, or the keys themselves; None starts from nothing but the defaults.
        overrides: `key.sub=value`, value in YAML; `stages.task_agnostic=null` leaves a stage out.

    Raises:
        InputError: unreadable file, unknown key, wrong type or value; the message says where and what is possible.
    """
    in_place = path is None or isinstance(path, Mapping)
    origin = "recipe" if in_place else f"recipe '{os.fspath(path)}'"
    merged = OmegaConf.structured(Recipe)
    if path is not None:
        merged = _merge(merged, OmegaConf.create(dict(path)) if in_place else _read(Path(path)), origin)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"override '{override}' is not of the form key.sub=value")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise InputError(f"override '{override}' cannot be read: {_first_line(error)}") from error
        if key in _TAKEN_WHOLE or key.startswith("data.label_maps."):
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{key}=null"]))
        merged = _merge(merged, parsed, f"override '{override}'")
    try:
        _no_missing_keys(merged, origin)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{origin}: {_first_line(error)}") from error
    _use_canonical_names(recipe)
    check_recipe(recipe, origin)
    if recipe.method not in LABEL_FREE_METHODS:
        # One recipe serves all methods: those that learn the task from the first step on leave the stages before out.
        recipe.stages.task_agnostic = recipe.stages.domain_agnostic = None
    return recipe


def _use_canonical_names(recipe: Recipe) -> None:
    for _, stage in recipe.stages:
        stage.data = "+".join(map(canonical_name, stage.domains))
    recipe.evaluate = [canonical_name(name) for name in recipe.evaluate]
    recipe.data.roots = {canonical_name(name): root for name, root in recipe.data.roots.items()}
    recipe.data.revisions = {canonical_name(name): given for name, given in recipe.data.revisions.items()}
    recipe.data.label_maps = {canonical_name(name): given for name, given in recipe.data.label_maps.items()}


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        siblings = sorted(each.name for each in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or (f"; that folder has: {', '.join(siblings)}" if siblings else "")
        raise InputError(f"recipe '{path}' does not exist{hint}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"recipe '{path}' is not readable YAML: {text}") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"recipe '{path}' must be a mapping of keys (student, teacher, stages, …), not a list")
    if "variants" in content:
        raise InputError(f"'{path}' compares methods: run it with scripts/compare_methods.py")
    return content


def _merge(recipe: DictConfig, changes: DictConfig, origin: str) -> DictConfig:
    _no_unknown_keys(OmegaConf.to_container(changes), Recipe, "", origin)
    _read_ratio(changes, "stages.task.label_fraction")
    try:
        recipe.merge_with(changes)  # in place: a copy of the whole recipe would take longer than all the rest
        return recipe
    except ValidationError as error:
        what = _first_line(error)
        if "not a ListConfig" in what:
            what = "a list is needed there, such as [a, b]"
        raise InputError(f"{origin}: key {error.full_key}: {what}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{origin}: {_first_line(error)}") from error


def _read_ratio(changes: DictConfig, key: str) -> None:
    """Put the number in place of a ratio of whole numbers, such as 1/16, which YAML reads as text."""
    given = OmegaConf.select(changes, key, throw_on_resolution_failure=False)
    ratio = re.fullmatch(r"\s*(\d+)\s*/\s*0*([1-9]\d*)\s*", given) if isinstance(given, str) else None
    if ratio is not None:
        OmegaConf.update(changes, key, int(ratio[1]) / int(ratio[2]))


def _no_unknown_keys(values: Any, section: type, where: str, origin: str) -> None:
    """OmegaConf also refuses unknown keys, but only this can name the key that was meant."""
    if values is None or isinstance(values, str) and values.startswith("${"):
        return
    if not isinstance(values, Mapping):
        raise InputError(f"{origin}: '{where}' must be a mapping of keys, not {values!r}")
    known = [entry.name for entry in dataclasses.fields(section)]
    for key, value in values.items():
        if key not in known:
            full = f"{where}.{key}" if where else str(key)
            homes = list(_sections_with(str(key)))
            hint = f": it is a key of {', '.join(homes)}" if homes else nearest(key, known)
            hint = hint or f"; known there: {', '.join(known)}"
            raise InputError(f"{origin}: unknown key '{full}'{hint}")
        inner = _SECTIONS.get(section, {}).get(key)
        if inner is None:
            continue
        place = f"{where}.{key}" if where else key
        if key != "teachers" or value is None:
            _no_unknown_keys(value, inner, place, origin)
            continue
        if not isinstance(value, list):
            raise InputError(f"{origin}: key teachers: a list is needed there, such as [{{name: a}}, {{name: b}}]")
        for number, each in enumerate(value):
            _no_unknown_keys(each, inner, f"{place}[{number}]", origin)


def _sections_with(key: str, section: type = Recipe, where: str = "") -> Iterator[str]:
    """Where in a recipe a key of that name belongs."""
    if key in (entry.name for entry in dataclasses.fields(section)):
        yield where or "the recipe itself"
    for name, inner in _SECTIONS.get(section, {}).items():
        yield from _sections_with(key, inner, f"{where}.{name}" if where else name)


def _no_missing_keys(merged: DictConfig, origin: str) -> None:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise InputError(
            f"{origin}: nothing is given for {', '.join(missing)}: add it to the file, or as an override "
            f"{missing[0]}=VALUE"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
