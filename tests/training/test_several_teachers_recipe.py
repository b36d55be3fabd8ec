"""Recipes with several teachers: what they may say, what the plan tells, and a run from first step to card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gkd_hf import InputError
from gkd_hf.hub.licences import ingredients
from gkd_hf.models.loading import load_encoder
from gkd_hf.training import artefacts, teaching
from gkd_hf.training.distillation_trainer import GKDDistillationTrainer
from gkd_hf.training.pipeline import run
from gkd_hf.training.plan import plan, planned_encoder, planned_teachers
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.scale import Layout, stage_scale
from gkd_hf.training.stage_settings import stage_folders
from tests.tiny import ENCODERS

SIZE = 32
TWO = ("teacher=null", "teachers=[{name: facebook/dinov2-base}, {name: facebook/dinov2-small, weight: 0.5}]")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "STATISTICS_IMAGES", 8)


@pytest.fixture
def encoders(tmp_path: Path) -> dict[str, Path]:
    """Two teachers in folders, and one of them again with tokens that are a hundred times as large."""
    torch.manual_seed(0)
    folders = {name: tmp_path / name for name in ("dinov2", "vit")}
    for name, folder in folders.items():
        load_encoder(ENCODERS[name])[0].save_pretrained(folder)
    large = folders["large"] = tmp_path / "large" / "dinov2"
    load_encoder(folders["dinov2"])[0].save_pretrained(large)
    weights = load_file(large / "model.safetensors")
    for name in ("layernorm.weight", "layernorm.bias"):
        weights[name] = 100 * weights[name]
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    return folders


def recipe(out: Path, *teachers: Path, **changes: Any) -> Recipe:
    stage = {"image_size": SIZE, "batch_size": 4, "workers": 0, "logging_steps": 1, "save_steps": 1}
    content = {
        "student": {"encoder": dict(ENCODERS["vit"])},
        "teachers": [{"name": str(folder), "weight": 1 / (1 + k)} for k, folder in enumerate(teachers)],
        "stages": {
            "task_agnostic": stage | {"data": "toy_city:pool", "max_steps": 1},
            "domain_agnostic": stage | {"data": "toy_city", "max_steps": 3, "learning_rate": 1e-4},
        },
        "data": {"toy_city": {"size": SIZE, "pool_images": 8, "train_images": 8, "test_images": 1}},
        "output_dir": str(out),
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return load_recipe(path)


def losses(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))
    return [
        {key: value for key, value in entry.items() if key.startswith("loss")}
        for entry in state["log_history"]
        if "loss" in entry
    ]


def test_a_recipe_with_two_teachers_runs_resumes_and_does_not_mind_their_scale(
    tmp_path: Path, encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (encoders["dinov2"], encoders["vit"])
    run(recipe(tmp_path / "whole", *given))
    stages = tmp_path / "whole" / "stages"
    logged = losses(stages / "domain_agnostic")
    terms = {f"loss_{name}/{term}" for name in ("dinov2", "vit") for term in ("total", "token", "feature", "patch")}
    assert len(logged) == 3 and all(set(entry) == {"loss", *terms} for entry in logged)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["loss_dinov2/total"] + entry["loss_vit/total"] / 2, rel=1e-5)
    # The second stage goes on with the statistics of the first.
    before, after = (load_file(stages / name / "heads.safetensors") for name in ("task_agnostic", "domain_agnostic"))
    statistics = [name for name in before if name.startswith("standardise.")]
    assert len(statistics) == 10 and all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(
        before["objectives.1.patch.value.proj.weight"], after["objectives.1.patch.value.proj.weight"]
    )
    card = (tmp_path / "whole" / "encoder" / "README.md").read_text(encoding="utf-8")
    assert "dinov2" in card and " and " in card

    step = GKDDistillationTrainer.compute_loss

    def killed(trainer: GKDDistillationTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.title == "domain_agnostic" and trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(GKDDistillationTrainer, "compute_loss", killed)
        run(recipe(tmp_path / "cut", *given))
    run(recipe(tmp_path / "cut", *given))
    folder = tmp_path / "cut" / "stages" / "domain_agnostic"
    assert losses(folder) == logged
    for name in ("heads.safetensors", "model/model.safetensors"):
        ours, expected = load_file(folder / name), load_file(stages / "domain_agnostic" / name)
        assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in expected)

    run(recipe(tmp_path / "scaled", encoders["large"], encoders["vit"]))
    scaled = losses(tmp_path / "scaled" / "stages" / "domain_agnostic")
    for entry, expected in zip(scaled, logged, strict=True):
        assert entry == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (TWO[1:], "teacher and teachers are both given"),
        (("teacher=null", "teachers=[]"), "teachers is empty"),
        (
            ("teacher=null", "teachers=[{name: a/b}, {name: a/b, weight: 2}]"),
            r"teachers\[1\] is 'a/b', which teachers\[0\]",
        ),
        (("teacher=null", "teachers=[{name: a/b, weight: 0}]"), r"teachers\[0\].weight is 0.*more than 0"),
        (
            ("teacher=null", "teachers=[{name: a/b, wieght: 2}]"),
            r"unknown key 'teachers\[0\].wieght', did you mean 'weight'",
        ),
        (("teacher=null", "teachers=[{weight: 2}]"), r"nothing is given for teachers\[0\].name"),
        (
            ("teacher=null", "teachers=[{name: a/b, geometry: natve}]"),
            r"teachers\[0\].geometry is 'natve', did you mean",
        ),
        (("teacher=null", "teachers={name: a/b}"), "a list is needed there"),
        (("teacher.weight=2",), "unknown key 'teacher.weight'"),
        ((*TWO, "baselines=[kd]"), "kd learns from one teacher: give teacher, not teachers"),
        ((*TWO[:1], "teachers=[{name: toy, revision: v1}]"), r"teachers\[0\].revision is 'v1', but 'toy' ships"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told) as refused:
        load_recipe("scripts/recipes/quickstart.yaml", overrides)
    assert len(str(refused.value).splitlines()) == 1


def test_the_plan_lists_and_counts_every_teacher() -> None:
    path = "scripts/recipes/gtav_dinov2b_deits.yaml"
    text = plan(load_recipe(path, TWO))
    assert "teacher (frozen): facebook/dinov2-base, 86.58 M parameters, geometry native, weight 1" in text
    assert "teacher (frozen): facebook/dinov2-small, 22.06 M parameters, geometry native, weight 0.5" in text
    assert "facebook/dinov2-base: about 347 MB" in text and "facebook/dinov2-small: about 89 MB" in text
    # Six LayerNorms and Linears for each, of which the class token's query is not trained: 384 → 768 and 384 → 384.
    heads = sum(5 * (2 * 384 + (384 + 1) * width) for width in (768, 384))
    assert f"heads {heads / 1e6:.2f} M" in text and text.count("frozen: the teachers") == 2


def test_every_teacher_is_in_the_simulated_step(encoders: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", encoders["dinov2"], encoders["vit"])
    made.teachers[1].sharding = "always"
    student, planned = planned_encoder(made.student.encoder, True), planned_teachers(made)
    scale = stage_scale(made, "task_agnostic", made.stages.task_agnostic, student, *planned)
    cost = scale.costs[False][0]
    statistics = 2 * 3 * 4  # image mean and standard deviation stay in fp32
    assert [each.bytes for each in cost.teachers] == [2 * each.parameters + statistics for each in planned]
    assert (scale.shards_teachers(1), scale.shards_teachers(8)) == ([False, False], [False, True])
    alone, shared = (scale.footprint(Layout(gpus)).parts["teacher's weights"] for gpus in (1, 2))
    assert alone == sum(each.bytes for each in cost.teachers)
    assert shared != alone and cost.teachers[0].bytes < shared
    heads = sum(6 * (2 * 24 + (24 + 1) * width) for width in (32, 24))
    assert cost.heads.parameters == heads and cost.heads.bytes == 4 * (heads + 4 * (32 + 24)) + 2 * 8  # and statistics


def test_cards_and_commits_name_every_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_recipe(
        "scripts/recipes/gtav_dinov2b_deits.yaml", [TWO[0], "teachers=[{name: toy}, {name: o/b, revision: v1}]"]
    )
    terms = [each.name for each in ingredients(made.as_dict()) if each.role == "teacher"]
    assert terms == ["toy (ships with gkd_hf)", "o/b"]
    monkeypatch.setattr(artefacts, "pulled_commit", lambda name, revision: f"{name}@{revision}")
    found = artefacts.resolved_commits(made)
    assert found["teachers[1]"] == "o/b@v1" and "teachers[0]" not in found and "teacher" not in found


def test_one_teacher_keeps_its_stage_settings(tmp_path: Path) -> None:
    """What a folder was begun with before there were several teachers is what it is continued with."""
    made = load_recipe("scripts/recipes/quickstart.yaml", [f"output_dir={tmp_path}"])
    settings = stage_folders(made, RecipeData(made))["task_agnostic"].settings
    assert {key for key in settings if key.startswith("teacher")} == {
        "teacher.name",
        "teacher.geometry",
        "teacher.revision",
    }
    several = load_recipe("scripts/recipes/quickstart.yaml", [f"output_dir={tmp_path}", *TWO])
    settings = stage_folders(several, RecipeData(several))["task_agnostic"].settings
    assert settings["teachers.1.weight"] == 0.5 and "teachers.1.sharding" not in settings
