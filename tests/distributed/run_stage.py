"""One process of a test run: a few optimiser steps of stage 1 or 2, with what it saw and what it learnt written down.

accelerate launch --multi_gpu --num_processes 2 tests/distributed/run_stage.py STAGE OUT WORLD MICRO ACCUMULATION STOP

STOP is the step after which it ends, as if interrupted; started again in the same folder it goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from gkd_hf.data.streaming import collate
from gkd_hf.training.distillation_trainer import MaskingCollator
from gkd_hf.training.process_group import end_process_group
from tests.training import test_trainers as single


class Gradients(TrainerCallback):
    """Keep the gradient of the first step, as the optimiser gets it."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Stop(TrainerCallback):
    """End the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= state.global_step >= self.step


def main(stage: str, out: str, world: str, micro: str, accumulation: str, stop: str) -> None:
    """Train, assert the number of processes, write gradients.safetensors, weights.safetensors and seen.RANK.json."""
    folder, seen = Path(out), []
    settings = {
        "per_device_train_batch_size": int(micro),
        "gradient_accumulation_steps": int(accumulation),
        "max_steps": 4,
        "save_steps": 2,
    }
    set_seed(0)
    if stage == "distil":
        trainer = single.distillation_trainer(folder, mask_probability=1.0, **settings)
        base = MaskingCollator(8, trainer.args)
    else:
        trainer = single.segmentation_trainer(folder, kind="vit", per_device_eval_batch_size=2, **settings)
        trainer.model.decode_head.norm = torch.nn.Identity()  # batch statistics hang on the device batch
        base = collate

    def remember(samples: list[dict]) -> dict:
        seen.extend(int(sample["index"]) for sample in samples)
        return base(samples)

    trainer.data_collator = remember
    assert trainer.args.world_size == int(world), f"{trainer.args.world_size} processes, not {world}"
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.add_callback(Stop(int(stop)))
    trainer.train(resume_from_checkpoint=True)
    rank = trainer.args.process_index
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))
    result = {"logs": [entry for entry in trainer.state.log_history if "loss" in entry]}
    if stage == "task":
        domain = trainer.evaluate_domains()["toy_city:night"]
        result |= {"confusion": domain.confusion.tolist(), "images": domain.images}
    (folder / f"result.{rank}.json").write_text(json.dumps(result))
    if rank == 0:
        save_file(gradients.first, folder / "gradients.safetensors")
        save_file({k: v.contiguous() for k, v in trainer.model.state_dict().items()}, folder / "weights.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()
