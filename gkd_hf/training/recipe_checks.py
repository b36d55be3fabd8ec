"""Everything about a recipe that can be told to be wrong from the recipe alone."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gkd_hf.data.domains import MIXING_BLOCK
from gkd_hf.errors import InputError, nearest
from gkd_hf.hub.repo_names import segmenter_repo
from gkd_hf.methods import BASELINES, LABEL_FREE_METHODS, METHODS, ONE_STAGE_METHODS
from gkd_hf.teacher_settings import GEOMETRIES, SHARDINGS, named_source
from gkd_hf.training.recipe import (
    KD_TARGETS,
    MAX_SEED,
    PRECISIONS,
    DistillationRecipe,
    Recipe,
    StageRecipe,
    TaskRecipe,
    recipe_domain,
)

MAX_TIMEOUT = 7 * 24 * 60  # minutes


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Raise `InputError` for the first thing that is wrong; `origin` names the recipe in the message."""

    def one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
        if value not in known:
            hint = nearest(value, known)
            raise InputError(f"{origin}: {key} is {value!r}{hint} (available: {', '.join(known)})")

    def known_domain(key: str, name: str) -> None:
        try:
            recipe_domain(name)
        except InputError as error:
            raise InputError(f"{origin}: {key}: {error}") from error

    one_of("method", recipe.method, tuple(METHODS))
    for name in recipe.baselines:
        one_of("baselines", name, BASELINES)
    for key, names in (
        ("evaluate", recipe.evaluate),
        ("baselines", recipe.baselines),
        ("data.classes", recipe.data.classes),
    ):
        if len(set(names)) < len(names):
            raise InputError(f"{origin}: {key} names the same entry twice: {', '.join(names)}")
    for key, names in (
        ("evaluate", recipe.evaluate),
        ("data.roots", recipe.data.roots),
        ("data.revisions", recipe.data.revisions),
        ("data.label_maps", recipe.data.label_maps),
    ):
        for name in names:
            known_domain(key, name)
    if not isinstance(recipe.student.encoder, str | Mapping):
        raise InputError(f"{origin}: student.encoder is {recipe.student.encoder!r}: give a Hub id, folder or mapping")
    _check_hub(recipe, origin)
    stages = dict(recipe.stages)
    if not stages:
        raise InputError(f"{origin}: no stage is given (task_agnostic, domain_agnostic, task)")
    for key, teacher in recipe.all_teachers.items():
        one_of(f"{key}.geometry", teacher.geometry, GEOMETRIES)
        one_of(f"{key}.sharding", teacher.sharding, SHARDINGS)
    _check_teachers(recipe, origin)
    _check_one_stage(recipe, origin)
    if recipe.stages.task is None and (recipe.evaluate or recipe.baselines):
        raise InputError(f"{origin}: evaluate and baselines need stages.task: without it no segmenter is trained")
    for name, stage in stages.items():
        _check_stage(f"stages.{name}", stage, origin, one_of, known_domain)
    _check_numbers("data.toy_city", recipe.data.toy_city, origin)
    for name in ONE_STAGE_METHODS:
        _check_numbers(name, recipe.__dict__[name], origin)
    if not 0 <= recipe.seed <= MAX_SEED:
        raise InputError(f"{origin}: seed is {recipe.seed}: it must be between 0 and {MAX_SEED}")
    if not 0.1 <= recipe.timeout_minutes <= MAX_TIMEOUT:
        raise InputError(
            f"{origin}: timeout_minutes is {recipe.timeout_minutes}: it must be between 0.1 and {MAX_TIMEOUT} (a week)"
        )


def _check_teachers(recipe: Recipe, origin: str) -> None:
    """One teacher or several, where one is needed; none of several twice."""
    if recipe.teacher is not None and recipe.teachers is not None:
        raise InputError(f"{origin}: teacher and teachers are both given: drop one of them (teacher=null, say)")
    if recipe.teachers is not None:
        if not recipe.teachers:
            raise InputError(
                f"{origin}: teachers is empty: list one or more, each with its name, or give teacher.name"
            )
        if recipe.one_stage:
            raise InputError(f"{origin}: {recipe.one_stage[0]} learns from one teacher: give teacher, not teachers")
    elif recipe.teacher is None and recipe.one_stage:
        raise InputError(f"{origin}: {recipe.one_stage[0]} needs a teacher: add teacher.name")
    elif recipe.teacher is None and _has_label_free_stages(recipe):
        raise InputError(f"{origin}: the label-free stages need a teacher: add teacher.name")
    found: dict[Any, str] = {}
    for key, teacher in recipe.all_teachers.items():
        source = named_source(teacher.name, teacher.revision)
        if source in found:
            raise InputError(
                f"{origin}: {key} is '{teacher.name}', which {found[source]} is already: name each teacher once, and "
                "give it a weight if it is to count for more"
            )
        found[source] = key
        _check_numbers(key, teacher, origin)


