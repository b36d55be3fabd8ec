"""Several teachers in one objective: tokens of one scale, one weighted sum, every term by its teacher's name."""

from __future__ import annotations

import math

import pytest
import torch

from gkd_hf import GKDObjective, GKDStudentModel, GKDTeacher, InputError, MSEObjective
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.standardise import LEAST_DEVIATION, TokenStandardisation, TokenStatistics
from gkd_hf.teacher import short_names
from tests.tiny import ENCODERS

STUDENT, WIDTHS, BATCH, TOKENS = 6, (5, 8), 3, 16


def tokens(scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens 40×16×5 and class tokens 40×5, with another deviation in each channel."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])
    patches = torch.randn(40, TOKENS, 5, generator=generator) * spread + 3.0
    cls = torch.randn(40, 5, generator=generator) * spread.flip(0) - 1.0
    return scale * patches + shift, scale * cls + shift


def fitted(patches: torch.Tensor, cls: torch.Tensor, batch: int = 8) -> TokenStandardisation:
    module, found = TokenStandardisation(patches.shape[-1]), TokenStatistics()
    for pair in zip(patches.split(batch), cls.split(batch), strict=True):
        found.add(*pair)
    module.fit(found)
    return module


def test_standardised_tokens_have_mean_0_and_deviation_1() -> None:
    patches, cls = tokens()
    module = fitted(patches, cls)
    assert module.images == 40
    torch.testing.assert_close(module.patch_mean, patches.mean((0, 1)))
    torch.testing.assert_close(module.patch_std, patches.std((0, 1), correction=0))
    torch.testing.assert_close(module.cls_std, cls.std(0, correction=0))
    for ours, raw, dims in zip(module(patches, cls), (patches, cls), ((0, 1), (0,)), strict=True):
        assert ours.shape == raw.shape
        torch.testing.assert_close(ours.mean(dims), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.std(dims, correction=0), torch.ones(5))
    halves = module(patches.bfloat16(), cls.bfloat16())
    assert {half.dtype for half in halves} == {torch.bfloat16}
    torch.testing.assert_close(halves[0].float(), module(patches.bfloat16().float(), cls)[0], atol=0.05, rtol=0.01)


def test_neither_batches_nor_scale_change_what_comes_out() -> None:
    module, other = fitted(*tokens()), fitted(*tokens(), batch=40)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer, rtol=1e-6, atol=0)
    large = fitted(*tokens(scale=1e6))
    for ours, expected in zip(large(*tokens(scale=1e6)), module(*tokens()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_dead_channel_is_not_blown_up() -> None:
    patches, cls = tokens()
    patches[..., 0] = 7 + 1e-6 * torch.randn(patches.shape[:-1])
    cls[:] = 2.0
    module = fitted(patches, cls)
    spread = patches.std((0, 1), correction=0)
    torch.testing.assert_close(module.patch_std[0], LEAST_DEVIATION * spread.mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(module.patch_std[1:], spread[1:])
    standard, standard_cls = module(patches, cls)
    assert standard[..., 0].abs().max() < 1e-2
    assert torch.equal(module.cls_std, torch.ones(5)) and torch.equal(standard_cls, torch.zeros(40, 5))


def test_what_cannot_be_standardised_is_told() -> None:
    with pytest.raises(InputError, match="no image to estimate them from"):
        TokenStandardisation(5).fit(TokenStatistics())
    patches, cls = tokens()
    with pytest.raises(InputError, match="not finite on the first 40 images"):
        fitted(patches.where(patches < 3, torch.inf), cls)


def student_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, TOKENS, STUDENT), torch.randn(BATCH, TOKENS, STUDENT), torch.randn(BATCH, STUDENT)


def teacher_tokens() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(2)
    patches = [1 + scale * torch.randn(BATCH, TOKENS, width) for width, scale in zip(WIDTHS, (1, 30), strict=True)]
    return patches, [scale * torch.randn(BATCH, width) for width, scale in zip(WIDTHS, (1, 30), strict=True)]


def make(kind: type = GKDObjective, **settings: object) -> MultiTeacherObjective:
    torch.manual_seed(3)
    return MultiTeacherObjective([kind(STUDENT, width) for width in WIDTHS], ("a", "b"), **settings)


def test_the_total_is_the_weighted_sum_of_the_teachers_totals() -> None:
    objective = make(weights=(1, 0.5), standardised=(False, True))
    (patches, cls), student = teacher_tokens(), student_tokens()
    objective.standardise["1"] = fitted(patches[1], cls[1])
    losses = objective(*student, patches, cls)
    assert set(losses) == {"total", *(f"{k}/{name}" for k in "ab" for name in ("total", "token", "feature", "patch"))}
    for k, name in enumerate("ab"):
        seen = objective.standardise["1"](patches[1], cls[1]) if k else (patches[0], cls[0])
        for term, value in objective.objectives[k](*student, *seen).items():
            assert losses[f"{name}/{term}"] == value
    torch.testing.assert_close(losses["total"], losses["a/total"] + 0.5 * losses["b/total"])
    losses["total"].backward()
    without = {name for name, parameter in objective.named_parameters() if parameter.grad is None}
    assert {name.split(".")[2:4] == ["token", "query"] for name in without} == {True}


def test_the_scale_of_a_teacher_changes_nothing() -> None:
    (patches, cls), student, results = teacher_tokens(), student_tokens(), []
    for scale in (1.0, 100.0):
        objective = make()
        scaled = [patches[0], scale * patches[1]], [cls[0], scale * cls[1]]
        assert [k for k, _ in objective.unfitted()] == [0, 1]
        for k in (0, 1):
            objective.standardise[str(k)] = fitted(scaled[0][k], scaled[1][k])
        assert objective.unfitted() == []
        results.append(objective(*student, *scaled))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=0, msg=name)


def test_attention_is_described_for_each_teacher_as_its_head_sees_it() -> None:
    objective, (patches, cls), student = make(), teacher_tokens(), student_tokens()[0][:2]
    for k in (0, 1):
        objective.standardise[str(k)] = fitted(patches[k], cls[k])
    found = objective.attention_statistics(student, patches)
    for k, name in enumerate("ab"):
        seen = objective.standardise[str(k)].patches(patches[k][:2])
        for statistic, value in objective.objectives[k].feature.attention_statistics(student, seen).items():
            assert found.pop(f"{name}/{statistic}") == value
    assert not found


def test_the_distiller_takes_several_teachers() -> None:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    objective = MultiTeacherObjective([MSEObjective(24, width) for width in WIDTHS], ("a", "b"))
    (patches, cls), mask = teacher_tokens(), torch.rand(1, TOKENS) < 0.5
    model = GKDDistiller(student, objective)
    losses = model(torch.randn(BATCH, 3, 32, 32), patches, cls, (4, 4), torch.tensor([1]), mask)
    assert losses["total"] == losses["a/total"] + losses["b/total"]
    alone = GKDDistiller(student, objective.objectives[0])
    assert not any("standardise" in name or "objectives" in name for name in alone.state_dict())


def test_several_teachers_are_one_compiled_graph() -> None:
    objective, (patches, cls), student = make(), teacher_tokens(), student_tokens()
    compiled = torch.compile(objective, backend="eager", fullgraph=True)(*student, patches, cls)
    for name, value in objective(*student, patches, cls).items():
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"weights": (1, 0)}, r"must be more than 0 and finite, got \(1.0, 0.0\)"),
        ({"weights": (1, math.inf)}, "must be more than 0 and finite"),
        ({"weights": (1,)}, r"2 objective\(s\), 2 name\(s\), 1 weight\(s\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make(**settings)


def test_names_are_unique() -> None:
    with pytest.raises(InputError, match="names of their own, got 'a', 'a'"):
        MultiTeacherObjective([MSEObjective(4, 4), MSEObjective(4, 4)], ("a", "a"))
    assert short_names(["facebook/dinov2-base", "/x/vit/", "/y/vit"]) == ["dinov2-base", "vit-1", "vit-2"]
    assert len(set(short_names(["o/vit", "p/vit", "o/vit-1"]))) == 3


def test_bad_weights_and_shardings_of_a_teacher_are_refused() -> None:
    with pytest.raises(InputError, match="a teacher's weight must be more than 0 and finite, got -1"):
        GKDTeacher(ENCODERS["vit"], weight=-1)
    with pytest.raises(InputError, match="unknown teacher sharding 'sometimes'"):
        GKDTeacher(ENCODERS["vit"], sharding="sometimes")
