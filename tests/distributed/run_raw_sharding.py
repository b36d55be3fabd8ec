"""One process of a test run: a step of everything sharded by torch's own `fully_shard`, beside the step unsharded.

accelerate launch --multi_gpu --num_processes 2 tests/distributed/run_raw_sharding.py OUT CASE…

A case is ENCODER (stage 1) or ENCODER-HEAD (stage 2). Each process steps on samples of its own; the unsharded step is
that on all processes' samples. OUT gets the differences, relative to the norms of what was expected.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gkd_hf import GKDObjective, GKDStudentForSemanticSegmentation, GKDStudentModel, GKDTeacher
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.masking import random_masks
from gkd_hf.training.sharding import is_sharded
from tests.tiny import DPT, ENCODERS, MASK2FORMER, UPERNET

HEADS = {"linear": "linear", "upernet": UPERNET, "dpt": DPT, "mask2former": MASK2FORMER}
HALF = torch.full((1, 3, 1, 1), 0.5)
SIZE, STEPS = 64, 3


def distilling(encoder: str, mesh: DeviceMesh) -> tuple[nn.Module, Callable]:
    """Return a distiller and its loss of a share, with the teacher sharded or not."""
    student = GKDStudentModel.from_encoder(ENCODERS[encoder])
    plain = GKDTeacher(ENCODERS["dinov2"]).double()
    sharded = copy.deepcopy(plain)
    sharded.shard(mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    assert held < 1.1 * sum(parameter.numel() for parameter in plain.parameters()) / mesh.size()
    model = GKDDistiller(student, GKDObjective(student.adapter.width, plain.width))
    grid = plain.grid_for(SIZE)

    def loss(model: nn.Module, share: int, step: int) -> torch.Tensor:
        teacher = sharded if is_sharded(model) else plain
        torch.manual_seed(100 * step + share)
        pixels = torch.randn(4, 3, SIZE, SIZE).double()
        rows, masks = random_masks(range(4 * share, 4 * share + 4), grid[0] * grid[1])
        taught = teacher(pixels, grid, HALF, HALF)
        # What a warm-up does: queries off, then copied, then on.
        model.objective.set_query_enabled(step > 0)
        losses = model(pixels, taught.patches, taught.cls, grid, rows, masks, attention=step == 2)
        assert step < 2 or torch.isfinite(losses["self_weight"])
        return losses["total"]

    return model, loss


def segmenting(encoder: str, head: str) -> tuple[nn.Module, Callable]:
    """Return a segmenter with a frozen encoder, and its loss of a share."""
    student = GKDStudentModel.from_encoder(ENCODERS[encoder])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head=HEADS[head])
    model.freeze_encoder()

    def loss(model: nn.Module, share: int, step: int) -> torch.Tensor:
        torch.manual_seed(100 * step + share)
        pixels, labels = torch.randn(4, 3, SIZE, SIZE).double(), torch.randint(0, 5, (4, SIZE, SIZE))
        return model(pixels, labels).loss

    return model, loss


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of tensors, relative to its norm or, if that is tiny, to the mean norm."""
    assert ours.keys() == expected.keys()
    typical = sum(tensor.norm() for tensor in expected.values()) / len(expected)
    return max(
        ((ours[name] - tensor).norm() / torch.maximum(tensor.norm(), 1e-3 * typical)).item()
        for name, tensor in expected.items()
    )


def run(case: str, rank: int, world: int) -> dict[str, float]:
    """Train both for a few steps; return how far they are apart."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,))
    encoder, _, head = case.partition("-")
    plain, loss = segmenting(encoder, head) if head else distilling(encoder, mesh)
    # A gradient that is 0 but for rounding (that of a key's bias) becomes a whole step of AdamW, so round little.
    plain.double().train()
    if head == "mask2former":
        plain.decode_head.criterion.float()  # as its inputs are, always
    model = copy.deepcopy(plain)
    layers = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    for layer in reversed(layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert not any(isinstance(buffer, DTensor) for buffer in model.buffers())

    found = {"layers": len(layers), "loss": 0.0, "gradients": 0.0}
    pairs = [(each, torch.optim.AdamW([p for p in each.parameters() if p.requires_grad])) for each in (model, plain)]
    for step in range(STEPS):
        for each, optimiser in pairs:
            optimiser.zero_grad()
            if step == 1 and not head:
                each.objective.start_query_from_value()
        ours = loss(model, rank, step)
        ours.backward()
        expected = [loss(plain, share, step) for share in range(world)]
        (sum(expected) / world).backward()
        found["loss"] = max(found["loss"], abs(ours.item() / expected[rank].item() - 1))
        gradients = [
            {name: full(p.grad) for name, p in each.named_parameters() if p.grad is not None} for each, _ in pairs
        ]
        found["gradients"] = max(found["gradients"], difference(*gradients))
        for _, optimiser in pairs:
            optimiser.step()
    found["weights"] = difference(*({n: full(p.detach()) for n, p in each.named_parameters()} for each, _ in pairs))
    return found


def main(out: str, *cases: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {case: run(case, rank, world) for case in cases}
    Path(out, f"found.{rank}.json").write_text(json.dumps({"processes": world, "cases": found}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
