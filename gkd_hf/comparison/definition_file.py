"""Reading the file of a comparison, and everything in it that can be told to be wrong before anything runs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gkd_hf.comparison.definition import Comparison, Variant, has_place
from gkd_hf.errors import InputError, nearest
from gkd_hf.training.recipe import MAX_SEED

KEYS = ("recipe", "output_dir", "seeds", "reference", "variants", "groups", "spread")
VARIANT_KEYS = ("title", "set", "tune", "tuned_as", "start_from", "shown")
# What the comparison itself decides for every run, and for one that starts from the encoder of another.
OWN_KEYS = ("seed", "output_dir", "baselines", "hub")
START_KEYS = ("encoder", "pretrained", "revision")


def read_comparison(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison's file and check every recipe that can be known before anything runs.

    Args:
        path: the YAML file; the recipe that it names is looked for beside it.
        overrides: `key.sub=value` for the recipe that all variants share; `output_dir=FOLDER` for the comparison.

    Raises:
        InputError: unreadable file, unknown key or variant, or any recipe that does not hold.
    """
    path = Path(path)
    content = _read(path)
    where = f"comparison '{path}'"
    _known(content, KEYS, where)
    for key in ("recipe", "output_dir", "seeds", "variants"):
        if content.get(key) is None:
            raise InputError(f"{where}: nothing is given for {key}: add it to the file")
    shared = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "output_dir":
            content["output_dir"] = value
        elif key.split(".")[0] in OWN_KEYS:
            raise InputError(f"override '{override}': '{key}' is the comparison's to decide (seeds: --seeds): drop it")
        else:
            shared.append(override)
    if "=" in str(content["output_dir"]):
        raise InputError(f"{where}: output_dir is '{content['output_dir']}': choose a folder without '=' in its path")
    base = content["recipe"]
    if not isinstance(base, Mapping):
        base = path.parent / os.path.expanduser(str(base))
    variants = {str(name): _variant(str(name), given, where) for name, given in _mapping(content, "variants", where)}
    shown = [name for name, variant in variants.items() if variant.shown]
    if not shown:
        raise InputError(f"{where}: variants: none is shown")
    comparison = Comparison(
        path, base, tuple(shared), Path(os.path.expanduser(str(content["output_dir"]))), _seeds(content, where),
        str(content.get("reference") or shown[0]), variants, _groups(content, shown, where), _spread(content, where),
    )  # fmt: skip
    _one_of(comparison.reference, shown, f"{where}: reference")
    for variant in variants.values():
        _check_links(comparison, variant, where)
    _check_recipes(comparison, where)
    return comparison


def _check_links(comparison: Comparison, variant: Variant, where: str) -> None:
    if variant.tuned_as is not None:
        tuned = [name for name, each in comparison.variants.items() if each.tune]
        _one_of(variant.tuned_as, tuned, f"{where}: variants.{variant.name}.tuned_as")
        if variant.tune:
            raise InputError(f"{where}: variants.{variant.name} has both tune and tuned_as: give one of them")
    seen = [variant.name]
    while (start := comparison.variants[seen[-1]].start_from) is not None:
        _one_of(start, comparison.variants, f"{where}: variants.{seen[-1]}.start_from")
        if start in seen:
            raise InputError(f"{where}: variants.{variant.name}.start_from goes in a circle: {', '.join(seen)}")
        seen.append(start)


def _check_recipes(comparison: Comparison, where: str) -> None:
    """Load the recipe of every variant with every candidate; a seed changes nothing about its validity."""
    seed, evaluated, rendered = comparison.seeds[0], {}, {}
    for name, variant in comparison.variants.items():
        tuner = comparison.tuner(variant)
        for tuned in tuner.candidates() if tuner else [{}]:
            recipe = comparison.recipe(variant, seed, comparison.folder(name, seed), tuned)
            for key in variant.tune:
                if not has_place(recipe, key):
                    raise InputError(f"{where}: variants.{name}.tune: the variant leaves out the section of '{key}'")
        rendered[name] = recipe.data.toy_city
        if recipe.stages.task is None and (variant.shown or variant.tune):
            what = "its mIoU on the source is what tune goes by" if variant.tune else "add shown: false"
            raise InputError(f"{where}: variants.{name} has no stages.task, so it has no mIoU: {what}")
        if variant.shown:
            evaluated[name] = recipe.evaluate
    # Means over other domains cannot be compared, and what is rendered once is rendered with one setting.
    for what, found in (("evaluate", evaluated), ("data.toy_city", rendered)):
        first = next(iter(found))
        for name, value in found.items():
            if value != found[first]:
                raise InputError(f"{where}: {what} of variant '{name}' is not that of '{first}': all must share it")


