from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data import rand_augment
from gkd_hf.data.rand_augment import OPERATIONS, RandAugment

FILL = (1, 2, 3)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramp() -> PIL.Image.Image:
    """Red is x, green is y, blue 200, 100×100."""
    y, x = np.mgrid[:100, :100].astype(np.uint8)
    return PIL.Image.fromarray(np.dstack([x + 50, y + 50, np.full_like(x, 200)]))


def applied(name: str, level: float, seed: int = 0, image: PIL.Image.Image | None = None) -> np.ndarray:
    return np.asarray(getattr(rand_augment, name)(image or ramp(), level, generator(seed), FILL)).astype(int)


def test_fifteen_different_operations():
    noise = PIL.Image.fromarray(generator(7).integers(0, 200, (64, 64, 3), dtype=np.uint8))
    results = {operation.__name__: applied(operation.__name__, 9, image=noise).tobytes() for operation in OPERATIONS}
    assert len(OPERATIONS) == len(results) == len(set(results.values())) == 15


def change(name: str, level: float) -> float:
    noise = PIL.Image.fromarray(generator(7).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    smooth = noise.resize((100, 100), PIL.Image.Resampling.BICUBIC)
    return float(
        np.mean([np.abs(applied(name, level, seed, smooth) - np.asarray(smooth)).mean() for seed in range(12)])
    )


@pytest.mark.parametrize(
    "name",
    [
        "rotate", "posterize", "solarize", "solarize_add", "color", "contrast", "brightness", "sharpness", "shear_x",
        "shear_y", "translate_x", "translate_y",
    ],
)  # fmt: skip
def test_a_larger_magnitude_is_a_stronger_change(name: str):
    changes = [change(name, level) for level in (1, 5, 9)]
    assert changes[0] < changes[1] < changes[2]


def test_geometry_at_full_magnitude():
    image = ramp()
    pixels = np.asarray(image).astype(int)
    shifted = {
        int(np.sign(s)): applied("translate_x", 10, seed)
        for seed in range(8)
        for s in [0.5 - generator(seed).random()]
    }
    for result in shifted.values():
        filled = (result == FILL).all(axis=(0, 2))
        assert filled.sum() in (44, 45, 46)  # 45 % of 100 columns
        kept = np.flatnonzero(~filled)
        offset = 45 if filled[-1] else -45
        inner = kept[2:-2]
        assert np.abs(result[:, inner] - pixels[:, inner + offset]).max() <= 1
    assert len(shifted) == 2
    degrees = {round(float(shift_angle(applied("rotate", 10, seed)))) for seed in range(8)}
    assert degrees == {-30, 30}
    sheared = applied("shear_x", 10)
    slope = (sheared[70, 50, 0] - sheared[30, 50, 0]) / 40
    assert abs(abs(slope) - 0.3) < 0.05
    assert np.array_equal(applied("shear_y", 0), pixels)


def shift_angle(result: np.ndarray) -> float:
    """Angle by which the x and y ramps have turned, from the gradient of red at the centre."""
    dx = (result[50, 60, 0] - result[50, 40, 0]) / 20
    dy = (result[60, 50, 0] - result[40, 50, 0]) / 20
    return np.degrees(np.arctan2(dy, dx))


def test_tone_at_known_magnitudes():
    grey = PIL.Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3)))
    assert np.array_equal(applied("invert", 9, image=grey)[0, :, 0], 255 - np.arange(256))
    added = applied("solarize_add", 10, image=grey)[0, :, 0]
    assert np.array_equal(added, np.where(np.arange(256) < 128, np.arange(256) + 110, np.arange(256)))
    half = applied("solarize", 5, image=grey)[0, :, 0]
    assert np.array_equal(half, np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)))
    assert np.array_equal(applied("solarize", 0, image=grey)[0, :, 0], np.arange(256))
    assert [len(np.unique(applied("posterize", level, image=grey))) for level in (0, 5, 9, 10)] == [16, 4, 2, 2]
    levels = {
        int(applied("brightness", 10, seed, PIL.Image.new("RGB", (4, 4), (100, 100, 100)))[0, 0, 0])
        for seed in range(8)
    }
    assert levels == {10, 190}


def test_two_operations_half_of_the_time_at_magnitudes_around_nine(monkeypatch):
    calls: list[tuple[str, float]] = []

    def spy(name: str):
        def operation(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: tuple) -> PIL.Image.Image:
            assert fill == FILL
            calls.append((name, level))
            return image

        return operation

    monkeypatch.setattr(rand_augment, "OPERATIONS", tuple(spy(operation.__name__) for operation in OPERATIONS))
    augment, image, counts = RandAugment(fill=FILL), ramp(), []
    for seed in range(2000):
        before = len(calls)
        augment(image, generator(seed))
        counts.append(len(calls) - before)
    assert set(counts) == {0, 1, 2}
    assert [counts.count(number) / 2000 for number in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    levels = np.array([level for _, level in calls])
    assert levels.mean() == pytest.approx(9, abs=0.05) and levels.std() == pytest.approx(0.5, abs=0.04)
    assert levels.max() == 10.0
    names = [name for name, _ in calls]
    assert set(names) == {operation.__name__ for operation in OPERATIONS}
    assert max(names.count(name) for name in names) < 2 * min(names.count(name) for name in names)


def test_the_image_keeps_its_size_and_the_generator_decides():
    augment, image = RandAugment(), ramp().crop((0, 0, 60, 40))
    results = [np.asarray(augment(image, generator(seed))) for seed in (1, 1, 2, 3, 4)]
    assert all(result.shape == (40, 60, 3) for result in results)
    assert np.array_equal(results[0], results[1])
    assert len({result.tobytes() for result in results}) > 2
