"""The one-stage methods: what is told before any training, the masks' order, the teacher compiled, digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import set_seed

from gkd_hf import (
    GKDDistillationArguments,
    GKDSegmentationArguments,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
    InputError,
)
from gkd_hf.distillation.one_stage import ONE_STAGE, Features
from gkd_hf.task_teacher import TaskTeacher
from gkd_hf.training.one_stage_trainer import GKDOneStageTrainer, HidingCollator
from gkd_hf.training.pipeline import Pipeline, run
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.stage_settings import stage_folders
from tests.tiny import DPT, ENCODERS
from tests.training.test_one_stage import TEACHER, one_stage_trainer, teacher_and_segmenter, tiny_recipe
from tests.training.test_trainers import SIZE, arguments, segmentation_stream


def saved(folder: Path, kind: str, **changes: int) -> str:
    """The folder of an encoder with random weights."""
    GKDStudentModel.from_encoder(ENCODERS[kind] | changes).encoder.save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return str(folder)


def in_yaml(mapping: dict[str, object]) -> str:
    return json.dumps(mapping).replace('"', "")


def test_a_head_that_the_teacher_cannot_have_is_told_before_any_training(tmp_path: Path) -> None:
    changes = {
        "student.encoder": in_yaml(ENCODERS["vit"]),
        "teacher.name": saved(tmp_path / "resnet", "resnet"),
        "stages.task.decode_head": in_yaml(DPT),
    }
    with pytest.raises(InputError, match=r"stages.task: the teacher's head: .*dpt"):
        run(tiny_recipe(tmp_path / "run", baselines="[cwd]", **changes))
    assert not (tmp_path / "run" / "stages").exists()


def test_the_teacher_is_resampled_from_its_own_weights_before_any_training(tmp_path: Path) -> None:
    """Patches of 14 pixels: 32² images make them 16, and what was resampled so would give 112² images a 7×7 grid."""
    changes = {
        "teacher.name": saved(tmp_path / "dinov2", "dinov2", patch_size=14, image_size=28),
        "teacher.geometry": "resample_patch_embed",
    }
    with pytest.raises(InputError, match="stages.task: .* cannot be resampled .* 64 is not a multiple of 5"):
        run(tiny_recipe(tmp_path / "run", baselines="[kd]", **changes, **{"stages.task.image_size": "64"}))
    assert not (tmp_path / "run" / "stages").exists()
    changes |= {"stages.task.image_size": "112", "baselines": "[af_dcd]", "af_dcd.pool": "1", "af_dcd.groups": "4"}
    Pipeline(tiny_recipe(tmp_path / "run", **changes, **{"af_dcd.patch": "8"})).check_models()
    with pytest.raises(InputError, match="8×8 tokens pooled by 1 leave 8×8, fewer than one 9×9 patch"):
        Pipeline(tiny_recipe(tmp_path / "run", **changes, **{"af_dcd.patch": "9"})).check_models()


@pytest.mark.parametrize("key, value", [("sharding", "always"), ("standardise", "true")])
def test_what_only_label_free_stages_look_at_needs_one(key: str, value: str, tmp_path: Path) -> None:
    teacher = {f"teacher.{key}": value}
    with pytest.raises(InputError, match=rf"teacher.{key} is {value}, which only .* \(kd, cwd\) has none: leave it"):
        tiny_recipe(tmp_path, method="kd", baselines="[none, cwd]", **teacher)
    with pytest.raises(InputError, match=r"\(kd\) has none"):
        tiny_recipe(tmp_path, baselines="[kd]", **teacher, **{"stages.domain_agnostic": "null"})
    assert tiny_recipe(tmp_path, baselines="[kd]", **teacher).teacher.__dict__[key]


def digests(recipe: Recipe) -> dict[str, str]:
    return {name: folder.digest for name, folder in stage_folders(recipe, RecipeData(recipe)).items()}


def test_keys_without_effect_change_no_digest(tmp_path: Path) -> None:
    unfrozen = {"stages.task.freeze_encoder": "false"}
    for method in ("none", "kd", "cwd"):
        assert digests(tiny_recipe(tmp_path, method=method)) == digests(
            tiny_recipe(tmp_path, method=method, **unfrozen)
        )
    plain = digests(tiny_recipe(tmp_path, baselines="[none, cwd]"))
    assert plain.keys() == {"domain_agnostic", "teacher_head", "none", "cwd", "task"}
    for changes, other in (unfrozen, {"task"}), ({"teacher.standardise": "true"}, {"domain_agnostic", "task"}):
        changed = digests(tiny_recipe(tmp_path, baselines="[none, cwd]", **changes))
        assert {name for name in plain if changed[name] != plain[name]} == other


def test_masks_hang_on_the_places_of_the_samples(tmp_path: Path) -> None:
    trainer = one_stage_trainer(tmp_path, "vitkd", "vit")
    collator = trainer.data_collator
    samples = [next(iter(trainer.train_dataset)) | {"index": place} for place in range(8)]
    hidden = collator(samples)["hidden"]
    assert hidden.shape == (8, 16) and hidden.sum(1).tolist() == [8] * 8  # of 4×4 tokens
    assert len({tuple(mask) for mask in hidden.tolist()}) == 8
    halves = [collator(half)["hidden"] for half in (samples[:4], samples[4:])]  # two processes
    assert torch.equal(torch.cat(halves), hidden)
    for sample in samples:
        del sample["index"]  # a stream of the user's own, for which processes draw the same random numbers
    drawn = []
    for rank in range(2):
        other = HidingCollator(collator.batch, collator.stride, collator.ratio, trainer.args)
        other.rank = rank
        torch.manual_seed(0)
        drawn.append(other(samples)["hidden"])
    assert not torch.equal(*drawn)


def test_the_method_hides_what_the_loader_has_drawn(tmp_path: Path) -> None:
    trainer = one_stage_trainer(tmp_path, "vitkd", "vit", max_steps=1)
    seen = []
    trainer.method.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    trainer.train()
    assert torch.equal(seen[0], next(iter(trainer.get_train_dataloader()))["hidden"])
    assert "hidden" not in next(iter(one_stage_trainer(tmp_path, "kd").get_train_dataloader()))


def test_masks_of_another_shape_are_refused() -> None:
    method = ONE_STAGE["vitkd"](24, 32, 8, mimic_weight=0.0)
    with pytest.raises(InputError, match="hidden has to say of 2×16 tokens, got"):
        method(
            Features(torch.zeros(2, 16, 24), (4, 4)),
            Features(torch.zeros(2, 16, 32), (4, 4)),
            torch.zeros(1, 16, dtype=torch.bool),
        )


def test_what_the_teacher_computes_is_compiled(tmp_path: Path) -> None:
    eager = one_stage_trainer(tmp_path, "cwd")
    compiled = one_stage_trainer(tmp_path, "cwd", torch_compile=True, torch_compile_backend="eager")
    counters.clear()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    expected, taught = eager.teach(pixels), compiled.teach(pixels)
    assert counters["stats"]["unique_graphs"] >= 1
    graphs = counters["stats"]["unique_graphs"]
    compiled.teach(pixels)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(taught.logits, expected.logits)
    torch.testing.assert_close(taught.patches, expected.patches)


def new_trainer(folder: Path, teacher: TaskTeacher, classes: int = 8) -> GKDOneStageTrainer:
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8)
    args = arguments(GKDSegmentationArguments, folder, freeze_encoder=False)
    return GKDOneStageTrainer(model, ONE_STAGE["cwd"](24, 32, classes), teacher, args, segmentation_stream())


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    halved = TaskTeacher(*teacher_and_segmenter())
    halved.halve()
    with pytest.raises(InputError, match="weights are bf16 .* this training is in fp32: give it a new TaskTeacher"):
        new_trainer(tmp_path, halved)
    with pytest.raises(InputError, match="of 8 classes, the segmenter has 8, the teacher's head 5"):
        new_trainer(tmp_path, TaskTeacher(*teacher_and_segmenter(num_labels=5)))
    with pytest.raises(InputError, match="of 5 classes, the segmenter has 8, the teacher's head 8"):
        new_trainer(tmp_path, TaskTeacher(*teacher_and_segmenter()), classes=5)
    _, segmenter = teacher_and_segmenter()
    set_seed(2)
    with pytest.raises(InputError, match=r"learnt on other weights than 'dinov2' has \(.* differs\)"):
        TaskTeacher(TEACHER, segmenter)  # other random ones


def test_a_head_learnt_on_resampled_kernels_is_taken(tmp_path: Path) -> None:
    place = saved(tmp_path / "dinov2", "dinov2", patch_size=14, image_size=28)
    body = GKDStudentModel.from_encoder(place)
    body.set_geometry(64, 16)
    segmenter = GKDStudentForSemanticSegmentation.from_student(body, num_labels=8)
    assert TaskTeacher(place, segmenter, geometry="resample_patch_embed").num_labels == 8
    with pytest.raises(InputError, match="learnt on other weights"):
        TaskTeacher(place, segmenter)


@pytest.mark.parametrize(
    "changes",
    [{"mask_probability": 0.0}, {"mask_ratio": 0.0}, {"per_device_train_batch_size": 1}],
)
def test_proteus_has_something_to_mask(changes: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="proteus computes its patch loss on masked patches, and none would be: mask"):
        arguments(GKDDistillationArguments, tmp_path, objective="proteus", **changes)
    arguments(GKDDistillationArguments, tmp_path, objective="proteus", patch_weight=0.0, **changes)
    arguments(GKDDistillationArguments, tmp_path, objective="mse", **changes)


def test_a_recipe_of_proteus_has_something_to_mask(tmp_path: Path) -> None:
    changes = {"method": "proteus", "stages.domain_agnostic.mask_ratio": "0.01"}
    with pytest.raises(InputError, match="domain_agnostic: proteus .* none would be: .*mask_ratio 0.01 of 16 patches"):
        run(tiny_recipe(tmp_path, **changes))
    assert not (tmp_path / "stages").exists()
