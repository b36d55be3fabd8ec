"""The 1.5·B step is the 2·B step, and only whole images feed the running statistics."""

from __future__ import annotations

import copy

import pytest
import torch

from gkd_hf import GKDObjective, GKDStudentModel
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.masking import random_masks
from gkd_hf.models.encoders import resample_tokens
from tests.tiny import ENCODERS

TEACHER_DIM, GRID = 20, (8, 8)


def make_distiller(kind: str) -> GKDDistiller:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    return GKDDistiller(student, GKDObjective(student.adapter.width, TEACHER_DIM))


def make_batch(size: int = 64, batch: int = 6) -> dict[str, object]:
    torch.manual_seed(1)
    rows, masks = random_masks(range(batch), GRID[0] * GRID[1])
    return {
        "pixel_values": torch.randn(batch, 3, size, size),
        "teacher_patches": torch.randn(batch, 64, TEACHER_DIM),
        "teacher_cls": torch.randn(batch, TEACHER_DIM),
        "grid": GRID,
        "mask_rows": rows,
        "masks": masks,
    }


def two_full_views(model: GKDDistiller, batch: dict) -> dict[str, torch.Tensor]:
    """The method as written: every sample forwarded twice, the unmasked ones with an empty mask."""
    student, pixels = model.student, batch["pixel_values"]
    everywhere = torch.zeros(len(pixels), GRID[0] * GRID[1], dtype=torch.bool)
    everywhere[batch["mask_rows"]] = batch["masks"]
    whole = student(pixels)
    masked = student(pixels, bool_masked_pos=everywhere, mask_grid=GRID)
    return model.objective(
        resample_tokens(whole.last_hidden_state, whole.grid, GRID),
        resample_tokens(masked.last_hidden_state, masked.grid, GRID),
        whole.pooler_output,
        batch["teacher_patches"],
        batch["teacher_cls"],
    )


@pytest.mark.parametrize(
    "kind, train", [("vit", True), ("dinov2", True), ("resnet", False), ("convnext", True), ("swin", False)]
)
def test_one_and_a_half_forwards_equal_two(kind: str, train: bool) -> None:
    ours = make_distiller(kind).double().train(train)
    plain = copy.deepcopy(ours)
    batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in make_batch().items()}
    losses, expected = ours(**batch), two_full_views(plain, batch)
    losses["total"].backward()
    expected["total"].backward()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=0)
    norms = []
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            norms.append(b.grad.norm())
            assert (a.grad - b.grad).norm() <= 1e-6 * b.grad.norm().clamp_min(1e-9), name
    assert torch.stack(norms).gt(0).sum() > 20


def test_fewer_images_are_forwarded() -> None:
    model = make_distiller("vit")
    seen = []
    model.student.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model(**make_batch(batch=6))
    assert seen == [6, 3]


def test_whole_images_alone_feed_the_running_statistics() -> None:
    model = make_distiller("resnet").train()
    alone = copy.deepcopy(model)
    batch = make_batch()
    model(**batch)
    alone.student(batch["pixel_values"])
    for (name, ours), expected in zip(model.student.named_buffers(), alone.student.buffers(), strict=True):
        assert torch.equal(ours, expected), name
    assert model.student.encoder.embedder.embedder.normalization.num_batches_tracked == 1


def test_the_masked_view_has_its_own_batch_statistics() -> None:
    """In train mode the masked samples are normalised among themselves, so the 2·B loss differs by construction."""
    model = make_distiller("resnet").train()
    batch = make_batch()
    plain = two_full_views(copy.deepcopy(model), batch)
    ours = model(**batch)
    torch.testing.assert_close(ours["feature"], plain["feature"])
    assert not torch.isclose(ours["patch"], plain["patch"], rtol=1e-5)


def test_frozen_batch_norms_stay_in_eval_mode() -> None:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"], freeze_batch_norm=True)
    model = GKDDistiller(student, GKDObjective(24, TEACHER_DIM)).train()
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    model(**make_batch())["total"].backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in student.named_buffers())
    assert student.encoder.embedder.embedder.normalization.weight.grad is not None
    assert student.training


def test_no_masks_means_one_view() -> None:
    model = make_distiller("vit")
    batch = make_batch()
    batch["mask_rows"], batch["masks"] = torch.zeros(0, dtype=torch.long), torch.zeros(0, 64, dtype=torch.bool)
    losses = model(**batch)
    output = model.student(batch["pixel_values"])
    expected = model.objective(
        output.last_hidden_state,
        output.last_hidden_state,
        output.pooler_output,
        batch["teacher_patches"],
        batch["teacher_cls"],
    )
    assert losses["total"] == expected["total"]


def test_attention_is_looked_at_when_asked() -> None:
    model = make_distiller("vit")
    batch = make_batch()
    losses = model(**batch, attention=True)
    tokens = model.student(batch["pixel_values"]).last_hidden_state[:2]
    expected = model.objective.feature.attention_statistics(tokens, batch["teacher_patches"][:2])
    assert losses.keys() - model(**batch).keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def saved_bytes_and_gradients(model: GKDDistiller, batch: dict[str, object]) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the forward keeps for the backward, each storage once, and what the backward gives."""
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch)["total"]
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return size, {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin"])
def test_activation_checkpointing_keeps_less_and_gives_the_same(kind: str) -> None:
    plain = make_distiller(kind).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable()
    batch = make_batch()
    torch.manual_seed(2)  # Swin drops paths
    size, expected = saved_bytes_and_gradients(plain, batch)
    torch.manual_seed(2)
    less, gradients = saved_bytes_and_gradients(saving, batch)
    assert less < 0.6 * size
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
