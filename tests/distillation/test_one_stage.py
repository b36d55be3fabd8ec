"""The one-stage methods against their formulas, computed anew in plain loops on maps of a few numbers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn

from gkd_hf.distillation.one_stage import (
    ONE_STAGE,
    AugmentationFreeContrast,
    ChannelWiseDistillation,
    Features,
    KnowledgeDistillation,
    OneStageMethod,
    ViTKD,
)

LEFT, ITSELF = (1, 0), (1, 1)


def softmax(scores: list[float], temperature: float) -> list[float]:
    total = sum(math.exp(score / temperature) for score in scores)
    return [math.exp(score / temperature) / total for score in scores]


def kl(teacher: list[float], student: list[float], temperature: float) -> float:
    """KL(teacher ‖ student) of the softmaxes of two lists of scores."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def of_map(maps: torch.Tensor, **more: object) -> Features:
    """Features whose patches are B×C×h×w maps."""
    return Features(maps.flatten(2).transpose(1, 2), tuple(maps.shape[-2:]), **more)


@torch.no_grad()
def set_convolutions(layers: nn.Sequential, first: tuple[int, int], scale: float = 1.0) -> None:
    """Both 3×3 convolutions pick a single neighbour of their own channel, the second one the place itself, scaled."""
    for layer, (row, column), factor in ((layers[0], first, 1.0), (layers[2], ITSELF, scale)):
        layer.weight.zero_()
        layer.bias.zero_()
        for channel in range(layer.weight.shape[0]):
            layer.weight[channel, channel, row, column] = factor


@torch.no_grad()
def set_linear(layer: nn.Module, weight: list[list[float]], bias: list[float] | None = None) -> None:
    layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
    if bias is not None:
        layer.bias.copy_(torch.tensor(bias))


def test_kd_of_features_by_hand() -> None:
    """LN of (0, 2) is (−1, 1), of (5, 1) is (1, −1); two tokens of three channels make a mean over six."""
    method = KnowledgeDistillation(2, 3, 19, weight=0.5)
    set_linear(method.head.proj, [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [0.0, 0.0, 1.0])
    student = Features(torch.tensor([[[0.0, 2.0], [5.0, 1.0]]]), (1, 2))
    teacher = Features(torch.tensor([[[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]]), (1, 2))
    # (−1, 2, 1) − (1, 2, 3) → 4 + 0 + 4; (1, −2, 1) − (0, 1, 0) → 1 + 9 + 1
    losses = method(student, teacher)
    assert losses["feature"].item() == pytest.approx(19 / 6, rel=1e-4)
    assert losses["total"].item() == pytest.approx(19 / 12, rel=1e-4)
    assert losses.keys() == {"feature", "total"} and not method.needs_logits


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_of_logits_by_hand(temperature: float) -> None:
    torch.manual_seed(0)
    own, other = torch.randn(2, 3, 2, 4), 2 * torch.randn(2, 3, 2, 4)
    method = KnowledgeDistillation(2, 3, 3, target="logits", temperature=temperature)
    losses = method(of_map(torch.zeros(2, 2, 1, 1), logits=own), of_map(torch.zeros(2, 3, 1, 1), logits=other))
    pixels = [
        kl(other[b, :, y, x].tolist(), own[b, :, y, x].tolist(), temperature)
        for b, y, x in product(range(2), range(2), range(4))
    ]
    assert losses["logits"].item() == pytest.approx(temperature**2 * sum(pixels) / 16, rel=1e-5)
    assert losses["total"] == losses["logits"]
    assert method.needs_logits and not list(method.parameters())


def test_the_teachers_logits_take_the_students_size() -> None:
    """Bilinear without aligned corners: 0 and 1 at two places become 0, ¼, ¾, 1 at four."""
    own = torch.tensor([[[[1.0, -1.0, 0.5, 2.0]], [[0.0] * 4]]])
    other = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]])
    method = KnowledgeDistillation(2, 2, 2, target="logits")
    losses = method(of_map(torch.zeros(1, 2, 1, 1), logits=own), of_map(torch.zeros(1, 2, 1, 1), logits=other))
    pixels = [kl([t, 0.0], [s, 0.0], 1.0) for t, s in zip((0, 0.25, 0.75, 1), (1, -1, 0.5, 2), strict=True)]
    assert losses["logits"].item() == pytest.approx(sum(pixels) / 4, rel=1e-5)


