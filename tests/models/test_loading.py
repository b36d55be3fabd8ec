"""Where encoders come from: what is read, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    MobileViTForSemanticSegmentation,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    ViTModel,
)

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, InputError
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.encoders import adapter_for
from gkd_hf.models.loading import config_from_mapping, load_encoder
from tests.tiny import ENCODERS, EVERY_ENCODER, MORE_ENCODERS


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
        ({"model_type": "radio", "mlp_ratio": 2}, "bad radio .*'mlp_ratio': TypeError: .* expected float, got int"),
        ({"model_type": "radio", "video_temporal_patch_size": 2}, "radio with video_temporal_patch_size is not supp"),
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


@pytest.mark.parametrize(
    "kind, layer",
    [
        ("vit", "embeddings.patch_embeddings.projection.weight"),
        ("dinov2", "embeddings.cls_token"),
        ("clip", "embeddings.class_embedding"),
        ("mobilevit", "conv_1x1_exp.convolution.weight"),
    ],
)
def test_weights_without_a_layer_are_refused(kind: str, layer: str, tmp_path: Path) -> None:
    load_encoder(EVERY_ENCODER[kind])[0].save_pretrained(tmp_path)
    drop(tmp_path, layer)
    with pytest.raises(InputError, match=rf"lack 1 of the \d+ tensors of \w+, .*: {layer}; choose a") as refused:
        load_encoder(tmp_path)
    assert ("those for classification have it" in str(refused.value)) == (kind == "mobilevit")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("dinov3_vit", "embeddings.mask_token"),
        ("radio", "input_conditioner.norm_mean"),
        ("resnet", "embedder.embedder.normalization.num_batches_tracked"),
    ],
)
def test_weights_without_what_needs_no_training_are_read(kind: str, name: str, tmp_path: Path) -> None:
    original, _, _ = load_encoder(EVERY_ENCODER[kind])
    original.save_pretrained(tmp_path)
    drop(tmp_path, name)
    assert torch.equal(load_encoder(tmp_path)[0].state_dict()[name], original.state_dict()[name])


def test_mobilevit_for_segmentation_lacks_the_layer_that_tokens_are_read_from(tmp_path: Path) -> None:
    fields = {key: value for key, value in ENCODERS["mobilevit"].items() if key != "model_type"}
    MobileViTForSemanticSegmentation(AutoConfig.for_model("mobilevit", **fields)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="random: conv_1x1_exp.*.those for segmentation leave out its last conv"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_code_beside_an_architecture_of_transformers_is_not_run(kind: str, tmp_path: Path) -> None:
    original, _, _ = load_encoder(EVERY_ENCODER[kind])
    original.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: ...\n")
    edit(tmp_path, auto_map={"AutoConfig": "evil.Model", "AutoModel": "evil.Model"})
    encoder, _, _ = load_encoder(tmp_path)
    assert type(encoder) is type(original) and not (tmp_path / "ran").exists()
    assert "auto_map" not in encoder.config.to_dict()
    edit(tmp_path, model_type="bert")
    with pytest.raises(InputError, match="encoders of type 'bert' are not supported"):
        load_encoder(tmp_path)
    edit(tmp_path, model_type="my_net")
    with pytest.raises(InputError, match="brings its own Python code. It is not run"):
        load_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()


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


@pytest.mark.parametrize("kind", ("vit", "dinov2", "deit", "ijepa"))
def test_norms_have_the_papers_epsilon(kind: str, tmp_path) -> None:
    fields = {key: value for key, value in EVERY_ENCODER[kind].items() if key != "model_type"}
    config = AutoConfig.for_model(kind, **fields)
    adapter_for(config).build().save_pretrained(tmp_path)
    for encoder in (load_encoder(EVERY_ENCODER[kind])[0], load_encoder(tmp_path)[0]):
        assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_a_vit_saved_by_transformers_is_read_whole(tmp_path) -> None:
    torch.manual_seed(0)
    fields = {key: value for key, value in ENCODERS["vit"].items() if key != "model_type"}
    original = ViTModel(AutoConfig.for_model("vit", layer_norm_eps=1e-6, **fields)).eval()
    original.save_pretrained(tmp_path)
    student = GKDStudentModel.from_encoder(tmp_path).eval()
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(student(pixels).last_hidden_state, original(pixels).last_hidden_state[:, 1:])


@pytest.mark.parametrize("kind", ["vit", "dinov2_registers", "dinov3_vit", "clip", "siglip2", "radio"])
def test_weights_of_another_patch_size_are_refused(kind: str, tmp_path: Path) -> None:
    load_encoder({**EVERY_ENCODER[kind], "patch_size": 4})[0].save_pretrained(tmp_path)
    edit(tmp_path, patch_size=8)
    with pytest.raises(InputError, match="have a patch size of 4, its config.json says patch_size 8: set it to 4"):
        load_encoder(tmp_path)


def test_weights_of_another_image_size_are_refused(tmp_path: Path) -> None:
    load_encoder(MORE_ENCODERS["deit"])[0].save_pretrained(tmp_path)
    edit(tmp_path, image_size=64)
    with pytest.raises(
        InputError, match="have positions for images of 32×32 pixels, .* says image_size 64: set it to 32"
    ):
        load_encoder(tmp_path)


def test_a_single_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    load_encoder(MORE_ENCODERS["siglip2"])[0].save_pretrained(tmp_path)
    edit(tmp_path, num_patches=25)
    with pytest.raises(
        InputError, match="another shape than its config.json says: embeddings.position_embedding.weight"
    ):
        load_encoder(tmp_path)


def test_sizes_that_are_not_square_are_refused() -> None:
    with pytest.raises(InputError, match=r"vit with image_size \[32, 64\] is not supported"):
        load_encoder({**ENCODERS["vit"], "image_size": [32, 64]})
    encoder, _, _ = load_encoder({**ENCODERS["vit"], "image_size": [32, 32], "patch_size": [8, 8]})
    assert (encoder.config.image_size, encoder.config.patch_size) == (32, 8)


@pytest.mark.parametrize(
    "full, config, kind",
    [(CLIPModel, CLIPConfig, "clip"), (SiglipModel, SiglipConfig, "siglip"), (Siglip2Model, Siglip2Config, "siglip2")],
)
def test_the_vision_tower_of_a_model_of_images_and_text_is_read(
    full: type, config: type, kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vision = {key: value for key, value in MORE_ENCODERS[kind].items() if key != "model_type"}
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    model = full(config(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    encoder, _, _ = load_encoder(tmp_path)
    assert encoder.config.model_type == MORE_ENCODERS[kind]["model_type"]
    pixels = torch.randn(1, 3, 32, 48)
    adapter = adapter_for(encoder.config)
    expected = adapter.forward(model.vision_model, pixels)
    assert torch.equal(adapter.forward(encoder.eval(), pixels).patches, expected.patches)


def test_zero_is_the_mean_colour_of_a_model_that_normalises_pixels_itself(tmp_path: Path) -> None:
    encoder, mean, std = load_encoder(MORE_ENCODERS["radio"])
    assert (mean, std) == (tuple(encoder.config.norm_mean), tuple(encoder.config.norm_std))
    pixels = torch.rand(1, 3, 32, 32)
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    patches = adapter_for(encoder.config).forward(encoder.eval(), normalised).patches
    torch.testing.assert_close(patches, encoder(pixels).features)
    student = GKDStudentModel.from_encoder(MORE_ENCODERS["radio"])
    seen: list[torch.Tensor] = []
    student.encoder.input_conditioner.register_forward_hook(lambda _, inputs, output: seen.append(output))
    student(normalised, bool_masked_pos=torch.ones(1, 16, dtype=torch.bool), mask_grid=(4, 4))
    torch.testing.assert_close(seen[0], torch.zeros_like(seen[0]), atol=1e-6, rtol=0)
    encoder.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "do_normalize": false}')
    assert load_encoder(tmp_path)[1:] == (mean, std)


@pytest.mark.parametrize("kind", ["siglip", "vit", "radio", "swin", "mobilenet_v2"])
def test_the_callers_configuration_stays_as_it_is(kind: str) -> None:
    fields = {key: value for key, value in EVERY_ENCODER[kind].items() if key != "model_type"}
    if "image_size" in fields:
        fields |= {"image_size": [32, 32], "patch_size": [8, 8]}
    config = AutoConfig.for_model(EVERY_ENCODER[kind]["model_type"], **fields, attn_implementation="eager")
    before = config.to_dict()
    students = [GKDStudentModel.from_encoder(config)]
    whole = GKDStudentConfig(encoder_config=config, decode_head={"type": "linear"})
    students.append(GKDStudentModel(whole))
    students.append(GKDStudentForSemanticSegmentation(whole).student)
    assert config.to_dict() == before and whole.encoder_config.to_dict() == before
    for student in students:
        student.set_geometry(64)
        assert student.config.encoder_config is student.encoder.config is not config
        assert isinstance(student.adapter.stride, int)
    assert config.to_dict() == before and config._attn_implementation == "eager"


def test_a_segmenter_and_its_student_have_one_configuration() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    segmenter = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3)
    for each in (segmenter, GKDStudentForSemanticSegmentation(segmenter.config)):
        each.student.set_geometry(64)
        assert each.config is each.student.config
        assert each.config.encoder_config.image_size == 64


def edit(folder: Path, **fields: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def drop(folder: Path, name: str) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    kept = {key: tensor for key, tensor in state.items() if not key.endswith(name)}
    assert len(kept) < len(state)
    save_file(kept, weights, metadata={"format": "pt"})
