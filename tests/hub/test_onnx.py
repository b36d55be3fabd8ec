"""Exported graphs give PyTorch's logits at sizes they were not traced at, and wrong graphs are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    Dinov2Config,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    ResNetConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, InputError
from gkd_hf.hub import onnx as export
from gkd_hf.hub.native import class_logits
from tests.tiny import ENCODERS

ROOT = Path(__file__).parents[2]
LABELS = ["road", "sky", "person"]
RESNET = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 16, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
DINOV2 = Dinov2Config(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=2,
    image_size=32,
    patch_size=8,
    out_features=["stage1", "stage2"],
    reshape_hidden_states=True,
)


def gkd_vit() -> PreTrainedModel:
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    return GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, id2label=dict(enumerate(LABELS)))


def upernet(backbone: Any) -> PreTrainedModel:
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone,
            hidden_size=16,
            pool_scales=[2, 3],
            use_auxiliary_head=False,
            id2label=dict(enumerate(LABELS)),
        )
    )


def mask2former() -> PreTrainedModel:
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = Mask2FormerConfig(
        backbone_config=RESNET,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label=dict(enumerate(LABELS)),
        **small,
    )
    return Mask2FormerForUniversalSegmentation(config)


def saved(model: PreTrainedModel, folder: Path, seed: int = 0) -> Path:
    """The model with weights so large that every position and pooled window shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            scale = 1.0 if "position" in name else (2 / parameter[0].numel()) ** 0.5
            nn.init.normal_(parameter, std=scale, generator=generator)
    model.save_pretrained(folder)
    processor = SegformerImageProcessorPil(
        size={"height": 48, "width": 64}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], do_reduce_labels=False
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_onnx", ROOT / "scripts" / "export_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an exported ViT segmenter."""
    folder = saved(gkd_vit(), tmp_path_factory.mktemp("onnx") / "vit")
    export.export_onnx(folder)
    return folder


def logits_of(file: Path, pixels: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixels.numpy()})[0]


@torch.no_grad()
def same_logits(folder: Path, model: PreTrainedModel, *shapes: tuple[int, int, int]) -> None:
    for batch, height, width in shapes:
        pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
        expected = class_logits(model.eval()(pixels), (height, width))
        assert expected.std() > 1e-2  # else anything would pass
        np.testing.assert_allclose(logits_of(folder / "onnx/model.onnx", pixels), expected, atol=1e-4, rtol=0)


def test_vit_positions_follow_the_image(vit: Path) -> None:
    model = GKDStudentForSemanticSegmentation.from_pretrained(vit)
    # The grid that positions were learned on, larger, oblong both ways, and one that has to be padded.
    same_logits(vit, model, (1, 32, 32), (3, 64, 64), (1, 40, 104), (1, 104, 40), (2, 50, 61))


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (lambda: upernet(RESNET), [(1, 64, 64), (3, 96, 160), (2, 75, 93)]),
        (lambda: upernet(DINOV2), [(1, 32, 32), (3, 64, 40), (2, 75, 93)]),
    ],
    ids=["resnet", "dinov2"],
)
def test_upernet_at_other_sizes_than_the_traced(
    build: Any, shapes: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    model = build()
    folder = saved(model, tmp_path / "segmenter")
    exported = export.export_onnx(folder)
    assert exported.file == folder / "onnx" / "model.onnx"
    assert set(exported.differences) == {(1, 48, 64), (2, 48, 64), (1, 85, 155), (2, 85, 155)}
    assert max(exported.differences.values()) <= 1e-4
    same_logits(folder, model, *shapes)


def test_mask2former_for_one_size(tmp_path: Path) -> None:
    model = mask2former()
    folder = saved(model, tmp_path / "segmenter")
    exported = export.export_onnx(folder, size=(64, 96))
    assert set(exported.differences) == {(1, 64, 96), (2, 64, 96)}
    same_logits(folder, model, (1, 64, 96), (3, 64, 96))


def test_script_prints_what_it_wrote(
    vit: Path, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(_: nn.Module, file: Path, *args: object) -> int:
        Path(file).write_bytes((vit / "onnx/model.onnx").read_bytes())
        return 20

    monkeypatch.setattr(export, "write_graph", copied)
    out = tmp_path / "sub" / "it.onnx"
    assert script.main([str(vit), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed and "opset 20" in printed and "3 classes: road, sky, person" in printed
    assert "1 × 48×64: " in printed and "2 × 85×155: " in printed
    assert [path.name for path in out.parent.iterdir()] == ["it.onnx"]


def test_metadata_and_usage(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    file = vit / "onnx" / "model.onnx"
    about = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == LABELS
    assert json.loads(about["image_mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(about["image_std"]) == [0.4, 0.5, 0.6]
    assert json.loads(about["image_size"]) == [48, 64]
    assert json.loads(about["stride"]) == 1
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    exec(export.onnx_usage(file), {})
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())

    model = GKDStudentForSemanticSegmentation.from_pretrained(vit)
    inputs = SegformerImageProcessorPil.from_pretrained(vit)(Image.open("street.jpg"), return_tensors="pt")
    with torch.no_grad():
        classes = class_logits(model(**inputs), (48, 64)).argmax(1)
    for index, name in enumerate(LABELS):
        share = (classes == index).float().mean().item()
        assert float(printed.get(name, "0 %").removesuffix(" %")) == pytest.approx(100 * share, abs=0.2)


def test_corrupted_graph_is_refused(vit: Path, script: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    graph = onnx.load(vit / "onnx" / "model.onnx")
    kernel = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("classifier.weight"))
    values = onnx.numpy_helper.to_array(kernel).copy()
    values.flat[0] += 0.01
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))

    def corrupted(_: nn.Module, file: Path, *args: object) -> int:
        onnx.save(graph, file)
        return 20

    monkeypatch.setattr(export, "write_graph", corrupted)
    out = tmp_path / "model.onnx"
    out.write_bytes(b"the earlier one")
    assert script.main([str(vit), "--out", str(out)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "does not give PyTorch's logits for 1 image of 48×64: they differ by" in message
    assert "nothing was written" in message
    assert out.read_bytes() == b"the earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_second_size_is_one_that_the_model_takes() -> None:
    def whole_windows(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.unflatten(2, (-1, 16)).unflatten(4, (-1, 16))

    def squares(pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[2] != pixels.shape[3]:
            raise ValueError("squares only")
        return pixels

    assert export._another_size(lambda pixels: pixels, (48, 64)) == ((85, 155), 1)
    assert export._another_size(whole_windows, (48, 64)) == ((96, 192), 16)
    assert export._another_size(squares, (64, 64)) == ((128, 128), 64)
    with pytest.raises(InputError, match="--size 48x64"):
        export._another_size(squares, (48, 64))


def test_graph_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="onnxruntime cannot read the graph"):
        export.check_parity(tmp_path / "model.onnx", lambda pixels: pixels, [(1, 8, 8)])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(InputError, match="needs onnxscript: pip install onnx onnxruntime onnxscript"):
        export.export_onnx("nowhere")


def test_no_segmenter_there(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