def _check_one_stage(recipe: Recipe, origin: str) -> None:
    if recipe.method not in LABEL_FREE_METHODS and recipe.stages.task is None:
        raise InputError(f"{origin}: method {recipe.method} learns the task from its first step on: add stages.task")
    if recipe.method in recipe.baselines:
        raise InputError(f"{origin}: {recipe.method} is the method and a baseline, too: drop it from baselines")
    if recipe.kd.target not in KD_TARGETS:
        hint = nearest(recipe.kd.target, KD_TARGETS)
        raise InputError(f"{origin}: kd.target is {recipe.kd.target!r}{hint} (available: {', '.join(KD_TARGETS)})")
    if recipe.one_stage and recipe.teacher is not None and not _has_label_free_stages(recipe):
        for key, value in ("sharding", "always"), ("standardise", True):
            if recipe.teacher.__dict__[key] == value:
                raise InputError(
                    f"{origin}: teacher.{key} is {str(value).lower()}, which only label-free stages look at, and this "
                    f"run ({', '.join(recipe.one_stage)}) has none: leave it out"
                )
    head = recipe.stages.task.decode_head if recipe.stages.task is not None else None
    kind = head.get("type") if isinstance(head, Mapping) else head
    if recipe.needs_teacher_head and kind == "mask2former":
        raise InputError(
            f"{origin}: {' and '.join(recipe.one_stage)}: logits can be compared where each pixel has one score per "
            "class, and stages.task.decode_head mask2former scores masks: take linear, upernet or dpt, or compare "
            "features alone (kd.target=features, cwd.logits_weight=0, af_dcd.logits_weight=0)"
        )


def _has_label_free_stages(recipe: Recipe) -> bool:
    return recipe.method in LABEL_FREE_METHODS and any(recipe.stages.distillation())


def _check_hub(recipe: Recipe, origin: str) -> None:
    """What is published must have a name, and only what is on the Hub has revisions."""
    student = recipe.student
    pinned = [("student.revision", student.encoder, student.revision)]
    pinned += [(f"{key}.revision", each.name, each.revision) for key, each in recipe.all_teachers.items()]
    for name, revision in recipe.data.revisions.items():
        if name not in recipe.data.roots:
            raise InputError(f"{origin}: data.revisions.{name} is given, but data.roots.{name} is not: add the Hub id")
        pinned.append((f"data.revisions.{name}", recipe.data.roots[name], revision))
    for key, source, revision in pinned:
        if revision is None:
            continue
        if not revision.strip():
            raise InputError(f"{origin}: {key} is empty: give a commit, tag or branch, or leave it out")
        if not isinstance(source, str) or source == "toy" or os.path.isdir(os.path.expanduser(source)):
            what = f"'{source}' is a folder here" if isinstance(source, str) else "the encoder is given by its fields"
            what = "'toy' ships with the package" if source == "toy" else what
            raise InputError(f"{origin}: {key} is '{revision}', but {what}: only Hub ids have revisions, leave it out")
    repo_id, task = recipe.hub.repo_id, recipe.stages.task
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
            valid, why = "/" in repo_id, ""
        except HFValidationError as error:
            valid, why = False, f" ({str(error).strip().splitlines()[0]})"
        if not valid:
            raise InputError(f"{origin}: hub.repo_id is '{repo_id}': give org/name, for example my-org/gkd-x{why}")
        if task is not None:
            try:
                validate_repo_id(segmenter_repo(repo_id, task.data))
            except HFValidationError as error:
                raise InputError(
                    f"{origin}: hub.repo_id is '{repo_id}' and stages.task.data '{task.data}', so the segmenter would "
                    f"be '{segmenter_repo(repo_id, task.data)}': choose a shorter or plainer name for one of them "
                    f"({str(error).strip().splitlines()[0]})"
                ) from error
    if recipe.hub.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", recipe.hub.license):
        raise InputError(
            f"{origin}: hub.license is '{recipe.hub.license}': give the Hub's id of a licence, such as apache-2.0 or "
            "cc-by-nc-4.0 (see https://huggingface.co/docs/hub/repositories-licenses)"
        )


