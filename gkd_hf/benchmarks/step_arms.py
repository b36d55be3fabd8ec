"""Three ways of doing one stage-1 step: as METHOD is written, as the trainer does it, and without heads and losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.objective import GKDObjective
from gkd_hf.distillation.query_based import QuerySoftDistillation
from gkd_hf.models.encoders import EncoderOutput, resample_tokens
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.training.distillation_trainer import GKDDistillationTrainer


class Arm(ABC):
    """One way of doing a step, with weights and an optimiser of its own.

    All arms share the trainer's teacher, precision, batch and way of bringing it to the device; AdamW is the trainer's
    kind in each, so that they differ in what they compute alone.

    Args:
        trainer: of the library. batch: what its loader gives. model: what this arm trains.
    """

    def __init__(self, trainer: GKDDistillationTrainer, batch: dict[str, Any], model: nn.Module):
        self.trainer, self.batch, self.model = trainer, in_loaders_memory(batch, trainer.args.device), model
        self.grid = tuple(batch["grid"])
        self.optimiser = self.new_optimiser()

    def new_optimiser(self) -> torch.optim.Optimizer:
        """Make AdamW over what this arm trains, with the trainer's settings."""
        cls, settings = self.trainer.get_optimizer_cls_and_kwargs(self.trainer.args)
        decayed = set(self.trainer.get_decay_parameter_names(self.model))
        trained = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        decay = self.trainer.args.weight_decay
        groups = [
            {"params": [p for name, p in trained if (name in decayed) is wanted], "weight_decay": decay * wanted}
            for wanted in (True, False)
        ]
        return cls(groups, **settings)

    def inputs(self) -> dict[str, Any]:
        """Bring the batch to the device, without waiting for it, as Accelerate's loader does in a training."""
        device = self.trainer.args.device
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in self.batch.items()
        }

    def teach(self, pixels: torch.Tensor) -> EncoderOutput:
        """Ask the teacher about the student's pixels B×3×H×W."""
        return self.trainer.teach(pixels, self.grid)[0]

    @abstractmethod
    def views(self, pixels: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Run the student; return its tokens, which the heads take."""

    @abstractmethod
    def backward(self, views: tuple[torch.Tensor, ...], taught: EncoderOutput, inputs: dict[str, Any]) -> torch.Tensor:
        """Run the heads, and everything's backward pass; returns the loss."""

    def learn(self) -> torch.Tensor:
        """Run forward and backward; returns the loss. The gradients stay."""
        self.model.train()
        inputs = self.inputs()
        pixels = self.trainer.pixels(inputs)
        taught = self.teach(pixels)
        return self.backward(self.views(pixels, inputs), taught, inputs)

    def optimise(self) -> None:
        """Let AdamW use up the gradients."""
        self.optimiser.step()
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Do a whole step: data to the device, forward, backward, AdamW."""
        self.learn()
        self.optimise()


class Reference(Arm):
    """The method as it is written (GKD, arXiv 2603.02554): 2·B student forwards, explicit softmax attention.

    Attention makes the B×N×N matrix in each head, and the token head attends over its one key.
    """

    def __init__(self, trainer: GKDDistillationTrainer, batch: dict[str, Any], model: GKDDistiller):
        model.objective.token.query.requires_grad_(True)
        super().__init__(trainer, batch, model)

    def views(self, pixels: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        with self.trainer.autocast():
            return two_views(self.model.student, pixels, self.grid, inputs["mask_rows"], inputs["masks"])

    def backward(self, views: tuple[torch.Tensor, ...], taught: EncoderOutput, inputs: dict[str, Any]) -> torch.Tensor:
        with self.trainer.autocast():
            loss = written_loss(self.model.objective, *views, taught.patches, taught.cls)
        loss.backward()
        return loss.detach()


class Ours(Arm):
    """A step of `GKDDistillationTrainer`, through its own ``training_step`` and on the model that Accelerate wraps."""

    def __init__(self, trainer: GKDDistillationTrainer, batch: dict[str, Any]):
        super().__init__(trainer, batch, trainer.model)
        self.wrapped = trainer.accelerator.prepare_model(trainer.model)
        trainer.current_gradient_accumulation_steps = 1  # set by the loop that is not run here

    def new_optimiser(self) -> torch.optim.Optimizer:
        return self.trainer.create_optimizer()

    def views(self, pixels: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        with self.trainer.autocast():
            return self.model.views(pixels, self.grid, inputs["mask_rows"], inputs["masks"])[:3]

    def backward(self, views: tuple[torch.Tensor, ...], taught: EncoderOutput, inputs: dict[str, Any]) -> torch.Tensor:
        with self.trainer.autocast():
            loss = self.model.objective(*views, taught.patches, taught.cls)["total"]
        loss.backward()
        return loss.detach()

    def learn(self) -> torch.Tensor:
        return self.trainer.training_step(self.wrapped, self.inputs())


class Floor(Arm):
    """What no distillation with these models can do without: B teacher forwards and 1.5·B of the student, with AdamW.

    In place of a loss's gradient the student's tokens get a constant one.
    """

    def __init__(self, trainer: GKDDistillationTrainer, batch: dict[str, Any], student: GKDStudentModel):
        super().__init__(trainer, batch, student)
        self._constant: list[torch.Tensor] = []

    def views(self, pixels: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        with self.trainer.autocast():
            whole = self.model(pixels)
            rows = inputs["mask_rows"]
            if not len(rows):
                return whole.last_hidden_state, whole.pooler_output
            masked = self.model(pixels[rows], bool_masked_pos=inputs["masks"], mask_grid=self.grid)
        return whole.last_hidden_state, whole.pooler_output, masked.last_hidden_state

    def backward(self, views: tuple[torch.Tensor, ...], taught: EncoderOutput, inputs: dict[str, Any]) -> torch.Tensor:
        if not self._constant:  # made once
            self._constant = [torch.full_like(view, 1e-6).detach() for view in views]
        torch.autograd.backward(views, self._constant)
        return views[0].new_zeros(())


def in_loaders_memory(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch where the trainer's loader leaves one: in pinned memory for a GPU, which others wait to copy."""
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def two_views(
    student: GKDStudentModel,
    pixels: torch.Tensor,
    grid: tuple[int, int],
    mask_rows: torch.Tensor,
    masks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward every image twice, with an empty mask where it has none.

    Args:
        pixels: B×3×H×W. grid: (h, w), h·w = N. mask_rows: M ≤ B places. masks: M×N, True where a patch is hidden.

    Returns:
        Patch tokens B×N×C_s of the whole and of the masked view, class tokens B×C_s of the whole one.
    """
    everywhere = masks.new_zeros(len(pixels), grid[0] * grid[1]).index_copy(0, mask_rows, masks)
    whole = student(pixels)
    masked = student(pixels, bool_masked_pos=everywhere, mask_grid=grid)
    patches, hidden = (resample_tokens(view.last_hidden_state, view.grid, grid) for view in (whole, masked))
    return patches, hidden, whole.pooler_output


def written_attention(head: QuerySoftDistillation, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return softmax(q·kᵀ·scale)·v of a head, with the B×K×K matrix in memory; see `QuerySoftDistillation`."""
    logits = head.query(student) @ teacher.to(student.dtype).transpose(1, 2) * head.scale
    return logits.softmax(-1) @ head.value(student)


def written_loss(
    objective: GKDObjective,
    patches: torch.Tensor,
    masked: torch.Tensor,
    cls: torch.Tensor,
    target: torch.Tensor,
    target_cls: torch.Tensor,
) -> torch.Tensor:
    """Return GKD's total loss term by term; see `GKDObjective`, whose heads it takes.

    Args:
        patches, masked: B×N×C_s. cls: B×C_s. target: B×N×C_t. target_cls: B×C_t.
    """
    target, target_cls = target.float(), target_cls.float()[:, None]
    token = written_attention(objective.token, cls[:, None], target_cls)
    feature = torch.cat([token, written_attention(objective.feature, patches, target)], dim=1)
    hidden = written_attention(objective.patch, masked, target)
    losses = (
        (token.float() - target_cls).square().mean(),
        (feature.float() - torch.cat([target_cls, target], dim=1)).square().mean(),
        (hidden.float() - target).square().mean(),
    )
    return sum(weight * loss for weight, loss in zip(objective.weights, losses, strict=True))


@contextmanager
def frozen_batch_norms(student: GKDStudentModel) -> Iterator[None]:
    """Keep batch norms in eval mode: with the statistics of each forward, 1.5·B and 2·B images differ by design."""
    config, before = student.config, student.config.freeze_batch_norm
    config.freeze_batch_norm = True
    try:
        yield
    finally:
        config.freeze_batch_norm = before
