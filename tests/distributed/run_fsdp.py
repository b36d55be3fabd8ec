"""One process of a test run: both stages by this library's trainers, sharded by Accelerate if it is launched so.

accelerate launch --config_file scripts/accelerate/fsdp2.yaml --num_processes 2 tests/distributed/run_fsdp.py OUT CASE…

A global batch is the same micro batches however many processes there are, so that batch statistics agree, too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, default_data_collator, set_seed

from gkd_hf import (
    GKDDistillationTrainer,
    GKDSegmentationArguments,
    GKDSegmentationTrainer,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
)
from gkd_hf.models import encoder_adapter
from gkd_hf.training.process_group import end_process_group
from gkd_hf.training.sharding import is_sharded, whole_model
from gkd_hf.training.stream_trainer import NonFiniteLossError
from tests.distributed.fsdp_on_cpu import let_accelerate_shard_on_the_cpu
from tests.tiny import ENCODERS, MASK2FORMER, UPERNET
from tests.training import test_one_stage as one_stage
from tests.training import test_several_teachers as several
from tests.training import test_trainers as single

STEPS, MICRO = 20, 4
RESUMED = ("distil", "task-upernet", "end-to-end")
CASES: dict[str, dict[str, Any]] = {
    "distil": {"query_warmup_steps": 3, "teacher_sharding": "always", "ema_decay": 0.9},
    "distil-accumulated": {"teacher_sharding": "always", "gradient_accumulation_steps": 2},
    "distil-resnet": {"kind": "resnet"},
    "distil-several": {"teacher_sharding": "always"},
    "distil-bf16": {"bf16": True, "teacher_sharding": "always", "activation_checkpointing": True},
    "task-linear": {"kind": "vit", "head": "linear", "eval_strategy": "steps", "eval_steps": 10},
    "task-upernet": {"kind": "resnet", "head": UPERNET},
    "task-mask2former": {"kind": "vit", "head": MASK2FORMER},
    "one-stage": {},
    "end-to-end": {"kind": "vit", "head": "linear", "freeze_encoder": False, "encoder_learning_rate": 1e-4},
}


class Watch(TrainerCallback):
    """What is sharded during a step, and whether the optimiser's state is."""

    def __init__(self) -> None:
        self.sharded: dict[str, bool] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        moments = [value for entry in optimizer.state.values() for key, value in entry.items() if key == "exp_avg"]
        self.sharded = {
            "parameters": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
            "optimiser": all(isinstance(moment, DTensor) for moment in moments),
        }


def seed_by_images(head: torch.nn.Module, given: tuple[Any, ...]) -> None:
    """Mask2Former's loss looks at random points: the same ones for the same images, whatever went before."""
    torch.manual_seed(int(given[1].sum()) if given[1] is not None else 0)


def make(case: str, folder: Path, world: int) -> GKDDistillationTrainer | GKDSegmentationTrainer:
    settings = {"gradient_accumulation_steps": 1} | CASES[case]
    settings |= {
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": settings["gradient_accumulation_steps"] * 2 // world,
        "logging_steps": 1,
    }
    if case == "distil-several":
        return several.trainer(folder, **settings)
    if case == "one-stage":
        trainer = one_stage.one_stage_trainer(folder, "vitkd", "vit", **settings)
        trainer.eval_dataset = {"toy_city:night": single.evaluation_set(5)}
        return trainer
    if case.startswith("distil"):
        return single.distillation_trainer(folder, **settings)
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[settings.pop("kind")])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8, decode_head=settings.pop("head"))
    model.decode_head.register_forward_pre_hook(seed_by_images)
    size = single.SIZE
    arguments = single.arguments(GKDSegmentationArguments, folder, window=size, stride=size, **settings)
    # Five images for two processes: one has more windows to compute than the other.
    sets = {"toy_city:night": single.evaluation_set(5)}
    return GKDSegmentationTrainer(model, arguments, single.segmentation_stream(), sets)


def refusal(trainer: GKDSegmentationTrainer) -> str:
    """Predict, break one process's weights, save; return what the latter is answered with."""
    trainer.data_collator = default_data_collator
    trainer.predict([{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.zeros(32, 32)} for _ in range(5)])
    weight = trainer.model.decode_head.classifier.weight
    if trainer.is_world_process_zero():
        with torch.no_grad():
            (weight.to_local() if isinstance(weight, DTensor) else weight).fill_(torch.nan)
    try:
        trainer._save_checkpoint(trainer.model, None)
    except NonFiniteLossError as error:
        return str(error)
    return ""


def run(case: str, folder: Path, world: int) -> None:
    """Train, save, evaluate; then train the second half again from its checkpoint."""
    trainer, watch = make(case, folder / "run", world), Watch()
    assert trainer.args.world_size == world
    if case == "distil-resnet":
        trainer.model.student.lay_out()  # in whole weights, as of an earlier training on a GPU: FSDP2 refuses these
        assert world == 1 or not all(parameter.is_contiguous() for parameter in trainer.model.parameters())
    trainer.add_callback(watch)
    trainer.train()
    sharded = is_sharded(trainer.model)
    trainer.save_model(folder / "model")
    plain = whole_model(trainer)
    assert not is_sharded(plain)
    found: dict[str, Any] = {
        "sharded": sharded,
        **watch.sharded,
        "logs": [{k: v for k, v in log.items() if "loss" in k} for log in trainer.state.log_history if "loss" in log],
    }
    if isinstance(trainer, GKDDistillationTrainer):
        found["teacher"] = all(isinstance(parameter, DTensor) for parameter in trainer.teacher.parameters())
        found["teacher_dtype"] = str(next(trainer.teacher.parameters()).dtype)
    else:
        found["metrics"] = trainer.evaluate()
        domain = trainer.evaluate_domains()["toy_city:night"]
        found |= {"confusion": domain.confusion.tolist(), "images": domain.images}
        found["evaluated"] = [log["step"] for log in trainer.state.log_history if "eval_mean_miou" in log]
    checkpoint = folder / "run" / f"checkpoint-{STEPS // 2}"
    found["files"] = sorted(path.name for path in checkpoint.iterdir())
    if case in RESUMED:
        # From the middle; and from the end, where a run was killed that had only its model to save.
        for name, start in ("resumed", checkpoint), ("finished", checkpoint.with_name(f"checkpoint-{STEPS}")):
            again = make(case, folder / name, world)
            again.train(resume_from_checkpoint=str(start))
            ours, expected = (each.state_dict() for each in (whole_model(again), plain))
            found[f"{name}_differ"] = [name for name in expected if not torch.equal(ours[name], expected[name])]
    if case == "task-linear":
        found["refused"] = refusal(trainer)
        assert "weights are not finite" in found["refused"]  # in every process, whoever has them
    if trainer.is_world_process_zero():
        save_file(
            {name: value.contiguous() for name, value in plain.state_dict().items()}, folder / "whole.safetensors"
        )
        (folder / "found.json").write_text(json.dumps(found))


def main(out: str, *cases: str) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_accelerate_shard_on_the_cpu()
        encoder_adapter.CHANNELS_LAST_ON = ("cuda", "cpu")
    for case in cases:
        folder = Path(out, case)
        folder.mkdir(parents=True, exist_ok=True)
        run(case, folder, int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()