def _check_stage(key: str, stage: StageRecipe, origin: str, one_of: Any, known_domain: Any) -> None:
    for name in stage.domains:
        known_domain(f"{key}.data", name)
    _check_mixture(key, stage, origin)
    one_of(f"{key}.precision", stage.precision, PRECISIONS)
    _check_numbers(key, stage, origin)
    if (stage.epochs is None) == (stage.max_steps is None):
        given = "neither is given" if stage.epochs is None else f"both are given (set {key}.epochs=null, or the other)"
        raise InputError(f"{origin}: {key} needs either epochs or max_steps, {given}")
    if stage.patch_size is not None and stage.image_size % stage.patch_size:
        best = max(1, round(stage.image_size / stage.patch_size)) * stage.patch_size
        raise InputError(
            f"{origin}: {key}.image_size {stage.image_size} is not a multiple of the patch size {stage.patch_size}; "
            f"the nearest that is: {best}"
        )
    if isinstance(stage, DistillationRecipe) and (
        len(stage.crop_scale) != 2 or not 0 < stage.crop_scale[0] <= stage.crop_scale[1] <= 1
    ):
        raise InputError(f"{origin}: {key}.crop_scale is {stage.crop_scale}: give [smallest, largest] within (0, 1]")
    if isinstance(stage, DistillationRecipe) and stage.early_backward and stage.compile:
        raise InputError(
            f"{origin}: {key}.early_backward does not go through torch.compile: leave it or {key}.compile out"
        )
    if isinstance(stage, DistillationRecipe) and stage.teacher_cache is not None:
        if stage.views is None:
            raise InputError(
                f"{origin}: {key}.teacher_cache needs {key}.views, for example 4: without it every pass shows new "
                "views, whose tokens nobody asks for again"
            )
        if stage.teacher_cache.strip().lower() in ("", "true", "false"):
            raise InputError(
                f"{origin}: {key}.teacher_cache is '{stage.teacher_cache}': give a folder, or null for no cache"
            )
    if isinstance(stage, TaskRecipe):
        # It brings transformers, which a misspelt key is refused without.
        from gkd_hf.models.configuration_gkd import DECODE_HEADS

        head = stage.decode_head
        one_of(f"{key}.decode_head", head.get("type") if isinstance(head, Mapping) else head, DECODE_HEADS)
        sides = stage.short_sides
        if sides is not None and (not sides or min(sides) < 1):
            raise InputError(f"{origin}: {key}.short_sides is {sides}: give lengths of 1 pixel or more, or null")


def _check_mixture(key: str, stage: StageRecipe, origin: str) -> None:
    if len(set(stage.domains)) < len(stage.domains):
        raise InputError(f"{origin}: {key}.data names a domain twice: {stage.data}")
    weights = stage.weights
    if weights is None:
        return
    if len(weights) != len(stage.domains):
        raise InputError(
            f"{origin}: {key}.weights has {len(weights)} number(s) but {key}.data names {len(stage.domains)} "
            f"domain(s) ({stage.data}): give one for each, in that order, or leave weights out"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"{origin}: {key}.weights is {weights}: every weight must be more than 0 and finite")
    least = sum(weights) / MIXING_BLOCK
    if min(weights) < least:
        raise InputError(
            f"{origin}: {key}.weights is {weights}: every weight must be at least 1/{MIXING_BLOCK} of their sum"
        )


_AT_LEAST_ZERO = {
    "workers",
    "seed",
    "label_seed",
    "query_warmup_steps",
    "weight_decay",
    "token_weight",
    "feature_weight",
    "patch_weight",
    "logits_weight",
    "contrast_weight",
    "mimic_weight",
    "generation_weight",
}
_FRACTIONS = {"mask_probability", "mask_ratio", "erase_probability", "max_class_fraction"}


def _check_numbers(key: str, section: Any, origin: str) -> None:
    for name, value in dataclasses.asdict(section).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name == "ema_decay":
            valid, wanted = 0 < value < 1, "between 0 and 1, both excluded"
        elif name == "label_fraction":
            valid, wanted = 0 < value <= 1, "more than 0 and at most 1"
        elif name in _FRACTIONS:
            valid, wanted = 0 <= value <= 1, "between 0 and 1"
        elif name in _AT_LEAST_ZERO:
            valid, wanted = value >= 0, "0 or more"
        else:
            valid, wanted = value > 0, "more than 0"
        if not valid:
            raise InputError(f"{origin}: {key}.{name} is {value}: it must be {wanted}")
