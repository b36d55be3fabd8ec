"""Models that are cut over processes (FSDP2): how to tell, and how to have all of their weights again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from gkd_hf.training.stream_trainer import StreamTrainer


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has cut ``module`` or something in it over processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first: FSDP2 leaves running statistics to each, DDP keeps those."""
    for buffer in module.buffers():
        distributed.broadcast(buffer, src=0)


def whole_state_dict(trainer: StreamTrainer) -> dict[str, torch.Tensor]:
    """Return all weights of what a trainer trains, under the names the model has when nothing wraps it.

    Every process must call it. Only the main one gets them, on the CPU (there without a copy of what is there
    already); the others get an empty mapping.
    """
    model = _bare(trainer)
    if is_sharded(model):
        share_buffers(model)
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not trainer.is_world_process_zero():
        return {}
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def under(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of one part of a model, under the names they have in that part."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def whole_model(trainer: StreamTrainer) -> nn.Module:
    """Return what a trainer trains, ready to be called by one process alone.

    Where it is sharded that is a copy with all weights, on every process's device; every process must call this. Drop
    it soon. Where it is not, it is the model itself.
    """
    model = _bare(trainer)
    if not is_sharded(model):
        return model
    share_buffers(model)
    plain = copy.deepcopy(trainer.skeleton)
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), assign=True)
    return plain.to(trainer.args.device)


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module that is not sharded yet, without its parameters' values."""
    hollow = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, hollow)


def _bare(trainer: StreamTrainer) -> nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
