"""Both trainers: what they train and log, exact resumption, accumulation, and how they stop on broken losses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from gkd_hf import (
    GKDDistillationArguments,
    GKDDistillationTrainer,
    GKDSegmentationArguments,
    GKDSegmentationTrainer,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
    GKDTeacher,
    InputError,
)
from gkd_hf.data.domains import label_space
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.streaming import EvaluationSet, SampleStream
from gkd_hf.data.toy_city import toy_city
from gkd_hf.data.transforms import DistillationTransform, EvaluationTransform, SegmentationTransform
from gkd_hf.training.stream_trainer import NonFiniteLossError
from tests.tiny import ENCODERS

SIZE = 32
STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def distillation_stream(count: int = 12) -> SampleStream:
    transform = DistillationTransform(SIZE, *STATISTICS, rand_augment=False)
    return SampleStream(
        toy_city("clear_day", count, size=SIZE, seed=0), transform, seed=0, micro_batch_size=1, domain="toy_city"
    )


def segmentation_stream(count: int = 12) -> SampleStream:
    transform = SegmentationTransform(SIZE, *STATISTICS, short_sides=(SIZE,), photometric=False)
    return SampleStream(
        toy_city("clear_day", count, size=SIZE, seed=0),
        transform,
        seed=0,
        micro_batch_size=1,
        domain="toy_city",
        label_map=label_map("identity", 8),
    )


def evaluation_set(count: int = 5) -> EvaluationSet:
    return EvaluationSet(
        toy_city("night", count, size=SIZE, seed=1),
        EvaluationTransform(*STATISTICS, size=None),
        label_map=label_map("identity", 8),
        label_space=label_space("toy_city"),
        domain="toy_city:night",
    )


def arguments(kind: type, folder: Path, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return kind(**(settings | changes))


def distillation_trainer(
    folder: Path, kind: str = "vit", freeze_batch_norm: bool = False, **changes: Any
) -> GKDDistillationTrainer:
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind], freeze_batch_norm=freeze_batch_norm)
    teacher = GKDTeacher(ENCODERS["dinov2"])
    return GKDDistillationTrainer(
        student, teacher, arguments(GKDDistillationArguments, folder, **changes), distillation_stream()
    )


def segmentation_trainer(folder: Path, kind: str = "resnet", **changes: Any) -> GKDSegmentationTrainer:
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8)
    return GKDSegmentationTrainer(
        model,
        arguments(GKDSegmentationArguments, folder, window=SIZE, stride=SIZE, **changes),
        segmentation_stream(),
        {"toy_city:night": evaluation_set()},
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


class StopAt(TrainerCallback):
    """A kill: nothing of the trainer runs after this step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# -- stage 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_distillation_trains_student_and_heads_and_saves_the_student(kind: str, tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, kind)
    before, teacher = weights(trainer), {k: v.clone() for k, v in trainer.teacher.state_dict().items()}
    trainer.train()
    after = weights(trainer)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in still if not name.startswith("objective.token.query")} == set()
    assert_equal(trainer.teacher.state_dict(), teacher)
    checkpoint = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert {name.split(".")[0] for name in checkpoint} == {"student", "objective"}
    trainer.save_model(tmp_path / "student")
    loaded = GKDStudentModel.from_pretrained(tmp_path / "student")
    assert_equal(loaded.state_dict(), trainer.student.state_dict())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    for entry in logs:
        assert {"loss_token", "loss_feature", "loss_patch", "attention_entropy", "self_weight", "logit_std"} <= set(
            entry
        )
        parts = entry["loss_token"] + entry["loss_feature"] + entry["loss_patch"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


def test_distillation_defaults_are_the_papers(tmp_path: Path) -> None:
    args = GKDDistillationArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=64, gradient_accumulation_steps=2, use_cpu=True
    )
    assert args.learning_rate == 5e-4 * 128 / 512
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps) == (0.05, 0, 0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    trainer = distillation_trainer(tmp_path, learning_rate=2e-3, max_steps=4)
    trainer.create_optimizer_and_scheduler(4)
    decayed, spared = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and all(p.ndim <= 1 for p in spared["params"])
    rates = []
    for _ in range(5):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    # cosine from 2e-3 to 1e-5 over four steps
    assert rates == pytest.approx([2e-3, 1.7085e-3, 1.005e-3, 3.0151e-4, 1e-5], rel=1e-3)


@pytest.mark.parametrize("warmup, kill", [(0, 3), (3, 5), (2, 3), (4, 5)])  # checkpoints are at 2 and 4
def test_distillation_resumes_bit_equal(warmup: int, kill: int, tmp_path: Path) -> None:
    whole = distillation_trainer(tmp_path / "whole", query_warmup_steps=warmup)
    whole.train()
    broken = distillation_trainer(tmp_path / "broken", query_warmup_steps=warmup)
    broken.add_callback(StopAt(kill))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = distillation_trainer(tmp_path / "broken", query_warmup_steps=warmup)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_equal(weights(again), weights(whole))


def test_epochs_of_an_ordinary_data_set_resume(tmp_path: Path) -> None:
    def make() -> GKDDistillationTrainer:
        set_seed(0)
        generator = torch.Generator().manual_seed(0)
        data = [{"pixel_values": torch.randn(3, SIZE, SIZE, generator=generator)} for _ in range(8)]
        args = arguments(GKDDistillationArguments, tmp_path, max_steps=-1, num_train_epochs=3, mask_probability=0)
        return GKDDistillationTrainer(
            GKDStudentModel.from_encoder(ENCODERS["vit"]), GKDTeacher(ENCODERS["dinov2"]), args, data
        )

    broken = make()
    broken.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_a_run_killed_after_its_last_checkpoint_does_not_train_on(tmp_path: Path) -> None:
    whole = distillation_trainer(tmp_path)
    whole.train()
    again = distillation_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_equal(weights(again), weights(whole))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_accumulation_is_exact(kind: str, tmp_path: Path) -> None:
    """2 × 4 equals 1 × 8; batch norms in eval mode, since batch statistics hang on the micro batch."""
    settings = {"mask_probability": 1.0, "max_steps": 3, "save_strategy": "no"}
    one = distillation_trainer(tmp_path / "one", kind, True, per_device_train_batch_size=8, **settings)
    one.train()
    two = distillation_trainer(
        tmp_path / "two", kind, True, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings
    )
    two.train()
    expected = weights(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4, msg=name)


def test_query_warmup_switches_once(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, query_warmup_steps=3, save_strategy="no", logging_steps=1)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs: Any) -> None:
            seen.append(trainer.objective.patch.query_enabled)

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [False] * 3 + [True] * 3
    with_attention = [entry["step"] for entry in trainer.state.log_history if "self_weight" in entry]
    assert with_attention == [4, 5, 6]


