"""The file of a comparison: the recipes that it stands for, and every mistake in it before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd_hf.comparison.definition import Comparison
from gkd_hf.comparison.definition_file import read_comparison
from gkd_hf.errors import InputError
from tests.comparison.conftest import RECIPE

Read = Callable[..., Comparison]
TUNE = {"stages.task_agnostic.learning_rate": [1e-3, 3e-3], "stages.task.learning_rate": [1e-2, 2e-2]}


def recipe_of(comparison: Comparison, name: str, seed: int = 1, tuned: dict[str, Any] | None = None) -> Any:
    return comparison.recipe(comparison.variants[name], seed, comparison.folder(name, seed), tuned or {})


def test_recipes_of_variants(read: Read, tmp_path: Path) -> None:
    comparison = read({
        "gkd": {"title": "GKD", "set": {"stages.task.max_steps": 7}},
        "mse": {"set": {"method": "mse", "stages.task.decode_head": {"type": "upernet", "channels": 8}}},
        "late": {"start_from": "gkd"},
    })  # fmt: skip
    gkd, mse, late = (recipe_of(comparison, name) for name in ("gkd", "mse", "late"))
    assert (gkd.method, gkd.seed, gkd.stages.task.max_steps) == ("gkd", 1, 7)
    assert gkd.output_dir == str(tmp_path / "out/gkd/seed1")
    assert (mse.method, mse.stages.task.max_steps) == ("mse", 3)
    assert mse.stages.task.decode_head == {"type": "upernet", "channels": 8}
    assert late.student.encoder == str(tmp_path / "out/gkd/seed1/encoder")
    assert comparison.reference == "gkd"
    assert comparison.variants["gkd"].title == "GKD"
    assert comparison.variants["mse"].title == "mse"


def test_a_comparison_publishes_nothing_and_trains_no_baselines_of_its_own(write: Callable[..., Path]) -> None:
    path = write({"gkd": {}})
    content = RECIPE | {"baselines": ["none"], "hub": {"repo_id": "org/name"}}
    (path.parent / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = recipe_of(read_comparison(path), "gkd")
    assert recipe.baselines == []
    assert recipe.hub.repo_id is None


def test_a_recipe_in_place_is_that_of_a_file(read: Read) -> None:
    variants = {"gkd": {"set": {"stages.task.max_steps": 7}}}
    assert recipe_of(read(variants), "gkd") == recipe_of(read(variants, recipe=RECIPE), "gkd")


def test_overrides_change_what_is_shared_but_not_the_variant(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write({"gkd": {"set": {"stages.task.max_steps": 7}}, "mse": {"set": {"method": "mse"}}})
    comparison = read_comparison(path, ["stages.task.max_steps=1", f"output_dir={tmp_path / 'else'}"])
    assert recipe_of(comparison, "gkd").stages.task.max_steps == 7
    assert recipe_of(comparison, "mse").stages.task.max_steps == 1
    assert comparison.folder("mse", 0) == tmp_path / "else" / "mse" / "seed0"


def test_the_grid_is_the_product_and_numbers_may_be_written_with_exponents(write: Callable[..., Path]) -> None:
    path = write({"gkd": {}})
    path.write_text(path.read_text().replace("gkd: {}", "gkd: {tune: {stages.task.learning_rate: [1e-3, 2e-5],"
                                             " stages.task.max_steps: [5, 6]}}"))  # fmt: skip
    candidates = read_comparison(path).variants["gkd"].candidates()
    assert [tuple(values.values()) for values in candidates] == [(1e-3, 5), (1e-3, 6), (2e-5, 5), (2e-5, 6)]


def test_values_whose_section_a_variant_leaves_out_are_passed_over(read: Read) -> None:
    comparison = read({"gkd": {"tune": TUNE}, "no_1a": {"set": {"stages.task_agnostic": None}, "tuned_as": "gkd"}})
    tuned = {key: values[1] for key, values in TUNE.items()}
    assert recipe_of(comparison, "gkd", tuned=tuned).stages.task_agnostic.learning_rate == 3e-3
    without = recipe_of(comparison, "no_1a", tuned=tuned)
    assert without.stages.task_agnostic is None
    assert without.stages.task.learning_rate == 2e-2


def test_what_has_to_be_run_for_what(read: Read) -> None:
    comparison = read({
        "first": {"shown": False},
        "tuned": {"start_from": "first", "tune": TUNE},
        "plain": {},
        "as_tuned": {"tuned_as": "tuned", "start_from": "plain"},
    })  # fmt: skip
    assert comparison.runs(["plain"], [1]) == {"plain": (1,)}
    assert comparison.runs(["tuned"], [1]) == {"first": (0, 1), "tuned": (1,)}  # the tuning is done with seed 0
    assert comparison.runs(["as_tuned"], [1]) == {"first": (0,), "plain": (1,), "as_tuned": (1,)}


def test_groups(read: Read) -> None:
    variants = {"a": {}, "b": {}, "c": {}, "step": {"shown": False}}
    assert read(variants).grouped() == {"": ("a", "b", "c")}
    assert read(variants, groups={"one": ["b", "a"]}).grouped() == {"one": ("b", "a"), "other": ("c",)}


@pytest.mark.parametrize(
    ("variants", "keys", "expected"),
    [
        ({"a": {"set": {"stages.task.max_step": 1}}}, {}, "variant 'a': override 'stages.task.max_step=1': unknown"),
        ({"a": {"set": {"methode": "gkd"}}}, {}, "did you mean 'method'"),
        ({"a": {"tune": {"stages.task.learning_rat": [1.0]}}}, {}, "did you mean 'learning_rate'"),
        ({"a": {"tune": {"stages.task.learning_rate": [1.0, -1.0]}}}, {}, "must be more than 0"),
        ({"a": {"tune": {"stages.task.learning_rate": 1.0}}}, {}, "needs a list of values"),
        ({"a": {"tune": {"stages.task.learning_rate": [1.0, 1.0]}}}, {}, "names a value twice"),
        ({"a": {"set": {"stages.task_agnostic": None}, "tune": TUNE}}, {}, "leaves out the section of"),
        ({"a": {"sett": {}}}, {}, "unknown key 'sett', did you mean 'set'"),
        ({"a": {}}, {"seed": 0}, "unknown key 'seed', did you mean 'seeds'"),
        ({"a": {}}, {"seeds": [0, 0]}, "seeds is [0, 0]"),
        ({"a": {}}, {"seeds": []}, "seeds is []"),
        ({"a": {}}, {"reference": "aa"}, "reference: no such variant 'aa', did you mean 'a'"),
        ({"a": {}}, {"groups": {"g": ["x"]}}, "groups.g: no such variant 'x'"),
        ({"a": {}}, {"spread": -1}, "spread is -1"),
        ({"a": {}}, {"output_dir": "runs/a=b"}, "choose a folder without '='"),
        ({"a": {}}, {"recipe": "other.yaml"}, "other.yaml' does not exist"),
        ({"a": {}}, {"recipe": RECIPE | {"evaluat": []}}, "did you mean 'evaluate'"),
        ({"a/b": {}}, {}, "the name is that of a folder"),
        ({"data": {}}, {}, "the name is that of a folder"),
        ({"a": {"set": {"seed": 1}}}, {}, "'seed' is the comparison's to decide"),
        ({"a": {"set": {"hub.repo_id": "org/name"}}}, {}, "variants.a: 'hub.repo_id' is the comparison's to decide"),
        ({"a": {"set": {"hub": {"private": False}}}}, {}, "'hub' is the comparison's to decide"),
        ({"a": {"set": {"baselines": ["none"]}}}, {}, "'baselines' is the comparison's to decide"),
        ({"a": {"tune": {"seed": [1, 2]}}}, {}, "'seed' is the comparison's to decide"),
        ({"a": {"shown": False}}, {}, "none is shown"),
        ({"a": {"shown": "no"}}, {}, "it must be true or false"),
        ({"a": {"tuned_as": "b"}, "b": {}}, {}, "variants.a.tuned_as: no such variant 'b'"),
        ({"a": {"start_from": "b"}, "b": {"start_from": "a"}}, {}, "goes in a circle"),
        ({"a": {"start_from": "b", "set": {"student.encoder": "x"}}, "b": {}}, {}, "'student.encoder' is the comp"),
        ({"a": {"start_from": "b", "set": {"student.encoder.depths": [1]}}, "b": {}}, {}, "student.encoder.depths'"),
        ({"a": {"start_from": "b", "set": {"student.pretrained": False}}, "b": {}}, {}, "'student.pretrained' is the"),
        ({"a": {"set": {"stages.task": None, "evaluate": []}}}, {}, "add shown: false"),
        ({"a": {}, "b": {"set": {"evaluate": []}}}, {}, "evaluate of variant 'b' is not that of 'a'"),
        ({"a": {}, "b": {"set": {"data.toy_city.size": 32}}}, {}, "data.toy_city of variant 'b' is not that of 'a'"),
        ({}, {}, "none is shown"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(read: Read, variants: dict[str, Any], keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read(variants, **keys)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seeds_and_baselines_are_no_overrides(write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="seeds: --seeds"):
        read_comparison(write({"a": {}}), ["seed=3"])


def test_nothing_else_uses_the_comparison() -> None:
    package = Path(__file__).parents[2] / "gkd_hf"
    users = [path for path in package.rglob("*.py") if "gkd_hf.comparison" in path.read_text("utf-8")]
    assert users
    assert {path.parent.name for path in users} == {"comparison"}
