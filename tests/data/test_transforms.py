from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from gkd_hf.data.transforms import (
    DEFAULT_SHORT_SIDES,
    DistillationTransform,
    EvaluationTransform,
    SegmentationTransform,
    draw_erasing,
    one_class_prevails,
    random_resized_crop_box,
    resized_size,
)

RAW_MEAN, RAW_STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # normalised values are the 0..255 pixels themselves
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def coordinates(width: int, height: int) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
    """An image whose red and green are x and y, and the masks x and y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return PIL.Image.fromarray(np.dstack([x, y, np.zeros_like(x)])), x, y


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("short_sides", [(24,), (90,), (150,), (40, 90, 200)])
@pytest.mark.parametrize("size", [(200, 120), (120, 200), (97, 61)])
def test_image_and_mask_show_the_same_place_whatever_the_resize_crop_and_flip(size, short_sides):
    image, x, y = coordinates(*size)
    transform = SegmentationTransform(64, RAW_MEAN, RAW_STD, short_sides=short_sides, photometric=False)
    flips = set()
    for seed in range(12):
        across, down = transform(image, generator(seed), x), transform(image, generator(seed), y)
        pixels, labels = across["pixel_values"], across["labels"]
        assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
        assert labels.shape == (64, 64) and labels.dtype == torch.uint8
        pixels, labels, down = pixels.int(), labels.int(), {"labels": down["labels"].int()}
        inside = labels != 255
        tolerance = max(1.0, min(size) / min(short_sides) / 1.5)
        assert (pixels[0] - labels)[inside].abs().max() <= tolerance
        assert (pixels[1] - down["labels"])[inside].abs().max() <= tolerance
        assert torch.equal(inside, down["labels"] != 255)
        assert (pixels[:, ~inside] == 0).all()
        row = labels[0][inside[0]]
        flips.add(bool(row[0] > row[-1]))
    assert flips == {True, False}


@pytest.mark.parametrize("short_side", [40, 60, 90, 150])
def test_a_crop_is_a_piece_of_the_resized_image_and_its_mask_the_nearest_ids(short_side: int):
    noise = PIL.Image.fromarray(generator(0).integers(0, 255, (90, 130, 3), dtype=np.uint8))
    mask = np.asarray(noise)[..., 0] % 200
    resized = resized_size(noise.size, short_side, 2048)
    transform = SegmentationTransform(32, RAW_MEAN, RAW_STD, short_sides=(short_side,), photometric=False)
    corners = set()
    for seed in range(30):
        rng = generator(seed)
        crop = transform.draw(noise.size, rng, mask)
        left, top, right, bottom = crop.box
        assert left == int(left) and top == int(top) and left >= 0 and right <= 130.001 and bottom <= 90.001
        assert (right - left, bottom - top) == pytest.approx((32 * 130 / resized[0], 32 * 90 / resized[1]))
        corners.add((left, top))
        sample = transform.finish(noise, crop.box, crop, rng)
        pixels, labels = sample["pixel_values"].numpy().transpose(1, 2, 0), sample["labels"].numpy()
        expected = np.asarray(noise.resize((32, 32), PIL.Image.Resampling.BILINEAR, box=crop.box)).astype(int)
        slow = [
            [mask[int(top + (y + 0.5) * 90 / resized[1]), int(left + (x + 0.5) * 130 / resized[0])] for x in range(32)]
            for y in range(32)
        ]
        if not np.array_equal(labels, slow):
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        assert np.array_equal(labels, slow)
        # What lies left of and above the crop has no part in it, which its outermost pixels feel.
        edge = 1 + (short_side > 90)
        assert np.abs(pixels - expected)[edge:-edge, edge:-edge].max() <= 1
        assert np.abs(pixels - expected).mean() < 4
    assert len(corners) > 20


def test_small_images_are_padded_right_and_bottom_with_the_mean_colour_and_255():
    image = PIL.Image.new("RGB", (30, 20), (255, 255, 255))
    mask = np.zeros((20, 30), np.uint8)
    transform = SegmentationTransform(64, IMAGENET_MEAN, IMAGENET_STD, short_sides=(20,), photometric=False)
    sample = transform(image, generator(0), mask)
    assert (sample["labels"][:20, :30] == 0).all()
    assert (sample["labels"] == 255).sum() == 64 * 64 - 600
    values = transform.normalise(sample["pixel_values"])
    assert values.dtype == torch.float32 and values.shape == (3, 64, 64)
    assert values[:, 20:].abs().max() < 0.01 and values[:, :, 30:].abs().max() < 0.01  # half a level of 255
    expected = [(1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    assert values[:, :20, :30].amin((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(values[:, :20, :30].amin((1, 2)), values[:, :20, :30].amax((1, 2)))


def test_resized_sizes():
    assert resized_size((2048, 1024), 512, 2048) == (1024, 512)
    assert resized_size((1024, 2048), 512, 2048) == (512, 1024)
    assert resized_size((1000, 100), 512, 2048) == (2048, 205)
    assert DEFAULT_SHORT_SIDES[:3] == (256, 307, 358) and DEFAULT_SHORT_SIDES[-1] == 1024
    assert len(DEFAULT_SHORT_SIDES) == 16


def test_crops_of_one_class_are_drawn_again():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 44:] = 1
    mask[:4] = 255
    image = PIL.Image.fromarray(np.dstack([mask] * 3))
    settings = {"short_sides": (64,), "photometric": False}
    shares = {}
    for fraction in (0.75, 1.0):
        transform = SegmentationTransform(24, RAW_MEAN, RAW_STD, max_class_fraction=fraction, **settings)
        labels = [transform(image, generator(seed), mask)["labels"] for seed in range(40)]
        shares[fraction] = [
            float(torch.bincount(label[label != 255], minlength=2).max() / (label != 255).sum()) for label in labels
        ]
    assert sum(share >= 0.75 for share in shares[1.0]) > 20
    assert sum(share >= 0.75 for share in shares[0.75]) < 5
    only_ignored = SegmentationTransform(24, RAW_MEAN, RAW_STD, **settings)(image, generator(0), mask * 0 + 255)
    assert (only_ignored["labels"] == 255).all()


def test_normalisation_to_the_number():
    image = PIL.Image.new("RGB", (5, 4), (255, 0, 128))
    transform = EvaluationTransform(IMAGENET_MEAN, IMAGENET_STD)
    pixels = transform(image)
    assert pixels.dtype == torch.uint8 and pixels[:, 0, 0].tolist() == [255, 0, 128]
    values = transform.normalise(pixels)
    assert values.shape == (3, 4, 5) and values.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert values[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_evaluation_sizes():
    image, x, _ = coordinates(200, 100)
    assert EvaluationTransform(RAW_MEAN, RAW_STD)(image)[0].numpy() == pytest.approx(x)
    assert EvaluationTransform(RAW_MEAN, RAW_STD, (100, 100))(image).shape == (3, 100, 100)
    keep = EvaluationTransform(RAW_MEAN, RAW_STD, (64, 40), keep_ratio=True)
    assert keep(image).shape == (3, 32, 64)
    assert keep(coordinates(100, 200)[0]).shape == (3, 64, 32)
    assert keep(coordinates(100, 100)[0]).shape == (3, 40, 40)


def test_distillation_crops_are_squeezed_boxes_of_the_image():
    image, _, _ = coordinates(200, 150)
    transform = DistillationTransform(32, RAW_MEAN, RAW_STD, rand_augment=False, erase_probability=0)
    flips, areas = set(), []
    for seed in range(60):
        sample = transform(image, generator(seed))
        assert sample["pixel_values"].dtype == torch.uint8 and sample["erasing"] is None
        values = transform.normalise(sample["pixel_values"])
        assert values.shape == (3, 32, 32) and values.dtype == torch.float32
        across = values[0].mean(0)
        step = (across[-3] - across[2]) / 27
        flips.add(bool(step < 0))
        assert (across[2:-2] - (across[2] + step * torch.arange(28))).abs().max() < 1.5  # still a linear ramp in x
        down_step = (values[1, -3].mean() - values[1, 2].mean()) / 27
        areas.append(float(step.abs() * down_step) * 32 * 32 / (200 * 150))
    assert flips == {True, False}
    assert 0.05 < min(areas) < 0.25 and 0.75 < max(areas) < 1.05


def test_crop_boxes_keep_their_scale_and_ratio():
    boxes = [random_resized_crop_box((400, 300), (0.08, 1.0), (3 / 4, 4 / 3), generator(seed)) for seed in range(500)]
    widths, heights = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes]).T
    assert all(left >= 0 and right <= 400 and top >= 0 and bottom <= 300 for left, top, right, bottom in boxes)
    area, ratio = widths * heights / (400 * 300), widths / heights
    assert 0.075 < area.min() < 0.12 and 0.8 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
    assert random_resized_crop_box((1000, 10), (1.0, 1.0), (3 / 4, 4 / 3), generator(0)) == (493, 0, 506, 10)


def test_erasing_is_noise_in_one_rectangle_a_quarter_of_the_time():
    image = PIL.Image.new("RGB", (64, 64), (255, 0, 0))
    transform = DistillationTransform(64, (1.0, 0.0, 0.0), (1.0, 1.0, 1.0), rand_augment=False)
    erased, noise = [], []
    for seed in range(400):
        sample = transform(image, generator(seed))
        values = transform.normalise(sample["pixel_values"][None], [sample["erasing"]])[0]
        assert torch.equal(values, transform.normalise(sample["pixel_values"][None], [sample["erasing"]])[0])
        touched = values[0] != 0
        if touched.any():
            rows, columns = touched.any(1).nonzero().ravel(), touched.any(0).nonzero().ravel()
            assert len(rows) == rows[-1] - rows[0] + 1 and len(columns) == columns[-1] - columns[0] + 1
            assert touched.sum() == len(rows) * len(columns)
            erased.append((len(rows) * len(columns) / 64**2, len(rows) / len(columns)))
            noise.append(values[:, touched])
    assert 70 < len(erased) < 130
    areas, ratios = np.array(erased).T
    assert 0.015 < areas.min() < 0.08 and 0.25 < areas.max() < 0.36
    assert 0.25 < ratios.min() < 0.8 and 1.3 < ratios.max() < 3.7
    noise = torch.cat(noise, dim=1)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert not torch.equal(noise[0], noise[1])
    off = DistillationTransform(64, (1.0, 0.0, 0.0), (1.0, 1.0, 1.0), rand_augment=False, erase_probability=0)
    assert all(off(image, generator(seed))["erasing"] is None for seed in range(40))


def test_erased_ratios_are_log_uniform():
    taller, seeds = 0, set()
    for seed in range(300):
        erasing = draw_erasing((64, 64), generator(seed))
        taller += erasing.height > erasing.width
        seeds.add(erasing.seed)
    assert len(seeds) == 300
    assert 120 < taller < 180


def test_switches_do_what_they_say():
    image, x, _ = coordinates(80, 80)
    for name in ("rand_augment", "photometric"):
        kind = DistillationTransform if name == "rand_augment" else SegmentationTransform
        settings = {"erase_probability": 0} if kind is DistillationTransform else {"short_sides": (80,)}
        on, off = (kind(48, RAW_MEAN, RAW_STD, **{name: value}, **settings) for value in (True, False))
        pairs = [(on(image, generator(seed), x), off(image, generator(seed), x)) for seed in range(30)]
        changed = sum(not torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in pairs)
        assert 15 < changed <= 30, name
        if name == "photometric":
            assert all(torch.equal(a["labels"], b["labels"]) for a, b in pairs)
    whole = DistillationTransform(
        80, RAW_MEAN, RAW_STD, crop_scale=(1, 1), crop_ratio=(1, 1), rand_augment=False, erase_probability=0
    )
    values = whole(image, generator(0))["pixel_values"][0].numpy()
    assert np.array_equal(values, x) or np.array_equal(values, x[:, ::-1])


def test_the_generator_decides_everything():
    image, x, _ = coordinates(100, 80)
    for transform in (DistillationTransform(32, RAW_MEAN, RAW_STD), SegmentationTransform(32, RAW_MEAN, RAW_STD)):
        one, two, other = (transform(image, generator(seed), x)["pixel_values"] for seed in (5, 5, 6))
        assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_class_prevails_as_counting_every_pixel_says():
    rng, found = generator(0), set()
    for case in range(300):
        side = int(rng.integers(3, 97)) if case % 4 else int(rng.integers(128, 400))
        share = rng.choice([0.0, 0.3, 0.7, 0.74, 0.76, 0.9, 1.0])
        label = np.full((side, side), 5, np.uint8)
        label[round(side * share) :] = rng.integers(0, 4, (side - round(side * share), side))
        if case % 3:
            label[:, : side // 2] = 255
        if case % 3 == 2:
            label[rng.integers(side) :] = 255
        counts = np.bincount(label.ravel(), minlength=256)[:255]
        expected = bool(counts.max() >= 0.75 * counts.sum() or counts.max() == counts.sum())
        assert one_class_prevails(label, 0.75) == expected
        found.add(expected)
    assert found == {True, False}
