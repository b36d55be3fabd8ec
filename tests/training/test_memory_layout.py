"""Convolutional weights with the channels innermost in memory: what they compute, what is saved, what goes on.

They are laid out so on CUDA devices alone; ``everywhere`` has it done on the CPU, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, GKDTeacher
from gkd_hf.models.encoder_adapter import lay_out_plainly
from gkd_hf.training.memory_layout import lay_out_optimizer
from tests.tiny import ENCODERS, EVERY_ENCODER, UPERNET
from tests.training.test_trainers import StopAt, assert_equal, distillation_trainer, segmentation_trainer, weights

GAINING = {
    *("resnet", "convnext", "convnextv2", "dinov3_convnext"),
    *("mobilenet_v1", "mobilenet_v2", "efficientnet", "mobilevit"),
}
SOME = ("resnet", "convnext", "mobilenet_v2")


def lay_out_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd_hf.models.encoder_adapter.CHANNELS_LAST_ON", ("cuda", "cpu"))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out_everywhere(monkeypatch)


def spread(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.is_contiguous()]


def pair(kind: str) -> tuple[GKDStudentModel, GKDStudentModel]:
    """The same student twice, the second laid out."""
    plain = GKDStudentModel.from_encoder(ENCODERS[kind])
    laid_out = GKDStudentModel.from_encoder(ENCODERS[kind])
    laid_out.load_state_dict(plain.state_dict())
    laid_out.lay_out()
    return plain, laid_out


@pytest.mark.parametrize("kind", EVERY_ENCODER)
def test_convolutional_encoders_alone_are_laid_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = GKDStudentModel.from_encoder(EVERY_ENCODER[kind])
    before = weights_of(student)
    parameters = [id(parameter) for parameter in student.parameters()]
    student.lay_out()
    assert spread(student) == []  # this is a CPU
    lay_out_everywhere(monkeypatch)
    student.lay_out()
    assert bool(spread(student)) == (kind in GAINING)
    assert all(name.endswith(".weight") for name in spread(student))
    assert parameters == [id(parameter) for parameter in student.parameters()]  # what an optimiser holds
    assert_equal(weights_of(student), before)
    lay_out_plainly(student)
    assert spread(student) == []
    assert_equal(weights_of(student), before)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", SOME)
def test_tokens_and_maps_are_the_same(kind: str) -> None:
    plain, laid_out = pair(kind)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected, got = (model.eval()(pixels, output_maps=True) for model in (plain, laid_out))
    assert got.grid == expected.grid
    assert got.last_hidden_state.shape == expected.last_hidden_state.shape
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(got.feature_maps, expected.feature_maps, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def losses_and_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    samples = iter(trainer.train_dataset)
    batch = trainer.data_collator([next(samples) for _ in range(4)])
    loss, losses = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    loss.backward()
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    return {name: value.detach() for name, value in losses.items()} | {k: v for k, v in found.items() if v is not None}


@pytest.mark.parametrize(
    "make, kind",
    [
        *((distillation_trainer, kind) for kind in SOME),
        (segmentation_trainer, "resnet"),
    ],
)
def test_losses_and_gradients_are_the_same(
    make: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses_and_gradients(make(tmp_path / "plain", kind))
    lay_out_everywhere(monkeypatch)
    trainer = make(tmp_path / "laid_out", kind)
    assert spread(trainer.model)
    got = losses_and_gradients(trainer)
    assert got.keys() == expected.keys() and len(got) > 3
    for name, value in expected.items():
        # The batch norms of so few positions divide by deviations near 0.
        worst = (got[name] - value).abs().max() / value.abs().max().clamp(min=1.0)
        assert worst <= 1e-5, f"{name}: {worst}"


def test_what_is_saved_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(folder: Path) -> list[str]:
        trainer = distillation_trainer(folder, "resnet", ema_decay=0.9)
        laid_out = spread(trainer.model)
        trainer._save(str(folder / "checkpoint"))
        trainer.save_model(str(folder / "student"))
        trainer.model.student.save_encoder(folder / "encoder")
        trainer.average.on_train_begin()
        trainer.average.save(folder, is_main=True)
        segmenter = GKDStudentForSemanticSegmentation.from_student(
            trainer.model.student, num_labels=3, decode_head={"type": "linear"}
        )
        nn.init.ones_(segmenter.decode_head.classifier.weight)
        segmenter.lay_out()
        segmenter.save_pretrained(folder / "segmenter")
        return laid_out

    assert save(tmp_path / "plain") == []
    lay_out_everywhere(monkeypatch)
    assert save(tmp_path / "laid_out")
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "laid_out" / file).read_bytes(), file


@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_on_in_either_layout(
    first: bool, then: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a training that was begun on a GPU goes on without one, or the other way round."""

    def begin(folder: str, laid_out: bool) -> Any:
        with monkeypatch.context() as patch:
            if laid_out:
                lay_out_everywhere(patch)
            trainer = distillation_trainer(tmp_path / folder, "resnet", ema_decay=0.9, max_steps=4)
        assert bool(spread(trainer.model)) == laid_out
        return trainer

    whole = begin("whole", first)
    whole.train()
    broken = begin("broken", first)
    broken.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = begin("broken", then)
    again.train(resume_from_checkpoint=True)
    assert bool(spread(again.model)) == then
    for parameter, state in again.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride() == state["exp_avg_sq"].stride()
    own, expected = weights(again), weights(whole)
    if first == then:
        assert_equal(own, expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_an_optimiser_follows_its_weights_layout() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    moment = state["exp_avg"].clone()
    state["exp_avg"] = state["exp_avg"].contiguous()
    lay_out_optimizer(optimizer)
    assert state["exp_avg"].stride() == weight.stride()
    assert torch.equal(state["exp_avg"], moment)
    assert state["step"].shape == ()


@pytest.mark.usefixtures("everywhere")
def test_a_convolutional_teacher_is_laid_out_where_it_is_placed() -> None:
    teacher = GKDTeacher(ENCODERS["dinov3_convnext"])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = pixels, (2, 2), teacher.image_mean, teacher.image_std
    before = teacher(*given)
    teacher.place("cpu")
    assert spread(teacher)
    after = teacher(*given)
    torch.testing.assert_close(after.patches, before.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.cls, before.cls, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_a_decode_head_is_laid_out_with_its_encoder() -> None:
    _, student = pair("resnet")
    segmenter = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, decode_head=UPERNET).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = segmenter(pixels).logits
    segmenter.lay_out()
    assert any(name.startswith("decode_head.") for name in spread(segmenter))
    torch.testing.assert_close(segmenter(pixels).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_on_cuda_lays_out_and_saves_contiguous_weights(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, "resnet", use_cpu=False, ema_decay=0.9, max_steps=4)
    assert spread(trainer.model)
    trainer.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = distillation_trainer(tmp_path, "resnet", use_cpu=False, ema_decay=0.9, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert spread(again.model)
    again.save_model(str(tmp_path / "student"))
    saved = load_file(tmp_path / "student" / "model.safetensors")
    for name, tensor in again.model.student.state_dict().items():
        assert torch.equal(saved[name], tensor.cpu()), name
