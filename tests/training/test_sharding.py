"""What is refused before anything is sharded; the rest is in tests/distributed/test_fsdp.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from gkd_hf import InputError
from gkd_hf.training.sharding import (
    check_can_shard,
    is_sharded,
    set_up_sharding,
    skeleton,
    under,
    whole_model,
    whole_state_dict,
)
from tests.training.test_trainers import assert_equal, distillation_trainer, segmentation_trainer


def accelerator(plugin: Any, processes: int = 2) -> Any:
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), num_processes=processes)


def plugin(**changes: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**({"fsdp_version": 2, "cpu_ram_efficient_loading": False} | changes))


def test_what_would_not_be_fsdp2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="set fsdp_version to 2"):
        set_up_sharding(accelerator(plugin(fsdp_version=1)))
    with pytest.raises(InputError, match="without the teacher's weights: set it to false"):
        set_up_sharding(accelerator(plugin(cpu_ram_efficient_loading=True)))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    set_up_sharding(accelerator(None, processes=1))
    with pytest.raises(InputError, match="does not shard on CPUs"):
        set_up_sharding(accelerator(None))


def test_sharding_on_cpus_is_refused_before_anything_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpus, on_gpus = (SimpleNamespace(distributed_type=DistributedType[f"MULTI_{each}"]) for each in ("CPU", "GPU"))
    check_can_shard(on_cpus)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_can_shard(on_gpus)
    with pytest.raises(InputError, match="does not shard on CPUs"):
        check_can_shard(on_cpus)


def test_deepspeed_shares_out_no_weights() -> None:
    def state(stage: int) -> Any:
        return SimpleNamespace(
            state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)), num_processes=2
        )

    set_up_sharding(state(2))
    with pytest.raises(InputError, match="ZeRO stage 3 leaves no process with whole weights to save: take stage 1 or"):
        set_up_sharding(state(3))


def test_bf16_is_left_to_autocast() -> None:
    ours = plugin(mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    set_up_sharding(accelerator(ours))
    assert ours.mixed_precision_policy is None


def test_an_unsharded_model_is_whole_as_it_is(tmp_path: Path) -> None:
    trainer = segmentation_trainer(tmp_path)
    assert not is_sharded(trainer.model)
    assert whole_model(trainer) is trainer.model
    weights = whole_state_dict(trainer)
    assert_equal(weights, trainer.model.state_dict())
    assert_equal(under("student.", weights), trainer.model.student.state_dict())


def test_a_skeleton_has_everything_but_the_parameters_values(tmp_path: Path) -> None:
    model = segmentation_trainer(tmp_path).model
    hollow = skeleton(model)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert [p.requires_grad for p in hollow.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(parameter.is_meta for parameter in model.parameters())
    hollow.load_state_dict(model.state_dict(), assign=True)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(hollow.eval()(pixels).logits, model.eval()(pixels).logits)


def test_activation_checkpointing_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="activation_checkpointing is not possible with a resnet"):
        distillation_trainer(tmp_path, "resnet", activation_checkpointing=True)
    with pytest.raises(InputError, match="the encoder is frozen"):
        segmentation_trainer(tmp_path, "vit", activation_checkpointing=True)
    segmentation_trainer(tmp_path, "vit", activation_checkpointing=True, freeze_encoder=False)
