"""What a recipe's domain names stand for: folders or Hub ids, label maps, rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gkd_hf.data.domains import Domain, LabelSpace, label_space, own_label_space
from gkd_hf.data.label_fraction import kept_images, labelled_subset, left_out
from gkd_hf.data.label_maps import LabelMap, label_map
from gkd_hf.data.manifest import Manifest, find_manifest
from gkd_hf.data.mixing import Source
from gkd_hf.data.shards import Rows, count_rows, is_hub_id, open_rows
from gkd_hf.data.streaming import EvaluationSet, SampleStream
from gkd_hf.data.toy_city import STYLES, is_written, write_shards
from gkd_hf.data.toy_city_styles import SOURCE_STYLE
from gkd_hf.data.transforms import DistillationTransform, EvaluationTransform, SegmentationTransform
from gkd_hf.errors import InputError, nearest
from gkd_hf.training.class_check import DividedSplit, check_classes
from gkd_hf.training.label_check import LabelledSplit, check_labels, look_at_first_rows
from gkd_hf.training.recipe import DistillationRecipe, Recipe, StageRecipe, TaskRecipe, recipe_domain

TOY_TEACHER = Path(__file__).parents[1] / "assets" / "toy_teacher"
POOL_STYLE = "pool"


@dataclass(frozen=True)
class DataUse:
    """One split of a domain that the run reads, and whether it reads the labels."""

    domain: str
    role: str
    labelled: bool

    @property
    def split(self) -> str:
        """Name of the split that plays the role; raises `InputError` if the domain has none."""
        return recipe_domain(self.domain).split(self.role)


class RecipeData:
    """The data of a recipe.

    Args:
        recipe: names the domains; `data` says where they are.

    Raises:
        InputError: a domain without a place, an unknown toy-city style or label map, label spaces that differ.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.label_space = task_label_space(recipe)
        for use in self.uses():
            self.location(use.domain)
            if use.labelled:
                self.label_map(use.domain)

    @property
    def source(self) -> str | None:
        """The domain whose labels are used, or several joined by "+"; None without a task stage."""
        return self.recipe.stages.task.data if self.recipe.stages.task else None

    def evaluated(self) -> list[str]:
        """Domains to evaluate, the sources' held-out splits first.

        Of several sources those that have none are left out; raises `InputError` if no source has one.
        """
        task = self.recipe.stages.task
        if task is None:
            return []
        held_out = [name for name in task.domains if "test" in recipe_domain(name).splits]
        if self.recipe.source_test and not held_out:
            raise InputError(f"'{task.data}' has no held-out split to evaluate: set source_test=false")
        own = [name for name in held_out if self.recipe.source_test and name not in self.recipe.evaluate]
        return [*own, *self.recipe.evaluate]

    def uses(self) -> list[DataUse]:
        """Every split that the run reads, each once; with its labels if any stage needs them."""
        found: dict[tuple[str, str], DataUse] = {}
        for name, stage in self.recipe.stages:
            for domain in stage.domains:
                key = (domain, "train")
                labelled = name == "task" or (key in found and found[key].labelled)
                found[key] = DataUse(domain, "train", labelled)
        for name in self.evaluated():
            found[name, "test"] = DataUse(name, "test", True)
        return list(found.values())

    def location(self, name: str) -> str:
        """Folder or Hub id of a domain."""
        if is_rendered(self.recipe, name):
            return str(Path(self.recipe.output_dir) / "data" / f"toy_city_{toy_city_style(name)}")
        root = data_root(self.recipe, name)
        if root is None:
            raise InputError(
                f"the recipe uses domain '{name}' but does not say where it is: add data.roots.{name}=FOLDER_OR_HUB_ID"
            )
        return root

    def revision(self, name: str) -> str | None:
        """Commit, tag or branch of a domain's Hub id, if the recipe pins it."""
        return self.recipe.data.revisions.get(name)

    def num_rows(self, use: DataUse) -> int | None:
        """Rows of a split; None if nobody knows."""
        return count_rows(self.location(use.domain), use.split, revision=self.revision(use.domain))

    def label_map(self, name: str) -> LabelMap:
        """The map from a domain's stored ids to the train ids of the label space.

        Raises:
            InputError: an unknown map, labels prepared for other classes, a map for what are train ids already.
        """
        manifest = find_manifest(self.location(name), self.revision(name))
        prepared = manifest if manifest is not None and manifest.labels == "train_ids" else None
        if name not in self.recipe.data.label_maps:
            own = recipe_domain(name).label_map
            return self._map(name, own if prepared is None else self._stored_ids(name, prepared))
        given = self._map(name, self.recipe.data.label_maps[name])
        if prepared is not None and prepared.classes == self.label_space.classes:
            ids = np.arange(len(prepared.classes))
            if not np.array_equal(given.table[ids], ids):
                raise InputError(
                    f"data.label_maps.{name}: {self.location(name)} holds train ids of this run's classes already, so "
                    f"that the map '{given.name}' would be applied a second time: leave data.label_maps.{name} out"
                )
        return given

    def _map(self, name: str, given: Any) -> LabelMap:
        try:
            return label_map(given, len(self.label_space.classes))
        except InputError as error:
            raise InputError(f"data.label_maps.{name}: {error}") from error

    def _stored_ids(self, name: str, prepared: Manifest) -> str:
        """The map that prepared labels need, none; raises `InputError` if they were prepared for other classes."""
        if prepared.classes != self.label_space.classes:
            raise InputError(
                f"the labels in {self.location(name)} were prepared for the classes {', '.join(prepared.classes)}, "
                f"but those of this run are {', '.join(self.label_space.classes)}: prepare the data for these, or say "
                f"which is which with data.label_maps.{name}"
            )
        return "identity"

    def rows(self, use: DataUse) -> Rows:
        """The undecoded rows of a split."""
        return open_rows(
            self.location(use.domain),
            use.split,
            columns=("image", "label") if use.labelled else ("image",),
            revision=self.revision(use.domain),
        )

    def labelled_rows(self, use: DataUse) -> Rows:
        """The rows that the task stage trains on: of a training split, the fraction that the recipe gives.

        Raises:
            InputError: as `rows`, and for streamed rows, of which no fraction can be taken.
        """
        task, where = self.recipe.stages.task, f"'{use.domain}' ({self.location(use.domain)})"
        return labelled_subset(self.rows(use), task.label_fraction, task.label_seed, where)

    def stream(
        self, stage: StageRecipe, transform: DistillationTransform | SegmentationTransform, micro_batch_size: int
    ) -> SampleStream:
        """The training samples of a stage, of all its domains; of the task stage, those of `labelled_rows`."""
        labelled = isinstance(stage, TaskRecipe)
        sources = []
        for name, weight in zip(stage.domains, stage.weights or [None] * len(stage.domains), strict=True):
            use = DataUse(name, "train", labelled)
            label_map = self.label_map(name) if labelled else None
            rows = self.labelled_rows(use) if labelled else self.rows(use)
            sources.append(Source(rows, name, label_map, weight, self.num_rows(use)))
        views = stage.views if isinstance(stage, DistillationRecipe) else None
        seed = self.recipe.seed
        return SampleStream.mixed(sources, transform, seed=seed, micro_batch_size=micro_batch_size, views=views)

    def evaluation_set(self, name: str, mean: Sequence[float], std: Sequence[float]) -> EvaluationSet:
        """The test images of a domain, at its test size; ``mean`` and ``std`` are the student's."""
        entry = recipe_domain(name)
        use = DataUse(name, "test", True)
        return EvaluationSet(
            self.rows(use),
            EvaluationTransform(mean, std, size=entry.test_size, keep_ratio=entry.keep_ratio),
            domain=name,
            label_map=self.label_map(name),
            label_space=self.label_space,
            limit=self.recipe.stages.task.evaluation_images,
            num_rows=self.num_rows(use),
        )

    def train_images(self, stage: StageRecipe) -> int | None:
        """`train_images` of a stage of the recipe."""
        return train_images(self.recipe, stage)

    def render_toy_city(self, progress: bool) -> None:
        """Write the toy-city domains in use as shards under output_dir/data; what is there already stays."""
        settings = self.recipe.data.toy_city
        for use in self.uses():
            if is_rendered(self.recipe, use.domain):
                images = toy_city_images(self.recipe, use.domain, use.role)
                if not progress and not is_written(self.location(use.domain), use.split):
                    what = f"{use.domain} ({use.split}), {images:,} images"
                    print(f"[data] rendering {what}", file=sys.stderr, flush=True)
                write_shards(
                    self.location(use.domain),
                    toy_city_style(use.domain),
                    use.split,
                    images,
                    size=settings.size,
                    # A held-out split is other scenes, not the first ones of the training split again.
                    seed=2 * settings.seed + (use.role != "train"),
                    progress=progress,
                )

    def check_rows(self) -> None:
        """Open every split in use, so that wrong data is told before any training.

        Of a folder every label that the run reads is checked, once: that is remembered in output_dir. Of a Hub data
        set the first rows are looked at. Where a label fraction is given, it must leave every class of the training
        splits some pixels; that is checked unless one of them is on the Hub, since looking for a rare class would
        fetch what the run itself may never read.

        Raises:
            InputError: folder, shards, column or rows missing; more bad rows than may be skipped, of which a label
                value outside the map makes one; a label fraction of streamed rows, or one that leaves a class without
                pixels.
        """
        folders, divided = [], []
        for use in self.uses():
            reduced = self._is_reduced(use)
            rendered = is_rendered(self.recipe, use.domain)
            if rendered and not reduced:
                continue  # rendered by this package
            location, rows = self.location(use.domain), self.rows(use)
            label_map = self.label_map(use.domain) if use.labelled else None
            read = self.labelled_rows(use) if reduced else rows
            if label_map is None or is_hub_id(location):
                look_at_first_rows(read, use.domain, location, use.split, label_map)
                continue
            limit = self.recipe.stages.task.evaluation_images if use.role == "test" else None
            split = LabelledSplit(use.domain, location, use.split, read, label_map, limit)
            if not rendered:
                folders.append(split)
            if reduced:
                divided.append(self._divided(split, rows))
                if any(use.domain in stage.domains for _, stage in self.recipe.stages.distillation()):
                    look_at_first_rows(rows, use.domain, location, use.split)  # read whole, without its labels
        memory = Path(self.recipe.output_dir) / "checked_labels.json"
        check_labels(folders, memory)
        task = self.recipe.stages.task
        if divided and len(divided) == len(task.domains):
            check_classes(divided, self.label_space.classes, task.label_fraction, task.label_seed, memory)

    def _is_reduced(self, use: DataUse) -> bool:
        """Whether the task stage trains on a fraction of a split."""
        task = self.recipe.stages.task
        return task is not None and task.label_fraction < 1 and use.role == "train" and use.domain in task.domains

    def _divided(self, kept: LabelledSplit, rows: Rows) -> DividedSplit:
        task = self.recipe.stages.task
        others = left_out(rows, task.label_fraction, task.label_seed)
        return DividedSplit(kept, None if others is None else replace(kept, rows=others))