def test_collapse_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = distillation_trainer(tmp_path, logging_steps=1, save_strategy="no", max_steps=4, learning_rate=1e-9)
    with torch.no_grad():  # uniform attention: the self weight is exactly chance
        trainer.objective.feature.query.proj.weight.zero_()
        trainer.objective.feature.query.proj.bias.zero_()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert len(warnings) == 1 and "query_warmup_steps" in warnings[0]


def test_heads_are_carried_and_checked(tmp_path: Path) -> None:
    first = distillation_trainer(tmp_path, max_steps=2)
    first.train()
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    args = arguments(GKDDistillationArguments, tmp_path / "next")
    second = GKDDistillationTrainer(
        student, GKDTeacher(ENCODERS["dinov2"]), args, distillation_stream(), objective=first.objective
    )
    assert second.objective is first.objective
    other = GKDStudentModel.from_encoder({**ENCODERS["vit"], "hidden_size": 12})
    with pytest.raises(InputError, match="the heads map 24 to 32 channels, student and teacher need 12 to 32"):
        GKDDistillationTrainer(
            other, GKDTeacher(ENCODERS["dinov2"]), args, distillation_stream(), objective=first.objective
        )


def test_a_teacher_of_bf16_weights_does_not_teach_in_fp32(tmp_path: Path) -> None:
    teacher = GKDTeacher(ENCODERS["dinov2"])
    for bf16 in (False, True, True):
        args = arguments(GKDDistillationArguments, tmp_path, bf16=bf16)
        student = GKDStudentModel.from_encoder(ENCODERS["vit"])
        GKDDistillationTrainer(student, teacher, args, distillation_stream())
        assert teacher.halved == bf16
    args = arguments(GKDDistillationArguments, tmp_path)
    with pytest.raises(InputError, match="the teacher's weights are bf16 .* this training is in fp32: give it a new"):
        GKDDistillationTrainer(student, teacher, args, distillation_stream())


