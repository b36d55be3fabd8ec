"""Two processes train a Mask2Former head; the second one's labels are all ignored.

accelerate launch --multi_gpu --num_processes 2 tests/distributed/run_void_rank.py OUT
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.training.process_group import end_process_group
from tests.tiny import ENCODERS, MASK2FORMER


def main(out: str) -> None:
    """Take one step in each process and write the gradients that both have."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head=MASK2FORMER)
    model.freeze_encoder()
    wrapped = accelerator.prepare(model)
    labels = torch.randint(0, 5, (2, 32, 32)) if accelerator.is_main_process else torch.full((2, 32, 32), 255)
    output = wrapped(pixel_values=torch.randn(2, 3, 32, 32), labels=labels)
    assert set(output.loss_terms) == {"cross_entropy", "mask", "dice"}
    accelerator.backward(output.loss)
    if accelerator.is_main_process:
        save_file({n: p.grad.contiguous() for n, p in model.named_parameters() if p.grad is not None}, out)


if __name__ == "__main__":
    main(sys.argv[1])
    end_process_group()
