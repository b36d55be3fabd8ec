"""How weights, and what an optimiser keeps of them, lie in memory: what is written for others is always contiguous."""

from __future__ import annotations

import torch
from torch import nn

from gkd_hf.models.modeling_gkd import GKDStudentPreTrainedModel


def lay_out_models(module: nn.Module) -> None:
    """Lay the students and segmenters in a module out as their device computes fastest, in place."""
    for part in module.modules():
        if isinstance(part, GKDStudentPreTrainedModel):
            part.lay_out()


def lay_out_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Lay the state of an optimiser out as its parameters are, in place.

    A checkpoint brings the layout of the machine that wrote it. Fused optimisers walk through memory without looking
    at strides: they would take the moments of one weight for another's, without an error on a CPU.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                continue  # such as the number of steps
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def contiguous(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights as safetensors takes them; what is contiguous already is not copied."""
    return {name: tensor.contiguous() for name, tensor in weights.items()}
