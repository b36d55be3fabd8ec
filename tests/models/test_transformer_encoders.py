"""Vision transformers of one resolution: their tokens, blocks and geometry, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, Siglip2ImageProcessorPil

from gkd_hf import GKDStudentModel, GKDTeacher, InputError
from gkd_hf.models.encoders import adapter_for, resample_geometry
from gkd_hf.models.loading import config_from_mapping, load_encoder
from gkd_hf.training.step_cost import DistillationStep
from tests.tiny import ENCODERS, EVERY_ENCODER

TRANSFORMERS = sorted(
    kind for kind, fields in EVERY_ENCODER.items() if adapter_for(config_from_mapping(fields)).num_blocks
)
LEARNED = [kind for kind in TRANSFORMERS if adapter_for(config_from_mapping(EVERY_ENCODER[kind])).fixed_grid]
FREE = sorted(set(TRANSFORMERS) - set(LEARNED))


def make_encoder(kind: str, **fields: int) -> PreTrainedModel:
    """An encoder whose every parameter counts: zeros and ones (positions, registers, norms) become random."""
    torch.manual_seed(0)
    encoder, _, _ = load_encoder(EVERY_ENCODER[kind] | fields)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def as_model_takes(encoder: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels as the plain model wants them: RADIO normalises by itself."""
    if adapter_for(encoder.config).pixel_statistics is None:
        return pixels
    return pixels * encoder.input_conditioner.norm_std + encoder.input_conditioner.norm_mean


def test_who_has_learned_positions() -> None:
    assert FREE == ["dinov3_vit", "radio", "siglip2"]
    assert len(LEARNED) >= 8


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_blocks_are_what_the_layers_give(kind: str) -> None:
    encoder = make_encoder(kind)
    adapter = adapter_for(encoder.config)
    layers = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == adapter.num_blocks)
    given: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, inputs, output: given.append(output)) for layer in layers]
    output = adapter.forward(encoder, torch.randn(2, 3, 32, 48), output_blocks=(1, adapter.num_blocks))
    for hook in hooks:
        hook.remove()
    count = output.grid[0] * output.grid[1]
    assert count == 24 and given[0].shape[1] == count + adapter.prefix
    torch.testing.assert_close(output.blocks[0], given[0][:, -count:])
    torch.testing.assert_close(output.blocks[1], given[-1][:, -count:])
    norm = encoder.get_submodule(adapter.final_norm) if adapter.final_norm else nn.Identity()
    torch.testing.assert_close(norm(output.blocks[1]), output.patches)


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


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_class_token(kind: str) -> None:
    encoder = make_encoder(kind)
    pixels = torch.randn(2, 3, 32, 32)
    output = adapter_for(encoder.config).forward(encoder, pixels)
    own = encoder(as_model_takes(encoder, pixels)) if kind != "siglip2" else None
    if kind in ("ijepa", "siglip", "siglip2"):
        expected = output.patches.mean(1)
    elif kind == "radio":
        expected = own.summary.unflatten(1, (2, -1)).mean(1)
    elif kind in ("vit", "deit"):
        expected = own.last_hidden_state[:, 0]
    else:
        expected = own.pooler_output
    torch.testing.assert_close(output.cls, expected)
    if kind == "radio":
        torch.testing.assert_close(output.patches, own.features)


def test_dinov3_gives_an_image_the_same_tokens_twice_in_training() -> None:
    student = GKDStudentModel.from_encoder(
        EVERY_ENCODER["dinov3_vit"] | {"pos_embed_rescale": 2.0, "pos_embed_shift": 0.5, "pos_embed_jitter": 2.0}
    ).train()
    student._replace_encoder(make_encoder("dinov3_vit", initializer_range=0.5, pos_embed_rescale=2.0).train())
    pixels = torch.randn(2, 3, 32, 48)
    plain = [student.encoder(pixels).last_hidden_state for _ in range(2)]
    assert (plain[0] - plain[1]).std() > 1e-3 * plain[0].std()  # what transformers does to it matters
    tokens = [student(pixels).last_hidden_state for _ in range(2)]
    assert torch.equal(*tokens) and student.encoder.training
    assert torch.equal(student.eval()(pixels).last_hidden_state, tokens[0])
    assert student.config.encoder_config.pos_embed_rescale == 2.0


