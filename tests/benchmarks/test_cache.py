"""The account of the teacher cache: what its figures are made of, and that its arms do what they are named for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gkd_hf.benchmarks import cache, step
from gkd_hf.benchmarks.cache import IMAGENET, measure, passes_until_it_pays, table
from gkd_hf.benchmarks.step import StepSettings
from gkd_hf.errors import InputError
from tests.tiny import ENCODERS


@pytest.mark.parametrize(
    ("recomputed", "cached", "kept", "passes"),
    [
        (3.0, 2.0, 3.5, 2),  # 5.5 against 6
        (3.0, 2.0, 4.0, 3),  # 6 against 6 is not less
        (3.0, 2.0, 7.5, 6),
        (3.0, 2.0, 2.9, 1),  # of noise: writing cannot be faster than not writing
        (2.0, 2.0, 2.1, None),
    ],
)
def test_passes_until_it_pays(recomputed: float, cached: float, kept: float, passes: int | None) -> None:
    assert passes_until_it_pays(recomputed, cached, kept) == passes
    if passes:
        assert kept + (passes - 1) * cached < passes * recomputed
    if passes and passes > 1:
        assert kept + (passes - 2) * cached >= (passes - 1) * recomputed


def test_the_account_of_a_tiny_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PRESETS", {"student": ENCODERS["vit"], "teacher": ENCODERS["dinov2"]})
    settings = StepSettings("student", "teacher", batch_size=2, image_size=32, rounds=2)
    result = measure(settings, str(tmp_path))
    assert result["bytes_per_view"] == 2 * 17 * 32 + 24
    assert result["imagenet_gb_per_view"] == pytest.approx(IMAGENET * result["bytes_per_view"] / 1e9)
    assert set(result["step_ms"]) == {"recomputed", "cached", "kept"}
    assert 0 < result["loss_difference"] < 2**-8  # the tokens are rounded, and the loss is otherwise the same
    assert f"{result['bytes_per_view'] / 1e6:.3f} MB a view" in table(result)
    assert json.loads(json.dumps(result)) == result
    assert not any(tmp_path.iterdir())
    with pytest.raises(InputError, match="shards cannot be written to"):
        measure(settings, str(tmp_path / "absent"))


def test_a_batch_of_more_images_than_are_kept_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PRESETS", {"student": ENCODERS["vit"], "teacher": ENCODERS["dinov2"]})
    monkeypatch.setattr(cache, "MOST_VIEWS", 2)
    result = measure(StepSettings("student", "teacher", batch_size=3, image_size=32, rounds=1), str(tmp_path))
    assert result["step_ms"]["cached"] > 0
