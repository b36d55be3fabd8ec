"""One process of the equality test: both stages, streams and ordinary data sets, every way to share out one batch.

accelerate launch --multi_gpu --num_processes 2 tests/distributed/run_equality.py OUT WORLD

Each training is twenty steps of eight samples. Its losses go to OUT/NAME.WORLDxACCUMULATION.json, its weights, last
and averaged, to a safetensors file beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed

from gkd_hf import (
    GKDDistillationArguments,
    GKDDistillationTrainer,
    GKDSegmentationArguments,
    GKDSegmentationTrainer,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
    GKDTeacher,
)
from gkd_hf.training.process_group import end_process_group
from gkd_hf.training.weight_average import AVERAGE_NAME
from tests.distributed.run_stage import Stop
from tests.tiny import ENCODERS
from tests.training import test_trainers as single

BATCH, STEPS, BREAK = 8, 20, 7
ROWS = 5 * BATCH  # four passes, so that step 7 is in the middle of one
ACCUMULATIONS = {1: (1, 2, 4), 2: (1, 2), 4: (1,)}  # by the number of processes; masks need two samples on a device
# The stage, how its data comes, what else there is to it: trained with every accumulation, or only with the last?
TRAININGS = {
    "distil.stream": True,
    "distil.rows": True,
    "distil.rows.resumed": False,
    "distil.rows.early": False,
    "task.stream": True,
    "task.rows": False,
}


class Rows(torch.utils.data.Dataset):
    """An ordinary data set of noise, with labels for the task."""

    def __init__(self, labelled: bool):
        self.labelled = labelled

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(row)
        sample = {"pixel_values": torch.randn(3, single.SIZE, single.SIZE, generator=generator)}
        if self.labelled:
            sample["labels"] = torch.randint(8, (single.SIZE, single.SIZE), generator=generator)
        return sample


def trainings(world: int) -> list[tuple[str, int]]:
    """Names and accumulations of what so many processes train; one process also without any, for comparison."""
    accumulations = ACCUMULATIONS[world]
    return [
        (name, accumulation)
        for name, every in TRAININGS.items()
        for accumulation in accumulations
        if every or accumulation == accumulations[-1] or (world == 1 and accumulation == 1 and "resumed" not in name)
    ]


def trainer_of(name: str, folder: Path, **changes: Any) -> Any:
    """Make the trainer of one of `TRAININGS`."""
    stage, data, *kinds = name.split(".")
    set_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    settings = {"max_steps": STEPS, "logging_steps": 1, "ema_decay": 0.9} | changes
    if stage == "distil":
        args = single.arguments(GKDDistillationArguments, folder, early_backward="early" in kinds, **settings)
        dataset = single.distillation_stream(ROWS) if data == "stream" else Rows(labelled=False)
        return GKDDistillationTrainer(student, GKDTeacher(ENCODERS["dinov2"]), args, dataset)
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8)
    model.decode_head.norm = torch.nn.Identity()  # batch statistics hang on the device batch
    args = single.arguments(GKDSegmentationArguments, folder, window=single.SIZE, stride=single.SIZE, **settings)
    dataset = single.segmentation_stream(ROWS) if data == "stream" else Rows(labelled=True)
    return GKDSegmentationTrainer(model, args, dataset)


def train(name: str, out: Path, world: int, accumulation: int) -> None:
    """Train, and write down the losses, the trained weights and their average."""
    label = f"{name}.{world}x{accumulation}"
    folder = out / "folders" / label
    settings = {
        "per_device_train_batch_size": BATCH // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "save_steps": BREAK if name.endswith("resumed") else STEPS,
    }
    trainer = trainer_of(name, folder, **settings)
    assert trainer.args.world_size == world, f"{trainer.args.world_size} processes, not {world}"
    if name.endswith("resumed"):
        trainer.add_callback(Stop(BREAK + 1))
        trainer.train()
        trainer = trainer_of(name, folder, **settings)
    trainer.train(resume_from_checkpoint=True)
    if not trainer.is_world_process_zero():
        return
    logs = [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in trainer.state.log_history]
    (out / f"{label}.json").write_text(json.dumps([entry for entry in logs if entry]))
    checkpoint = folder / f"checkpoint-{STEPS}"
    weights = {
        f"{kind}.{name}": tensor
        for kind, file in (("last", "model.safetensors"), ("average", AVERAGE_NAME))
        for name, tensor in load_file(checkpoint / file).items()
    }
    save_file(weights, out / f"{label}.safetensors")


def main(out: str, world: str) -> None:
    """Train everything in every way that so many processes can."""
    for name, accumulation in trainings(int(world)):
        train(name, Path(out), int(world), accumulation)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process_group()
