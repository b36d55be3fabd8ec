"""The moving average of the weights: its numbers, its place in checkpoints, and that it is what training gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState

from gkd_hf.errors import InputError
from gkd_hf.training.weight_average import AVERAGE_NAME, WeightAverage
from tests.training.test_trainers import distillation_trainer, segmentation_trainer


class Weights(TrainerCallback):
    """Keep a parameter after each step."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter, self.seen = parameter, [parameter.detach().clone()]

    def on_step_end(self, *args, **kwargs) -> None:
        self.seen.append(self.parameter.detach().clone())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= state.global_step >= self.step


def by_hand(seen: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = seen[0]
    for step, weights in enumerate(seen[1:], start=1):
        d = min(decay, (1 + step) / (10 + step))
        average = d * average + (1 - d) * weights
    return average


def test_numbers() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    model[1].requires_grad_(False)
    model[0].weight.data.fill_(1.0)
    average = WeightAverage(model, 0.25)
    average.on_train_begin()
    for step, weight in ((1, 3.0), (2, 5.0)):
        model[0].weight.data.fill_(weight)
        model[1].running_mean.fill_(weight)
        average.on_step_end(None, TrainerState(global_step=step), None)
    # d = 2/11, then min(0.25, 3/12) = 0.25
    first = 2 / 11 * 1 + 9 / 11 * 3
    with average.given():
        assert model[0].weight.item() == pytest.approx(0.25 * first + 0.75 * 5)
        assert model[1].running_mean.item() == pytest.approx(0.25 * (9 / 11 * 3) + 0.75 * 5)
        assert model[1].weight.item() == 1.0
    assert model[0].weight.item() == 5.0
    average.restart(("0.",))
    average.give()
    assert model[0].weight.item() == 5.0 and model[1].running_mean.item() != 5.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_gives_the_average(tmp_path: Path, accumulation: int) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": accumulation}
    trainer = distillation_trainer(tmp_path / "a", ema_decay=0.5, **settings)
    weights = Weights(next(trainer.student.parameters()))
    trainer.add_callback(weights)
    trainer.train()
    wanted = by_hand(weights.seen, 0.5)
    assert not torch.allclose(weights.seen[-1], wanted, atol=1e-6)
    assert torch.allclose(next(trainer.student.parameters()), wanted, atol=1e-6)
    # The last checkpoint goes on from the weights themselves.
    checkpoint = tmp_path / "a" / "checkpoint-4"
    saved = load_file(checkpoint / "model.safetensors")
    name = next(name for name, _ in trainer.model.named_parameters())
    assert torch.equal(saved[name], weights.seen[-1])
    assert torch.allclose(load_file(checkpoint / AVERAGE_NAME)[name], wanted, atol=1e-6)


def test_resumed_in_the_middle_and_after_the_end(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "ema_decay": 0.5}
    whole = distillation_trainer(tmp_path / "whole", **settings)
    whole.train()
    broken = distillation_trainer(tmp_path / "broken", **settings)
    broken.add_callback(StopAt(3))
    broken.train()
    for _ in range(2):  # from step 2, then from step 4
        resumed = distillation_trainer(tmp_path / "broken", **settings)
        resumed.train(resume_from_checkpoint=True)
        for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def test_resumed_from_checkpoints_of_the_model_alone(tmp_path: Path) -> None:
    settings = {"save_steps": 2, "ema_decay": 0.5, "save_only_model": True}
    distillation_trainer(tmp_path, max_steps=2, **settings).train()
    saved = load_file(tmp_path / "checkpoint-2" / AVERAGE_NAME)
    resumed = distillation_trainer(tmp_path, max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, ours in resumed.model.named_parameters():
        assert name not in saved or torch.equal(ours, saved[name]), name


def test_evaluated_in_training_is_the_average(tmp_path: Path) -> None:
    trainer = segmentation_trainer(tmp_path, ema_decay=0.9, max_steps=2, save_steps=2, learning_rate=1.0)
    parameter = next(p for p in trainer.model.decode_head.parameters())
    found = []

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            before = parameter.detach().clone()
            with trainer.averaged():
                found.append((before, parameter.detach().clone()))
                inside = next(iter(trainer.evaluate_domains().values())).confusion
            assert torch.equal(parameter, before)
            assert torch.equal(next(iter(trainer.evaluate_domains().values())).confusion, inside)
            assert torch.equal(parameter, before)
            trainer.model.train()

    trainer.add_callback(Evaluate())
    trainer.train()
    assert not torch.equal(*found[-1])
    assert torch.equal(parameter, found[-1][1])


def test_the_warm_ups_queries_are_forgotten(tmp_path: Path) -> None:
    trainer = distillation_trainer(tmp_path, ema_decay=0.999, max_steps=2, query_warmup_steps=1)
    trainer.add_callback(StopAt(2))
    random_queries = trainer.objective.patch.query.proj.weight.detach().clone()
    value_at_start = trainer.objective.patch.value.proj.weight.detach().clone()
    trainer.train()
    query = trainer.objective.patch.query.proj.weight
    assert (query - value_at_start).norm() < 0.2 * (query - random_queries).norm()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ema_decay must lie between 0 and 1"):
        distillation_trainer(tmp_path, ema_decay=1.0)
    plain = distillation_trainer(tmp_path / "plain", max_steps=4, save_steps=2)
    plain.add_callback(StopAt(2))
    plain.train()
    averaged = distillation_trainer(tmp_path / "plain", max_steps=4, save_steps=2, ema_decay=0.9)
    with pytest.raises(InputError, match="ema.safetensors is missing or broken"):
        averaged.train(resume_from_checkpoint=True)
    save_file({"other": torch.zeros(1)}, tmp_path / AVERAGE_NAME)
    with pytest.raises(InputError, match="of another model"):
        averaged.average.load(tmp_path)
