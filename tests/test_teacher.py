"""The teacher: frozen for good, its own normalisation, its grid brought onto the student's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gkd_hf import GKDTeacher, InputError
from gkd_hf.models.encoders import adapter_for
from gkd_hf.models.loading import load_encoder
from tests.tiny import ENCODERS

HALF = torch.full((1, 3, 1, 1), 0.5)


def test_it_never_trains() -> None:
    teacher = GKDTeacher(ENCODERS["resnet"])
    holder = nn.ModuleList([teacher]).train()
    assert holder.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    output = teacher(pixels, (4, 4), HALF, HALF)
    assert not output.patches.requires_grad and not output.cls.requires_grad


def test_it_renormalises_the_students_pixels(tmp_path) -> None:
    encoder, _, _ = load_encoder(ENCODERS["vit"])
    encoder.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    teacher = GKDTeacher(tmp_path)
    raw = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    expected = adapter_for(teacher.encoder.config).forward(teacher.encoder, (raw - mean) / std)
    output = teacher((raw - 0.5) / 0.25, (4, 4), HALF, HALF / 2)
    torch.testing.assert_close(output.patches, expected.patches)
    torch.testing.assert_close(output.cls, expected.cls)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "resnet", "convnext", "swin"])
def test_native_geometry_gives_the_students_grid(kind: str) -> None:
    teacher = GKDTeacher(ENCODERS[kind])
    output = teacher(torch.randn(1, 3, 96, 64), (6, 4), HALF, HALF)  # a student of patch 16
    assert output.grid == (6, 4) and output.patches.shape == (1, 24, teacher.width)


def test_native_geometry_resizes_to_its_own_patches() -> None:
    """512/16 = 448/14: a teacher of patch 14 sees a 28² image where a student of patch 16 sees 32²."""
    teacher = GKDTeacher({**ENCODERS["dinov2"], "patch_size": 14, "image_size": 28})
    seen = []
    teacher.encoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    assert teacher(torch.randn(1, 3, 32, 32), (2, 2), HALF, HALF).grid == (2, 2)
    assert seen == [(28, 28)]


def test_resampled_geometry_sees_the_students_image() -> None:
    teacher = GKDTeacher({**ENCODERS["dinov2"], "patch_size": 14, "image_size": 28}, geometry="resample_patch_embed")
    teacher.fit_geometry(32, (2, 2))
    assert teacher.encoder.config.patch_size == 16
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher(torch.randn(1, 3, 32, 32), (2, 2), HALF, HALF).grid == (2, 2)
    kernel = teacher.encoder.embeddings.patch_embeddings.projection.weight.clone()
    teacher.fit_geometry(40, (2, 2))
    teacher.fit_geometry(32, (2, 2))  # back again: from the original kernels, so nothing is lost on the way
    assert torch.equal(teacher.encoder.embeddings.patch_embeddings.projection.weight, kernel)
    with pytest.raises(InputError, match="cannot be resampled to a 3×3 grid of a 32² image"):
        teacher.fit_geometry(32, (3, 3))


def test_grid_of_a_cnns_image_is_the_teachers() -> None:
    assert GKDTeacher(ENCODERS["vit"]).grid_for(60) == (8, 8)  # 60 / 8 = 7.5


def test_bad_teachers_are_refused() -> None:
    with pytest.raises(InputError, match="unknown teacher geometry 'nativ', did you mean 'native'"):
        GKDTeacher(ENCODERS["vit"], geometry="nativ")
    with pytest.raises(InputError, match="needs patch kernels and positions to resample, resnet has none"):
        GKDTeacher(ENCODERS["resnet"], geometry="resample_patch_embed")
    with pytest.raises(InputError, match="encoders of type 'gpt2' are not supported"):
        GKDTeacher({"model_type": "gpt2"})


def test_bf16_weights_give_nearly_the_same_tokens() -> None:
    torch.manual_seed(0)
    teacher = GKDTeacher(ENCODERS["dinov2"])
    pixels = torch.randn(4, 3, 32, 32)
    expected = teacher(pixels, (4, 4), HALF, HALF)
    teacher.halve()
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in teacher.buffers()} == {torch.float32}  # the statistics of its images
    with torch.autocast("cpu", torch.bfloat16):
        output = teacher(pixels, (4, 4), HALF, HALF)
    for ours, theirs in ((output.patches, expected.patches), (output.cls, expected.cls)):
        error = ((ours.float() - theirs).norm() / theirs.norm()).item()
        assert 0 < error < 0.01  # measured: 0.005


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_leaves_batch_norms_as_they_are(autocast: bool) -> None:
    torch.manual_seed(0)
    teacher = GKDTeacher(ENCODERS["resnet"])
    pixels = torch.randn(4, 3, 64, 64)
    expected = teacher(pixels, (4, 4), HALF, HALF)
    teacher.halve()
    for module in teacher.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, nn.BatchNorm2d):
            assert all(tensor.dtype != torch.bfloat16 for tensor in tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = teacher(pixels, (4, 4), HALF, HALF)
    error = ((output.patches.float() - expected.patches).norm() / expected.patches.norm()).item()
    assert 0 < error < 0.02  # measured: 0.008


def test_bf16_weights_are_resampled_as_bf16() -> None:
    teacher = GKDTeacher({**ENCODERS["dinov2"], "patch_size": 14, "image_size": 28}, geometry="resample_patch_embed")
    teacher.halve()
    teacher.fit_geometry(32, (2, 2))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert teacher(torch.randn(1, 3, 32, 32), (2, 2), HALF, HALF).grid == (2, 2)


@pytest.fixture
def group_of_one() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_teacher_keeps_its_geometry(group_of_one: DeviceMesh) -> None:
    teacher = GKDTeacher({**ENCODERS["dinov2"], "patch_size": 14, "image_size": 28}, geometry="resample_patch_embed")
    teacher.fit_geometry(32, (2, 2))
    pixels = torch.randn(1, 3, 32, 32)
    expected = teacher(pixels, (2, 2), HALF, HALF)
    whole = [weakref.ref(parameter) for parameter in (*teacher._original[0].parameters(), *teacher.parameters())]
    teacher.shard(group_of_one)
    gc.collect()
    assert teacher.sharded and [parameter for parameter in whole if parameter() is not None] == []
    assert all(isinstance(parameter, DTensor) for parameter in teacher.parameters())
    output = teacher(pixels, (2, 2), HALF, HALF)
    assert torch.equal(output.patches, expected.patches) and torch.equal(output.cls, expected.cls)
    assert all(isinstance(parameter, DTensor) for parameter in teacher.parameters())  # again
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher.fit_geometry(32, (2, 2))
    teacher.shard(group_of_one)  # it is already
    with pytest.raises(
        InputError, match="sharded for images of 32 pixels in patches of 16 and cannot be resampled to 40"
    ):
        teacher.fit_geometry(40, (2, 2))
    with pytest.raises(InputError, match="halve it before it is sharded"):
        teacher.halve()


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_any_teacher_can_be_sharded(kind: str, group_of_one: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A final norm beside the encoder's forward, batch norms of another precision, weights laid out for a GPU."""
    monkeypatch.setattr("gkd_hf.models.encoder_adapter.CHANNELS_LAST_ON", ("cpu",))
    teacher = GKDTeacher(ENCODERS[kind])
    teacher.halve()
    teacher.place("cpu")
    assert not all(parameter.is_contiguous() for parameter in teacher.parameters())
    pixels = torch.randn(1, 3, 64, 64)
    expected = teacher(pixels, (4, 4), HALF, HALF)
    teacher.shard(group_of_one)
    assert torch.equal(teacher(pixels, (4, 4), HALF, HALF).patches, expected.patches)


def test_large_teachers_are_those_of_half_a_billion_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = GKDTeacher(ENCODERS["dinov2"])
    assert not teacher.large
    size = sum(parameter.numel() for parameter in teacher.parameters())
    monkeypatch.setattr("gkd_hf.teacher.LARGE", size)
    assert teacher.large
