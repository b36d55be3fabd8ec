"""Proteus's patch loss: hidden patches alone count, by hand, and the distiller says which they are."""

from __future__ import annotations

import pytest
import torch

from gkd_hf import GKDStudentModel, InputError
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.objective import GKDObjective, MSEObjective, ProteusObjective
from tests.tiny import ENCODERS


def identity_objective() -> ProteusObjective:
    """Patch head LN, then the identity: the student's (0, 2) becomes (−1, 1) and its (2, 0) becomes (1, −1)."""
    objective = ProteusObjective(2, 2, weights=(1, 10, 100))
    with torch.no_grad():
        objective.patch.value.proj.weight.copy_(torch.eye(2))
        objective.patch.value.proj.bias.zero_()
        for head, bias in ((objective.token, 1.0), (objective.feature, 2.0)):
            head.value.proj.weight.zero_()
            head.value.proj.bias.fill_(bias)
    return objective


def test_losses_by_hand() -> None:
    """B = 2, N = 3, C = 2; three patches are hidden, unevenly over the samples and not as many as are seen."""
    up, down = [0.0, 2.0], [2.0, 0.0]
    patches = torch.tensor([[up, down, up], [down, down, up]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    teacher = torch.tensor([[[1.0, 0.0], [50.0, 50.0], [-1.0, 4.0]], [[60.0, 0.0], [2.0, 2.0], [0.0, 70.0]]])
    # errors at the hidden places: (−1, 1) − (1, 0) → 4 + 1; (−1, 1) − (−1, 4) → 0 + 9; (1, −1) − (2, 2) → 1 + 9
    seen_whole, cls = torch.randn(2, 3, 2), torch.randn(2, 2)
    objective = identity_objective()
    losses = objective(seen_whole, patches, cls, teacher, torch.zeros(2, 2), mask)
    assert losses["patch"].item() == pytest.approx((5 + 9 + 10) / (3 * 2), rel=1e-4)
    # token: 1 per channel. feature: (2 − t)² of all six tokens, 48² twice, 58², 68², and 1, 2², 3², 2², 2², 2² beside
    patch_errors = (1 + 4) + 2 * 48**2 + (9 + 4) + (58**2 + 4) + (0 + 0) + (4 + 68**2)
    assert losses["token"].item() == pytest.approx(1)
    assert losses["feature"].item() == pytest.approx((4 * 1 + patch_errors) / (2 * 4 * 2))
    expected = 1 + 10 * (4 + patch_errors) / 16 + 100 * 4
    assert losses["total"].item() == pytest.approx(expected, rel=1e-4)


def test_gradient_reaches_hidden_patches_alone() -> None:
    torch.manual_seed(0)
    objective, masked = ProteusObjective(4, 6), torch.randn(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[False, True, False, False, True], [False] * 5])
    objective(torch.randn(2, 5, 4), masked, torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6), mask)[
        "patch"
    ].backward()
    assert torch.equal(masked.grad.abs().sum(-1) > 0, mask)


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 5, dtype=torch.bool)])
def test_nothing_hidden_is_no_patch_loss_and_still_a_gradient(mask: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    objective = ProteusObjective(4, 6)
    patches = torch.randn(2, 5, 4)
    losses = objective(patches, patches, torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6), mask)
    losses["total"].backward()
    assert losses["patch"] == 0
    assert losses["total"] == losses["token"] + losses["feature"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert all(p.grad.abs().sum() == 0 for p in objective.patch.parameters())


@pytest.mark.parametrize("kind", [MSEObjective, GKDObjective])
def test_the_other_objectives_take_all_patches(kind: type[MSEObjective]) -> None:
    torch.manual_seed(0)
    objective = kind(4, 6)
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    assert objective(*inputs, mask=torch.rand(2, 5) > 0.5)["patch"] == objective(*inputs)["patch"]


def test_a_mask_of_another_shape_is_named() -> None:
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    with pytest.raises(InputError, match=r"mask and student_patches do not fit together: .*'mask': \(1, 5\)"):
        ProteusObjective(4, 6)(*inputs, mask=torch.zeros(1, 5, dtype=torch.bool))


def test_the_distiller_hands_over_which_patches_each_sample_lost() -> None:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    model = GKDDistiller(student, ProteusObjective(student.adapter.width, 20))
    seen = []
    model.objective.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True
    )
    batch = {
        "pixel_values": torch.randn(4, 3, 64, 64),
        "teacher_patches": torch.randn(4, 64, 20),
        "teacher_cls": torch.randn(4, 20),
        "grid": (8, 8),
    }
    masks = torch.zeros(2, 64, dtype=torch.bool)
    masks[0, 3] = masks[1, 5] = masks[1, 60] = True
    assert model(**batch, mask_rows=torch.tensor([1, 3]), masks=masks)["patch"] > 0
    assert seen[0].nonzero().tolist() == [[1, 3], [3, 5], [3, 60]]
    assert model(**batch, mask_rows=torch.zeros(0, dtype=torch.long), masks=masks[:0])["patch"] == 0
    assert seen[1] is None
