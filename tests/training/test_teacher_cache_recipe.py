"""Fixed views and the teacher cache as a recipe asks for them: what is refused, planned, remembered and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gkd_hf.errors import InputError
from gkd_hf.training.pipeline import run
from gkd_hf.training.plan import plan
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.stage_arguments import stage_arguments
from gkd_hf.training.stage_folder import flatten
from gkd_hf.training.stage_settings import stage_folders
from tests.tiny import ENCODERS


def recipe(folder: Path, **changes: Any) -> Recipe:
    stage = {"data": "toy_city", "image_size": 32, "batch_size": 4, "max_steps": 4, "workers": 0, "save_steps": 2}
    return load_recipe(
        {
            "student": {"encoder": ENCODERS["vit"]},
            "teacher": {"name": "toy"},
            "stages": {"domain_agnostic": stage | changes},
            "data": {"toy_city": {"size": 32, "train_images": 8}},
            "output_dir": str(folder / "run"),
        }
    )


def test_views_and_cache_reach_the_training(tmp_path: Path) -> None:
    given = recipe(tmp_path, views=3, teacher_cache=str(tmp_path / "cache"))
    stage = given.stages.domain_agnostic
    arguments = stage_arguments(given, "domain_agnostic", stage, tmp_path, 4, 1)
    assert arguments.teacher_cache == str(tmp_path / "cache")
    data = RecipeData(given)
    data.render_toy_city(progress=False)
    assert data.stream(stage, lambda image, rng: {}, 4).views == 3
    plain = recipe(tmp_path)
    stage = plain.stages.domain_agnostic
    assert stage_arguments(plain, "domain_agnostic", stage, tmp_path, 4, 1).teacher_cache is None
    assert RecipeData(plain).stream(stage, lambda image, rng: {}, 4).views is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher_cache": "cache"}, "teacher_cache needs stages.domain_agnostic.views, for example 4"),
        ({"teacher_cache": True, "views": 2}, "teacher_cache is '[Tt]rue': give a folder, or null"),
        ({"views": 0}, "stages.domain_agnostic.views is 0: it must be more than 0"),
        ({"views": "many"}, "views"),
    ],
)
def test_what_does_nothing_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        recipe(tmp_path, **changes)


def test_a_stage_begun_before_these_keys_goes_on_and_the_cache_may_move(tmp_path: Path) -> None:
    def settings(**changes: Any) -> dict[str, Any]:
        given = recipe(tmp_path, **changes)
        return stage_folders(given, RecipeData(given))["domain_agnostic"].settings

    plain = settings()
    assert not [key for key in plain if key.endswith(("views", "teacher_cache"))]
    cached = settings(views=2, teacher_cache="here")
    assert cached == plain | {"stages.domain_agnostic.views": 2, "stages.domain_agnostic.teacher_cache": "bf16"}
    assert settings(views=2, teacher_cache="there") == cached
    assert flatten({"views": None, "teacher_cache": None}) == {}


def test_the_plan_tells_the_size_of_the_cache(tmp_path: Path) -> None:
    """The toy teacher's width is 192, and the student's grid 4×4: 17·192 numbers of two bytes for each view."""
    text = plan(recipe(tmp_path, views=3, teacher_cache="/data/tokens"))
    assert "views: 3 fixed one(s) of each image" in text
    assert 17 * 192 * 2 * 8 * 3 == 156672
    assert "teacher cache: /data/tokens, 0.000157 GB = 0.00653 MB × 8 images × 3, once every view was seen" in text
    assert "teacher cache" not in plan(recipe(tmp_path, views=3))
    assert "views" not in plan(recipe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_steps": 4}, "NOTE: 2 passes over 2 view(s) see none of them twice"),
        ({"max_steps": 5}, "each view is seen 1.25 times"),
        ({"max_steps": 12}, "each view is seen 3 times; the first computes, so the cache pays from 2 on"),
        ({"max_steps": None, "epochs": 2}, "NOTE: 2 passes over 2 view(s) see none of them twice"),
        ({"max_steps": None, "epochs": 8}, "each view is seen 4 times"),
    ],
)
def test_the_plan_tells_how_often_a_view_comes_back(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    text = plan(recipe(tmp_path, views=2, teacher_cache="/data/tokens", **changes))
    assert told in text
    assert ("NOTE" in text) != ("each view is seen" in text)
    assert "is seen" not in plan(recipe(tmp_path, views=2, **changes))


def test_a_second_run_finds_what_the_first_one_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, found in (("first", "8 of 16"), ("second", "16 of 16")):
        run(recipe(tmp_path / name, views=1, teacher_cache=str(tmp_path / "cache")))
        assert f"[domain_agnostic] teacher cache: {found} views were there" in capsys.readouterr().out
