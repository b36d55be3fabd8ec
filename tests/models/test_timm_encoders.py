"""timm's encoders through transformers' wrapper; what needs timm itself is skipped where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel
from transformers.dynamic_module_utils import get_imports

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, InputError
from gkd_hf.models import timm_encoders
from gkd_hf.models.loading import load_encoder


def can_be_imported(package: str) -> bool:
    try:
        import_module(package)
    except Exception:  # not only ImportError: a torchvision of another torch raises its own kinds
        return False
    return True


needs_timm = pytest.mark.skipif(not can_be_imported("timm"), reason="timm is an extra")
without_timm = pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")

EVA = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 56, "ref_feat_shape": [4, 4]}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 2, "img_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": EVA,
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64},
    "convnext_atto": {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "resnet10t": {},
    "mobilenetv2_035": {},
    "swin_tiny_patch4_window7_224": SWIN,
}
ONE_GRID = ("eva02_tiny_patch14_224", "vit_tiny_patch16_224")


def fields(architecture: str, **arguments: Any) -> dict[str, Any]:
    model_args = MODELS.get(architecture, {}) | arguments
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": model_args or None}


def student_of(architecture: str, **arguments: Any) -> GKDStudentModel:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(fields(architecture, **arguments)).eval()
    for module in student.modules():
        if isinstance(module, nn.Conv2d):  # MobileNetV2 starts so small that no signal gets through
            nn.init.kaiming_normal_(module.weight)
    return student


def images(student: GKDStudentModel, height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.randn(2, 3, height * student.adapter.stride, width * student.adapter.stride)


def test_a_model_that_travels_does_not_ask_for_timm() -> None:
    asked = {name for path in Path(timm_encoders.__file__).parent.glob("*.py") for name in get_imports(path)}
    assert "torch" in asked and "timm" not in asked


@without_timm
def test_without_timm_a_repo_of_timms_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {"tag": "a1_in1k"}}')
    with pytest.raises(InputError, match=r"pip install gkd_hf\[timm\]"):
        load_encoder(tmp_path)


@without_timm
def test_without_timm_it_is_said_what_to_install() -> None:
    with pytest.raises(InputError, match=r"need timm, .* pip install gkd_hf\[timm\]") as refused:
        GKDStudentModel.from_encoder(fields("eva02_tiny_patch14_224"))
    assert "\n" not in str(refused.value)


def test_a_timm_that_cannot_be_imported_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"cannot be imported \(is torchvision .* made for torch .*::nms") as refused:
        load_encoder(fields("eva02_tiny_patch14_224"))
    assert "\n" not in str(refused.value)


@needs_timm  # elsewhere every test shows it
def test_nothing_else_imports_timm() -> None:
    script = "import sys, gkd_hf; gkd_hf.GKDStudentModel, gkd_hf.GKDTeacher; assert 'timm' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr


@needs_timm
@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_tokens_and_class_are_timms(architecture: str, tmp_path: Path) -> None:
    student = student_of(architecture)
    pixels = images(student)
    output = student(pixels)
    assert output.grid == (4, 4) and output.last_hidden_state.shape == (2, 16, student.adapter.width)
    student.save_encoder(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    features = plain(pixels).last_hidden_state
    pooled = plain.timm_model.forward_head(features, pre_logits=True)
    if architecture in ONE_GRID:
        tokens = plain.timm_model.fc_norm(features)
        torch.testing.assert_close(output.last_hidden_state, tokens[:, 1:])
        expected = pooled if architecture.startswith("vit") else tokens[:, 0]  # EVA pools the patches
        torch.testing.assert_close(output.pooler_output, expected)
    else:
        torch.testing.assert_close(output.pooler_output, pooled, rtol=1e-4, atol=1e-5)
        if architecture.startswith("swin"):
            torch.testing.assert_close(output.last_hidden_state, features.flatten(1, 2))
        elif architecture != "convnext_atto":
            torch.testing.assert_close(output.last_hidden_state, features.flatten(2).transpose(1, 2))
    again = GKDStudentModel.from_encoder(tmp_path).eval()
    assert torch.equal(again(pixels).last_hidden_state, output.last_hidden_state)


@needs_timm
@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_maps_sizes_and_gradients(architecture: str) -> None:
    student = student_of(architecture)
    pixels = images(student, 4, 6)
    maps = student(pixels, output_maps=True).feature_maps
    assert tuple(m.shape[1] for m in maps) == student.adapter.map_channels
    assert tuple(pixels.shape[3] // m.shape[3] for m in maps) == student.adapter.map_strides
    tokens = student(pixels).last_hidden_state
    changed = pixels.clone()
    changed[..., -1] += 3  # the right edge
    assert not torch.allclose(student(changed).last_hidden_state, tokens, atol=1e-6)
    with pytest.raises(InputError, match=f"not a multiple of the patch size {student.adapter.stride} of timm_wrapper"):
        student(pixels[..., :-1])
    mask = torch.rand(2, 16) < 0.5
    output = student(pixels, bool_masked_pos=mask, mask_grid=(4, 4))
    (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


@needs_timm
@pytest.mark.parametrize("norm_feature_maps", [False, True])
@pytest.mark.parametrize("architecture", ["eva02_tiny_patch14_224", "convnext_atto", "resnet10t"])
def test_end_to_end_every_parameter_that_is_trained_has_a_gradient(architecture: str, norm_feature_maps: bool) -> None:
    student = student_of(architecture)
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, norm_feature_maps=norm_feature_maps)
    model.freeze_encoder(False)
    pixels = images(student)
    model(pixels, torch.randint(0, 3, (2, *pixels.shape[2:]))).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert student._no_split_modules <= {type(module).__name__ for module in student.encoder.modules()}


@needs_timm
def test_blocks_and_normed_maps_of_one_grid() -> None:
    student = student_of("eva02_tiny_patch14_224")
    pixels = images(student)
    adapter, model = student.adapter, student.encoder
    assert adapter.num_blocks == 3
    output = adapter.forward(model, pixels, output_maps=True, output_blocks=(3, 1))
    torch.testing.assert_close(model.timm_model.fc_norm(output.blocks[0]), output.patches)
    assert not torch.allclose(output.blocks[1], output.blocks[0])
    normed = adapter.forward(model, pixels, output_maps=True, norm_maps=True).maps[-1]
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), output.patches)
    with pytest.raises(InputError, match="has blocks 1 to 3"):
        adapter.forward(model, pixels, output_blocks=(4,))


@needs_timm
def test_a_repo_as_timm_publishes_it(tmp_path: Path) -> None:
    """No model type, bare names, and the image statistics beside the weights' address."""
    student = student_of("eva02_tiny_patch14_224")
    config = {
        "architecture": "eva02_tiny_patch14_224",
        "num_classes": 0,
        "model_args": EVA,
        "pretrained_cfg": {"tag": "mim_in22k", "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous() for name, tensor in student.encoder.timm_model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder, mean, std = load_encoder(tmp_path)
    assert (mean, std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    for name, tensor in encoder.timm_model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    pixels = images(student, 6, 4)
    loaded = student.adapter.forward(encoder.eval(), pixels)
    assert torch.equal(loaded.patches, student(pixels).last_hidden_state)


@needs_timm
def test_student_survives_saving(tmp_path: Path) -> None:
    student = student_of("eva02_tiny_patch14_224")
    student.save_pretrained(tmp_path)
    pixels = images(student, 6, 4)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).last_hidden_state, student(pixels).last_hidden_state)


@needs_timm
@pytest.mark.parametrize(
    "architecture, arguments, message",
    [
        ("eva02_tny_patch14_224", {}, "timm .* cannot build 'eva02_tny_patch14_224': Unknown model"),
        ("resnet10t", {"embed_dim": 3}, "timm .* cannot build 'resnet10t': .*embed_dim"),
        ("resnet10t", {"features_only": True}, "timm_wrapper with features_only is not supported"),
        ("hiera_tiny_224", {}, "timm's hiera_tiny_224 is not supported as an encoder: "),
        ("levit_128", {}, "timm's levit_128 is not supported as an encoder: "),
        ("mobilenetv3_small_050", {}, r"parameters that no token passes \(conv_head.weight, conv_head.bias\)"),
    ],
)
def test_what_does_not_fit_is_refused(architecture: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        student_of(architecture, **arguments)


@needs_timm
def test_a_model_of_one_image_size_says_so() -> None:
    student = student_of("beit_base_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=64)
    assert student(images(student)).grid == (4, 4)
    with pytest.raises(InputError, match="beit_base_patch16_224 takes images of 64×64 pixels only, got 64×96"):
        student(images(student, 4, 6))
