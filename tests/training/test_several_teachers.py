"""Several teachers in stage 1's trainer: one scale for all, statistics that last, and a log of each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from gkd_hf import GKDDistillationArguments, GKDDistillationTrainer, GKDStudentModel, GKDTeacher, InputError
from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.objective import GKDObjective
from gkd_hf.training import teaching
from tests.tiny import ENCODERS
from tests.training.test_trainers import SIZE, StopAt, arguments, assert_equal, distillation_stream, weights

IMAGES = 16  # that the statistics are of, here
TERMS = ("total", "token", "feature", "patch")
ATTENTION = ("attention_entropy", "self_weight", "logit_std")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert teaching.STATISTICS_IMAGES == 64
    monkeypatch.setattr(teaching, "STATISTICS_IMAGES", IMAGES)


def teachers(scale: float = 1.0, **settings: Any) -> list[GKDTeacher]:
    """A DINOv2 whose tokens are ``scale`` times as large, and a ViT with other patches, of half the weight."""
    torch.manual_seed(0)
    first = GKDTeacher(ENCODERS["dinov2"], **settings)
    first.encoder.layernorm.weight.data *= scale
    first.encoder.layernorm.bias.data *= scale
    return [first, GKDTeacher({**ENCODERS["vit"], "patch_size": 16}, weight=0.5, **settings)]


def trainer(folder: Path, several: Any = None, kind: str = "vit", data: Any = None, **changes: Any) -> Any:
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    objective = changes.pop("objective", None)
    changes = {"max_steps": 4, "learning_rate": 1e-4} | changes
    return GKDDistillationTrainer(
        student,
        several or teachers(),
        arguments(GKDDistillationArguments, folder, **changes),
        data if data is not None else distillation_stream(),
        objective=objective,
    )


def logged(trained: GKDDistillationTrainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if key != "epoch"}  # which a resumed run counts from its start
        for entry in trained.state.log_history
        if "loss" in entry
    ]


def statistics(trained: GKDDistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trained.objective.standardise.state_dict().items()}


def test_both_teachers_are_learnt_from_and_logged(tmp_path: Path) -> None:
    trained = trainer(tmp_path / "small", teachers())
    before = weights(trained)
    trained.train()
    after = weights(trained)
    heads = {name for name in after if name.startswith("objective.objectives.") and ".token.query." not in name}
    assert {name[:22] for name in heads} == {"objective.objectives.0", "objective.objectives.1"}
    assert not [name for name in heads if torch.equal(before[name], after[name])]
    for entry in logged(trained):
        for name in ("dinov2", "vit"):
            assert {f"loss_{name}/{term}" for term in TERMS} <= set(entry)
            assert {f"{name}/{statistic}" for statistic in ATTENTION} <= set(entry)
        total = entry["loss_dinov2/total"] + 0.5 * entry["loss_vit/total"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    # A teacher whose tokens are a hundred times as large teaches the same.
    large = trainer(tmp_path / "large", teachers(scale=100.0))
    large.train()
    for entry, expected in zip(logged(large), logged(trained), strict=True):
        terms = [key for key in expected if key.startswith("loss")]
        assert [entry[key] for key in terms] == pytest.approx([expected[key] for key in terms], rel=1e-3)
    name = "standardise.0.patch_std"
    torch.testing.assert_close(large.objective.state_dict()[name], 100 * trained.objective.state_dict()[name])


def test_the_statistics_are_those_of_the_first_images(tmp_path: Path) -> None:
    trained = trainer(tmp_path, max_steps=1)
    trained.train()
    stream = trained.train_dataset.shard(IMAGES, rank=0, world_size=1)
    samples = [sample for sample, _ in zip(stream, range(IMAGES), strict=False)]
    pixels = trained.train_dataset.normalised(
        {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "erasing": [sample["erasing"] for sample in samples],
        }
    )
    for k, taught in enumerate(trained.teach(pixels, (4, 4))):
        found = trained.objective.standardise[str(k)]
        assert found.images == IMAGES
        torch.testing.assert_close(found.patch_mean, taught.patches.mean((0, 1)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.cls_std, taught.cls.std(0, correction=0), rtol=1e-4, atol=1e-5)
    # Another device batch, accumulated: the same images in the same order, so the same to the last bit.
    other = trainer(tmp_path / "other", max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    other.train()
    assert_equal(statistics(other), statistics(trained))


def test_a_resumed_run_takes_its_statistics_from_the_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    settings = {"max_steps": 4, "ema_decay": 0.9, "query_warmup_steps": 1}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    cut = trainer(tmp_path / "cut", **settings)
    cut.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    monkeypatch.setattr("gkd_hf.training.distillation_trainer.first_batches", lambda *given: pytest.fail("again"))
    again = trainer(tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(whole))
    assert logged(again) == logged(whole)
    saved = load_file(tmp_path / "cut" / "checkpoint-4" / "model.safetensors")
    kept = {name: value for name, value in saved.items() if name.startswith("objective.standardise.")}
    assert_equal(kept, {f"objective.standardise.{name}": value for name, value in statistics(whole).items()})
    # The next stage goes on with heads and statistics.
    carried, before = trainer(tmp_path / "next", objective=again.objective), statistics(again)
    carried.train()
    assert_equal(statistics(carried), before)


def test_a_warm_up_ends_for_every_teacher_and_its_average_begins_anew(tmp_path: Path) -> None:
    trained = trainer(tmp_path, max_steps=2, query_warmup_steps=1, ema_decay=0.999)
    restarted: list[str] = []
    restart = trained.average.restart
    trained.average.restart = lambda prefixes: (restarted.extend(prefixes), restart(prefixes))
    trained.train()
    heads = ("patch", "feature")
    assert restarted == [f"objective.objectives.{k}.{head}.query." for k in (0, 1) for head in heads]
    for objective in trained.objective.objectives:
        assert isinstance(objective, GKDObjective) and objective.feature.query_enabled


def test_one_teacher_can_be_standardised_and_is_not_by_default(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", teachers()[:1])
    assert type(plain.objective) is GKDObjective
    trained = trainer(tmp_path / "run", teachers(scale=100.0, standardise=True)[:1], kind="resnet", objective=None)
    trained.train()
    assert isinstance(trained.objective, MultiTeacherObjective)
    entry = logged(trained)[-1]
    assert {"loss_token", "loss_feature", "loss_patch", *ATTENTION} <= set(entry)
    assert entry["loss_feature"] < 5  # raw, it is in the thousands
    raw = trainer(tmp_path / "raw", teachers(standardise=False))
    assert not list(raw.objective.standardise.parameters()) and not raw.objective.unfitted()


def test_a_data_set_of_known_length_is_read_in_the_trainings_order(tmp_path: Path) -> None:
    read: list[int] = []

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            read.append(row)
            return {"pixel_values": torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(row))}

    trained = trainer(tmp_path, data=Images(), max_steps=1, per_device_train_batch_size=4)
    trained.train()
    assert trained.objective.standardise["0"].images == 12
    first, rest = read[:12], read[12:]  # for both teachers, and for the step
    assert sorted(first) == list(range(12)) != first
    assert rest[:4] == first[:4]


def test_bf16_trains_on_standardised_tokens(tmp_path: Path) -> None:
    trained = trainer(tmp_path, bf16=True, max_steps=1, logging_steps=1, activation_checkpointing=True)
    trained.train()
    assert all(teacher.halved for teacher in trained.teachers)
    assert {value.dtype for name, value in statistics(trained).items() if "images" not in name} == {torch.float32}
    assert all(0 < logged(trained)[0][f"loss_{name}/feature"] < 5 for name in ("dinov2", "vit"))


def test_a_collapsed_attention_is_told_by_its_teacher(tmp_path: Path, caplog: Any) -> None:
    trained = trainer(tmp_path)
    trained._chance = 1 / 16
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            trained._attention = {"a/self_weight": torch.tensor(0.5), "b/self_weight": torch.tensor(0.06)}
            trained.log({"loss": 1.0})
    assert [record.getMessage()[:34] for record in caplog.records] == ["QSD attention to b has collapsed: "]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    first, second = teachers()
    with pytest.raises(InputError, match="teacher 'dinov2' is given twice"):
        trainer(tmp_path, [first, first])
    first.encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="saved' is given twice: name each once"):
        trainer(tmp_path, [str(tmp_path / "saved"), tmp_path / "." / "saved"])
    with pytest.raises(InputError, match="teacher is an empty list"):
        GKDDistillationTrainer(None, [], None, None)
    heads = trainer(tmp_path, [first, second]).objective
    with pytest.raises(InputError, match=r"the heads are of 2 teacher\(s\), 1 are given"):
        trainer(tmp_path, [first], objective=heads)
    with pytest.raises(InputError, match="give the teachers what the heads were trained with"):
        trainer(tmp_path, teachers(standardise=False), objective=heads)


def test_the_card_names_every_teacher(tmp_path: Path) -> None:
    for name, teacher in zip(("one", "two"), teachers(), strict=True):
        teacher.encoder.save_pretrained(tmp_path / name)
    named = [GKDTeacher(tmp_path / "one", weight=2), GKDTeacher(tmp_path / "two")]
    settings = trainer(tmp_path / "run", named).card_settings()
    assert settings["teacher"] is None
    assert [(Path(each["name"]).name, each["weight"]) for each in settings["teachers"]] == [("one", 2.0), ("two", 1.0)]
    assert "teachers" not in trainer(tmp_path / "run", named[1:]).card_settings()
