"""Forward and backward ask the device for nothing: they run on tensors without values, and bring it no constants.

That is shown on the device "meta", without random erasing, which it has no random numbers for, and without autocast,
which does not reach it. Where there is a GPU, whole steps with both, and with the optimiser, are shown not to wait. Of
logging it is shown only when it looks at the gradients' norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gkd_hf import GKDDistillationArguments, GKDDistillationTrainer, GKDStudentModel, GKDTeacher
from gkd_hf.benchmarks.step_arms import Ours
from gkd_hf.data.streaming import SampleStream
from gkd_hf.data.toy_city import toy_city
from gkd_hf.data.transforms import DistillationTransform
from tests.tiny import ENCODERS

SIZE, BATCH = 32, 4


class Crossings(TorchDispatchMode):
    """Notes every operation that takes values of this machine's memory to the device "meta".

    The other way there is none: what asks a tensor on "meta" for its values raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = [each for each in tree_iter(out) if isinstance(each, torch.Tensor)]
        if any(each.device.type == "cpu" for each in given) and any(each.device.type == "meta" for each in made):
            self.seen.append(str(func))
        return out


def distillation(
    folder: Path, student: str, teacher: str, erase_probability: float = 0.0, **settings: Any
) -> GKDDistillationTrainer:
    transform = DistillationTransform(
        SIZE, (0.5,) * 3, (0.25,) * 3, rand_augment=False, erase_probability=erase_probability
    )
    stream = SampleStream(
        toy_city("clear_day", BATCH, size=SIZE, seed=0), transform, seed=0, micro_batch_size=BATCH, domain="toy_city"
    )
    usual = {"max_steps": 100, "per_device_train_batch_size": BATCH, "use_cpu": True, "disable_tqdm": True}
    model = GKDStudentModel.from_encoder(ENCODERS[student])
    args = GKDDistillationArguments(str(folder), **(usual | settings))
    return GKDDistillationTrainer(model, GKDTeacher(ENCODERS[teacher]), args, stream)


def trainer_on_meta(folder: Path, student: str, teacher: str, **settings: Any) -> GKDDistillationTrainer:
    trainer = distillation(folder, student, teacher, **settings)
    trainer.model.to("meta").train()
    trainer.teacher.to("meta")
    trainer._teaching.mean, trainer._teaching.std = torch.empty(2, 1, 3, 1, 1, device="meta")
    return trainer


def batch_on_meta(trainer: GKDDistillationTrainer) -> dict[str, Any]:
    samples = iter(trainer.train_dataset)
    batch = trainer.data_collator([next(samples) for _ in range(BATCH)])
    return {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}


@pytest.mark.parametrize(
    "student, bf16, early",
    [
        ("vit", False, False),
        ("vit", False, True),
        ("vit", True, False),
        ("resnet", False, True),
        ("swin", False, False),
    ],
)
def test_forward_and_backward_neither_wait_for_the_device_nor_bring_it_constants(
    student: str, bf16: bool, early: bool, tmp_path: Path
) -> None:
    """Of bf16 this sees the teacher's weights and tokens alone."""
    trainer = trainer_on_meta(tmp_path, student, "dinov2", bf16=bf16, early_backward=early)
    batch = batch_on_meta(trainer)
    trainer.pixels(batch)  # the first brings what every later one finds
    with Crossings() as crossings:
        for _ in range(2):
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
    assert crossings.seen == []
    assert loss.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_whole_step_with_erasing_does_not_wait_for_cuda(bf16: bool, tmp_path: Path) -> None:
    trainer = distillation(tmp_path, "vit", "dinov2", erase_probability=1.0, use_cpu=False, bf16=bf16)
    samples = iter(trainer.train_dataset)
    batch = trainer.data_collator([next(samples) for _ in range(BATCH)])
    assert any(part is not None for part in batch["erasing"])
    arm = Ours(trainer, batch)
    arm.step()  # makes what every later one finds
    before = [each.detach().clone() for each in arm.model.parameters()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            arm.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(not torch.equal(own, was) for own, was in zip(arm.model.parameters(), before, strict=True))


def test_a_question_to_the_device_would_be_seen(tmp_path: Path) -> None:
    trainer = trainer_on_meta(tmp_path, "vit", "dinov2")
    batch = batch_on_meta(trainer)
    with pytest.raises(RuntimeError, match="meta"):
        trainer.compute_loss(trainer.model, batch).item()
    with Crossings() as crossings:
        torch.zeros(3, device="meta") + torch.ones(3).to("meta")
    assert crossings.seen == ["aten._to_copy.default"]


def test_the_norm_of_the_gradients_is_looked_at_where_it_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = distillation(tmp_path, "vit", "dinov2", max_steps=5, logging_steps=2, save_strategy="no")
    asked: list[int] = []
    norm = trainer.accelerator.clip_grad_norm_

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(trainer.state.global_step + 1)
        return norm(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", seen)
    trainer.train()
    assert asked == [2, 4]
    assert [entry["step"] for entry in trainer.state.log_history if entry.get("grad_norm", 0) > 0] == [2, 4]


def test_clipping_looks_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = distillation(tmp_path, "vit", "dinov2", max_steps=3, max_grad_norm=1e-3, save_strategy="no")
    asked: list[float] = []
    norm = trainer.accelerator.clip_grad_norm_

    def seen(parameters: Any, most: float) -> torch.Tensor:
        asked.append(most)
        return norm(parameters, most)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", seen)
    trainer.train()
    assert asked == [1e-3] * 3
