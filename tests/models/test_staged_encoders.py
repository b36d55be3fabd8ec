"""What is special to encoders in stages: transformers' own maps and pooled features, sizes, refusals, batch norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig, AutoModel

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, InputError
from gkd_hf.models import convolutional_encoders
from gkd_hf.models.encoders import adapter_for
from gkd_hf.models.loading import config_from_mapping
from tests.tiny import ENCODERS

STAGED = (
    "convnextv2",
    "dinov3_convnext",
    "efficientnet",
    "mobilenet_v1",
    "mobilevit",
    "pvt_v2",
    "segformer",
    "swinv2",
)
POOLED = ("convnextv2", "dinov3_convnext", "efficientnet", "mobilenet_v1", "mobilevit", "swinv2")


def student_of(kind: str, **changes: Any) -> GKDStudentModel:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind] | changes).eval()
    for module in student.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # transformers starts so small that hardly a signal gets through
            nn.init.kaiming_normal_(module.weight)
    return student


@pytest.mark.parametrize("kind", STAGED)
def test_a_plain_auto_model_gives_the_same(kind: str, tmp_path) -> None:
    student = student_of(kind)
    student.save_encoder(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 64, 96)
    output, expected = student(pixels), plain(pixels)
    scale = output.last_hidden_state.std().item()
    assert scale > 1e-4
    tokens = expected.last_hidden_state
    pooled = expected.pooler_output if kind in POOLED else tokens.mean((2, 3))
    torch.testing.assert_close(output.pooler_output, pooled, rtol=1e-4, atol=1e-4 * scale)
    if tokens.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    if kind == "convnextv2":  # the one whose pooled features pass a norm that its map does not
        tokens = plain.layernorm(tokens)
    if kind == "dinov3_convnext":
        tokens = tokens[:, 1:]  # the first is the pooled one
    torch.testing.assert_close(output.last_hidden_state, tokens, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["convnextv2", "dinov3_convnext", "pvt_v2", "swinv2"])
def test_stage_maps_are_those_of_transformers_backbones(kind: str) -> None:
    student = student_of(kind)
    stages = [f"stage{index + 1}" for index in range(3)]
    backbone = AutoBackbone.from_config(AutoConfig.for_model(**ENCODERS[kind], out_features=stages)).eval()
    missing = backbone.load_state_dict(student.encoder.state_dict(), strict=False).missing_keys
    assert all(key.startswith("hidden_states_norms.") for key in missing)
    pixels = torch.randn(1, 3, 64, 96)
    maps, norms = student(pixels, output_maps=True).feature_maps, student.adapter.map_norms()
    assert (norms is not None) == (kind == "convnextv2")
    for norm, m, expected in zip(norms or [nn.Identity()] * 3, maps, backbone(pixels).feature_maps, strict=True):
        torch.testing.assert_close(norm(m), expected)


@pytest.mark.parametrize("kind", STAGED)
def test_what_an_image_gives_does_not_depend_on_those_before(kind: str) -> None:
    student = student_of(kind)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = student(pixels).last_hidden_state
        student(torch.randn(1, 3, 32, 32))
        student(torch.randn(1, 3, 96, 32))
        assert torch.equal(student(pixels).last_hidden_state, before)


@pytest.mark.parametrize("kind", (*STAGED, "convnext", "mobilenet_v2", "resnet"))
def test_no_edge_pixel_is_dropped(kind: str) -> None:
    """The last tokens see the last row and column of an image of any size, or the size is refused."""
    student = student_of(kind)
    for size in (64, 65, 72, 80):
        pixels = torch.randn(1, 3, size, size, requires_grad=True)
        try:
            output = student(pixels)
        except InputError:
            assert size % student.adapter.stride
            continue
        last = output.last_hidden_state.unflatten(1, output.grid)[:, -1, -1]
        (gradient,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), pixels)
        gradient = gradient.abs().sum((0, 1))
        typical = gradient[-size // 2 :, -size // 2 :].mean()
        assert gradient[-1].max() > 1e-3 * typical > 0 and gradient[:, -1].max() > 1e-3 * typical, size


@pytest.mark.parametrize(
    "kind, changes, size, padded",
    [
        ("swin", {"window_size": 4}, (40, 70), (64, 80)),
        ("segformer", {"sr_ratios": [8, 4, 2]}, (50, 64), (64, 64)),
        ("pvt_v2", {"sr_ratios": [4, 4, 2]}, (48, 80), (64, 96)),
        ("pvt_v2", {"sr_ratios": [4, 4, 2], "linear_attention": True}, (48, 70), (48, 80)),
        ("convnext", {}, (33, 64), (48, 64)),
    ],
)
def test_a_segmenter_takes_images_of_any_size(
    kind: str, changes: dict[str, Any], size: tuple[int, int], padded: tuple[int, int]
) -> None:
    model = GKDStudentForSemanticSegmentation.from_student(student_of(kind, **changes), num_labels=3).eval()
    adapter = model.student.adapter
    assert adapter.padded_size(*size) == padded == adapter.padded_size(*padded)
    pixels = torch.randn(1, 3, *size)
    below = F.pad(pixels, (0, padded[1] - size[1], 0, padded[0] - size[0]))
    logits = F.interpolate(model(below).logits, padded, mode="bilinear", align_corners=False)
    assert torch.equal(
        model(pixels, torch.zeros(1, *size, dtype=torch.long)).logits, logits[..., : size[0], : size[1]]
    )


@pytest.mark.parametrize("kind", ["swin", "swinv2", "segformer", "pvt_v2", "convnext", "dinov3_convnext"])
def test_stochastic_depth_is_off_unless_the_encoder_learns(kind: str) -> None:
    student = student_of(kind, drop_path_rate=0.5)
    pixels = torch.randn(4, 3, 64, 64)
    tokens = student(pixels).last_hidden_state
    assert torch.equal(student(pixels).last_hidden_state, tokens)
    student.train()
    assert not torch.equal(student(pixels).last_hidden_state, student(pixels).last_hidden_state)
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3)
    model.freeze_encoder()
    model.train()
    frozen = [model(pixels, output_student=True).student.last_hidden_state for _ in range(2)]
    assert torch.equal(*frozen)
    torch.testing.assert_close(frozen[0], tokens)  # attention rounds differently where no gradient is wanted


def test_mobilevit_says_once_that_it_blurs_odd_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(convolutional_encoders.logger, "warning", lambda message, *rest: said.append(message))
    student = student_of("mobilevit")
    student(torch.randn(1, 3, 64, 128))
    assert said == []
    for _ in range(2):
        student(torch.randn(1, 3, 64, 160))
    assert len(said) == 1 and "64×160 pixels: multiples of 64 avoid that" in said[0]


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("convnext", (72, 64), "image height 72 is not a multiple of the patch size 16 of convnext.*: 64"),
        ("convnextv2", (64, 72), "image width 72 is not a multiple of the patch size 16 of convnextv2"),
        ("dinov3_convnext", (64, 72), "image width 72 is not a multiple .* of dinov3_convnext"),
        ("efficientnet", (64, 80), "image width 80 is not a multiple of the patch size 32 of efficientnet.*: 64"),
        ("segformer", (8, 64), "image height 8 is not a multiple of the patch size 16 of segformer"),
        ("swinv2", (40, 64), "image height 40 is not a multiple of the patch size 16 of swinv2"),
    ],
)
def test_sizes_that_would_lose_an_edge_are_refused(kind: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        student_of(kind)(torch.randn(1, 3, *size))


@pytest.mark.parametrize("kind", ["segformer", "pvt_v2"])
def test_attention_has_keys_for_the_whole_map(kind: str) -> None:
    student = student_of(kind, sr_ratios=[4, 4, 2])
    with pytest.raises(
        InputError, match=rf"{kind} with sr_ratios .4, 4, 2. needs .* of 32 pixels, else stage 2 .*64×48"
    ):
        student(torch.randn(1, 3, 64, 48))
    if kind == "pvt_v2":
        student = student_of(kind, sr_ratios=[4, 4, 2], linear_attention=True)
        assert student(torch.randn(1, 3, 64, 48)).grid == (4, 3)


@pytest.mark.parametrize("kind", STAGED)
def test_blocks_are_refused_in_one_line(kind: str) -> None:
    student = student_of(kind)
    with pytest.raises(InputError, match=f"{kind} has no blocks on one grid") as refused:
        student.adapter.forward(student.encoder, torch.randn(1, 3, 64, 64), output_blocks=(1,))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind, momentum", [("efficientnet", 0.01), ("mobilenet_v1", 0.1), ("mobilevit", 0.1)])
def test_batch_norms_are_set_up_as_torch_means_them(kind: str, momentum: float, tmp_path) -> None:
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    student.save_encoder(tmp_path)
    for encoder in (student, GKDStudentModel.from_encoder(tmp_path)):
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {norm.momentum for norm in norms} == {momentum}
        assert all(bool((norm.weight == 1).all()) for norm in norms)
    wide = torch.randn(8, 3, 64, 64) * 5 + 2
    student.train()(wide)
    first = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d))
    assert 0.9 < float(first.running_var.mean()) < 1.2  # one batch has moved it a little, not replaced it


@pytest.mark.parametrize("kind", ["segformer", "pvt_v2", "mobilevit", "swinv2"])
def test_activations_can_be_computed_again(kind: str) -> None:
    student = student_of(kind)
    student.check_activation_checkpointing()
    pixels = torch.randn(2, 3, 64, 64)
    gradients = []
    for again in (False, True):
        if again:
            student.activation_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in student.encoder.modules())
            student.train()
            for module in student.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        student.zero_grad()
        student(pixels).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for n, p in student.named_parameters() if n != "mask_pixel"])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_maps_are_where_the_resolution_falls() -> None:
    small = adapter_for(
        config_from_mapping({"model_type": "efficientnet", "width_coefficient": 1.0, "hidden_dim": 1280})
    )
    assert small.map_channels == (24, 40, 112, 1280) and small.map_strides == (4, 8, 16, 32)
    assert adapter_for(config_from_mapping({"model_type": "efficientnet"})).map_channels == (48, 80, 224, 2560)  # B7
    assert adapter_for(config_from_mapping({"model_type": "mobilevit"})).map_channels == (64, 96, 128, 640)
    assert adapter_for(config_from_mapping({"model_type": "mobilenet_v1"})).map_channels == (128, 256, 512, 1024)
    coarse = adapter_for(config_from_mapping({"model_type": "mobilevit", "output_stride": 16}))
    assert coarse.map_strides == (4, 8, 16, 16)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("convnextv2", {"num_stages": 4}, "convnextv2 needs num_stages .4. depths and hidden_sizes"),
        ("dinov3_convnext", {"depths": [1, 1]}, "dinov3_convnext needs as many depths as hidden_sizes"),
        ("efficientnet", {"hidden_dim": 64}, "width_coefficient 0.25 needs hidden_dim 320, got 64"),
        ("efficientnet", {"strides": [1, 2]}, "efficientnet needs as many out_channels as strides"),
        ("pvt_v2", {"num_encoder_blocks": 4}, "pvt_v2 needs num_encoder_blocks .4. depths"),
        ("segformer", {"sr_ratios": [4, 2]}, "segformer needs as many hidden_sizes as sr_ratios"),
        ("segformer", {"reshape_last_stage": False}, "reshape_last_stage: true"),
        ("swinv2", {"use_absolute_embeddings": True}, "swinv2 with use_absolute_embeddings is not supported"),
        ("swinv2", {"num_heads": [2, 2]}, "swinv2 needs as many depths as num_heads"),
        ("swinv2", {"pretrained_window_sizes": [0]}, "as many pretrained_window_sizes as depths"),
        ("swinv2", {"image_size": 8}, "swinv2 with 3 stages needs an image_size of 16 or more"),
    ],
)
def test_configurations_that_cannot_be_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GKDStudentModel.from_encoder(ENCODERS[kind] | changes)
