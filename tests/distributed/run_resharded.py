"""Stage 1 sharded over the processes of this launch, from the beginning or from a checkpoint that lies in OUT.

accelerate launch --config_file scripts/accelerate/fsdp2.yaml --num_processes N tests/distributed/run_resharded.py OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from gkd_hf.training.ending import exit_code
from gkd_hf.training.sharding import whole_state_dict
from tests.distributed.fsdp_on_cpu import let_accelerate_shard_on_the_cpu
from tests.training.test_trainers import distillation_trainer

BATCH = 8


def run(out: Path) -> None:
    """Train four steps of eight images and write the whole weights."""
    world = int(os.environ["WORLD_SIZE"])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_the_cpu()
    trainer = distillation_trainer(
        out, max_steps=4, per_device_train_batch_size=BATCH // world, mask_probability=1.0, disable_tqdm=True
    )
    assert trainer.args.world_size == world
    trainer.train(resume_from_checkpoint=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    weights = whole_state_dict(trainer)
    if trainer.is_world_process_zero():
        save_file(
            {name: weight.contiguous() for name, weight in weights.items()}, out / f"weights.{world}.safetensors"
        )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(Path(sys.argv[1]))))
