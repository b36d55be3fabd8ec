"""Every supported encoder goes through the adapter: tokens, grid, maps, masks, geometry, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig, AutoModel, ViTModel

from gkd_hf import GKDStudentModel, InputError
from gkd_hf.models.encoders import adapter_for, mask_image, resample_geometry, resample_tokens
from gkd_hf.models.loading import config_from_mapping, load_encoder
from gkd_hf.models.modeling_gkd import frozen_running_statistics
from tests.tiny import ENCODERS

TRANSFORMERS = ("vit", "dinov2")


@pytest.fixture(params=sorted(ENCODERS))
def student(request: pytest.FixtureRequest) -> GKDStudentModel:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[request.param]).eval()
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
    pixels = torch.randn(1, 3, 128, 128)
    changed = pixels.clone()
    changed[..., :32, -32:] = 3.0  # the top right corner
    difference = (student(changed).last_hidden_state - student(pixels).last_hidden_state).abs().sum(-1)[0]
    rows, columns = student(pixels).grid
    if student.adapter.fixed_grid or rows > 4:
        row, column = divmod(int(difference.argmax()), columns)
        assert row < rows / 2 <= column
    if not student.adapter.fixed_grid:
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


@pytest.mark.parametrize("depth, blocks", [(12, (4, 6, 8, 12)), (24, (8, 12, 16, 24)), (4, (1, 2, 3, 4))])
def test_stage_maps_come_from_the_papers_blocks(depth: int, blocks: tuple[int, ...]) -> None:
    config = config_from_mapping({**ENCODERS["vit"], "num_hidden_layers": depth})
    assert adapter_for(config).map_layers == blocks


def test_stage_maps_are_before_the_final_norm() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["vit"]).eval()
    output = student(torch.randn(1, 3, 32, 32), output_maps=True)
    last = output.feature_maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(student.encoder.layernorm(last), output.last_hidden_state)


def test_stage_maps_can_pass_the_final_norm() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["vit"]).eval()
    student.config.norm_feature_maps = True
    output = student(torch.randn(1, 3, 32, 32), output_maps=True)
    last = output.feature_maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(last, output.last_hidden_state)


def test_blocks_are_the_tokens_after_them(student: GKDStudentModel) -> None:
    adapter, pixels = student.adapter, torch.randn(1, 3, 64, 96)
    if adapter.num_blocks is None:
        with pytest.raises(InputError, match=f"{adapter.config.model_type} has no blocks on one grid"):
            adapter.forward(student.encoder, pixels, output_blocks=(1, 2))
        return
    output = adapter.forward(student.encoder, pixels, output_maps=True, output_blocks=(1, adapter.num_blocks))
    seen = []
    norm = student.encoder.get_submodule(adapter.final_norm)
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    patches = adapter.forward(student.encoder, pixels).patches
    hook.remove()
    count = output.patches.shape[1]
    torch.testing.assert_close(output.blocks[1], seen[0][:, -count:])
    torch.testing.assert_close(output.blocks[1], output.maps[-1].flatten(2).transpose(1, 2))
    assert output.blocks[0].shape == output.patches.shape == patches.shape
    assert not torch.allclose(output.blocks[0], output.blocks[1])
    with pytest.raises(InputError, match=f"has blocks 1 to {adapter.num_blocks}, block {adapter.num_blocks + 1}"):
        adapter.forward(student.encoder, pixels, output_blocks=(adapter.num_blocks + 1,))


def test_who_owns_the_grid(student: GKDStudentModel) -> None:
    assert student.adapter.owns_grid == (student.config.encoder_config.model_type in TRANSFORMERS)


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


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_geometry_follows_transformers_interpolation(kind: str) -> None:
    torch.manual_seed(0)
    encoder, _, _ = load_encoder(ENCODERS[kind])
    encoder.eval()
    pixels = torch.randn(1, 3, 64, 64)
    adapter = adapter_for(encoder.config)
    by_model = adapter.forward(encoder, pixels)  # transformers resamples the positions on the fly
    rebuilt = resample_geometry(encoder, 64)
    assert rebuilt.config.image_size == 64 and encoder.config.image_size == 32
    ours = adapter_for(rebuilt.config).forward(rebuilt, pixels)
    torch.testing.assert_close(ours.patches, by_model.patches)
    assert resample_geometry(rebuilt, 64) is rebuilt


def test_patch_kernel_is_resized_bicubically() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    kernel = student.encoder.embeddings.patch_embeddings.projection.weight.detach().clone()
    student.set_geometry(64, 16)
    resized = student.encoder.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(resized, F.interpolate(kernel, (16, 16), mode="bicubic", align_corners=False))
    assert student(torch.randn(1, 3, 64, 64)).grid == (4, 4)
    assert student.config.encoder_config.patch_size == 16
    with pytest.raises(InputError, match=r"image height 60 is not a multiple of the patch size 16.*: 64"):
        student.set_geometry(60)


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


@pytest.mark.parametrize(
    "source, message",
    [
        (
            {"model_type": "bert"},
            "encoders of type 'bert' are not supported.*convnext, .*dinov2, .*mobilenet_v2, .*resnet, .*swin, .*vit",
        ),
        ({"model_type": "resnett"}, "unknown encoder model_type 'resnett'"),
        ({"hidden_size": 3}, "needs 'model_type'"),
        (
            {"model_type": "resnet", "hidden_size": 3},
            "no configuration field 'hidden_size', did you mean 'hidden_sizes'",
        ),
        ({"model_type": "resnet", "layer_type": "wide"}, "bad resnet configuration"),
        ({"model_type": "resnet", "depths": [1, 1], "hidden_sizes": [8]}, "as many depths as hidden_sizes"),
        (
            {"model_type": "convnext", "depths": [1, 1], "hidden_sizes": [8, 8]},
            "needs num_stages .4. depths and hidden",
        ),
        ({"model_type": "swin", "depths": [1, 1]}, "swin needs as many depths as num_heads"),
        ({"model_type": "swin", "use_absolute_embeddings": True}, "would take one image size only"),
        ("/nowhere/at/all", "that folder does not exist"),
    ],
)
def test_what_is_no_encoder_is_refused(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_encoder(source)


def test_a_folder_without_config_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_encoder(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path) -> None:
    load_encoder({**ENCODERS["vit"], "hidden_size": 12})[0].save_pretrained(tmp_path)
    config_from_mapping(ENCODERS["vit"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"fill only \d+% of the \d+ tensors of ViTModel"):
        load_encoder(tmp_path)


def test_pickled_weights_are_refused(tmp_path) -> None:
    encoder, _, _ = load_encoder(ENCODERS["resnet"])
    encoder.config.save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only as pytorch_model.bin, a pickle"):
        load_encoder(tmp_path)


def test_truncated_weights_are_refused(tmp_path) -> None:
    load_encoder(ENCODERS["resnet"])[0].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot read safetensors weights"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"image_mean": null}', "image_mean is None, three numbers"),
        ('{"image_std": 0.5}', "image_std is 0.5, three numbers"),
        ('{"image_std": [0, 1, 1]}', "image_std is .*three numbers"),
        ("{", "cannot read .*preprocessor_config.json"),
    ],
)
def test_broken_image_statistics_are_refused(content: str, message: str, tmp_path) -> None:
    load_encoder(ENCODERS["resnet"])[0].save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_encoder(tmp_path)


def test_weights_and_image_statistics_are_read(tmp_path) -> None:
    encoder, _, _ = load_encoder(ENCODERS["resnet"])
    encoder.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    loaded, mean, std = load_encoder(tmp_path)
    assert mean == (0.1, 0.2, 0.3) and std == (1.0, 2.0, 3.0)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    fresh, _, _ = load_encoder(tmp_path, pretrained=False)
    weight = "embedder.embedder.convolution.weight"
    assert not torch.equal(fresh.state_dict()[weight], encoder.state_dict()[weight])


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_norms_have_the_papers_epsilon(kind: str, tmp_path) -> None:
    fields = {key: value for key, value in ENCODERS[kind].items() if key != "model_type"}
    config = AutoConfig.for_model(kind, **fields)
    adapter_for(config).build().save_pretrained(tmp_path)
    for encoder in (load_encoder(ENCODERS[kind])[0], load_encoder(tmp_path)[0]):
        assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_a_vit_saved_by_transformers_is_read_whole(tmp_path) -> None:
    torch.manual_seed(0)
    fields = {key: value for key, value in ENCODERS["vit"].items() if key != "model_type"}
    original = ViTModel(AutoConfig.for_model("vit", layer_norm_eps=1e-6, **fields)).eval()
    original.save_pretrained(tmp_path)
    student = GKDStudentModel.from_encoder(tmp_path).eval()
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(student(pixels).last_hidden_state, original(pixels).last_hidden_state[:, 1:])
