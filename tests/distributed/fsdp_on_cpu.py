"""Accelerate's own FSDP2 path on processes that have no GPU, for tests.

Accelerate takes several processes on CPUs for DDP, whatever its configuration says. torch shards over gloo all the
same, so what keeps Accelerate from it is the name it gives such processes: here they get that of processes with GPUs.
"""

from __future__ import annotations

import accelerate.state
import torch
from accelerate.utils import DistributedType


def let_accelerate_shard_on_the_cpu() -> None:
    """Call this first in a program that is launched with an FSDP configuration."""
    torch.distributed.init_process_group("gloo")
    prepare_backend = accelerate.state.PartialState._prepare_backend

    def named_as_gpus(self, cpu=False, sagemaker_dp=False, backend=None):
        backend, kind = prepare_backend(self, cpu, sagemaker_dp, backend)
        return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind

    def on_the_cpu(self) -> None:
        self.device = torch.device("cpu")

    accelerate.state.PartialState._prepare_backend = named_as_gpus
    accelerate.state.PartialState.set_device = on_the_cpu
