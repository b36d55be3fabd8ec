"""The one-stage methods: what is trained and logged, the teacher's head, resumption, recipes, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, set_seed

from gkd_hf import (
    GKDSegmentationArguments,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
    InputError,
)
from gkd_hf.distillation.one_stage import ONE_STAGE
from gkd_hf.methods import METHODS, ONE_STAGE_METHODS
from gkd_hf.models.loading import config_from_mapping
from gkd_hf.task_teacher import TaskTeacher
from gkd_hf.training.one_stage_cost import OneStageStep
from gkd_hf.training.one_stage_trainer import GKDOneStageTrainer
from gkd_hf.training.pipeline import run
from gkd_hf.training.plan import plan
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.step_cost import SegmentationStep
from tests.tiny import ENCODERS
from tests.training.test_trainers import SIZE, arguments, segmentation_stream

TEACHER = ENCODERS["dinov2"]
SMALL = {"af_dcd": {"pool": 1, "patch": 2, "groups": 4}}


def teacher_and_segmenter(num_labels: int = 8) -> tuple[PreTrainedConfig, GKDStudentForSemanticSegmentation]:
    """A teacher by its configuration, and a segmenter on its very weights if it is built at once."""
    set_seed(1)
    body = GKDStudentModel.from_encoder(TEACHER)
    segmenter = GKDStudentForSemanticSegmentation.from_student(body, num_labels=num_labels)
    set_seed(1)
    return config_from_mapping(TEACHER), segmenter


def one_stage_trainer(folder: Path, name: str, kind: str = "resnet", **changes: Any) -> GKDOneStageTrainer:
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8)
    teacher = TaskTeacher(*teacher_and_segmenter())
    settings = SMALL.get(name, {}) | changes.pop("settings", {})
    method = ONE_STAGE[name](student.adapter.width, teacher.width, 8, **settings)
    args = arguments(GKDSegmentationArguments, folder, freeze_encoder=False, window=SIZE, stride=SIZE, **changes)
    return GKDOneStageTrainer(model, method, teacher, args, segmentation_stream())


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    stage = {
        "data": "toy_city",
        "image_size": SIZE,
        "batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "workers": 0,
    }
    label_free = stage | {"max_steps": 2, "rand_augment": False, "learning_rate": 1e-3}
    recipe = {
        "student": {"encoder": ENCODERS["resnet"] | {"hidden_sizes": [8, 24], "depths": [1, 1]}},
        "teacher": {"name": "toy"},
        "stages": {
            "domain_agnostic": label_free,
            "task": stage
            | {
                "max_steps": 3,
                "decode_head": "linear",
                "learning_rate": 1e-2,
                "baseline_encoder_learning_rate": 1e-2,
                "window": SIZE,
                "stride": SIZE,
            },
        },
        "data": {"toy_city": {"size": SIZE, "train_images": 12, "test_images": 3}},
        "output_dir": str(folder),
    }
    return load_recipe(recipe, [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.parametrize("name", ONE_STAGE_METHODS)
def test_recipes_have_the_published_defaults(name: str) -> None:
    parameters = inspect.signature(ONE_STAGE[name]).parameters.values()
    published = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert dataclasses.asdict(Recipe().__dict__[name]) == published


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("kd", "resnet", {}),
        ("kd", "vit", {"target": "logits"}),
        ("cwd", "vit", {}),
        ("af_dcd", "convnext", {}),
        ("vitkd", "vit", {}),
        ("vitkd", "vit", {"generation_weight": 0.0}),
    ],
)
def test_everything_that_is_trained_learns_and_nothing_else(
    name: str, kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = one_stage_trainer(tmp_path, name, kind, settings=settings, max_steps=2)
    # A teacher's weights that are looked up after the training were changed by it if it were trained.
    teacher = {key: value.clone() for key, value in trainer.teacher.state_dict().items()}
    without = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    trainer.model.zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    got = {n for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert got == without
    assert any(n.startswith("segmenter.student.encoder") for n in got)
    assert all(torch.equal(value, teacher[key]) for key, value in trainer.teacher.state_dict().items())
    logged = trainer.state.log_history[0]
    terms = {f"loss_{term}" for term in trainer.method.weights}
    assert {"loss", "loss_task", *terms} <= set(logged)
    weighted = sum(weight * logged[f"loss_{term}"] for term, weight in trainer.method.weights.items())
    assert logged["loss"] == pytest.approx(logged["loss_task"] + weighted, rel=1e-4)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert not any("teacher" in key for key in saved)


def test_logits_are_those_of_the_teachers_head(tmp_path: Path) -> None:
    trainer = one_stage_trainer(tmp_path, "kd", settings={"target": "logits"})
    pixels = torch.randn(2, 3, SIZE, SIZE)
    taught = trainer.teach(pixels)
    head = GKDStudentForSemanticSegmentation.from_student(GKDStudentModel.from_encoder(TEACHER), num_labels=8).eval()
    head.student.encoder.load_state_dict(trainer.teacher.encoder.state_dict())
    head.decode_head.load_state_dict(trainer.teacher.decode_head.state_dict())
    own = pixels * trainer.student_std + trainer.student_mean
    expected = head((own - trainer.teacher.image_mean) / trainer.teacher.image_std)
    torch.testing.assert_close(taught.logits, expected.logits)
    assert not taught.logits.requires_grad


def test_resuming_gives_the_same_weights(tmp_path: Path) -> None:
    whole = one_stage_trainer(tmp_path / "whole", "vitkd", "vit", max_steps=4)  # it draws masks as it goes
    whole.train()
    part = one_stage_trainer(tmp_path / "part", "vitkd", "vit", max_steps=4)
    part.train()
    (tmp_path / "part" / "checkpoint-4").rename(tmp_path / "gone")
    again = one_stage_trainer(tmp_path / "part", "vitkd", "vit", max_steps=4)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=True)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    again.save_model(tmp_path / "saved")
    loaded = GKDStudentForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    for key, value in again.segmenter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trains the encoder, too"):
        set_seed(0)
        student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
        model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8)
        method = ONE_STAGE["kd"](24, 32, 8)
        GKDOneStageTrainer(
            model, method, TaskTeacher(TEACHER), arguments(GKDSegmentationArguments, tmp_path), segmentation_stream()
        )
    with pytest.raises(InputError, match="compares logits, and the teacher has no head"):
        args = arguments(GKDSegmentationArguments, tmp_path, freeze_encoder=False)
        GKDOneStageTrainer(model, ONE_STAGE["cwd"](24, 32, 8), TaskTeacher(TEACHER), args, segmentation_stream())
    with pytest.raises(InputError, match="learnt on a dinov2 of 32 channels, the teacher is a vit of 24"):
        body = GKDStudentModel.from_encoder(TEACHER)
        TaskTeacher(ENCODERS["vit"], GKDStudentForSemanticSegmentation.from_student(body, num_labels=8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "kdd"}, r"method is 'kdd', did you mean 'kd'\? \(available: gkd, mse, proteus, kd,"),
        ({"method": "kd", "teacher": "null"}, "kd needs a teacher: add teacher.name"),
        (
            {"method": "none", "stages.task": "null", "baselines": "[]"},
            "method none learns the task .* add stages.task",
        ),
        ({"method": "kd", "baselines": "[none, kd]"}, "kd is the method and a baseline, too"),
        ({"method": "kd", "kd.target": "logit"}, r"kd.target is 'logit', did you mean 'logits'"),
        ({"baselines": "[cwd]", "stages.task.decode_head": "mask2former"}, "cwd: logits can be compared where each"),
        ({"method": "af_dcd", "af_dcd.groups": "0"}, "af_dcd.groups is 0: it must be more than 0"),
        ({"method": "kd", "kd.wait": "1"}, r"unknown key 'kd.wait', did you mean 'weight'"),
    ],
)
def test_wrong_recipes(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        tiny_recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "af_dcd"}, r"stages.task: af_dcd: 4×4 tokens pooled by 4"),
        ({"method": "af_dcd", "af_dcd.pool": "1", "af_dcd.groups": "400"}, r"af_dcd: .*192.* channels"),
        ({"baselines": "[vitkd]"}, "vitkd .*resnet.* no blocks"),
        ({"method": "kd", "stages.task.image_size": "36"}, "36 is no multiple of the student's stride 8"),
    ],
)
def test_what_two_encoders_cannot_do_is_told_before_any_training(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny_recipe(tmp_path, **changes))
    assert not (tmp_path / "stages").exists()


def test_a_recipe_trains_the_teachers_head_its_method_and_its_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"method": "cwd", "baselines": "[none, kd]", "evaluate": "['toy_city:night']"}
    recipe = tiny_recipe(tmp_path, **changes)
    assert recipe.stages.domain_agnostic is None  # there is none where the task is learned from the first step on
    told = plan(recipe)
    assert "teacher_head: the same head on the frozen teacher" in told and "baseline kd" in told
    report = run(recipe)
    assert set(report["baselines"]) == {"none", "kd"} and report["settings"]["method"] == "cwd"
    head = GKDStudentForSemanticSegmentation.from_pretrained(tmp_path / "stages" / "teacher_head" / "model")
    plain = TaskTeacher(str(Path("gkd_hf/assets/toy_teacher").absolute()))
    for key, value in plain.encoder.state_dict().items():  # frozen while its head was learnt
        assert torch.equal(head.student.encoder.state_dict()[key], value), key
    assert "CWD" in capsys.readouterr().out
    card = (tmp_path / "segmenter" / "README.md").read_text()
    assert "while it learned the task (CWD)" in card
    (tmp_path / "report.json").unlink()
    run(tiny_recipe(tmp_path, **changes))
    again = capsys.readouterr().out
    assert again.count("finished before") == 4  # head, task, two baselines
    assert json.loads((tmp_path / "report.json").read_text())["targets"] == report["targets"]


@pytest.mark.parametrize("method", ["none", "gkd"])
def test_the_encoder_is_trained_where_it_should_be(method: str, tmp_path: Path) -> None:
    frozen = "true" if method == "none" else "false"  # the key is for methods with label-free stages
    run(tiny_recipe(tmp_path, method=method, **{"stages.task.freeze_encoder": frozen}))
    before = (
        GKDStudentModel.from_pretrained(tmp_path / "stages" / "domain_agnostic" / "model") if method == "gkd" else None
    )
    after = GKDStudentForSemanticSegmentation.from_pretrained(tmp_path / "stages" / "task" / "model")
    if before is not None:
        one, other = before.encoder.state_dict(), after.student.encoder.state_dict()
        assert any(not torch.equal(one[key], other[key]) for key in one if key.endswith("convolution.weight"))
    else:
        assert not (tmp_path / "stages" / "domain_agnostic").exists()
        assert METHODS["none"].title in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["af_dcd", "vitkd"])
def test_a_step_on_paper_counts_teacher_and_projections(name: str) -> None:
    kind = config_from_mapping(ENCODERS["vit" if name == "vitkd" else "resnet"])
    head = {"decode_head": "linear", "classes": 8, "precision": "fp32"}
    plain = SegmentationStep(kind, 64, frozen=False, **head).costs((2,))[False][0]
    step = OneStageStep(
        kind, config_from_mapping(TEACHER), 64, method=name, method_settings=SMALL.get(name, {}), **head
    )
    cost = step.costs((2,))[False][0]
    assert cost.teachers[0].parameters > 0 and not plain.teachers
    assert cost.heads.trained > plain.heads.trained
    assert cost.flops > plain.flops


def test_the_plan_refuses_what_two_encoders_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stages.task: vitkd .*resnet.* no blocks"):
        plan(tiny_recipe(tmp_path, method="vitkd"))
    told = plan(tiny_recipe(tmp_path, **{"stages.domain_agnostic.query_warmup_steps": "2"}))
    assert "NOTE: the stage ends before its query branches begin" in told


def test_a_comparison_is_no_recipe() -> None:
    with pytest.raises(InputError, match="compares methods: run it with scripts/compare_methods.py"):
        load_recipe("scripts/recipes/toy_compare.yaml")


def test_rendering_is_told_of_where_there_is_something_to_render(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = RecipeData(tiny_recipe(tmp_path))
    data.render_toy_city(progress=False)
    assert "[data] rendering toy_city (train), 12 images" in capsys.readouterr().err
    data.render_toy_city(progress=False)
    assert capsys.readouterr().err == ""
