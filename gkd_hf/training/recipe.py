"""The recipe of a run: a YAML file and `key.sub=value` overrides, checked against the keys and types below.

Nothing heavy is imported here beyond the package itself, so that a mistake in a recipe is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from gkd_hf.data.domains import Domain, domain
from gkd_hf.data.toy_city_styles import SOURCE_STYLE
from gkd_hf.errors import InputError, nearest
from gkd_hf.hub.model_card import segmenter_repo
from gkd_hf.models.configuration_gkd import DECODE_HEADS
from gkd_hf.teacher import GEOMETRIES

METHODS = ("gkd", "mse")
BASELINES = ("none",)
PRECISIONS = ("auto", "fp32", "bf16")
MAX_SEED = 2**32 - 1  # NumPy's


@dataclass
class StudentRecipe:
    """The encoder to distil: a Hub id, a folder, or a configuration given in place (a mapping with `model_type`)."""

    encoder: Any = MISSING
    pretrained: bool = True  # False: random weights in the architecture of that id or folder
    freeze_batch_norm: bool = False  # never train in batch statistics: for weights whose own were folded away
    revision: str | None = None  # commit, tag or branch of a Hub id; None: its main branch


@dataclass
class TeacherRecipe:
    """The frozen foundation model: a Hub id, a folder, or `toy` for the teacher that ships with the package."""

    name: str = MISSING
    geometry: str = "native"
    revision: str | None = None  # as the student's


@dataclass
class StageRecipe:
    """What all stages share. `batch_size` is global: over all processes and accumulation steps."""

    data: str = MISSING
    image_size: int = MISSING
    batch_size: int = MISSING
    patch_size: int | None = None  # None: the encoder's own
    epochs: float | None = None  # either epochs or max_steps
    max_steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.05
    gradient_accumulation_steps: int = 1
    sync_batch_norm: bool = False
    precision: str = "auto"  # bf16 on a GPU, fp32 elsewhere
    save_steps: int = 1000
    logging_steps: int = 50
    workers: int = 2

    def steps(self, train_images: int | None) -> int | None:
        """Optimiser steps of the stage; None where `epochs` is given and the number of images is not known."""
        if self.max_steps is not None:
            return self.max_steps
        return None if train_images is None else math.ceil(self.epochs * train_images / self.batch_size)


@dataclass
class DistillationRecipe(StageRecipe):
    """A label-free stage. Defaults are the paper's (arXiv 2603.02554); learning rate None = 5e-4 · batch / 512."""

    min_learning_rate: float = 1e-5
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    rand_augment: bool = True
    erase_probability: float = 0.25
    mask_probability: float = 0.5
    mask_ratio: float = 0.5
    token_weight: float = 1.0
    feature_weight: float = 1.0
    patch_weight: float = 1.0
    query_warmup_steps: int = 0
    attention_scale: float = 1.0
    carry_heads: bool = True  # start from the heads of the stage before, if there is one


@dataclass
class TaskRecipe(StageRecipe):
    """The task stage: the decode head on a frozen encoder, and how the domains are evaluated with it."""

    learning_rate: float | None = 1e-4
    decode_head: Any = "mask2former"  # or a mapping with `type` and the options of that head
    norm_feature_maps: bool = False  # stage maps of a ViT after its final norm; the paper takes them before it
    short_sides: list[int] | None = None  # None: 0.5, 0.6, …, 2.0 times image_size, as the paper's 256 … 1024
    max_class_fraction: float = 0.75
    photometric: bool = True
    window: int = 512
    stride: int = 341
    window_batch_size: int = 4
    evaluation_images: int | None = None  # at most so many of each domain
    baseline_learning_rate: float | None = None  # of the head when trained end to end; None: as above
    baseline_encoder_learning_rate: float = 1e-5


@dataclass
class StagesRecipe:
    """The stages in their order; one that is left out is skipped."""

    task_agnostic: DistillationRecipe | None = None
    domain_agnostic: DistillationRecipe | None = None
    task: TaskRecipe | None = None

    def __iter__(self) -> Iterator[tuple[str, StageRecipe]]:
        for entry in dataclasses.fields(self):
            stage = self.__dict__[entry.name]
            if stage is not None:
                yield entry.name, stage

    def distillation(self) -> Iterator[tuple[str, DistillationRecipe]]:
        """The label-free stages that are present, in order."""
        for name, stage in self:
            if isinstance(stage, DistillationRecipe):
                yield name, stage