def _classes_of(entry: Domain) -> str:
    return f"the classes of {entry.label_space}" if entry.label_space else "no labels"


def data_root(recipe: Recipe, name: str) -> str | None:
    """Folder or Hub id that the recipe gives for a domain, `~` expanded; None if it gives none."""
    root = recipe.data.roots.get(name)
    return None if root is None else os.path.expanduser(root)


def train_images(recipe: Recipe, stage: StageRecipe, *, ask_hub: bool = True) -> int | None:
    """Number of a stage's training images: as rendered, as counted, or else as published; None if nobody knows.

    Args:
        recipe: says how many scenes are rendered, and where data is.
        stage: one of the recipe's; the images of all its domains are counted, in the task stage the fraction of each
            domain's that is trained on.
        ask_hub: whether the Hub may be asked how many rows a data set has.
    """
    counts = [_domain_images(recipe, name, ask_hub) for name in stage.domains]
    if None in counts:
        return None
    if isinstance(stage, TaskRecipe):
        counts = [kept_images(count, stage.label_fraction) for count in counts]
    return sum(counts)


def _domain_images(recipe: Recipe, name: str, ask_hub: bool) -> int | None:
    if is_rendered(recipe, name):
        return toy_city_images(recipe, name, "train")
    entry, root = recipe_domain(name), data_root(recipe, name)
    if root is None or (is_hub_id(root) and not ask_hub):
        return entry.train_images
    revision = recipe.data.revisions.get(name)
    return count_rows(root, entry.split("train"), revision=revision) or entry.train_images


