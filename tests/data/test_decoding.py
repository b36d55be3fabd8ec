from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from gkd_hf.data import decoding
from gkd_hf.data.decoding import CorruptImage, EncodedImage, decode_image, decode_label, image_size
from gkd_hf.errors import InputError

from .samples import encode

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8)


def cell(data: bytes | None, path: str | None = None) -> dict:
    return {"bytes": data, "path": path}


def test_rgb_png_is_exact_and_a_path_is_read(tmp_path):
    pixels = np.stack([RAMP, RAMP + 1, RAMP + 2], axis=-1)
    assert np.array_equal(np.asarray(decode_image(cell(encode(pixels)), "w")), pixels)
    (tmp_path / "a.png").write_bytes(encode(pixels))
    assert np.array_equal(np.asarray(decode_image(cell(None, str(tmp_path / "a.png")), "w")), pixels)


def test_other_modes_become_rgb_by_the_stated_rules():
    grey = np.repeat(RAMP[..., None], 3, axis=-1)
    assert np.array_equal(np.asarray(decode_image(cell(encode(RAMP)), "w")), grey)
    deep = RAMP.astype(np.uint16) * 256 + 99
    assert np.array_equal(np.asarray(decode_image(cell(encode(deep)), "w")), grey)
    rgba = np.dstack([grey, np.zeros_like(RAMP)])
    assert np.array_equal(np.asarray(decode_image(cell(encode(rgba)), "w")), grey)
    palette = PIL.Image.fromarray(RAMP, "P")
    palette.putpalette([value for index in range(256) for value in (255 - index, index, 0)])
    decoded = np.asarray(decode_image(cell(encode(palette)), "w"))
    assert np.array_equal(decoded, np.dstack([255 - RAMP, RAMP, np.zeros_like(RAMP)]))
    cmyk = PIL.Image.new("CMYK", (8, 6), (0, 255, 255, 0))
    red = np.asarray(decode_image(cell(encode(cmyk, "JPEG")), "w"))
    assert red.shape == (6, 8, 3)
    assert (red[..., 0] > 200).all() and (red[..., 1:] < 60).all()
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(cell(animated), "w").getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(CorruptImage, match="floating-point"):
        decode_image(cell(encode(PIL.Image.fromarray(RAMP.astype(np.float32)), "TIFF")), "w")


