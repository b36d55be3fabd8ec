"""Models that are cut over processes (FSDP2): how to tell, and how to have all of their weights again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from gkd_hf.errors import InputError

if TYPE_CHECKING:
    from gkd_hf.training.stream_trainer import StreamTrainer


NOT_ON_CPUS = (
    "Accelerate does not shard on CPUs: it would train with whole copies (take scripts/accelerate/ddp.yaml for that, "
    "or GPUs)"
)


def check_can_shard(state: PartialState) -> None:
    """Refuse, before anything is prepared, what `set_up_sharding` would refuse when the first stage begins.

    Raises:
        InputError: sharding is configured for processes on CPUs.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        raise InputError(NOT_ON_CPUS)


def set_up_sharding(accelerator: Accelerator) -> None:
    """Have Accelerate, if it is to shard, train the very model that its other engines train.

    Raises:
        InputError: a configuration by which it would not.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage > 2:
        raise InputError(
            f"DeepSpeed's ZeRO stage {deepspeed.zero_stage} leaves no process with whole weights to save: take stage "
            "1 or 2, or scripts/accelerate/fsdp2.yaml to share the weights out"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1:
            raise InputError(NOT_ON_CPUS)
        return
    if plugin.fsdp_version != 2:
        raise InputError("models are sharded by FSDP2 only: set fsdp_version to 2 in Accelerate's configuration")
    if plugin.cpu_ram_efficient_loading:
        raise InputError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without the teacher's weights: set it "
            "to false in Accelerate's configuration"
        )
    # Accelerate would compute all of bf16 training in bf16: losses, norms, the residual stream, the reduction of
    # gradients. Autocast, by which the other engines train, knows better.
    plugin.mixed_precision_policy = None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has cut ``module`` or something in it over processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Cut again what a forward that no backward followed has left whole: the parameters of the root."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


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
