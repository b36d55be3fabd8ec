from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data.resampling import channels_first, nearest, pixel_view, resample

KERNELS = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(32, 32), (20, 41), (90, 70), (64, 30)])
@pytest.mark.parametrize("box", [(0, 0, 120, 90), (13, 7, 77, 37), (50, 20, 120, 90), (3, 3, 4, 5)])
def test_a_resized_part_is_pillows(kernel: str, size: tuple, box: tuple):
    image = noise(120, 90)
    expected = np.asarray(image.crop(box).resize(size, KERNELS[kernel])).astype(int)
    result = resample(image, box, size, kernel)
    assert result.flags.c_contiguous and result.flags.writeable
    assert np.abs(result[..., :3] - expected).max() <= (1 if kernel == "bilinear" else 2)


def test_a_broken_box_keeps_its_scale_and_moves_by_less_than_a_pixel():
    ramp = np.repeat(np.arange(120, dtype=np.uint8)[None, :, None], 90, axis=0).repeat(3, axis=2)
    for left in (10.0, 10.3, 10.5, 10.9):
        result = resample(PIL.Image.fromarray(ramp), (left, 5.5, left + 41.6, 47.1), (104, 104), "bilinear")
        across = result[50, 8:-8, 0].astype(float)
        exact = left + (np.arange(8, 96) + 0.5) * 0.4 - 0.5
        assert np.abs(across - exact).max() <= 1.1
    edge = resample(PIL.Image.fromarray(ramp), (78.6, 0, 120.2, 41.6), (104, 104), "bilinear")
    assert edge.shape == (104, 104, 4) and edge[..., 0].max() == 119


def test_an_image_of_many_blocks_of_memory_is_the_same():
    image = noise(2600, 1700)  # more than four million pixels
    assert np.array_equal(pixel_view(image)[..., :3], np.asarray(image))
    part = resample(image, (700, 500, 2400, 1650), (64, 64), "bicubic")
    expected = np.asarray(image.crop((700, 500, 2400, 1650)).resize((64, 64), KERNELS["bicubic"])).astype(int)
    assert np.abs(part[..., :3] - expected).max() <= 2


def test_a_view_outlives_its_image():
    view = pixel_view(noise(50, 40))
    others = [noise(50, 40).rotate(90) for _ in range(20)]
    assert np.array_equal(view[..., :3], np.asarray(noise(50, 40))) and len(others) == 20


def test_nearest_takes_the_value_under_the_pixels_centre():
    label = np.arange(200, dtype=np.uint8).reshape(10, 20)
    for box, size in (((0, 0, 20, 10), (20, 10)), ((3, 2, 10, 9), (13, 5)), ((0, 0, 20, 10), (7, 3))):
        width, height = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
        slow = [
            [label[int(box[1] + (y + 0.5) * height), int(box[0] + (x + 0.5) * width)] for x in range(size[0])]
            for y in range(size[1])
        ]
        assert np.array_equal(nearest(label, box, size), slow)


def test_channels_come_first_and_are_mirrored_on_demand():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    for flip in (False, True):
        out = channels_first(pixels, flip=flip)
        assert out.flags.c_contiguous and out.dtype == np.uint8
        assert np.array_equal(out, (pixels[:, ::-1] if flip else pixels)[..., :3].transpose(2, 0, 1))