@dataclass
class ToyCityRecipe:
    """How many scenes are rendered for each toy-city domain, and at which size."""

    size: int = 64
    pool_images: int = 12000  # unlabelled use, style `pool`
    train_images: int = 1500  # every other style that is trained on
    test_images: int = 300
    seed: int = 0


@dataclass
class DataRecipe:
    """Where data is: domain → folder of parquet shards or Hub id; label map by name or {stored id: train id}."""

    roots: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)  # domain → commit, tag or branch of its Hub id
    label_maps: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)  # of the label space, where the source is `custom`
    toy_city: ToyCityRecipe = field(default_factory=ToyCityRecipe)


@dataclass
class HubRecipe:
    """Where the result is published. The token is never here: it comes from `hf auth login` or HF_TOKEN."""

    repo_id: str | None = None  # org/name of the encoder; the segmenter's is org/name-SOURCE. None: not published
    private: bool = True
    license: str | None = None  # the Hub's licence id; None: derived from teacher and data


@dataclass
class Recipe:
    """A whole run. See `scripts/recipes/` for examples."""

    student: StudentRecipe = field(default_factory=StudentRecipe)
    teacher: TeacherRecipe | None = None
    method: str = "gkd"
    stages: StagesRecipe = field(default_factory=StagesRecipe)
    evaluate: list[str] = field(default_factory=list)
    source_test: bool = True  # also evaluate the held-out split of the source
    baselines: list[str] = field(default_factory=list)
    data: DataRecipe = field(default_factory=DataRecipe)
    hub: HubRecipe = field(default_factory=HubRecipe)
    output_dir: str = MISSING
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as written to recipe.yaml and the report."""
        return dataclasses.asdict(self)

    def save(self, folder: str | os.PathLike) -> None:
        """Write recipe.yaml: what was run, every default included."""
        path = Path(folder) / "recipe.yaml"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, path)


def recipe_domain(name: str) -> Domain:
    """`domain(name)`, and `custom:anything` for several data sets of the user's own."""
    name = canonical_name(name)
    base, _, own_name = name.partition(":")
    if base == "custom" and own_name:
        return dataclasses.replace(domain(base), name=name)
    return domain(name)


def canonical_name(name: str) -> str:
    """The one name of a domain: `toy_city:clear_day` is `toy_city`, whose style that is."""
    return "toy_city" if name == f"toy_city:{SOURCE_STYLE}" else name


