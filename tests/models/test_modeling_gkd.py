"""Students and segmenters: losses, freezing, sizes, saving and loading through the Auto classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSemanticSegmentation

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, InputError
from gkd_hf.models.decode_heads import LinearHead, build_decode_head
from tests.tiny import DPT, ENCODERS, EVERY_ENCODER, MASK2FORMER, UPERNET

HEADS = {"linear": {"type": "linear"}, "mask2former": MASK2FORMER, "upernet": UPERNET, "dpt": DPT}
VITS = ("vit", "dinov2")
# Every encoder's maps go into a head, and into every head those of one encoder of each kind. DPT needs a ViT's four.
EVERY_HEAD = (*VITS, "resnet", "mobilenet_v2", "convnext", "swin")
PAIRS = [(kind, head) for kind in EVERY_HEAD for head in sorted(HEADS) if head != "dpt" or kind in VITS]
PAIRS += [(kind, "linear") for kind in sorted(set(ENCODERS) - set(EVERY_HEAD))]


def make_segmenter(kind: str, head: str, seed: int = 0) -> GKDStudentForSemanticSegmentation:
    torch.manual_seed(seed)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    return GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head=HEADS[head])


@pytest.mark.parametrize("kind, head", PAIRS)
def test_segmenter_learns_and_survives_saving(kind: str, head: str, tmp_path) -> None:
    model = make_segmenter(kind, head)
    pixels = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 5, (2, 64, 64))
    labels[0, :16] = 255
    output = model(pixels, labels=labels)
    output.loss.backward()
    # End to end, only what distillation alone uses stays without a gradient.
    idle = {name.split(".")[-1] for name, p in model.named_parameters() if p.grad is None}
    beside = model.student.adapter.beside_maps()
    assert idle <= {"mask_token", "mask_pixel"} | ({"weight", "bias"} if beside else set())
    assert torch.isfinite(output.loss) and output.loss_terms
    model.eval()
    logits = model(pixels).logits
    assert logits.shape[:2] == (2, 5)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).logits, logits)


def test_ignored_pixels_do_not_count() -> None:
    head = LinearHead((4,), 3, ignore_index=255).eval()
    maps = (torch.randn(1, 4, 2, 2),)
    labels = torch.tensor([[[0, 1], [2, 255]]])
    logits = head(maps).logits
    expected = F.cross_entropy(logits.flatten(2)[..., :3], labels.flatten(1)[:, :3])
    torch.testing.assert_close(head(maps, labels).loss, expected)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_batch_of_ignored_pixels_gives_a_zero_loss(head: str) -> None:
    model = make_segmenter("vit" if head == "dpt" else "resnet", head)
    labels = torch.full((2, 64, 64), 255)
    output = model(torch.randn(2, 3, 64, 64), labels=labels)
    output.loss.backward()
    assert output.loss == 0
    labels[0] = 1  # one sample has labels, the other has none
    assert torch.isfinite(model(torch.randn(2, 3, 64, 64), labels=labels).loss)


def test_mask2former_has_the_papers_settings() -> None:
    head = build_decode_head({"type": "mask2former"}, (384,) * 4, (16,) * 4, 19, 255)
    config = head.config
    assert (config.encoder_layers, len(head.transformer_module.decoder.layers)) == (6, 9)
    assert (config.num_queries, config.hidden_dim, config.feature_size) == (100, 256, 256)
    assert (config.class_weight, config.mask_weight, config.dice_weight) == (2.0, 5.0, 5.0)
    assert (config.no_object_weight, config.train_num_points) == (0.1, 12544)
    assert (config.oversample_ratio, config.importance_sample_ratio) == (3.0, 0.75)
    assert config.feature_strides == [4, 8, 16, 32]


def test_mask2former_loss_is_weighted_over_all_layers() -> None:
    """Total = Σ over predictions of 2·class + 5·mask + 5·dice; with the points fixed the parts can be recomputed."""
    model = make_segmenter("vit", "mask2former")
    head = model.decode_head
    parts = {"loss_cross_entropy": 1.0, "loss_mask": 10.0, "loss_dice": 100.0}
    layers = 3  # the bare queries and two decoder layers

    def criterion(**kwargs: object) -> dict[str, torch.Tensor]:
        assert len(kwargs["auxiliary_predictions"]) == layers - 1
        names = [name + suffix for name in parts for suffix in ("", "_0", "_1")]
        return {name: torch.tensor(parts[name.removesuffix("_0").removesuffix("_1")]) for name in names}

    head.criterion.forward = criterion
    output = model(torch.randn(1, 3, 64, 64), labels=torch.zeros(1, 64, 64, dtype=torch.long))
    assert output.loss == layers * (2 * 1 + 5 * 10 + 5 * 100)
    assert output.loss_terms == {"cross_entropy": 1.0, "mask": 10.0, "dice": 100.0}


def test_mask2former_logits_are_the_semantic_inference() -> None:
    model = make_segmenter("vit", "mask2former").eval()
    logits = model(torch.randn(1, 3, 64, 64)).logits
    assert logits.shape == (1, 5, 32, 32)  # ×4 of an 8×8 grid
    assert logits.min() >= 0 and logits.max() <= MASK2FORMER["num_queries"]


def test_any_image_size_is_taken() -> None:
    model = make_segmenter("vit", "linear").eval()
    pixels = torch.randn(1, 3, 50, 70)
    assert model(pixels).logits.shape == (1, 5, 50, 70)
    labels = torch.randint(0, 5, (1, 50, 70))
    assert torch.isfinite(model(pixels, labels=labels).loss)
    whole = model(F.pad(pixels, (0, 2, 0, 6))).logits
    resized = F.interpolate(whole, (56, 72), mode="bilinear", align_corners=False)[..., :50, :70]
    torch.testing.assert_close(model(pixels).logits, resized)


@pytest.mark.parametrize("kind, head", [("vit", "dpt"), ("vit", "upernet"), ("resnet", "upernet")])
def test_heads_keep_the_place_in_images_that_are_not_square(kind: str, head: str) -> None:
    model = make_segmenter(kind, head).eval()
    assert model(torch.randn(1, 3, 50, 70)).logits.shape == (1, 5, 50, 70)
    maps = model.student(torch.randn(1, 3, 64, 128), output_maps=True).feature_maps
    changed = tuple(m.clone() for m in maps)
    for m in changed:
        m[..., : m.shape[-2] // 4, -(m.shape[-1] // 4) :] += 5  # the top right corner
    difference = (model.decode_head(changed).logits - model.decode_head(maps).logits).abs().sum((0, 1))
    row, column = divmod(int(difference.argmax()), difference.shape[1])
    assert row < difference.shape[0] / 2 and column > difference.shape[1] / 2


def test_upernet_says_that_one_image_is_too_few() -> None:
    model = make_segmenter("resnet", "upernet")
    with pytest.raises(InputError, match="upernet cannot be trained with one image per device"):
        model(torch.randn(1, 3, 32, 32), labels=torch.zeros(1, 32, 32, dtype=torch.long))


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_map_norms_learn_with_the_head(kind: str) -> None:
    model = make_segmenter(kind, "linear")
    model.freeze_encoder()
    model(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 5, (2, 64, 64))).loss.backward()
    learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"map_norms", "decode_head"}
    assert all(parameter.grad is not None for parameter in model.map_norms.parameters())
    channels = model.student.adapter.map_channels
    maps = [norm(torch.randn(2, c, 3, 4) * 5 + 2) for norm, c in zip(model.map_norms, channels, strict=True)]
    for normed in maps:  # over the channels of each position
        torch.testing.assert_close(normed.mean(1), torch.zeros(2, 3, 4), atol=1e-4, rtol=0)
    assert make_segmenter("resnet", "linear").map_norms is None


def test_frozen_encoder_stays_in_eval_mode_and_without_gradients() -> None:
    model = make_segmenter("resnet", "linear")
    model.freeze_encoder()
    model.train()
    assert model.decode_head.training and not any(module.training for module in model.student.modules())
    before = {name: tensor.clone() for name, tensor in model.student.state_dict().items()}
    output = model(torch.randn(2, 3, 64, 64), labels=torch.zeros(2, 64, 64, dtype=torch.long))
    output.loss.backward()
    assert all(parameter.grad is None for parameter in model.student.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.student.state_dict().items())
    model.freeze_encoder(False)
    assert model.student.training
    assert [n for n, p in model.student.named_parameters() if not p.requires_grad] == ["mask_pixel"]


@pytest.mark.parametrize("kind", sorted(EVERY_ENCODER))
def test_student_survives_saving(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(EVERY_ENCODER[kind]).eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = student(pixels)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModel.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(loaded(pixels).last_hidden_state, expected.last_hidden_state)
    assert loaded.config.image_mean == student.config.image_mean
    student.save_encoder(tmp_path / "encoder")
    assert not any("mask_token" in key for key in load_file(tmp_path / "encoder" / "model.safetensors")) or (
        kind.startswith("dinov")  # whose own architectures have one
    )
    again = GKDStudentModel.from_encoder(tmp_path / "encoder").eval()
    assert torch.equal(again(pixels).pooler_output, expected.pooler_output)


def test_a_fresh_process_gets_the_same_outputs(tmp_path) -> None:
    model = make_segmenter("vit", "linear").eval()
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path / "segmenter")
    model.student.save_encoder(tmp_path / "encoder")
    script = f"""