def _variant(name: str, given: Any, where: str) -> Variant:
    where = f"{where}: variants.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "data":
        raise InputError(f"{where}: the name is that of a folder: letters, digits, '_', '-' and '.', and not 'data'")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping ({', '.join(VARIANT_KEYS)}), not {given!r}")
    _known(given, VARIANT_KEYS, where)
    changes = dict(_mapping(given, "set", where))
    tune = dict(_mapping(given, "tune", where))
    own = OWN_KEYS if given.get("start_from") is None else (*OWN_KEYS, *(f"student.{key}" for key in START_KEYS))
    for key in (*changes, *tune):
        if any(key == each or str(key).startswith(f"{each}.") for each in own):
            raise InputError(f"{where}: '{key}' is the comparison's to decide: drop it")
    for key, values in tune.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}.tune: '{key}' needs a list of values to try, such as [1e-3, 3e-3]")
        if any(value in values[:index] for index, value in enumerate(values)):
            raise InputError(f"{where}.tune: '{key}' names a value twice: {values}")
        if key in changes:
            raise InputError(f"{where}.tune: '{key}' is set as well: give it once")
    shown = given.get("shown", True)
    if not isinstance(shown, bool):
        raise InputError(f"{where}.shown is {shown!r}: it must be true or false")
    named = {key: None if given.get(key) is None else str(given[key]) for key in ("tuned_as", "start_from")}
    return Variant(name, str(given.get("title") or name), changes, tune, **named, shown=shown)


def _groups(content: Mapping[str, Any], shown: Sequence[str], where: str) -> dict[str, tuple[str, ...]]:
    groups = {}
    for heading, names in _mapping(content, "groups", where):
        if not isinstance(names, list) or not names:
            raise InputError(f"{where}: groups.{heading} must be a list of variants")
        for name in names:
            _one_of(name, shown, f"{where}: groups.{heading}")
        groups[str(heading)] = tuple(dict.fromkeys(names))
    return groups


def _seeds(content: Mapping[str, Any], where: str) -> tuple[int, ...]:
    seeds = content["seeds"]
    good = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise InputError(f"{where}: seeds is {seeds!r}: give a list of different whole numbers, such as [0, 1, 2]")
    return tuple(seeds)


def _spread(content: Mapping[str, Any], where: str) -> float | None:
    spread = content.get("spread")
    if spread is None:
        return None
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 < spread < math.inf:
        raise InputError(f"{where}: spread is {spread!r}: give points of mIoU, more than 0, or leave it out")
    return float(spread)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = sorted(each.name for each in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise InputError(f"comparison '{path}' does not exist{nearest(path.name, siblings)}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"comparison '{path}' is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"comparison '{path}' must be a mapping of keys ({', '.join(KEYS)})")
    return OmegaConf.to_container(content)


def _mapping(given: Mapping[str, Any], key: str, where: str) -> Iterable[tuple[Any, Any]]:
    value = given.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} must be a mapping, not {value!r}")
    return (value or {}).items()


def _known(given: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in given:
        if key not in keys:
            hint = nearest(str(key), keys) or f"; known there: {', '.join(keys)}"
            raise InputError(f"{where}: unknown key '{key}'{hint}")


def _one_of(name: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if name not in known:
        hint = nearest(str(name), known) or f" (possible: {', '.join(known) or 'none'})"
        raise InputError(f"{where}: no such variant '{name}'{hint}")
