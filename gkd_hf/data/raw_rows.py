"""One row of a prepared data set from a raw sample, and how many bad samples are left out before it is too many.

A sample is bad if its image or label is damaged, empty or no image, if its label has another size than its image,
stores colours in place of ids, or has values that the data set (or one's own map) does not define. It is left out and
listed. A file that is missing or that the system cannot read is no bad sample: it stops everything, and so does a
label file without image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from gkd_hf.data.bad_rows import WrongLabel, count_by_reason
from gkd_hf.data.decoding import CorruptImage, decode_image
from gkd_hf.data.domains import IGNORE_INDEX
from gkd_hf.data.raw_layouts import BadSample, RawLayout, RawSample
from gkd_hf.errors import InputError

_FIRST_LOOK = 8  # samples of each split
_WRONG_MAP = 0.25  # a share of bad samples in the first look that no healthy data set has
_NAMED = 3

LeftOut = Mapping[str, str]
"""``{"id", "reason"}`` of a sample that was left out; reasons as in ``bad_rows``."""


@dataclass(frozen=True)
class Row:
    """What is stored of a sample: encoded image and its suffix, (width, height), and train ids H×W uint8 or None."""

    image: bytes
    suffix: str
    size: tuple[int, int]
    ids: np.ndarray | None


def read_row(
    layout: RawLayout, sample: RawSample, classes: int | None, re_encode: str | None = None, *, labelled: bool = True
) -> Row:
    """Read a sample; the image is decoded completely, so that no damage gets into the shards.

    Args:
        classes: how many train ids there are. re_encode: None, "png" or "jpeg:QUALITY". labelled: whether there are
            labels.

    Raises:
        BadSample: by the rules of the module.
        InputError: a file that is missing or cannot be read.
    """
    image, suffix = layout.read_image(sample)
    try:
        decoded = decode_image(image, str(sample.image))
    except CorruptImage as error:
        raise BadSample(f"{sample.image} is damaged ({error})", str(error)) from error
    try:
        ids = layout.read_label(sample) if labelled else None
    except WrongLabel as error:
        raise BadSample(str(error), error.reason) from error
    if ids is not None:
        _check_label(ids, decoded.size, sample, classes)
    if re_encode is not None:
        image, suffix = _re_encoded(decoded, re_encode)
    return Row(image, suffix, decoded.size, ids)


def _check_label(ids: np.ndarray, size: tuple[int, int], sample: RawSample, classes: int | None) -> None:
    if ids.shape != (size[1], size[0]):
        both = f"label {ids.shape[1]}×{ids.shape[0]}, image {size[0]}×{size[1]}"
        raise BadSample(f"{sample.label}: {both} pixels; they must agree", f"label: another size ({both})")
    strangers = np.unique(ids[(ids >= (classes or 0)) & (ids != IGNORE_INDEX)])
    if len(strangers):
        shown = ", ".join(map(str, strangers[:10]))
        raise BadSample(
            f"{sample.label}: train id(s) {shown} with only {classes} classes", f"label: no such class ({shown})"
        )


def _re_encoded(image: PIL.Image.Image, how: str) -> tuple[bytes, str]:
    kind, _, quality = how.partition(":")
    return (encoded(image, "PNG"), ".png") if kind == "png" else (encoded(image, "JPEG", int(quality)), ".jpg")


def encoded(image: PIL.Image.Image, kind: str, quality: int | None = None) -> bytes:
    """Return the bytes of an image in a format of Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({} if quality is None else {"quality": quality}))
    return buffer.getvalue()


def spread(samples: Sequence[RawSample], count: int) -> list[RawSample]:
    """Return at most ``count`` of the samples, at even distances."""
    places = sorted({(2 * place + 1) * len(samples) // (2 * count) for place in range(count)})
    return [samples[place] for place in places]


@dataclass(frozen=True)
class Limit:
    """How many bad samples may be left out of each split.

    Attributes:
        domain: named in messages. rows: split → samples. share: of a split's samples, 0 or more and below 1.
        sheet: a contact sheet that shows them, if one was drawn.
    """

    domain: str
    rows: Mapping[str, int]
    share: float
    sheet: str | None = None

    def check(self, split: str, left_out: Sequence[LeftOut]) -> None:
        """Raise ``InputError``, with the reasons by number and the first samples, if these are too many."""
        if len(left_out) > int(self.share * self.rows[split]):
            raise self._too_many(split, left_out, f"its {self.rows[split]:,} samples are bad (or more)")

    def check_first(self, layout: RawLayout, samples: Mapping[str, Sequence[RawSample]], classes: int | None) -> None:
        """Read a few samples of each split, so that a wrong map or class list is told before hours of work.

        Raises ``InputError`` as `check`, also if more than a quarter of those looked at are bad (unless ``share``
        allows more).
        """
        for split, found in samples.items():
            few, bad = spread(found, _FIRST_LOOK), []
            for sample in few:
                try:
                    read_row(layout, sample, classes, labelled=sample.label is not None)
                except BadSample as error:
                    bad.append({"id": sample.id, "reason": error.reason})
            self.check(split, bad)
            if len(bad) > max(_WRONG_MAP, self.share) * len(few):
                raise self._too_many(split, bad, f"{len(few)} samples that were looked at first are bad")

    def _too_many(self, split: str, left_out: Sequence[LeftOut], of_what: str) -> InputError:
        counts = ", ".join(f"{count} × {reason}" for reason, count in count_by_reason(left_out).items())
        by_name = sorted(left_out, key=lambda entry: entry["id"])
        first = ", ".join(f"{entry['id']} [{entry['reason']}]" for entry in by_name[:_NAMED])
        more = ", …" if len(left_out) > _NAMED else ""
        look = "a contact sheet shows them: --contact" if self.sheet is None else f"look at {self.sheet}"
        return InputError(
            f"{self.domain}, split '{split}': {len(left_out)} of {of_what}, and only "
            f"{100 * self.share:g} % may be left out: {counts}; namely {first}{more}; correct the files or the label "
            f"map ({look}), or allow more with --max-bad"
        )
