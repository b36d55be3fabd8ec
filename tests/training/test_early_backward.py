"""When the trainer runs one view at a time: on GPUs, where it is asked for, and not with what does not bear it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gkd_hf import GKDDistillationArguments
from gkd_hf.errors import InputError
from gkd_hf.models.loading import config_from_mapping
from gkd_hf.training import scale
from gkd_hf.training.plan import PlannedEncoder
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.stage_arguments import stage_arguments
from gkd_hf.training.stage_settings import stage_folders
from tests.tiny import ENCODERS
from tests.training import test_teacher_cache_recipe as recipes
from tests.training import test_trainers as single


def test_a_cpu_does_as_it_is_told(tmp_path: Path) -> None:
    assert not single.distillation_trainer(tmp_path).model.early_backward
    assert single.distillation_trainer(tmp_path, early_backward=True).model.early_backward


def test_a_training_with_a_warm_up_learns_what_it_does_with_both_views_at_once(tmp_path: Path) -> None:
    curves = []
    for early in (False, True):
        settings = {"max_steps": 4, "query_warmup_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
        trainer = single.distillation_trainer(tmp_path / str(early), early_backward=early, **settings)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4 and curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "expected"), [({}, True), ({"is_fsdp_enabled": True}, False), ({"is_deepspeed_enabled": True}, False)]
)
def test_a_gpu_does_unless_models_are_sharded(
    changed: dict[str, bool], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = single.distillation_trainer(tmp_path)
    monkeypatch.setattr(GKDDistillationArguments, "device", torch.device("cuda"))
    for name, value in changed.items():
        monkeypatch.setattr(trainer, name, value)
    assert trainer._runs_backward_early() is expected
    trainer.args.early_backward = False
    assert trainer._runs_backward_early() is False
    trainer.args.early_backward, trainer.args.torch_compile = None, True
    assert trainer._runs_backward_early() is False


def test_what_does_not_bear_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="torch.compile: leave one of them out"):
        GKDDistillationArguments(str(tmp_path), early_backward=True, torch_compile=True, use_cpu=True)
    trainer = single.distillation_trainer(tmp_path, early_backward=True)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(InputError, match="FSDP or DeepSpeed: leave it out"):
        trainer._runs_backward_early()


def test_a_recipe_switches_it_and_its_stage_goes_on_either_way(tmp_path: Path) -> None:
    given = {switch: recipes.recipe(tmp_path, early_backward=switch) for switch in (None, False, True)}
    settings = []
    for switch, recipe in given.items():
        stage = recipe.stages.domain_agnostic
        assert stage_arguments(recipe, "domain_agnostic", stage, tmp_path, 4, 1).early_backward is switch
        settings.append(stage_folders(recipe, RecipeData(recipe))["domain_agnostic"].settings)
    assert settings[0] == settings[1] == settings[2]
    with pytest.raises(InputError, match="domain_agnostic.early_backward does not go through torch.compile"):
        recipes.recipe(tmp_path, early_backward=True, compile=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"early_backward": True}, True), ({"early_backward": False}, False), ({"compile": True}, False)],
)
def test_a_plan_reckons_with_what_the_recipe_says(
    changes: dict[str, bool], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale.DistillationStep, "costs", lambda step, batches: {False: step.early_backward})
    recipe = recipes.recipe(tmp_path, **changes)
    encoder = PlannedEncoder("student", config_from_mapping(ENCODERS["vit"]), False)
    planned = scale.stage_scale(recipe, "domain_agnostic", recipe.stages.domain_agnostic, encoder, encoder)
    assert planned.costs[False] is expected and planned.sharded_costs[False] is False
    assert planned.runs_backward_early is expected
    # What FSDP2 refuses when the training starts is not advised before.
    planned.costs[True] = None
    shardings = {layout.fsdp for layout in planned.layouts(8)}
    assert shardings == ({False} if changes.get("early_backward") else {False, True})