def test_cwd_by_hand() -> None:
    """Softmax over places; the student's map through 1×1 convolution, batch norm over samples and places, ReLU."""
    torch.manual_seed(0)
    own, other = torch.randn(2, 2, 2, 3), torch.randn(2, 3, 2, 3)
    logits, scores = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    method = ChannelWiseDistillation(2, 3, 4, logits_temperature=4, feature_temperature=2).train()
    weight = [[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]]
    set_linear(method.align[0], weight)
    losses = method(of_map(own, logits=logits), of_map(other, logits=scores))
    of_logits = sum(
        kl(scores[b, c].flatten().tolist(), logits[b, c].flatten().tolist(), 4) for b, c in product(range(2), range(4))
    )
    of_features = 0.0
    for c, (first, second) in enumerate(weight):
        aligned = [(first * own[b, 0] + second * own[b, 1]).flatten().tolist() for b in range(2)]
        mean = sum(map(sum, aligned)) / 12
        variance = sum((value - mean) ** 2 for row in aligned for value in row) / 12
        for b in range(2):
            normed = [max(0.0, (value - mean) / math.sqrt(variance + 1e-5)) for value in aligned[b]]
            of_features += kl(other[b, c].flatten().tolist(), normed, 2)
    assert losses["logits"].item() == pytest.approx(16 * of_logits / 8, rel=1e-4)
    assert losses["feature"].item() == pytest.approx(4 * of_features / 6, rel=1e-4)
    assert losses["total"].item() == pytest.approx(3 * losses["logits"].item() + 50 * losses["feature"].item())


