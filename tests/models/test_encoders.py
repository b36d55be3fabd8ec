"""Every supported encoder goes through the adapter: tokens, grid, maps, masks, geometry, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig, AutoModel

from gkd_hf import GKDStudentModel, InputError
from gkd_hf.models.encoders import mask_image, resample_tokens
from gkd_hf.models.modeling_gkd import frozen_running_statistics
from tests.tiny import ENCODERS, EVERY_ENCODER


@pytest.fixture(params=sorted(EVERY_ENCODER))
def student(request: pytest.FixtureRequest) -> GKDStudentModel:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(EVERY_ENCODER[request.param]).eval()
    for module in student.modules():
        if isinstance(module, nn.Conv2d):  # transformers starts MobileNetV2 so small that no signal gets through
            nn.init.kaiming_normal_(module.weight)
    return student


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_tokens_grid_and_maps_agree(student: GKDStudentModel, size: tuple[int, int]) -> None:
    output = student(torch.randn(2, 3, *size), output_maps=True)
    height, width = output.grid
    assert output.grid == (size[0] // student.adapter.stride, size[1] // student.adapter.stride)
    assert output.last_hidden_state.shape == (2, height * width, student.adapter.width)
    assert output.pooler_output.shape == (2, student.adapter.width)
    assert tuple(m.shape[1] for m in output.feature_maps) == student.adapter.map_channels
    strides = tuple(size[1] // m.shape[3] for m in output.feature_maps)
    assert strides == student.adapter.map_strides
    assert (student(torch.randn(2, 3, *size)).feature_maps) is None


def test_patches_are_row_by_row(student: GKDStudentModel) -> None:
    # Of the encoders whose stride is 32, one gets an image that is large enough to tell the places apart.
    side = 256 if student.adapter.config.model_type == "mobilenet_v1" else 128
    pixels = torch.randn(1, 3, side, side)
    changed = pixels.clone()
    changed[..., :32, -32:] = 3.0  # the top right corner
    difference = (student(changed).last_hidden_state - student(pixels).last_hidden_state).abs().sum(-1)[0]
    rows, columns = student(pixels).grid
    transformer = student.adapter.num_blocks is not None
    if transformer or rows > 4:
        row, column = divmod(int(difference.argmax()), columns)
        assert row < rows / 2 <= column
    if not transformer:
        output = student(changed, output_maps=True)
        by_row = output.last_hidden_state.transpose(1, 2).unflatten(2, output.grid)
        last = output.feature_maps[-1]
        for name in student.adapter.beside_maps():  # the tokens passed the final norm, the maps did not
            last = student.encoder.get_submodule(name)(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(by_row, last)


def test_mask_changes_what_is_masked(student: GKDStudentModel) -> None:
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith(("mask_token", "mask_pixel")):
                parameter.fill_(0.7)
    pixels = torch.randn(2, 3, 64, 64)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, 9] = True
    whole = student(pixels).last_hidden_state
    masked = student(pixels, bool_masked_pos=mask, mask_grid=(8, 8)).last_hidden_state
    assert not torch.allclose(whole[0], masked[0])
    torch.testing.assert_close(whole[1], masked[1])
    # What lies under the mask cannot be seen.
    other = pixels.clone()
    other[0, :, 8:16, 8:16] = torch.randn(3, 8, 8)
    torch.testing.assert_close(student(other, bool_masked_pos=mask, mask_grid=(8, 8)).last_hidden_state, masked)


def test_gradients_reach_every_parameter(student: GKDStudentModel) -> None:
    mask = torch.rand(2, 64) < 0.5
    output = student(torch.randn(2, 3, 64, 64), bool_masked_pos=mask, mask_grid=(8, 8))
    (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


def test_class_token_of_a_cnn_is_the_average() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"]).eval()
    output = student(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_class_token_is_what_transformers_pools(kind: str) -> None:
    student = GKDStudentModel.from_encoder(ENCODERS[kind]).eval()
    pixels = torch.randn(2, 3, 64, 64)
    plain = AutoModel.from_config(student.encoder.config).eval()
    plain.load_state_dict(student.encoder.state_dict())
    output, expected = student(pixels), plain(pixels)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)
    tokens = expected.last_hidden_state
    if kind == "convnext":
        tokens = plain.layernorm(tokens.flatten(2).transpose(1, 2))
    torch.testing.assert_close(output.last_hidden_state, tokens)


def test_swin_does_not_remember_the_sizes_it_saw() -> None:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS["swin"] | {"initializer_range": 0.5}).eval()
    pixels = torch.randn(1, 3, 64, 64)
    before = student(pixels).last_hidden_state
    student(torch.randn(1, 3, 32, 32))  # the last map is one window: no shift there
    assert torch.equal(student(pixels).last_hidden_state, before)


def test_swin_refuses_maps_smaller_than_a_window() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["swin"] | {"window_size": 4})
    with pytest.raises(InputError, match=r"windows of 4 needs images of 64 pixels or more .* got 64×48"):
        student(torch.randn(1, 3, 64, 48))


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_stage_maps_are_those_of_transformers_backbones(kind: str) -> None:
    student = GKDStudentModel.from_encoder(ENCODERS[kind]).eval()
    stages = [f"stage{index + 1}" for index in range(3)]
    backbone = AutoBackbone.from_config(AutoConfig.for_model(**ENCODERS[kind], out_features=stages)).eval()
    state = {(f"swin.{key}" if kind == "swin" else key): t for key, t in student.encoder.state_dict().items()}
    backbone.load_state_dict(state, strict=False)
    pixels = torch.randn(1, 3, 64, 96)
    maps = student(pixels, output_maps=True).feature_maps
    for norm, m, expected in zip(student.adapter.map_norms(), maps, backbone(pixels).feature_maps, strict=True):
        torch.testing.assert_close(norm(m), expected)


def test_blocks_are_refused_where_there_are_none(student: GKDStudentModel) -> None:
    adapter, pixels = student.adapter, torch.randn(1, 3, 64, 64)
    depth = adapter.num_blocks
    message = (
        f"has blocks 1 to {depth}, block 99 was" if depth else f"{adapter.config.model_type} has no blocks on one"
    )
    with pytest.raises(InputError, match=message):
        adapter.forward(student.encoder, pixels, output_blocks=(1, 99))
    assert adapter.owns_grid == (depth is not None)


def test_image_mask_uses_the_learned_pixel() -> None:
    pixel = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    mask = torch.tensor([[True, False, False, False]])
    masked = mask_image(torch.zeros(1, 3, 4, 4), mask, (2, 2), pixel)
    assert masked[0, :, 0, 0].tolist() == [1, 2, 3]
    assert masked.sum() == 4 * 6  # four pixels of one cell


def test_resample_tokens_is_bilinear_on_the_grid() -> None:
    tokens = torch.arange(8.0).view(1, 4, 2)
    expected = F.interpolate(tokens.transpose(1, 2).reshape(1, 2, 2, 2), (4, 4), mode="bilinear", align_corners=False)
    resampled = resample_tokens(tokens, (2, 2), (4, 4))
    torch.testing.assert_close(resampled.transpose(1, 2).reshape(1, 2, 4, 4), expected)
    assert resample_tokens(tokens, (2, 2), (2, 2)) is tokens


def test_cnn_geometry_stays() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
    encoder = student.encoder
    student.set_geometry(96)
    assert student.encoder is encoder
    with pytest.raises(InputError, match="resnet has no patch size to change"):
        student.set_geometry(96, 8)


def test_mobilenet_momentum_is_torchs(tmp_path) -> None:
    def momenta(student: GKDStudentModel) -> set[float]:
        return {m.momentum for m in student.modules() if isinstance(m, nn.BatchNorm2d)}

    student = GKDStudentModel.from_encoder(ENCODERS["mobilenet_v2"])
    assert momenta(student) == {0.1}
    student.save_encoder(tmp_path)
    assert momenta(GKDStudentModel.from_encoder(tmp_path)) == {0.1}


def test_frozen_running_statistics_forget_the_batch() -> None:
    norm = nn.BatchNorm1d(2)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    batch = torch.randn(8, 2) * 3 + 1
    with frozen_running_statistics(norm):
        out = norm(batch)
    torch.testing.assert_close(out.mean(0), torch.zeros(2), atol=1e-6, rtol=0)  # still normalised by the batch
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name
    norm(batch)
    assert norm.num_batches_tracked == 1