def is_rendered(recipe: Recipe, name: str) -> bool:
    """Whether this package renders a domain: a toy city, unless the recipe says where its shards are."""
    return name.partition(":")[0] == "toy_city" and name not in recipe.data.roots


def is_custom(entry: Domain) -> bool:
    """Whether a domain is the user's own."""
    return entry.name.partition(":")[0] == "custom"


def toy_city_style(name: str) -> str:
    """Style of `toy_city` (the source style) or `toy_city:style`; raises `InputError` for an unknown one."""
    style = name.partition(":")[2] or SOURCE_STYLE
    if style not in STYLES:
        raise InputError(
            f"domain '{name}': unknown toy-city style '{style}'{nearest(style, STYLES)} (known: {', '.join(STYLES)})"
        )
    return style


def toy_city_images(recipe: Recipe, name: str, role: str) -> int:
    """How many scenes the recipe renders for a split of a toy-city domain."""
    settings = recipe.data.toy_city
    if role != "train":
        return settings.test_images
    return settings.pool_images if toy_city_style(name) == POOL_STYLE else settings.train_images


def task_label_space(recipe: Recipe) -> LabelSpace | None:
    """The classes that the source teaches; None without a task stage.

    Raises:
        InputError: a source of one's own without `data.classes`, or an evaluated domain with other classes.
    """
    if recipe.stages.task is None:
        return None
    classes = recipe.data.classes
    source, *others = map(recipe_domain, recipe.stages.task.domains)
    if is_custom(source):
        if not classes:
            raise InputError(
                f"the source '{source.name}' is your own data: name its classes, in the order of their train ids, "
                "under data.classes"
            )
        space = own_label_space(classes)
    else:
        if classes:
            raise InputError(f"data.classes is only for a source that is custom; '{source.name}' has its own classes")
        space = label_space(source.name)
    for other in others:
        if not is_custom(other) and other.label_space != source.label_space:
            raise InputError(
                f"stages.task.data: '{other.name}' has {_classes_of(other)}, but '{source.name}' those of "
                f"{space.name}; mix domains that share their classes"
            )
    for name in recipe.evaluate:
        target = recipe_domain(name)
        if not is_custom(target) and target.label_space != source.label_space:
            raise InputError(
                f"evaluate: domain '{name}' has {_classes_of(target)}, but the source '{source.name}' "
                f"teaches those of {space.name}; evaluate domains that share them"
            )
    return space