def pooled(maps: torch.Tensor, side: int) -> torch.Tensor:
    batch, channels, height, width = maps.shape
    result = torch.zeros(batch, channels, height // side, width // side)
    for y, x in product(range(height // side), range(width // side)):
        result[:, :, y, x] = maps[:, :, y * side : (y + 1) * side, x * side : (x + 1) * side].amax((2, 3))
    return result


def contrast_in_loops(restored: torch.Tensor, target: torch.Tensor, patch: int, groups: int, tau: float) -> float:
    """Σ over groups, mean over positions and samples of −log(e⁺ / (e⁺ + Σ e⁻)), from pooled maps."""
    batch, channels, height, width = restored.shape
    wide, places, total = channels // groups, 0, 0.0
    for b, y0, x0 in product(range(batch), range(0, height - patch + 1, patch), range(0, width - patch + 1, patch)):
        positions = list(product(range(y0, y0 + patch), range(x0, x0 + patch)))
        places += len(positions)
        for (y, x), g in product(positions, range(groups)):
            vector = restored[b, g * wide : (g + 1) * wide, y, x]

            def likeness(group: int, row: int, column: int, of: torch.Tensor = vector, sample: int = b) -> float:
                other = target[sample, group * wide : (group + 1) * wide, row, column]
                return math.exp(-sum(abs(i - j) for i, j in zip(of.tolist(), other.tolist(), strict=True)) / tau)

            positive = likeness(g, y, x)
            negative = sum(likeness(h, *place) for h in range(groups) if h != g for place in positions)
            total -= math.log(positive / (positive + negative))
    return total / places


def test_af_dcd_by_hand() -> None:
    """Two samples of 4×10 tokens pool to 2×5: two 2×2 patches, the fifth column left over; two groups of two."""
    torch.manual_seed(0)
    hidden = torch.rand(2, 40) < 0.4
    own, other = torch.randn(2, 3, 4, 10), torch.randn(2, 4, 4, 10)
    logits, scores = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    method = AugmentationFreeContrast(
        3, 4, 3, pool=2, patch=2, groups=2, contrast_temperature=1.5, feature_weight=0.01, contrast_weight=0.1
    )
    weight, bias = torch.randn(4, 3), torch.randn(4)
    set_linear(method.align, weight.tolist(), bias.tolist())
    set_convolutions(method.restore, LEFT, scale=-2.0)
    restored = torch.zeros(2, 4, 4, 10)
    for b, c, y, x in product(range(2), range(4), range(4), range(1, 10)):
        if not hidden[b, y * 10 + x - 1]:  # the neighbour to the left, negative values cut, times −2
            aligned = sum(weight[c, k] * own[b, k, y, x - 1] for k in range(3)) + bias[c]
            restored[b, c, y, x] = -2 * max(0.0, aligned.item())
    losses = method(of_map(own, logits=logits), of_map(other, logits=scores), hidden)
    feature = sum(d**2 for d in (restored - other).flatten().tolist()) / 2
    contrast = contrast_in_loops(pooled(restored, 2), pooled(other, 2), 2, 2, 1.5)
    of_logits = sum(
        kl(scores[b, :, y, x].tolist(), logits[b, :, y, x].tolist(), 1)
        for b, y, x in product(range(2), range(2), range(2))
    )
    assert losses["logits"].item() == pytest.approx(of_logits / 8, rel=1e-4)
    assert losses["feature"].item() == pytest.approx(feature, rel=1e-4)
    assert losses["contrast"].item() == pytest.approx(contrast, rel=1e-4)
    assert losses["total"].item() == pytest.approx(of_logits / 8 + 0.01 * feature + 0.1 * contrast, rel=1e-4)


def test_vitkd_by_hand() -> None:
    """Two samples of a 2×3 grid; half of the places replaced, each seen through its left neighbour."""
    torch.manual_seed(0)
    hidden = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    own, other = torch.randn(3, 2, 6, 2), torch.randn(3, 2, 6, 3)
    method = ViTKD(2, 3, 19, mimic_weight=0.1, generation_weight=0.01)
    weights, biases = torch.randn(3, 3, 2), torch.randn(3, 3)
    for index, layer in enumerate((*method.mimic, method.align)):
        set_linear(layer, weights[index].tolist(), biases[index].tolist())
    set_convolutions(method.restore, LEFT, scale=3.0)
    with torch.no_grad():
        method.mask_token.copy_(torch.tensor([1.0, -1.0, 2.0]))

    def projected(index: int, b: int, n: int) -> list[float]:
        return [
            sum(weights[index, c, k].item() * own[index, b, n, k].item() for k in range(2)) + biases[index, c].item()
            for c in range(3)
        ]

    mimic = sum(
        (projected(block, b, n)[c] - other[block, b, n, c].item()) ** 2
        for block, b, n, c in product(range(2), range(2), range(6), range(3))
    )
    generation = 0.0
    for b, y, x in product(range(2), range(2), range(3)):
        if not hidden[b, y * 3 + x]:
            continue
        left = [0.0] * 3  # beyond the edge
        if x:
            left = [1.0, -1.0, 2.0] if hidden[b, y * 3 + x - 1] else projected(2, b, y * 3 + x - 1)
        generation += sum((3 * max(0.0, left[c]) - other[2, b, y * 3 + x, c].item()) ** 2 for c in range(3))
    losses = method(
        Features(own[2], (2, 3), blocks=tuple(own[:2])), Features(other[2], (2, 3), blocks=tuple(other[:2])), hidden
    )
    assert losses["mimic"].item() == pytest.approx(mimic / 2, rel=1e-4)
    assert losses["generation"].item() == pytest.approx(generation / (0.5 * 2), rel=1e-4)
    assert losses["total"].item() == pytest.approx(0.1 * mimic / 2 + 0.01 * generation, rel=1e-4)


def make(name: str, **settings: object) -> OneStageMethod:
    torch.manual_seed(0)
    small = {"pool": 2, "patch": 2, "groups": 4} if name == "af_dcd" else {}
    return ONE_STAGE[name](6, 8, 5, **small, **settings)


def features_of(method: OneStageMethod, width: int, constant: bool = False, logits: int = 9) -> Features:
    draw = torch.ones if constant else torch.randn
    tensors = [draw(2, 24, width) for _ in range(1 + len(method.needs_blocks))]
    scores = draw(2, 5, logits, logits) if method.needs_logits else None
    for tensor in (*tensors, *([] if scores is None else [scores])):
        tensor.requires_grad_()
    return Features(tensors[0], (4, 6), tuple(tensors[1:]), scores)


def tensors_of(features: Features) -> list[torch.Tensor]:
    return [features.patches, *features.blocks, *([] if features.logits is None else [features.logits])]


ALL = [("kd", {}), ("kd", {"target": "logits"}), ("cwd", {}), ("af_dcd", {}), ("vitkd", {})]


@pytest.mark.parametrize("name, settings", ALL)
@pytest.mark.parametrize("constant", [False, True])
def test_all_but_the_teacher_gets_a_gradient(name: str, settings: dict[str, object], constant: bool) -> None:
    method = make(name, **settings)
    student, teacher = features_of(method, 6, constant), features_of(method, 8, constant, logits=5)
    losses = method(student, teacher)
    losses["total"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert all(tensor.grad is None for tensor in tensors_of(teacher))
    if not constant:
        used = tensors_of(student)[1:] if name == "kd" and method.needs_logits else tensors_of(student)
        assert all(tensor.grad.abs().sum() > 0 for tensor in used)
        assert all(p.grad.abs().sum() > 0 for p in method.parameters())


@pytest.mark.parametrize("name, settings", ALL)
def test_bf16_gives_finite_losses_in_fp32(name: str, settings: dict[str, object]) -> None:
    method = make(name, **settings)
    student, teacher = features_of(method, 6), features_of(method, 8)
    torch.manual_seed(1)
    exact = method(student, teacher)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(student, teacher)
    losses["total"].backward()
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[key], rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name, ratio", [("af_dcd", 0.75), ("vitkd", 0.5)])
def test_masks_hide_their_part_of_each_sample_anew(name: str, ratio: float) -> None:
    method = make(name)
    seen = []
    method.restore.register_forward_pre_hook(lambda module, args: seen.append((args[0] == 0).all(1).flatten(1)))
    student, teacher = features_of(method, 6), features_of(method, 8)
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        method(student, teacher)
    assert [mask.sum(1).tolist() for mask in seen] == [[24 * ratio] * 2] * 3
    assert torch.equal(seen[0], seen[1])  # torch's generator alone decides
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0][0], seen[0][1])


def test_published_defaults() -> None:
    assert make("kd").weights == {"feature": 1}
    assert make("cwd").weights == {"logits": 3, "feature": 50}
    assert make("cwd").logits_temperature == make("cwd").feature_temperature == 4
    contrast = AugmentationFreeContrast(6, 32, 5)
    assert contrast.weights == {"logits": 1, "feature": 4e-5, "contrast": 1e-3}
    assert (contrast.mask_ratio, contrast.contrast_temperature, contrast.logits_temperature) == (0.75, 0.07, 1)
    assert (contrast.pool, contrast.patch, contrast.groups) == (4, 4, 16)
    assert make("vitkd").weights == {"mimic": 3e-5, "generation": 3e-6}
    assert make("vitkd").mask_ratio == 0.5 and make("vitkd").needs_blocks == (1, 2)
