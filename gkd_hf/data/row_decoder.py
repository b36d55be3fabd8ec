"""From a raw row to an image and its train ids, or to the reason why it is skipped."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import PIL.Image
import torch

from gkd_hf.data.bad_rows import WrongLabel
from gkd_hf.data.decoding import CorruptImage, EncodedImage, cell_bytes, decode_label
from gkd_hf.data.domains import IGNORE_INDEX
from gkd_hf.data.label_maps import LabelMap
from gkd_hf.data.transforms import DistillationTransform, SegmentationTransform
from gkd_hf.errors import InputError


class RowDecoder:
    """Raw row → upright RGB image and, if there is a label map, train ids; checks that they belong together."""

    def __init__(self, domain: str, label_map: LabelMap | None) -> None:
        self._domain = domain
        self._label_map = label_map
        self.labelled = label_map is not None

    def __call__(self, row: dict) -> tuple[PIL.Image.Image, np.ndarray | None]:
        """Decode the whole image and its label."""
        encoded = self._encoded(row)
        image = encoded.decode()
        return image, self._label(row, encoded.size)

    def crop(
        self, row: dict, transform: DistillationTransform | SegmentationTransform, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Transform a row whose crop is drawn first, so that no more of its image is decoded than the crop needs."""
        encoded = self._encoded(row)
        try:
            label = self._label(row, encoded.size)
        except CorruptImage:
            encoded.decode()  # of a row that is wrong twice, the image is told
            raise
        crop = transform.draw(encoded.size, rng, label)
        image, box = encoded.decode_crop(crop.box, crop.size)
        return transform.finish(image, box, crop, rng)

    def check(self, row: dict) -> str | None:
        """Return why the row would be skipped, as far as its label and the image's header tell; None if it is good."""
        try:
            self._label(row, self._encoded(row).size)
        except CorruptImage as error:
            return str(error)
        return None

    def classes(self, row: dict) -> frozenset[int]:
        """Return the train ids that the row's label has pixels of; none for a row that would be skipped."""
        try:
            label = self._label(row, self._encoded(row).size)
        except CorruptImage:
            return frozenset()
        present = np.zeros(IGNORE_INDEX + 1, dtype=bool)
        present[label] = True
        return frozenset(np.flatnonzero(present[:IGNORE_INDEX]).tolist())

    def encoded_bytes(self, row: dict) -> bytes:
        """Return the bytes of the row's image as they are stored; raises ``CorruptImage`` where there are none."""
        return cell_bytes(self._cell(row), "image")

    def _encoded(self, row: dict) -> EncodedImage:
        return EncodedImage(self._cell(row))

    def _cell(self, row: dict) -> Mapping | bytes | None:
        if "image" not in row:
            raise InputError(f"domain '{self._domain}': no column 'image' (columns present: {', '.join(row)})")
        return row["image"]

    def _label(self, row: dict, size: tuple[int, int]) -> np.ndarray | None:
        if self._label_map is None:
            return None
        if "label" not in row:
            raise InputError(f"domain '{self._domain}': no column 'label' (columns present: {', '.join(row)})")
        where, (width, height) = f"domain '{self._domain}'", size
        try:
            label = decode_label(row["label"], where)
            if label.shape != (height, width):
                raise CorruptImage(
                    f"label: of another size than its image ({label.shape[1]}×{label.shape[0]}, "
                    f"the image {width}×{height})"
                )
            return self._label_map.apply(label, where)
        except WrongLabel as error:
            raise CorruptImage(error.reason) from error
