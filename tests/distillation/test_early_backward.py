"""One view at a time: the losses and gradients of both together, and less in memory."""

from __future__ import annotations

import copy

import pytest
import torch

from gkd_hf import GKDObjective, GKDStudentModel
from gkd_hf.benchmarks.step import keeping
from gkd_hf.distillation.distiller import GKDDistiller, _others
from gkd_hf.distillation.early_backward import backward_early
from gkd_hf.distillation.masking import random_masks
from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.objective import OBJECTIVES
from tests.tiny import ENCODERS

GRID = (8, 8)
TOKENS = GRID[0] * GRID[1]


def distiller(kind: str = "vit", objective: str = "qsd", widths: tuple[int, ...] = (20,)) -> GKDDistiller:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    heads = [OBJECTIVES[objective](student.adapter.width, width, (1.0, 0.5, 2.0)) for width in widths]
    if len(heads) == 1:
        return GKDDistiller(student, heads[0])
    several = MultiTeacherObjective(heads, ["a", "b"], [1.0, 3.0], [True, False])
    several.standardise["0"].images.fill_(1)  # its statistics are those it was made with
    return GKDDistiller(student, several)


def batch(images: int = 6, widths: tuple[int, ...] = (20,), probability: float = 0.5) -> dict[str, object]:
    torch.manual_seed(1)
    rows, masks = random_masks(range(images), TOKENS, sample_probability=probability)
    patches = tuple(torch.randn(images, TOKENS, width) for width in widths)
    cls = tuple(torch.randn(images, width) for width in widths)
    return {
        "pixel_values": torch.randn(images, 3, 64, 64),
        "teacher_patches": patches[0] if len(widths) == 1 else patches,
        "teacher_cls": cls[0] if len(widths) == 1 else cls,
        "grid": GRID,
        "mask_rows": rows,
        "masks": masks,
    }


def in_double(values: dict[str, object]) -> dict[str, object]:
    def widened(value: object) -> object:
        if isinstance(value, tuple) and torch.is_tensor(value[0]):
            return tuple(each.double() for each in value)
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    return {key: widened(value) for key, value in values.items()}


