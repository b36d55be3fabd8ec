"""What the one-stage methods refuse, before training where it can be known then, and terms that are left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from gkd_hf import InputError
from gkd_hf.distillation.one_stage import ONE_STAGE, Features, check_method
from gkd_hf.models.encoders import EncoderAdapter, adapter_for
from tests.tiny import ENCODERS


def adapter(kind: str, **changes: object) -> EncoderAdapter:
    return adapter_for(AutoConfig.for_model(**ENCODERS[kind] | changes))


@pytest.mark.parametrize("name, settings", [("kd", {"target": "logits"}), ("cwd", {}), ("af_dcd", {}), ("vitkd", {})])
def test_what_can_be_done_is_let_through(name: str, settings: dict[str, object]) -> None:
    check_method(name, adapter("vit"), adapter("dinov2"), (16, 24), **settings)
    if name != "vitkd":
        check_method(name, adapter("resnet"), adapter("dinov2"), (16, 24), **settings)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("afdcd", {}, "'afdcd' is no one-stage method, did you mean 'af_dcd'"),
        ("cwd", {"logit_weight": 1.0}, "cwd has no setting 'logit_weight', did you mean 'logits_weight'"),
        ("kd", {"target": "blocks"}, "target must be 'features' or 'logits', got 'blocks'"),
        ("kd", {"temperature": 2.0}, "temperature 2.0 needs target 'logits'"),
        ("kd", {"weight": 0.0}, "≥ 0 and not all 0"),
        ("cwd", {"logits_temperature": 0.0}, "cwd: logits_temperature must be positive, got 0.0"),
        ("cwd", {"feature_weight": -1.0}, "≥ 0 and not all 0"),
        ("cwd", {"feature_weight": float("nan")}, "≥ 0 and not all 0"),
        ("af_dcd", {"groups": 1}, "groups must be at least 2"),
        ("af_dcd", {"groups": 12}, "the teacher's 32 channels do not cut into 12 groups"),
        ("af_dcd", {"groups": 64}, "the teacher's 32 channels do not cut into 64 groups .* divisor of 32"),
        ("af_dcd", {"mask_ratio": 1.0}, r"mask_ratio must lie in \[0, 1\)"),
        ("af_dcd", {"pool": 0}, "pool must be positive"),
        ("af_dcd", {"feature_weight": 0.0, "contrast_weight": 0.0}, "for logits alone take kd"),
        ("vitkd", {"mask_ratio": 0.0}, r"mask_ratio must lie in \(0, 1\)"),
    ],
)
def test_bad_settings_are_refused_early(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_method(name, adapter("vit"), adapter("dinov2"), (16, 16), **settings)


def test_a_grid_too_small_for_a_patch_is_refused() -> None:
    with pytest.raises(InputError, match=r"8×24 tokens pooled by 4 leave 2×6, fewer than one 4×4 patch.*≤ 8"):
        check_method("af_dcd", adapter("vit"), adapter("dinov2"), (8, 24))
    check_method("af_dcd", adapter("vit"), adapter("dinov2"), (8, 24), pool=2)
    check_method("af_dcd", adapter("vit"), adapter("dinov2"), (8, 24), contrast_weight=0.0)


def test_vitkd_names_the_encoder_without_blocks() -> None:
    with pytest.raises(InputError, match=r"blocks 1 to 2, but the student \('resnet'\) has no blocks of one grid"):
        check_method("vitkd", adapter("resnet"), adapter("dinov2"), (8, 8))
    with pytest.raises(InputError, match=r"the teacher \('convnext'\) has no blocks"):
        check_method("vitkd", adapter("vit"), adapter("convnext"), (8, 8))
    with pytest.raises(InputError, match=r"the student \('vit'\) has only 1 block;"):
        check_method("vitkd", adapter("vit", num_hidden_layers=1), adapter("dinov2"), (8, 8))
    check_method("vitkd", adapter("resnet"), adapter("dinov2"), (8, 8), mimic_weight=0.0)


@pytest.mark.parametrize(
    "name, settings, terms, logits, blocks",
    [
        ("cwd", {"logits_weight": 0.0}, {"feature"}, False, ()),
        ("cwd", {"feature_weight": 0.0}, {"logits"}, True, ()),
        ("af_dcd", {"logits_weight": 0.0, "contrast_weight": 0.0}, {"feature"}, False, ()),
        ("af_dcd", {"feature_weight": 0.0, "pool": 1, "groups": 2}, {"logits", "contrast"}, True, ()),
        ("vitkd", {"mimic_weight": 0.0}, {"generation"}, False, ()),
        ("vitkd", {"generation_weight": 0.0}, {"mimic"}, False, (1, 2)),
    ],
)
def test_terms_of_weight_0_are_left_out_with_what_they_need(
    name: str, settings: dict[str, object], terms: set[str], logits: bool, blocks: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    method = ONE_STAGE[name](6, 16, 5, **settings)
    assert (method.needs_logits, method.needs_blocks) == (logits, blocks)
    sides = [
        Features(torch.randn(2, 16, width), (4, 4), tuple(torch.randn(len(blocks), 2, 16, width))) for width in (6, 16)
    ]
    if logits:
        sides = [replace(side, logits=torch.randn(2, 5, 4, 4)) for side in sides]
    losses = method(*sides)
    assert losses.keys() == terms | {"total"}
    if list(method.parameters()):
        losses["total"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("kd", {"grid": (2, 4)}, r"the student's 6 patches are no \(2, 4\) grid"),
        ("kd", {"patches": torch.zeros(3, 6, 4)}, r"different batches or grids: \(3, 2, 3\) and \(2, 2, 3\)"),
        ("kd", {"patches": torch.zeros(2, 8, 4), "grid": (2, 4)}, r"grids: \(2, 2, 4\) and \(2, 2, 3\)"),
        ("cwd", {}, "the student has to come with logits of 5 classes, got None"),
        ("cwd", {"logits": torch.zeros(2, 4, 2, 2)}, r"logits of 5 classes, got \(2, 4, 2, 2\)"),
        ("vitkd", {}, r"the student has to come with 2 blocks of 2×6 tokens, got \[\]"),
        ("vitkd", {"blocks": (torch.zeros(2, 6, 4), torch.zeros(2, 7, 4))}, r"got \[\(2, 6\), \(2, 7\)\]"),
    ],
)
def test_features_that_do_not_fit_are_named(name: str, changes: dict[str, object], message: str) -> None:
    teacher = Features(torch.zeros(2, 6, 4), (2, 3))
    with pytest.raises(InputError, match=message):
        ONE_STAGE[name](4, 4, 5)(replace(teacher, **changes), teacher)
