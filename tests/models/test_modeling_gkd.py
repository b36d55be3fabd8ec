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
from tests.tiny import ENCODERS, MASK2FORMER

HEADS = {"linear": {"type": "linear"}, "mask2former": MASK2FORMER}


def make_segmenter(kind: str, head: str, seed: int = 0) -> GKDStudentForSemanticSegmentation:
    torch.manual_seed(seed)
    student = GKDStudentModel.from_encoder(ENCODERS[kind])
    return GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head=HEADS[head])


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_segmenter_learns_and_survives_saving(kind: str, head: str, tmp_path) -> None:
    model = make_segmenter(kind, head)
    pixels = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 5, (2, 64, 64))
    labels[0, :16] = 255
    output = model(pixels, labels=labels)
    output.loss.backward()
    # End to end, only what distillation alone uses stays without a gradient.
    idle = {name.split(".")[-1] for name, p in model.named_parameters() if p.grad is None}
    assert idle <= {"mask_token", "mask_pixel"} | ({"weight", "bias"} if kind in ("vit", "dinov2") else set())
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
    model = make_segmenter("resnet", head)
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


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_student_survives_saving(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[kind]).eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = student(pixels)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModel.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(loaded(pixels).last_hidden_state, expected.last_hidden_state)
    assert loaded.config.image_mean == student.config.image_mean
    student.save_encoder(tmp_path / "encoder")
    assert not any("mask_token" in key for key in load_file(tmp_path / "encoder" / "model.safetensors")) or (
        kind == "dinov2"  # whose own architecture has one
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