CASES = {
    "qsd": ("vit", "qsd", (20,)),
    "mask token": ("dinov2", "qsd", (20,)),
    "mse": ("vit", "mse", (20,)),
    "proteus": ("vit", "proteus", (20,)),
    "two teachers": ("vit", "qsd", (20, 12)),
    "batch norms": ("resnet", "qsd", (20,)),
    "warm-up": ("vit", "qsd", (20,)),
    "frozen student": ("vit", "mse", (20,)),
    "mask token alone": ("vit", "mse", (20,)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_losses_gradients_and_statistics_are_those_of_both_views_together(case: str, probability: float) -> None:
    kind, objective, widths = CASES[case]
    plain = distiller(kind, objective, widths).double().train()
    if case == "warm-up":
        plain.objective.set_query_enabled(False)
    frozen = {"frozen student": plain.student, "mask token alone": plain}.get(case)
    if frozen is not None:
        frozen.requires_grad_(False)
    if case == "mask token alone":
        (mask_token,) = (each for name, each in plain.named_parameters() if name.endswith("mask_token"))
        mask_token.requires_grad_(True)
    early = copy.deepcopy(plain)
    early.early_backward = True
    inputs = in_double(batch(widths=widths, probability=probability))
    expected, losses = plain(**inputs), early(**inputs)
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=0)
    # Not by 1, as where micro batches are accumulated.
    (0.25 * expected["total"]).backward()
    (0.25 * losses["total"]).backward()
    pairs = list(zip(early.named_parameters(), plain.parameters(), strict=True))
    least = {"frozen student": 11, "mask token alone": 0}.get(case, 20)
    assert sum(wanted.grad is not None and wanted.grad.norm() > 0 for _, wanted in pairs) > least
    for (name, own), wanted in pairs:
        assert (own.grad is None) is (wanted.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-6, atol=1e-10, msg=name)
    for own, wanted in zip(early.buffers(), plain.buffers(), strict=True):
        assert torch.equal(own, wanted)


def test_autocast_casts_as_it_does_for_both_views_together() -> None:
    plain = distiller().train()
    early = copy.deepcopy(plain)
    early.early_backward = True
    inputs, gradients = batch(), []
    for model in (plain, early):
        with torch.autocast("cpu", torch.bfloat16):
            total = model(**inputs)["total"]
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    # bf16 rounds at other places where sums are cut; one in a hundred is what its 8 bits leave.
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_attention_is_looked_at_as_it_is() -> None:
    plain = distiller()
    early = copy.deepcopy(plain)
    early.early_backward = True
    expected, found = plain(**batch(), attention=True), early(**batch(), attention=True)
    assert {"self_weight", "attention_entropy", "logit_std"} < found.keys()
    for name in ("self_weight", "attention_entropy", "logit_std"):
        torch.testing.assert_close(found[name], expected[name])


def test_one_views_activations_are_kept() -> None:
    plain = distiller()
    early = copy.deepcopy(plain)
    early.early_backward = True
    inputs, kept = batch(images=12, probability=1.0), []
    for model in (plain, early):
        with keeping() as memory:
            model(**inputs)["total"].backward()
        kept.append(memory.most)
    gradients = sum(p.numel() * p.element_size() for p in early.parameters() if p.requires_grad)
    # Of two views of all images one, and the first one's gradients.
    assert kept[1] < 0.6 * kept[0] + gradients


def test_without_gradients_or_masks_it_is_the_same_as_ever() -> None:
    plain = distiller().eval()
    early = copy.deepcopy(plain)
    early.early_backward = True
    with torch.no_grad():
        assert torch.equal(early(**batch())["total"], plain(**batch())["total"])
    none = batch() | {"mask_rows": torch.empty(0, dtype=torch.long), "masks": torch.empty(0, TOKENS, dtype=torch.bool)}
    assert torch.equal(early(**none)["total"], plain(**none)["total"])


def test_activations_can_be_recomputed_in_the_early_pass() -> None:
    plain = distiller().train()
    early = copy.deepcopy(plain)
    early.early_backward = True
    early.activation_checkpointing_enable()
    kept = []
    for model in (plain, early):
        with keeping() as memory:
            model(**batch())["total"].backward()
        kept.append(memory.most)
    assert kept[1] < 0.6 * kept[0]
    for own, wanted in zip(early.parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-4, atol=1e-6)


def test_each_parameter_gets_one_gradient_at_the_usual_time() -> None:
    model = distiller().train()
    model.early_backward = True
    times: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, n=name: times.update({n: times.get(n, 0) + 1}))
    losses = model(**batch())
    assert not times and all(parameter.grad is None for parameter in model.parameters())
    losses["total"].backward()
    assert set(times.values()) == {1}
    assert times.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_all_losses_but_the_total_are_for_the_log() -> None:
    weight = torch.tensor([3.0], requires_grad=True)
    unused = torch.tensor([1.0], requires_grad=True)
    losses = backward_early(lambda: {"total": (weight**2).sum(), "part": weight.sum()}, [weight, unused])
    assert losses["total"].requires_grad and not losses["part"].requires_grad
    (2 * losses["total"]).backward()
    assert weight.grad.item() == 12.0 and unused.grad is None


def test_parameters_that_share_a_gradient_get_their_own_of_it() -> None:
    """Autograd gives both terms of a sum one tensor, and a sum's parameter an expanded scalar."""
    first, second, spread = (torch.ones(3, requires_grad=True) for _ in range(3))
    losses = backward_early(lambda: {"total": (first + second).square().sum() + spread.sum()}, [first, second, spread])
    (0.5 * losses["total"]).backward()
    assert [each.grad.tolist() for each in (first, second, spread)] == [[2.0] * 3, [2.0] * 3, [0.5] * 3]


@pytest.mark.parametrize("rows", [[], [0], [3, 1], [4, 0, 2, 1, 3]])
def test_the_others_are_those_that_are_not_masked(rows: list[int]) -> None:
    others = _others(torch.tensor(rows, dtype=torch.long), 5)
    assert sorted([*rows, *others.tolist()]) == [0, 1, 2, 3, 4]


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        GKDObjective(12, 20).whole_view(
            torch.randn(2, 4, 12), torch.randn(2, 12), torch.randn(2, 9, 20), torch.randn(2, 20), torch.tensor([0])
        )