import json, torch
torch.manual_seed(1)
pixels = torch.randn(1, 3, 32, 32)
from transformers import AutoModel, AutoModelForSemanticSegmentation
encoder = AutoModel.from_pretrained({str(tmp_path / "encoder")!r}).eval()
import sys
assert "gkd_hf" not in sys.modules
tokens = encoder(pixels).last_hidden_state
import gkd_hf
segmenter = AutoModelForSemanticSegmentation.from_pretrained({str(tmp_path / "segmenter")!r}).eval()
print("RESULT" + json.dumps([tokens.double().sum().item(), segmenter(pixels).logits.double().flatten().tolist()]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert run.returncode == 0, run.stderr
    tokens, logits = json.loads(run.stdout.split("RESULT")[1])
    with torch.no_grad():
        expected = model.student.encoder(pixels, interpolate_pos_encoding=True).last_hidden_state.double().sum().item()
        assert tokens == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(
            torch.tensor(logits), model(pixels).logits.double().flatten().float(), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    "settings, channels, message",
    [
        ({"type": "linaer"}, (8, 8, 8), "unknown decode_head 'linaer', did you mean 'linear'"),
        (
            {"type": "upernet", "hiden_size": 3},
            (8, 8),
            "upernet has no option 'hiden_size', did you mean 'hidden_size'",
        ),
        ({"type": "upernet", "pool_scales": [0]}, (8, 8), "bad decode_head upernet: pool_scales is .*1 or more"),
        ({"type": "upernet", "hidden_size": "wide"}, (8, 8), "bad decode_head upernet: .*hidden_size"),
        (
            {"type": "dpt"},
            (8, 8, 8, 8),
            "dpt needs the four stage maps of one grid .*strides 4, 8, 16, 32: use upernet",
        ),
        ({"type": "dpt", "readout_type": "add"}, (8,), "dpt has no option 'readout_type' .*there are: neck_hidden_"),
        ({"type": "linear", "width": 3}, (8, 8, 8), "linear has no options, got width"),
        ({"type": "mask2former", "num_querys": 3}, (8, 8, 8), "no option 'num_querys', did you mean 'num_queries'"),
        ({"type": "mask2former", "hidden_dim": "wide"}, (8, 8, 8), "bad decode_head mask2former: .*hidden_dim"),
        ({"type": "mask2former", "num_attention_heads": 7}, (8, 8, 8), "bad decode_head mask2former: .*divisible"),
        ({"type": "mask2former"}, (8, 8), "needs three stage maps or more, the encoder has 2"),
    ],
)
def test_bad_decode_heads_are_refused(settings: dict, channels: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_decode_head(settings, channels, tuple(4 * 2**i for i in range(len(channels))), 5, 255)


@pytest.mark.parametrize("norm_feature_maps", [False, True])
@pytest.mark.parametrize("kind", list(EVERY_ENCODER))
def test_end_to_end_every_parameter_that_is_trained_has_a_gradient(kind: str, norm_feature_maps: bool) -> None:
    student = GKDStudentModel.from_encoder(EVERY_ENCODER[kind])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, norm_feature_maps=norm_feature_maps)
    model.freeze_encoder(False)
    model(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []
    trained = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
    assert len(trained) >= len(list(model.student.parameters())) - 4


@pytest.mark.parametrize("kind", list(EVERY_ENCODER))
def test_layers_to_shard_are_in_the_model(kind: str) -> None:
    student = GKDStudentModel.from_encoder(EVERY_ENCODER[kind])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3)
    names = [type(module).__name__ for module in student.encoder.modules()]
    assert model._no_split_modules == student._no_split_modules
    assert len(student._no_split_modules) > 0 and student._no_split_modules <= set(names)
    held = {
        id(parameter)
        for module in student.modules()
        if type(module).__name__ in student._no_split_modules
        for parameter in module.parameters()
    }
    sizes = {id(parameter): parameter.numel() for parameter in student.parameters()}
    # What is left for the root is whole all the time: it has to be the smaller part.
    assert sum(size for key, size in sizes.items() if key in held) > 0.4 * sum(sizes.values())


def test_activation_checkpointing_is_refused_where_nothing_can_be_computed_again() -> None:
    student = GKDStudentModel.from_encoder(ENCODERS["resnet"])
    with pytest.raises(InputError, match="activation_checkpointing is not possible with a resnet"):
        student.check_activation_checkpointing()
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    student.check_activation_checkpointing()
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3)
    model.check_activation_checkpointing()
    model.freeze_encoder()
    with pytest.raises(InputError, match="the encoder is frozen, and decode_head linear has no layers"):
        model.check_activation_checkpointing()
