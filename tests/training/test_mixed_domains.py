"""Several domains in one stage: `data: gtav+synthia`, how often each is drawn, what is read and reported of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gkd_hf.data.domains import LABEL_SPACES
from gkd_hf.errors import InputError
from gkd_hf.evaluation.domain_report import DomainReport, DomainResult
from gkd_hf.hub.licences import ingredients
from gkd_hf.hub.model_card import GKDModelCard
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.hub.run_facts import RunFacts
from gkd_hf.training.checks import train_steps
from gkd_hf.training.plan import plan
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
SYNTHETIC = ["gtav", "synthia", "urbansyn"]


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "scripts/recipes/quickstart.yaml", overrides)


def synthetic_sources(*overrides: str, place: str = "/nowhere") -> Recipe:
    roots = [f"data.roots.{name}={place}/{name}" for name in [*SYNTHETIC, "cityscapes"]]
    stages = ["stages.task_agnostic=null", "stages.domain_agnostic=null", "stages.task.data=gtav + synthia+urbansyn"]
    return quickstart(*stages, "evaluate=[cityscapes]", "baselines=[]", *roots, *overrides)


def test_every_domain_of_a_stage_is_read_and_those_with_a_held_out_split_are_evaluated() -> None:
    recipe = synthetic_sources()
    assert recipe.stages.task.data == "gtav+synthia+urbansyn"
    data = RecipeData(recipe)
    assert data.source == "gtav+synthia+urbansyn"
    assert [(use.domain, use.role) for use in data.uses()] == [
        *((name, "train") for name in SYNTHETIC),
        ("gtav", "test"),
        ("cityscapes", "test"),
    ]
    assert all(use.labelled for use in data.uses())
    assert data.evaluated() == ["gtav", "cityscapes"]
    assert RecipeData(synthetic_sources("source_test=false")).evaluated() == ["cityscapes"]
    with pytest.raises(InputError, match="'synthia\\+urbansyn' has no held-out split to evaluate: set source_test"):
        RecipeData(synthetic_sources("stages.task.data=synthia+urbansyn"))


def test_an_epoch_is_all_images_of_all_domains() -> None:
    recipe = quickstart(
        "stages.task.data=toy_city+toy_city:pool", "stages.task.max_steps=null", "stages.task.epochs=2"
    )
    assert train_steps(RecipeData(recipe), "task", recipe.stages.task) == round(2 * (1500 + 8000) / 32)
    text = plan(recipe)
    assert "stage task: toy_city+toy_city:pool, 9,500 images" in text
    recipe.stages.task.weights = [2.0, 0.5]
    assert "stage task: toy_city+toy_city:pool in shares of 2, 0.5, 9,500 images" in plan(recipe)
    assert "evaluation: toy_city, toy_city:pool (held-out split), toy_city:night" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.task.data=gtav+gtv"], "stages.task.data: unknown domain 'gtv'"),
        (["stages.task.data=gtav+"], "stages.task.data: unknown domain ''"),
        (["stages.task.data=gtav+synthia+gtav"], "stages.task.data names a domain twice: gtav+synthia+gtav"),
        (["stages.task.weights=[1, 2]"], "stages.task.weights has 2 number(s) but stages.task.data names 3 domain(s)"),
        (
            ["stages.task.weights=[1, 0, 2]"],
            "stages.task.weights is [1.0, 0.0, 2.0]: every weight must be more than 0",
        ),
        (["stages.task.weights=[1, .inf, 2]"], "every weight must be more than 0 and finite"),
        (["stages.task.weights=[1, 5000, 1]"], "every weight must be at least 1/1024 of their sum"),
        (["stages.task.weights=yes"], "stages.task.weights: a list is needed there, such as [a, b]"),
    ],
)
def test_a_wrong_mixture_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        synthetic_sources(*overrides)


def test_only_domains_of_one_label_space_are_mixed() -> None:
    recipe = synthetic_sources("stages.task.data=gtav+potsdam_rgb", "data.roots.potsdam_rgb=/nowhere/potsdam")
    with pytest.raises(InputError, match="stages.task.data: 'potsdam_rgb' has the classes of isprs, but 'gtav' those"):
        RecipeData(recipe)


def test_cards_name_every_domain_and_its_terms() -> None:
    settings = synthetic_sources("hub.repo_id=org/gkd-r50", place="org").as_dict()
    assert [each.name for each in ingredients(settings)][:3] == SYNTHETIC
    space = LABEL_SPACES["cityscapes"]
    report = DomainReport("gtav+synthia+urbansyn", space, settings, 0)
    for name in ("gtav", "cityscapes"):
        report.add(DomainResult(name, torch.eye(19, dtype=torch.int64), 3, []))
    names = RepoNames.of(settings, "org/gkd-r50")
    assert names.segmenter == "org/gkd-r50-gtav-synthia-urbansyn"
    card = GKDModelCard("segmenter", RunFacts(settings=settings), names, report=report.as_dict())
    assert card.metadata().datasets == [f"org/{name}" for name in SYNTHETIC]
    assert [each.dataset_name for each in card.metadata().eval_results] == [
        "gtav+synthia+urbansyn (source, held out)",
        "cityscapes (unseen in training)",
    ]
    text = str(card.render())
    assert "gtav+synthia+urbansyn (source)" in text
