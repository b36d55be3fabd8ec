"""What a recipe's domain names stand for: folders or Hub ids, label maps, rows."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets

from gkd_hf.data.domains import Domain, LabelSpace, label_space, own_label_space
from gkd_hf.data.label_maps import LabelMap, label_map
from gkd_hf.data.manifest import find_manifest
from gkd_hf.data.shards import count_rows, is_hub_id, open_rows
from gkd_hf.data.toy_city import STYLES, write_shards
from gkd_hf.data.toy_city_styles import SOURCE_STYLE
from gkd_hf.errors import InputError, nearest
from gkd_hf.training.label_check import LabelledSplit, check_labels, look_at_first_rows
from gkd_hf.training.recipe import Recipe, recipe_domain

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
        """The domain whose labels are used; None without a task stage."""
        return self.recipe.stages.task.data if self.recipe.stages.task else None

    def evaluated(self) -> list[str]:
        """Domains to evaluate, the source's held-out split first."""
        own = [self.source] if self.recipe.source_test and self.source not in self.recipe.evaluate else []
        return [*own, *self.recipe.evaluate] if self.source else []

    def uses(self) -> list[DataUse]:
        """Every split that the run reads, each once; with its labels if any stage needs them."""
        found: dict[tuple[str, str], DataUse] = {}
        for name, stage in self.recipe.stages:
            key = (stage.data, "train")
            labelled = name == "task" or (key in found and found[key].labelled)
            found[key] = DataUse(stage.data, "train", labelled)
        for name in self.evaluated():
            if name == self.source and "test" not in recipe_domain(name).splits:
                raise InputError(f"domain '{name}' has no held-out split to evaluate: set source_test=false")
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
        """The map from a domain's stored ids to the train ids of the label space."""
        maps = self.recipe.data.label_maps
        given = maps[name] if name in maps else self._stored_ids(name)
        try:
            return label_map(given, len(self.label_space.classes))
        except InputError as error:
            raise InputError(f"data.label_maps.{name}: {error}") from error

    def _stored_ids(self, name: str) -> str:
        """The map that a domain's labels need unless the recipe names another: none where they are prepared."""
        own, location = recipe_domain(name).label_map, self.location(name)
        if own == "identity" and is_hub_id(location):
            return own  # without asking the Hub
        manifest = find_manifest(location, self.revision(name))
        if manifest is None or manifest.labels != "train_ids":
            return own
        if manifest.classes != self.label_space.classes:
            raise InputError(
                f"the labels in {location} were prepared for the classes {', '.join(manifest.classes)}, but those of "
                f"this run are {', '.join(self.label_space.classes)}: prepare the data for these, or say which is "
                f"which with data.label_maps.{name}"
            )
        return "identity"

    def rows(self, use: DataUse) -> datasets.IterableDataset:
        """The undecoded rows of a split."""
        return open_rows(
            self.location(use.domain),
            use.split,
            columns=("image", "label") if use.labelled else ("image",),
            revision=self.revision(use.domain),
        )

    def train_images(self, name: str) -> int | None:
        """`train_images` of a domain of the recipe."""
        return train_images(self.recipe, name)

    def render_toy_city(self, progress: bool) -> None:
        """Write the toy-city domains in use as shards under output_dir/data; what is there already stays."""
        settings = self.recipe.data.toy_city
        for use in self.uses():
            if is_rendered(self.recipe, use.domain):
                if not progress:
                    print(
                        f"[data] rendering {use.domain} ({use.split}) unless it is there", file=sys.stderr, flush=True
                    )
                write_shards(
                    self.location(use.domain),
                    toy_city_style(use.domain),
                    use.split,
                    toy_city_images(self.recipe, use.domain, use.role),
                    size=settings.size,
                    # A held-out split is other scenes, not the first ones of the training split again.
                    seed=2 * settings.seed + (use.role != "train"),
                    progress=progress,
                )

    def check_rows(self) -> None:
        """Open every split in use, so that wrong data is told before any training.

        Of a folder every label that the run reads is checked, once: what was found good is remembered in output_dir.
        Of a Hub data set the first rows are looked at.

        Raises:
            InputError: folder, shards, column or rows missing; a label value outside the map; image and label of
                different size.
        """
        folders = []
        for use in self.uses():
            if is_rendered(self.recipe, use.domain):
                continue  # rendered by this package
            location, rows = self.location(use.domain), self.rows(use)
            label_map = self.label_map(use.domain) if use.labelled else None
            if label_map is None or is_hub_id(location):
                look_at_first_rows(rows, location, use.split, label_map)
                continue
            limit = self.recipe.stages.task.evaluation_images if use.role == "test" else None
            folders.append(LabelledSplit(use.domain, location, use.split, rows, label_map, limit))
        check_labels(folders, Path(self.recipe.output_dir) / "checked_labels.json")


def _classes_of(entry: Domain) -> str:
    return f"the classes of {entry.label_space}" if entry.label_space else "no labels"


def data_root(recipe: Recipe, name: str) -> str | None:
    """Folder or Hub id that the recipe gives for a domain, `~` expanded; None if it gives none."""
    root = recipe.data.roots.get(name)
    return None if root is None else os.path.expanduser(root)


def train_images(recipe: Recipe, name: str, *, ask_hub: bool = True) -> int | None:
    """Number of a domain's training images: as rendered, as counted, or else as published; None if nobody knows.

    Args:
        recipe: says how many scenes are rendered, and where data is.
        name: the domain.
        ask_hub: whether the Hub may be asked how many rows a data set has.
    """
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
    source = recipe_domain(recipe.stages.task.data)
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
    for name in recipe.evaluate:
        target = recipe_domain(name)
        if not is_custom(target) and target.label_space != source.label_space:
            raise InputError(
                f"evaluate: domain '{name}' has {_classes_of(target)}, but the source '{source.name}' "
                f"teaches those of {space.name}; evaluate domains that share them"
            )
    return space
