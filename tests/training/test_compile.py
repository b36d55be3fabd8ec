"""torch.compile: whole graphs of everything that is computed in each step, and the numbers of eager mode."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, GKDTeacher
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.masking import random_masks
from gkd_hf.distillation.objective import GKDObjective
from tests.distributed.run_stage import Stop
from tests.tiny import DPT, ENCODERS, MASK2FORMER, UPERNET
from tests.training import test_trainers as single

BACKEND = "aot_eager"  # traces forward and backward as every backend does, and generates no code, which takes minutes
SIZE = 64
HALF = torch.full((1, 3, 1, 1), 0.5)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    trace = logging.getLogger("torch.__trace")  # writes down every tensor it meets, at length, where anything listens
    trace.disabled = True
    yield
    trace.disabled = False
    torch._dynamo.reset()


def encoder(kind: str) -> dict[str, Any]:
    changes = {"drop_path_rate": 0.0} if kind == "swin" else {}  # what is dropped is drawn otherwise when compiled
    return ENCODERS[kind] | changes


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() and len(expected) > 0
    for name, tensor in expected.items():
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", ["vit", "dinov2", "resnet", "mobilenet_v2", "convnext", "swin"])
def test_student_and_heads_are_a_whole_graph(kind: str) -> None:
    """fullgraph raises at a break. Batch norms: losses, gradients and running statistics of two views are eager's."""
    pixels = torch.randn(4, 3, SIZE, SIZE)
    teacher = GKDTeacher(encoder(kind))
    grid = teacher.grid_for(SIZE)
    taught = teacher(pixels, grid, HALF, HALF)
    student = GKDStudentModel.from_encoder(encoder(kind))
    model = GKDDistiller(student, GKDObjective(student.adapter.width, teacher.width)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = (pixels, taught.patches, taught.cls, grid, *random_masks(range(4), grid[0] * grid[1]))

    def step(call: Any) -> list[dict[str, torch.Tensor]]:
        model.load_state_dict(before)
        losses = call(*batch)
        losses["total"].backward()
        return [losses, gradients(model), {name: buffer.clone() for name, buffer in model.named_buffers()} or losses]

    expected = step(model)
    backend = BACKEND if kind in ("vit", "resnet") else "eager"  # half of the work, the same graphs
    for ours, eager in zip(step(torch.compile(model, backend=backend, fullgraph=True)), expected, strict=True):
        assert_close(ours, eager)


@pytest.mark.parametrize("geometry", ["native", "resample_patch_embed"])
def test_a_teacher_is_a_whole_graph(geometry: str) -> None:
    """One graph for each grid; what other encoders compute without gradients, the segmenters' test compiles."""
    teacher = GKDTeacher(ENCODERS["dinov2"], geometry=geometry)
    teacher.compile(backend="eager", fullgraph=True)
    for count, grid in enumerate([(4, 4), (4, 4), (8, 8)]):
        pixels = torch.randn(2, 3, SIZE, SIZE)
        teacher.fit_geometry(SIZE, grid)
        taught = teacher(pixels, grid, HALF, HALF)
        assert torch.allclose(taught.patches, teacher.forward(pixels, grid, HALF, HALF).patches, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == max(1, count)


@pytest.mark.parametrize("kind, head", [("swin", "linear"), ("resnet", "linear"), ("vit", UPERNET), ("vit", DPT)])
def test_segmenters_are_whole_graphs(kind: str, head: str | dict[str, Any]) -> None:
    student = GKDStudentModel.from_encoder(encoder(kind))
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8, decode_head=head)
    model.freeze_encoder()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = {"pixel_values": torch.randn(2, 3, SIZE, SIZE), "labels": torch.randint(8, (2, SIZE, SIZE))}
    model(**batch).loss.backward()
    expected = gradients(model)
    torch.compile(model, backend="eager", fullgraph=True)(**batch).loss.backward()
    assert_close(gradients(model), expected)


def test_mask2former_breaks_only_where_transformers_looks_at_values() -> None:
    """Its matching runs on the host, and transformers looks for infinities behind each layer of the pixel decoder."""
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=8, decode_head=MASK2FORMER)
    model.freeze_encoder()
    model.train()
    model(torch.randn(2, 3, 32, 32))  # records hidden states from its first call on, which no graph could hold
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for classes in (2, 5, 8):
        compiled(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.randint(classes, (2, 32, 32))).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1, "other classes in an image compile again"
    reasons = list(counters["graph_break"])
    assert len(reasons) == 2, reasons
    assert any("Data-dependent branching" in reason for reason in reasons)
    assert any("Mask2FormerHead._loss" in reason for reason in reasons)


def test_a_compiled_training_is_the_eager_one_and_resumes_as_such(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "query_warmup_steps": 2}
    compiled = {"torch_compile": True, "torch_compile_backend": BACKEND}
    eager = single.distillation_trainer(tmp_path / "eager", **settings)
    eager.train()
    assert counters["stats"]["unique_graphs"] == 0

    trainer = single.distillation_trainer(tmp_path / "compiled", **settings, **compiled)
    trainer.train()
    # The teacher's; the student's with the queries off, and on; both of these with the attention looked at.
    assert counters["stats"]["unique_graphs"] >= 3
    assert not counters["graph_break"]
    curves = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (trainer, eager)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    names = load_file(tmp_path / "compiled" / "checkpoint-4" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "eager" / "checkpoint-4" / "model.safetensors").keys()
    trainer.save_model(str(tmp_path / "student"))
    GKDStudentModel.from_pretrained(tmp_path / "student")

    # Begun eager, and gone on compiled.
    broken = single.distillation_trainer(tmp_path / "mixed", **settings)
    broken.add_callback(Stop(2))
    broken.train()
    again = single.distillation_trainer(tmp_path / "mixed", **settings, **compiled)
    again.train(resume_from_checkpoint=True)
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == pytest.approx(curves[1], abs=1e-5)
    assert again.state.global_step == 4 and isinstance(again.model_wrapped, torch._dynamo.OptimizedModule)

    # Begun compiled, and gone on eager.
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
    again = single.distillation_trainer(tmp_path / "compiled", **settings)
    again.train(resume_from_checkpoint=True)
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == pytest.approx(curves[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_task_is_trained_in_one_graph(kind: str, tmp_path: Path) -> None:
    """Its trainer's, not the model's work alone: the encoder's hidden states are recorded from outside the graph."""
    settings = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    eager = single.segmentation_trainer(tmp_path / "eager", kind, **settings)
    eager.train()
    trainer = single.segmentation_trainer(
        tmp_path, kind, torch_compile=True, torch_compile_backend="eager", **settings
    )
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    curves = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (trainer, eager)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
