from __future__ import annotations

import io
import zlib

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data.compressed import cut_jpeg, encode_label, plain_png

from .samples import encode

LIMIT = 10**6
NOISE = np.random.default_rng(0).integers(0, 255, (150, 70, 3), dtype=np.uint8)
IDS = np.random.default_rng(1).integers(0, 20, (37, 53), dtype=np.uint8)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"restart_marker_blocks": 3}])
@pytest.mark.parametrize("rows", [1, 15, 16, 31, 64, 100, 120])
def test_the_upper_part_of_a_jpeg_is_that_of_the_whole(options: dict, rows: int):
    data = encode(NOISE, "JPEG", quality=90, **options)
    whole, part = decoded(data), decoded(cut_jpeg(data, rows))
    assert rows <= len(part) < 150 and len(part) <= rows + 16
    assert np.array_equal(part[:rows], whole[:rows])


def test_a_grey_jpeg_is_cut_too():
    data = encode(NOISE[..., 0], "JPEG")
    assert np.array_equal(decoded(cut_jpeg(data, 30))[:30], decoded(data)[:30])


def test_what_cannot_be_cut_is_left_alone():
    data = encode(NOISE, "JPEG")
    assert cut_jpeg(data, 149) is None and cut_jpeg(data, 150) is None
    assert cut_jpeg(encode(NOISE, "JPEG", progressive=True), 10) is None
    assert cut_jpeg(encode(NOISE), 10) is None
    for length in range(0, len(data) - 2, 7):
        assert cut_jpeg(data[:length], 10) is None


def test_a_label_is_the_same_for_every_reader_and_smaller():
    data = encode_label(IDS)
    image = PIL.Image.open(io.BytesIO(data))
    image.verify()
    assert image.mode == "L" and np.array_equal(decoded(data), IDS) and np.array_equal(plain_png(data, LIMIT), IDS)
    scene = np.kron(np.random.default_rng(0).integers(0, 20, (8, 8)), np.ones((40, 40))).astype(np.uint8)
    assert len(encode_label(scene)) < len(encode(scene))


def test_only_plain_pngs_are_taken():
    palette = PIL.Image.fromarray(IDS, "P")
    palette.putpalette([0, 1, 2] * 256)
    assert np.array_equal(plain_png(encode(palette), LIMIT), IDS)
    smooth = np.add.outer(np.arange(60), np.arange(60)).astype(np.uint8)
    assert plain_png(encode(smooth), LIMIT) is None  # rows are filtered
    for other in (PIL.Image.fromarray(IDS > 3), IDS.astype(np.uint16), NOISE, np.dstack([IDS, IDS])):
        assert plain_png(encode(other), LIMIT) is None
    data = encode_label(IDS)
    assert plain_png(data, IDS.size) is not None and plain_png(data, IDS.size - 1) is None
    for length in range(0, len(data), 5):
        assert plain_png(data[:length], LIMIT) is None
    torn = bytearray(data)
    torn[60:80] = bytes(20)
    assert plain_png(bytes(torn), LIMIT) is None
    bomb = data.replace(zlib.compress(np.pad(IDS, ((0, 0), (1, 0))).tobytes(), 9), b"")
    assert bomb != data and plain_png(bomb, LIMIT) is None