def test_ordinary_data_sets_work_too(tmp_path: Path) -> None:
    set_seed(0)
    data = [{"pixel_values": torch.randn(3, SIZE, SIZE)} for _ in range(8)]
    trainer = GKDDistillationTrainer(
        GKDStudentModel.from_encoder(ENCODERS["vit"]),
        GKDTeacher(ENCODERS["dinov2"]),
        arguments(GKDDistillationArguments, tmp_path, max_steps=3, save_strategy="no"),
        data,
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = distillation_trainer(tmp_path / "plain", max_steps=2, save_strategy="no")
    plain.train()
    saving = distillation_trainer(tmp_path / "saving", max_steps=2, save_strategy="no", activation_checkpointing=True)
    assert not any(module.gradient_checkpointing for module in plain.student.encoder.layers)
    saving.train()
    assert all(module.gradient_checkpointing for module in saving.student.encoder.layers)
    assert_equal(weights(saving), weights(plain))


def test_an_endless_stream_needs_max_steps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="endless: say when to stop with max_steps"):
        distillation_trainer(tmp_path, max_steps=-1)


class Poisoned(SampleStream):
    """A stream whose pixels turn into infinities at one sample."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in super().__iter__():
            if sample["index"] == 13:
                sample["pixel_values"] = sample["pixel_values"] * float("inf")
            yield sample


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_checkpoint(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)
    trainer.train_dataset.__class__ = Poisoned
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    message = str(error.value)
    assert "not finite at step 4" in message and str(tmp_path / "checkpoint-2") in message
    assert "token nan" in message and "patch nan" in message and "Lower learning_rate" in message


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs: Any) -> None:
            if state.global_step == 4:
                with torch.no_grad():
                    next(trainer.model.parameters()).fill_(float("nan"))

    trainer.add_callback(Break())
    with pytest.raises(NonFiniteLossError, match="weights are not finite after step 4.*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "qds"}, "unknown objective 'qds', did you mean 'qsd'"),
        ({"mask_probability": 2}, "mask_probability must lie in"),
        ({"mask_ratio": 1}, "mask_ratio must lie in"),
        ({"query_warmup_steps": -1}, "query_warmup_steps must be ≥ 0"),
        ({"query_warmup_steps": 5, "objective": "mse"}, "needs objective qsd"),
        ({"attention_scale": 0}, "attention_scale must be positive"),
        ({"token_weight": 0, "feature_weight": 0, "patch_weight": 0}, "must be ≥ 0 and not all 0"),
        ({"sync_batch_norm": True}, "sync_batch_norm needs CUDA"),
        ({"fp16": True}, "fp16 overflows"),
    ],
)
def test_bad_distillation_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        arguments(GKDDistillationArguments, tmp_path, **changes)


# -- stage 2 ----------------------------------------------------------------------------------------------------------


def test_segmentation_trains_the_head_alone(tmp_path: Path) -> None:
    trainer = segmentation_trainer(tmp_path)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decode_head.") for name in changed)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.decode_head.parameters()}
    assert "loss_cross_entropy" in trainer.state.log_history[0]


def test_accumulation_of_the_task_is_exact(tmp_path: Path) -> None:
    def run(folder: Path, micro: int, accumulation: int) -> dict[str, torch.Tensor]:
        trainer = segmentation_trainer(
            folder, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, save_strategy="no"
        )
        trainer.model.decode_head.norm = torch.nn.Identity()  # batch statistics hang on the micro batch
        trainer.train()
        return weights(trainer)

    expected = run(tmp_path / "one", 8, 1)
    for name, tensor in run(tmp_path / "two", 4, 2).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_segmentation_resumes_bit_equal(tmp_path: Path) -> None:
    whole = segmentation_trainer(tmp_path / "whole")
    whole.train()
    broken = segmentation_trainer(tmp_path / "broken")
    broken.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")  # and twice over
    again = segmentation_trainer(tmp_path / "broken")
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(whole))


def test_end_to_end_has_its_own_encoder_rate(tmp_path: Path) -> None:
    trainer = segmentation_trainer(tmp_path, freeze_encoder=False, encoder_learning_rate=1e-5, max_steps=2)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(before[name], tensor)}
    assert any(name.startswith("student.encoder") for name in changed)
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = (group["initial_lr"], group["weight_decay"])
    model = trainer.model
    assert rates[id(model.decode_head.classifier.weight)] == (1e-3, 0.05)
    assert rates[id(model.decode_head.norm.weight)] == (1e-3, 0.0)
    assert rates[id(model.student.encoder.embedder.embedder.convolution.weight)] == (1e-5, 0.05)
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


def test_evaluation_counts_every_pixel_at_native_size(tmp_path: Path) -> None:
    trainer = segmentation_trainer(tmp_path, per_device_eval_batch_size=2)
    results = trainer.evaluate_domains(examples=2)
    result = results["toy_city:night"]
    images = evaluation_set()
    labels = [sample["labels"] for sample in images]
    assert result.images == 5 and len(result.examples) == 2
    assert result.confusion.sum() == sum((label != 255).sum() for label in labels)
    predicted = torch.cat([trainer.model.eval()(images.normalised(s["pixel_values"])[None]).logits for s in images])
    predicted = torch.nn.functional.interpolate(predicted, (SIZE, SIZE), mode="bilinear", align_corners=False).argmax(
        1
    )
    correct = sum((p == label).sum() for p, label in zip(predicted, labels, strict=True))
    assert result.confusion.diagonal().sum() == correct
    metrics = trainer.evaluate()
    assert metrics["eval_toy_city:night_miou"] == metrics["eval_mean_miou"] == pytest.approx(result.mean_iou)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 4])
def test_too_many_corrupt_images_stop_the_evaluation_whatever_the_workers(workers: int, tmp_path: Path) -> None:
    import datasets

    rows = list(toy_city("night", 40, size=SIZE, seed=0))
    cells = {key: [{"bytes": row[key]["bytes"], "path": None} for row in rows] for key in ("image", "label")}
    for index in (3, 8, 13, 22):  # one for each of four workers
        cells["image"][index]["bytes"] = b"no image"
    data = datasets.Dataset.from_dict({**cells, "id": [f"row{i}" for i in range(40)]})
    images = evaluation_set()
    images.rows = data.to_iterable_dataset()
    trainer = segmentation_trainer(tmp_path, dataloader_num_workers=workers)
    with pytest.raises(InputError, match="domain 'toy_city:night': [234] bad rows among 40"):
        trainer.evaluate_domains({"toy_city:night": images})


def test_corrupt_rows_are_listed_once(tmp_path: Path) -> None:
    import datasets

    rows = list(toy_city("clear_day", 60, size=SIZE, seed=0))
    cells = [{"bytes": row["image"]["bytes"], "path": None} for row in rows]
    cells[7]["bytes"] = cells[7]["bytes"][:60]
    data = datasets.Dataset.from_dict({"image": cells, "id": [f"row{i}" for i in range(60)]})
    stream = SampleStream(
        data.to_iterable_dataset(),
        DistillationTransform(SIZE, *STATISTICS, rand_augment=False),
        seed=0,
        micro_batch_size=1,
        domain="toy_city",
    )
    trainer = GKDDistillationTrainer(
        GKDStudentModel.from_encoder(ENCODERS["vit"]),
        GKDTeacher(ENCODERS["dinov2"]),
        arguments(GKDDistillationArguments, tmp_path, max_steps=32, save_strategy="no"),
        stream,
    )
    trainer.train()  # two passes and more
    assert [row["id"] for row in trainer.bad_rows] == ["row7"]
    logged = (tmp_path / "bad_rows.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["domain"] for line in logged] == ["toy_city"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 64, "stride": 65}, "stride must lie in 1…64"),
        ({"window": 64, "stride": 0}, "stride must lie in"),
        ({"encoder_learning_rate": 1e-5}, "does nothing while freeze_encoder"),
    ],
)
def test_bad_segmentation_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        arguments(GKDSegmentationArguments, tmp_path, **changes)
