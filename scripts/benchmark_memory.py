#!/usr/bin/env python
"""Measure the memory of real training steps, and compare what `run_gkd.py --plan --gpus` would have said of them.

    python scripts/benchmark_memory.py [--device cpu] [--cases vit-s,resnet-50] [--batches 8,16]

Each case runs two steps of the trainers with random weights and images, in a process of its own. On a GPU the figure
is torch's `max_memory_allocated`, in bf16. On the CPU, in fp32, it is the highest resident set (VmHWM) above what was
resident after steps of a tiny model, which load every library; malloc gives freed blocks back at once there. Figures
are bytes; the last line is one JSON object. Exit code 1 if an estimate is not within 20 % of the measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

VIT = {"model_type": "vit", "image_size": 224, "patch_size": 16}
VIT_B = VIT | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_S = VIT_B | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
TINY = VIT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_WIDTHS = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
TINY_HEAD = dict.fromkeys(_WIDTHS, 32) | {"type": "mask2former", "encoder_layers": 1, "decoder_layers": 2}
# name → student, teacher or decode head, pixels, part of the batch size
CASES = {
    "vit-s": (VIT_S, VIT_B, 224, 1),
    "resnet-50": ({"model_type": "resnet"}, VIT_B, 224, 1),
    "task-linear": (VIT_S, "linear", 256, 1),
    "task-mask2former": (VIT_S, "mask2former", 256, 4),
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def train(case: tuple, batch: int, again: bool, device: str, folder: str) -> None:
    """Run two steps of the stage's trainer."""
    import torch

    import gkd_hf as gkd

    student_config, other, size, _ = case
    distils = isinstance(other, dict) and "model_type" in other
    settings = {"bf16": device == "cuda", "use_cpu": device == "cpu", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"max_steps": 2, "per_device_train_batch_size": batch, "activation_checkpointing": again}
    arguments = (gkd.GKDDistillationArguments if distils else gkd.GKDSegmentationArguments)(folder, **settings)
    sample = {"pixel_values": torch.randn(3, size, size)}
    student = gkd.GKDStudentModel.from_encoder(student_config, image_size=size)
    if distils:
        gkd.GKDDistillationTrainer(student, other, arguments, [sample] * batch * 2).train()
    else:
        # Twelve classes in an image, as the estimate assumes.
        sample["labels"] = torch.arange(size)[:, None].expand(size, size) * 12 // size
        model = gkd.GKDStudentForSemanticSegmentation.from_student(student, num_labels=19, decode_head=other)
        gkd.GKDSegmentationTrainer(model, arguments, [sample] * batch * 2).train()


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def measured(case: tuple, batch: int, again: bool, device: str) -> int:
    """Bytes that training takes at the most, beyond what was there before."""
    import torch

    gpu = device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        small = TINY if isinstance(case[1], dict) else {"mask2former": TINY_HEAD}.get(case[1], case[1])
        train((TINY, small, 64, 1), 2, False, device, folder)
        # The highest figure begins anew.
        torch.cuda.reset_peak_memory_stats() if gpu else Path("/proc/self/clear_refs").write_text("5")
        before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
        train(case, batch, again, device, folder)
        return (torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")) - before


def estimated(case: tuple, batches: tuple[int, ...], device: str) -> dict[tuple[int, bool], int]:
    """Bytes that the plan tells of batches, without and with activation checkpointing where there is such."""
    from gkd_hf.models.loading import config_from_mapping
    from gkd_hf.training.step_cost import DistillationStep, SegmentationStep

    student, other, size = config_from_mapping(case[0]), case[1], case[2]
    settings = {"on_gpu": device == "cuda", "precision": "bf16" if device == "cuda" else "fp32"}
    if isinstance(other, dict):
        costs = DistillationStep(student, [config_from_mapping(other)], size, **settings).costs(batches)
    else:
        costs = SegmentationStep(student, size, decode_head=other, classes=19, **settings).costs(batches)
    return {(cost.batch, again): cost.total() for again in (False, True) for cost in costs[again] or ()}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if an estimate is off."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="of %(default)s (default: all)")
    parser.add_argument("--batches", default="8", help="images in a step; mask2former gets a quarter (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one case, in a process of its own
    options = parser.parse_args(argv)
    if options.measure:
        name, batch, again, device = options.measure.split(",")
        print(measured(CASES[name], int(batch), again == "1", device))
        return 0
    device, rows = options.device or ("cuda" if torch.cuda.is_available() else "cpu"), []
    for name in options.cases.split(","):
        batches = tuple(max(1, int(each) // CASES[name][3]) for each in options.batches.split(","))
        for (batch, again), estimate in estimated(CASES[name], batches, device).items():
            command = [sys.executable, __file__, "--measure", f"{name},{batch},{int(again)},{device}"]
            run = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
            actual = int(run.stdout.split()[-1])
            row = {"case": name, "batch": batch, "activation_checkpointing": again, "estimate": estimate}
            rows.append(row | {"measured": actual, "ratio": round(estimate / actual, 3)})
            print(rows[-1], flush=True)
    print(json.dumps({"device": device, "rows": rows}))
    return int(any(abs(row["ratio"] - 1) > 0.2 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
