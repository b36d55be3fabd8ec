"""What is compared: variants of one recipe, their seeds, and the complete recipe of every run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gkd_hf.errors import InputError
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_file import load_recipe

# A comparison publishes nothing, and a baseline is a variant of its own.
SHARED = {"baselines": [], "hub.repo_id": None}
OTHER_GROUP = "other"


@dataclass(frozen=True)
class Variant:
    """One method: what it changes in the recipe, and which of its hyper-parameters are chosen on the source.

    Attributes:
        name: also the folder of its runs.
        title: how tables and figure call it.
        changes: recipe key → value.
        tune: recipe key → the values to try; the grid is their product.
        tuned_as: the variant whose chosen values this one takes.
        start_from: the variant whose encoder, of the same seed, this one's student starts from.
        shown: whether it is in the table, and not only a step towards another variant.
    """

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tuned_as: str | None = None
    start_from: str | None = None
    shown: bool = True

    def candidates(self) -> list[dict[str, Any]]:
        """The grid of values to try, in the order of the file; one empty entry where nothing is tuned."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]


@dataclass(frozen=True)
class Comparison:
    """A comparison as its file says it.

    Attributes:
        path: the file.
        base: the shared recipe, its path or its keys.
        overrides: `key.sub=value` for the shared recipe, from the command line.
        output_dir: where everything goes.
        seeds: those of every variant; the first is the one that tuning uses.
        reference: the variant that gains are told against.
        variants: by name.
        groups: heading → names of shown variants.
        spread: by how many points a result may differ from a stored one; None: by the stored seeds' own spread.
    """

    path: Path
    base: Path | Mapping[str, Any]
    overrides: tuple[str, ...]
    output_dir: Path
    seeds: tuple[int, ...]
    reference: str
    variants: Mapping[str, Variant]
    groups: Mapping[str, tuple[str, ...]]
    spread: float | None = None

    def recipe(
        self, variant: Variant, seed: int, folder: Path, tuned: Mapping[str, Any], *, source_only: bool = False
    ) -> Recipe:
        """The complete recipe of one run.

        Args:
            variant: one of the comparison's.
            seed: of the run, and of the run whose encoder it starts from.
            folder: the run's output folder.
            tuned: hyper-parameters by recipe key; those whose section the variant leaves out are passed over.
            source_only: for tuning: no target domain is evaluated, only the source's held-out split.

        Raises:
            InputError: as `load_recipe`; the message begins with the variant.
        """
        changes = SHARED | dict(variant.changes) | {"seed": seed, "output_dir": str(folder)}
        if variant.start_from is not None:
            encoder = str(self.folder(variant.start_from, seed) / "encoder")
            changes |= {"student.encoder": encoder, "student.pretrained": True, "student.revision": None}
        if source_only:
            changes |= {"evaluate": [], "source_test": True}
        plain = self._load(variant, changes)
        applicable = {key: value for key, value in tuned.items() if has_place(plain, key)}
        return self._load(variant, changes | applicable) if applicable else plain

    def _load(self, variant: Variant, changes: Mapping[str, Any]) -> Recipe:
        try:
            given = [f"{key}={_in_one_line(value)}" for key, value in changes.items()]
            return load_recipe(self.base, [*self.overrides, *given])
        except InputError as error:
            raise InputError(f"variant '{variant.name}': {error}") from error

    def folder(self, variant: str, seed: int) -> Path:
        """Where a variant's run of a seed is."""
        return self.output_dir / variant / f"seed{seed}"

    def tuner(self, variant: Variant) -> Variant | None:
        """The variant that finds the values which this one is run with; None where nothing is tuned."""
        if variant.tuned_as is not None:
            return self.variants[variant.tuned_as]
        return variant if variant.tune else None

    def runs(self, names: Iterable[str], seeds: Iterable[int]) -> dict[str, tuple[int, ...]]:
        """The seeds of every variant that have to be run for those named, in the file's order.

        What they start from is run with the same seed; what a tuning starts from, with the first.
        """
        seeds, wanted = list(seeds), set()
        open_runs = [(name, seed) for name in names for seed in seeds]
        while open_runs:
            name, seed = run = open_runs.pop()
            if run in wanted:
                continue
            wanted.add(run)
            variant = self.variants[name]
            tuner = self.tuner(variant)
            starts = [(variant.start_from, seed), (tuner.start_from if tuner else None, self.seeds[0])]
            open_runs += [start for start in starts if start[0] is not None]
        found = {name: tuple(seed for seed in self.seeds if (name, seed) in wanted) for name in self.variants}
        return {name: seeds for name, seeds in found.items() if seeds}

    def grouped(self) -> dict[str, tuple[str, ...]]:
        """The shown variants by heading; those that no group names come last."""
        named = {name for names in self.groups.values() for name in names}
        rest = tuple(name for name, variant in self.variants.items() if variant.shown and name not in named)
        return dict(self.groups) | ({OTHER_GROUP if self.groups else "": rest} if rest else {})


def _in_one_line(value: Any) -> str:
    """A value as YAML for an override; a list around it keeps a bare scalar free of the end mark of a document."""
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]


def has_place(recipe: Recipe, key: str) -> bool:
    """Whether the section that a key belongs to is present."""
    section: Any = recipe.as_dict()
    for part in key.split(".")[:-1]:
        section = section.get(part) if isinstance(section, Mapping) else None
    return section is not None
