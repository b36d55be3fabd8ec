"""QSD and the objectives: hand-worked numbers, the reference implementation's losses and gradients, bad shapes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gkd_hf import GKDObjective, InputError, MSEObjective, QuerySoftDistillation

REFERENCE = os.environ.get("GKD_REFERENCE_DATA")
OURS = {"proj_q.0": "query.norm", "proj_q.1": "query.proj", "proj_v.0": "value.norm", "proj_v.1": "value.proj"}


def test_qsd_by_hand() -> None:
    """Two tokens of two channels. LN of (0, 2) is (−1, 1) up to eps; identity maps make the rest plain arithmetic."""
    head = QuerySoftDistillation(2, 2)
    with torch.no_grad():
        head.query.proj.weight.copy_(torch.eye(2))
        head.query.proj.bias.zero_()
        head.value.proj.weight.copy_(3 * torch.eye(2))
        head.value.proj.bias.copy_(torch.tensor([1.0, 0.0]))
    student = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    # q₀ = (−1, 1): q₀·k = (1, −0.5); q₁ = (1, −1): q₁·k = (−1, 0.5); v = (−2, 3), (4, −3)
    a = 1 / (1 + math.exp(-1.5))
    b = 1 / (1 + math.exp(1.5))
    expected = [[a * -2 + (1 - a) * 4, a * 3 - (1 - a) * 3], [b * -2 + (1 - b) * 4, b * 3 - (1 - b) * 3]]
    torch.testing.assert_close(head(student, teacher), torch.tensor([expected]), atol=2e-4, rtol=0)


def test_attention_scale_is_a_factor_on_the_logits() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    head = QuerySoftDistillation(6, 4, scale=0.5)
    attention = (head.query(student) @ teacher.transpose(1, 2) * 0.5).softmax(-1)
    torch.testing.assert_close(head(student, teacher), attention @ head.value(student))


def test_losses_by_hand() -> None:
    """Heads that give constants: token error 1 per channel, features 2, patches 3; N = 3, so features mix 1 : 3."""
    objective = MSEObjective(2, 2, weights=(1, 10, 100))
    with torch.no_grad():
        for head, bias in ((objective.token, 1.0), (objective.feature, 2.0), (objective.patch, 3.0)):
            head.value.proj.weight.zero_()
            head.value.proj.bias.fill_(bias)
    patches, cls = torch.randn(2, 3, 2), torch.randn(2, 2)
    losses = objective(patches, patches, cls, torch.zeros(2, 3, 2), torch.zeros(2, 2))
    losses = {name: value.item() for name, value in losses.items()}
    assert losses["token"] == pytest.approx(1)
    assert losses["feature"] == pytest.approx((1 * 1 + 3 * 4) / 4)
    assert losses["patch"] == pytest.approx(9)
    assert losses["total"] == pytest.approx(1 + 10 * 3.25 + 100 * 9)


def test_the_masked_view_only_feeds_the_patch_loss() -> None:
    torch.manual_seed(0)
    objective = GKDObjective(4, 6)
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    first = objective(*inputs)
    inputs[1] = inputs[1] + 1
    inputs[1][0, 0, 0] -= 5
    second = objective(*inputs)
    assert first["token"] == second["token"] and first["feature"] == second["feature"]
    assert first["patch"] != second["patch"]


def test_keys_are_the_documented_ones_and_mse_is_the_value_branch() -> None:
    objective = GKDObjective(4, 6)
    expected = {
        f"{head}.{branch}.{part}.{tensor}"
        for head in ("patch", "feature", "token")
        for branch in ("query", "value")
        for part in ("norm", "proj")
        for tensor in ("weight", "bias")
    }
    assert set(objective.state_dict()) == expected
    mse = MSEObjective(4, 6)
    mse.load_state_dict({key: value for key, value in objective.state_dict().items() if ".value." in key})
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    objective.set_query_enabled(False)
    warm, plain = objective(*inputs), mse(*inputs)
    for name in plain:
        torch.testing.assert_close(warm[name], plain[name])


def test_query_warmup_keeps_the_query_in_the_graph_and_ends_with_a_copy() -> None:
    objective = GKDObjective(4, 6)
    objective.set_query_enabled(False)
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    objective(*inputs)["total"].backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad.abs().sum() == 0 for name, p in trained.items() if ".query." in name)
    objective.start_query_from_value()
    for head in (objective.patch, objective.feature):
        assert head.query_enabled
        assert torch.equal(head.query.proj.weight, head.value.proj.weight)


def test_token_head_has_no_query_gradient() -> None:
    objective = GKDObjective(4, 6)
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    inputs[3].requires_grad_()
    objective(*inputs)["total"].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.token.query.parameters())
    assert inputs[3].grad is None  # the teacher is not taught


def test_attention_statistics_know_one_hot_from_uniform() -> None:
    head = QuerySoftDistillation(4, 4)
    tokens = torch.eye(4)[None]
    with torch.no_grad():
        head.query.proj.weight.zero_()
        head.query.proj.bias.zero_()
    uniform = head.attention_statistics(tokens, tokens)
    assert uniform["attention_entropy"] == pytest.approx(math.log(4))
    assert uniform["self_weight"] == pytest.approx(0.25)
    assert uniform["logit_std"] == 0
    with torch.no_grad():
        head.query.proj.weight.copy_(100 * torch.eye(4))
    one_hot = head.attention_statistics(tokens, tokens)
    assert one_hot["attention_entropy"] == pytest.approx(0, abs=1e-4)
    assert one_hot["self_weight"] == pytest.approx(1)


@pytest.mark.skipif(REFERENCE is None, reason="GKD_REFERENCE_DATA is not set")
def test_reference_losses_and_gradients() -> None:
    golden = load_file(Path(REFERENCE) / "golden" / "gkd_loss.safetensors")

    def ours(name: str) -> str:
        for theirs, mine in OURS.items():
            name = name.replace(theirs, mine)
        return name

    def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return ((actual - expected).norm() / expected.norm()).item()

    weights = {ours(k): v for k, v in golden.items() if k.split(".")[0] in ("patch", "feature", "token")}
    cls, patches = golden["teacher_cls"], golden["teacher_patch"]
    objective = GKDObjective(golden["student_cls"].shape[1], cls.shape[1])
    objective.load_state_dict(weights)
    inputs = {key: golden[key].requires_grad_() for key in ("student_patch", "student_patch_masked", "student_cls")}
    losses = objective(
        student_patches=inputs["student_patch"],
        student_patches_masked=inputs["student_patch_masked"],
        student_cls=inputs["student_cls"],
        teacher_patches=patches,
        teacher_cls=cls,
    )
    losses["total"].backward()
    for name, value in losses.items():
        assert relative(value, golden[f"loss.{name}"]) < 1e-5, name
    outputs = {
        "patch": objective.patch(inputs["student_patch_masked"], patches),
        "feature": objective.feature(inputs["student_patch"], patches),
        "token": objective.token(inputs["student_cls"][:, None], cls[:, None]),
    }
    for name, value in outputs.items():
        assert relative(value, golden[f"out.{name}"]) < 1e-5, name
    for name, tensor in inputs.items():
        assert relative(tensor.grad, golden[f"grad.{name}"]) < 1e-5, name
    checked = 0
    gradients = {ours(k.removeprefix("grad.")): v for k, v in golden.items() if k.startswith("grad.")}
    for name, parameter in objective.named_parameters():
        if name.startswith("token.query"):
            assert parameter.grad is None and gradients[name].abs().max() == 0
        else:
            assert relative(parameter.grad, gradients[name]) < 1e-5, name
            checked += 1
    assert checked == 20


@pytest.mark.parametrize(
    "change, message",
    [
        ((1, (2, 4, 4)), "student_patches and student_patches_masked do not fit"),
        ((3, (2, 4, 6)), "student_patches and teacher_patches"),
        ((2, (2, 5)), "student_cls and student_patches"),
        ((4, (3, 6)), "teacher_cls and teacher_patches"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: tuple[int, tuple[int, ...]], message: str) -> None:
    inputs = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 5, 6), torch.randn(2, 6)]
    inputs[change[0]] = torch.randn(*change[1])
    with pytest.raises(InputError, match=message):
        GKDObjective(4, 6)(*inputs)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="≥ 0 and not all 0"):
        GKDObjective(4, 6, weights=(0, 0, 0))
    with pytest.raises(InputError, match="≥ 0 and not all 0"):
        MSEObjective(4, 6, weights=(1, -1, 1))
    with pytest.raises(InputError, match="attention_scale must be positive"):
        GKDObjective(4, 6, attention_scale=0)