def test_siglip2_gets_the_patches_of_its_image_processor() -> None:
    encoder = make_encoder("siglip2")
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    processor = Siglip2ImageProcessorPil(do_resize=True, patch_size=8, max_num_patches=24)
    inputs = processor(image, return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [[4, 6]]
    pixels = (image[None] / 255 - 0.5) / 0.5
    output = adapter_for(encoder.config).forward(encoder, pixels)
    torch.testing.assert_close(output.patches, encoder(**inputs).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_saved_encoders_are_what_auto_model_reads(kind: str, tmp_path) -> None:
    student = GKDStudentModel.from_encoder(EVERY_ENCODER[kind])
    student._replace_encoder(make_encoder(kind))
    student.eval()
    pixels = torch.randn(1, 3, 32, 48)
    expected = student(pixels)
    student.save_encoder(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    assert type(plain) is type(student.encoder)
    output = student.adapter.forward(plain, pixels)
    torch.testing.assert_close(output.patches, expected.last_hidden_state)
    torch.testing.assert_close(output.cls, expected.pooler_output)
    if kind in ("vit", "deit"):
        pooled = plain(pixels, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(pooled, expected.pooler_output.tanh())
    held = load_file(tmp_path / "model.safetensors")
    assert any("mask_token" in key for key in held) == (kind.startswith("dino"))


@pytest.mark.parametrize("kind", LEARNED)
def test_geometry_follows_transformers_interpolation(kind: str) -> None:
    encoder = make_encoder(kind)
    pixels = torch.randn(1, 3, 64, 64)
    by_model = adapter_for(encoder.config).forward(encoder, pixels)  # transformers resamples as it runs
    rebuilt = resample_geometry(encoder, 64)
    assert rebuilt.config.image_size == 64 and encoder.config.image_size == 32
    assert adapter_for(rebuilt.config).image_size == 64
    plain = rebuilt(pixels)  # without any resampling now
    adapter = adapter_for(rebuilt.config)
    tokens = plain.last_hidden_state
    tokens = tokens if adapter.norms_output else rebuilt.get_submodule(adapter.final_norm)(tokens)
    torch.testing.assert_close(tokens[:, adapter.prefix :], by_model.patches)
    torch.testing.assert_close(adapter.forward(rebuilt, pixels).cls, by_model.cls)
    assert resample_geometry(rebuilt, 64) is rebuilt


@pytest.mark.parametrize("kind", FREE)
def test_free_sizes_keep_their_weights(kind: str) -> None:
    encoder = make_encoder(kind)
    assert resample_geometry(encoder, 64) is encoder
    with pytest.raises(InputError, match="image height 60 is not a multiple of the patch size 8"):
        resample_geometry(encoder, 60)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_patch_kernels_are_resized_bicubically(kind: str) -> None:
    encoder = make_encoder(kind)
    adapter = adapter_for(encoder.config)
    rebuilt = resample_geometry(encoder, 64, 16)
    target = adapter_for(rebuilt.config)
    before, after = adapter.kernel_maps(encoder.state_dict()[adapter.kernel]), rebuilt.state_dict()[adapter.kernel]
    expected = F.interpolate(before, (16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(target.kernel_maps(after), expected)
    pixels = torch.randn(1, 3, 64, 96)
    output = target.forward(rebuilt, pixels)
    assert output.grid == (4, 6)
    # The kernel is applied to the image as a convolution, whatever its layout.
    seen: list[torch.Tensor] = []
    name = adapter.kernel.removesuffix(".weight")
    hook = rebuilt.get_submodule(name).register_forward_hook(lambda _, inputs, result: seen.append(result))
    target.forward(rebuilt, pixels)
    hook.remove()
    bias = rebuilt.get_submodule(name).bias
    convolved = F.conv2d(pixels, expected, bias, stride=16)
    tokens = seen[0] if seen[0].dim() == 4 else seen[0].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(tokens, convolved, atol=1e-4, rtol=1e-4)


def test_a_student_takes_another_patch_size() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    student.set_geometry(64, 16)
    assert student(torch.randn(1, 3, 64, 64)).grid == (4, 4)
    assert student.config.encoder_config.patch_size == 16
    with pytest.raises(InputError, match=r"image height 60 is not a multiple of the patch size 16.*: 64"):
        student.set_geometry(60)
    assert GKDStudentModel.from_encoder(EVERY_ENCODER["siglip2"], patch_size=4).adapter.stride == 4


@pytest.mark.parametrize("geometry", ["native", "resample_patch_embed"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_every_teacher_reaches_the_students_grid(kind: str, geometry: str) -> None:
    """As 512/16 of the student and 448/14 of a teacher, at an eighth of the size."""
    sizes = {"patch_size": 7} | ({"image_size": 28} if kind in LEARNED else {})
    teacher = GKDTeacher(EVERY_ENCODER[kind] | sizes, geometry=geometry)
    teacher.fit_geometry(64, (8, 8))
    half = torch.full((1, 3, 1, 1), 0.5)
    output = teacher(torch.randn(2, 3, 64, 64), (8, 8), half, half)
    assert output.grid == (8, 8) and output.patches.shape == (2, 64, teacher.width)
    assert teacher.adapter.stride == (7 if geometry == "native" else 8)
    assert output.patches.isfinite().all()


def test_dinov3_computes_with_what_a_plan_has_seen() -> None:
    """Costs are computed on tensors without values, and transformers keeps DINOv3's coordinates for later calls."""
    config = config_from_mapping(EVERY_ENCODER["dinov3_vit"])
    DistillationStep(config_from_mapping(ENCODERS["vit"]), [config], 24).costs((1,))
    encoder = make_encoder("dinov3_vit")
    assert adapter_for(encoder.config).forward(encoder, torch.randn(1, 3, 24, 24)).patches.isfinite().all()