def test_exif_orientation_is_applied():
    image = PIL.Image.fromarray(np.repeat(RAMP[..., None], 3, axis=-1))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(cell(encode(image, exif=exif)), "w")
    assert upright.size == (6, 8)
    assert np.array_equal(np.asarray(upright)[..., 0], np.rot90(RAMP, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_size_in_the_header_is_that_of_the_decoded_image(kind: str, orientation: int | None):
    image = PIL.Image.fromarray(np.repeat(RAMP[..., None], 3, axis=-1))
    exif = PIL.Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = cell(encode(image, kind, exif=exif))
    assert image_size(data) == decode_image(data, "w").size


def test_size_is_read_without_the_pixels():
    whole = encode(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8))
    assert image_size(cell(whole[: len(whole) // 2])) == (48, 64)
    for data in (None, cell(b""), cell(b"a text"), cell(None, "/nowhere/x.png")):
        with pytest.raises(CorruptImage):
            image_size(data)


def test_damaged_bytes_are_corrupt(monkeypatch):
    whole = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), "JPEG")
    for data, reason in ((whole[: len(whole) // 2], "truncated"), (b"", "zero bytes"), (b"a text", "not an image")):
        with pytest.raises(CorruptImage, match=reason):
            decode_image(cell(data), "w")
    png = bytearray(encode(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)))
    png[200:260] = bytes(60)
    with pytest.raises(CorruptImage):
        decode_label(cell(bytes(png)), "w")
    with pytest.raises(CorruptImage, match="image: empty cell"):
        decode_image(None, "w")
    with pytest.raises(CorruptImage, match="image: file cannot be read"):
        decode_image(cell(None, "/nowhere/x.png"), "w")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    with pytest.raises(CorruptImage, match=r"decompression bomb \(64×64 pixels\)"):
        decode_image(cell(whole), "w")


def test_pillows_own_bomb_limit_is_a_corrupt_image():
    header = io.BytesIO(encode(PIL.Image.new("1", (30000, 30000))))
    with pytest.raises(CorruptImage, match="bomb|limit"):
        decode_image(cell(header.getvalue()), "w")


def test_labels_keep_their_integers():
    assert np.array_equal(decode_label(cell(encode(RAMP)), "w"), RAMP)
    palette = PIL.Image.fromarray(RAMP, "P")
    palette.putpalette([value for index in range(256) for value in (255 - index, index, 0)])
    assert np.array_equal(decode_label(cell(encode(palette)), "w"), RAMP)
    deep = RAMP.astype(np.uint16) * 1000
    assert np.array_equal(decode_label(cell(encode(deep)), "w"), deep)
    wide = PIL.Image.fromarray(RAMP.astype(np.int32) * 100000)
    assert np.array_equal(decode_label(cell(encode(wide, "TIFF")), "w"), RAMP.astype(np.int32) * 100000)
    bilevel = PIL.Image.fromarray(RAMP > 20)
    assert decode_label(cell(encode(bilevel)), "w").dtype == np.uint8
    assert np.array_equal(decode_label(cell(encode(bilevel)), "w"), RAMP > 20)


def test_grey_labels_in_more_channels_are_taken():
    assert np.array_equal(decode_label(cell(encode(np.dstack([RAMP] * 3))), "w"), RAMP)
    assert np.array_equal(decode_label(cell(encode(np.dstack([RAMP, 255 - RAMP]))), "w"), RAMP)


def test_a_colour_label_or_none_is_the_users_error():
    with pytest.raises(InputError, match="row 'x': the label is a picture of mode RGB"):
        decode_label(cell(encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))), "row 'x'")
    with pytest.raises(InputError, match="row 'x': the row has no label"):
        decode_label(None, "row 'x'")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_is_decoded_no_finer_and_no_further_than_its_crop_needs(orientation: int, progressive: bool):
    ramp = np.linspace(0, 255, 203 * 151).reshape(151, 203).astype(np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    jpeg = cell(encode(np.dstack([ramp] * 3), "JPEG", quality=95, exif=exif, progressive=progressive))
    whole = decode_image(jpeg, "w")
    box = (10, 8, 90, 56)
    for size, factor in (((81, 24), 1), ((80, 49), 1), ((80, 48), 1), ((40, 24), 2), ((21, 12), 2), ((10, 6), 8)):
        part, scaled = EncodedImage(jpeg).decode_crop(box, size)
        assert scaled == tuple(edge / factor for edge in box) and part.mode == "RGB"
        full = tuple(-(-side // factor) for side in whole.size)
        assert part.width == full[0] and part.height <= full[1]
        assert (part.height < full[1]) == (orientation == 1 and not progressive)
        reference = whole.resize(full, PIL.Image.Resampling.BOX)
        area = (0, 0, part.width, -(-box[3] // factor))
        difference = np.abs(np.asarray(part.crop(area)).astype(int) - np.asarray(reference.crop(area)))
        assert difference.max() == 0 if factor == 1 else difference.mean() < 6
    png = EncodedImage(cell(encode(RAMP))).decode_crop((0, 0, 4, 4), (1, 1))
    assert png[0].size == (8, 6) and png[1] == (0, 0, 4, 4)


@pytest.mark.parametrize("lost", [1, 2, 400])
def test_a_truncated_jpeg_is_corrupt_also_where_the_crop_is_whole(lost: int):
    noise = np.random.default_rng(0).integers(0, 255, (160, 64, 3), dtype=np.uint8)
    data = encode(noise, "JPEG")[:-lost]
    outcomes = []
    for decode in (lambda image: image.decode(), lambda image: image.decode_crop((0, 0, 16, 16), (16, 16))):
        try:
            decode(EncodedImage(cell(data)))
            outcomes.append("")
        except CorruptImage as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] and (lost < 400 or "truncated" in outcomes[0])