def load_recipe(path: str | os.PathLike | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file; None starts from nothing but the defaults.
        overrides: `key.sub=value`, value in YAML; `stages.task_agnostic=null` leaves a stage out.

    Raises:
        InputError: unreadable file, unknown key, wrong type or value; the message says where and what is possible.
    """
    origin = f"recipe '{os.fspath(path)}'" if path is not None else "recipe"
    merged = OmegaConf.structured(Recipe)
    if path is not None:
        merged = _merge(merged, _read(Path(path)), origin)
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
    _check(recipe, origin)
    return recipe


def _use_canonical_names(recipe: Recipe) -> None:
    for _, stage in recipe.stages:
        stage.data = canonical_name(stage.data)
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
    return content


def _merge(recipe: DictConfig, changes: DictConfig, origin: str) -> DictConfig:
    _no_unknown_keys(OmegaConf.to_container(changes), Recipe, "", origin)
    try:
        return OmegaConf.merge(recipe, changes)
    except ValidationError as error:
        what = _first_line(error)
        if "not a ListConfig" in what:
            what = "a list is needed there, such as [a, b]"
        raise InputError(f"{origin}: key {error.full_key}: {what}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{origin}: {_first_line(error)}") from error


# A mapping given for one of these replaces the recipe's: fields of two architectures or heads do not mix.
_TAKEN_WHOLE = ("student.encoder", "stages.task.decode_head")

_SECTIONS: dict[type, dict[str, type]] = {
    Recipe: {
        "student": StudentRecipe,
        "teacher": TeacherRecipe,
        "stages": StagesRecipe,
        "data": DataRecipe,
        "hub": HubRecipe,
    },
    StagesRecipe: {"task_agnostic": DistillationRecipe, "domain_agnostic": DistillationRecipe, "task": TaskRecipe},
    DataRecipe: {"toy_city": ToyCityRecipe},
}


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
            hint = nearest(key, known) or f"; known there: {', '.join(known)}"
            raise InputError(f"{origin}: unknown key '{full}'{hint}")
        inner = _SECTIONS.get(section, {}).get(key)
        if inner is not None:
            _no_unknown_keys(value, inner, f"{where}.{key}" if where else key, origin)


def _no_missing_keys(merged: DictConfig, origin: str) -> None:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise InputError(
            f"{origin}: nothing is given for {', '.join(missing)}: add it to the file, or as an override "
            f"{missing[0]}=VALUE"
        )


def _check(recipe: Recipe, origin: str) -> None:
    """Everything that can be told from the recipe alone."""

    def one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
        if value not in known:
            hint = nearest(value, known)
            raise InputError(f"{origin}: {key} is {value!r}{hint} (available: {', '.join(known)})")

    def known_domain(key: str, name: str) -> None:
        try:
            recipe_domain(name)
        except InputError as error:
            raise InputError(f"{origin}: {key}: {error}") from error

    one_of("method", recipe.method, METHODS)
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
    if recipe.teacher is not None:
        one_of("teacher.geometry", recipe.teacher.geometry, GEOMETRIES)
    elif any(recipe.stages.distillation()):
        raise InputError(f"{origin}: the label-free stages need a teacher: add teacher.name")
    if recipe.stages.task is None and (recipe.evaluate or recipe.baselines):
        raise InputError(f"{origin}: evaluate and baselines need stages.task: without it no segmenter is trained")
    for name, stage in stages.items():
        _check_stage(f"stages.{name}", stage, origin, one_of, known_domain)
    _check_numbers("data.toy_city", recipe.data.toy_city, origin)
    if not 0 <= recipe.seed <= MAX_SEED:
        raise InputError(f"{origin}: seed is {recipe.seed}: it must be between 0 and {MAX_SEED}")


def _check_hub(recipe: Recipe, origin: str) -> None:
    """What is published must have a name, and only what is on the Hub has revisions."""
    student, teacher = recipe.student, recipe.teacher
    pinned = [("student.revision", student.encoder, student.revision)]
    pinned += [("teacher.revision", teacher.name, teacher.revision)] if teacher is not None else []
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
            valid, why = False, f" ({_first_line(error)})"
        if not valid:
            raise InputError(f"{origin}: hub.repo_id is '{repo_id}': give org/name, for example my-org/gkd-x{why}")
        if task is not None:
            try:
                validate_repo_id(segmenter_repo(repo_id, task.data))
            except HFValidationError as error:
                raise InputError(
                    f"{origin}: hub.repo_id is '{repo_id}' and stages.task.data '{task.data}', so the segmenter would "
                    f"be '{segmenter_repo(repo_id, task.data)}': choose a shorter or plainer name for one of them "
                    f"({_first_line(error)})"
                ) from error
    if recipe.hub.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", recipe.hub.license):
        raise InputError(
            f"{origin}: hub.license is '{recipe.hub.license}': give the Hub's id of a licence, such as apache-2.0 or "
            "cc-by-nc-4.0 (see https://huggingface.co/docs/hub/repositories-licenses)"
        )


def _check_stage(key: str, stage: StageRecipe, origin: str, one_of: Any, known_domain: Any) -> None:
    known_domain(f"{key}.data", stage.data)
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
    if isinstance(stage, TaskRecipe):
        head = stage.decode_head
        one_of(f"{key}.decode_head", head.get("type") if isinstance(head, Mapping) else head, DECODE_HEADS)
        sides = stage.short_sides
        if sides is not None and (not sides or min(sides) < 1):
            raise InputError(f"{origin}: {key}.short_sides is {sides}: give lengths of 1 pixel or more, or null")


_AT_LEAST_ZERO = {
    "workers",
    "seed",
    "query_warmup_steps",
    "weight_decay",
    "token_weight",
    "feature_weight",
    "patch_weight",
}
_FRACTIONS = {"mask_probability", "mask_ratio", "erase_probability", "max_class_fraction"}


def _check_numbers(key: str, section: Any, origin: str) -> None:
    for name, value in dataclasses.asdict(section).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in _FRACTIONS:
            valid, wanted = 0 <= value <= 1, "between 0 and 1"
        elif name in _AT_LEAST_ZERO:
            valid, wanted = value >= 0, "0 or more"
        else:
            valid, wanted = value > 0, "more than 0"
        if not valid:
            raise InputError(f"{origin}: {key}.{name} is {value}: it must be {wanted}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
