"""ISPRS 2D semantic labelling, Potsdam and Vaihingen (Rottensteiner et al., 2012): large tiles, cut into pieces.

The tiles that train and validate are those of the benchmark, and so are the pieces: 512×512 pixels side by side.
Where a tile's width or height is no multiple of 512, the last piece is moved back until it ends with the tile and
overlaps its neighbour, so that no pixel is lost and none invented: a 6000×6000 tile gives 12×12 pieces.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import PIL.Image

from gkd_hf.data.raw_layouts.base import (
    RawLayout,
    RawSample,
    ids_of_colours,
    is_colour_coded,
    named,
    rgb_image,
    size_of,
    stored_ids,
)
from gkd_hf.errors import InputError

PIECE = 512  # pixels

# To the ids of label files with one value for each pixel. Black is the boundary between objects in the "noBoundary"
# labels, which the benchmark does not count.
_COLOURS = {
    (0, 0, 0): 0, (255, 255, 255): 1, (0, 0, 255): 2, (0, 255, 255): 3, (0, 255, 0): 4, (255, 255, 0): 5,
    (255, 0, 0): 6,
}  # fmt: skip

# As distributed, the first of these labels went through a lossy format and the second has 252 for many a 255.
_INEXACT_TILES = ("top_potsdam_4_12_label", "top_potsdam_6_7_label")

_POTSDAM = {
    "train": (
        "2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12",
        "6_7", "6_8", "6_9", "6_10", "6_11", "6_12", "7_7", "7_8", "7_9", "7_10", "7_11", "7_12",
    ),
    "validation": (
        "2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15",
        "7_13",
    ),
}  # fmt: skip
_VAIHINGEN = {
    "train": ("1", "3", "5", "7", "11", "13", "15", "17", "21", "23", "26", "28", "30", "32", "34", "37"),
    "validation": ("2", "4", "6", "8", "10", "12", "14", "16", "20", "22", "24", "27", "29", "31", "33", "35", "38"),
}


class ISPRS(RawLayout):
    """One of the two cities in one band choice."""

    domain_label_map = "isprs"
    splits = ("train", "validation")

    def __init__(self, domain: str) -> None:
        self.domain = domain
        if domain == "vaihingen_irrg":
            self._tiles = _VAIHINGEN
            self._prefix = "top_mosaic_09cm_area"
            self._image_folders: tuple[str, ...] = ("top", "ISPRS_semantic_labeling_Vaihingen/top")
            self._image_endings: tuple[str, ...] = (".tif",)
            complete = "ISPRS_semantic_labeling_Vaihingen_ground_truth"
            self._label_folders: tuple[str, ...] = (f"{complete}_eroded_COMPLETE", f"{complete}_COMPLETE")
            self._label_endings: tuple[str, ...] = ("_noBoundary.tif", "_noBoundary.png", ".tif", ".png")
        else:
            bands = {"potsdam_rgb": "RGB", "potsdam_irrg": "IRRG"}[domain]
            self._tiles = _POTSDAM
            self._prefix = "top_potsdam_"
            self._image_folders = ({"RGB": "2_Ortho_RGB", "IRRG": "3_Ortho_IRRG"}[bands],)
            self._image_endings = (f"_{bands}.tif",)
            self._label_folders = ("5_Labels_all_noBoundary", "5_Labels_all")
            self._label_endings = ("_label_noBoundary.tif", "_label_noBoundary.png", "_label.tif", "_label.png")
        self.description = (
            f"  {self._image_folders[0]}/{self._prefix}TILE{self._image_endings[0]}\n"
            f"  {self._label_folders[0]}/{self._prefix}TILE{self._label_endings[0]}   (or else "
            f"{self._label_folders[1]}/{self._prefix}TILE{self._label_endings[2]})\n"
            "  labels: RGB in the six colours, black = ignored; or one value for each pixel, 0 = ignored, 1..6\n"
            f"  cut into {PIECE}×{PIECE} pieces; the last of a row or column is moved back to end with the tile"
        )

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        images = self.collect(self.folder(root, *self._image_folders), self._image_endings, prefix=self._prefix)
        labels = self.collect(self.folder(root, *self._label_folders), self._label_endings, prefix=self._prefix)
        tiles = self._tiles[split]
        known = {tile for listed in self._tiles.values() for tile in listed}
        for found in (images, labels):
            strange = sorted(found.keys() - known)
            if strange:
                raise InputError(
                    f"{self.domain}: {named([found[tile] for tile in strange])}: no tile of the benchmark is called "
                    f"{named(strange)}; move what is not part of it away"
                )
        # Labels of the other split may be absent: they were published later.
        chosen = [{tile: found[tile] for tile in tiles if tile in found} for found in (images, labels)]
        missing = [tile for tile in tiles if tile not in images and tile not in labels]
        if missing:
            raise InputError(
                f"{self.domain}: {len(missing)} of the {len(tiles)} tiles of '{split}' are not in {root}: "
                f"{named(missing)}; {self.expectation}"
            )
        samples = [piece for whole in self.pair(*chosen) for piece in self._pieces(whole)]
        return sorted(samples, key=lambda sample: sample.id)

    def _pieces(self, whole: RawSample) -> list[RawSample]:
        size = size_of(whole.image)
        if whole.label is not None and size_of(whole.label) != size:
            raise InputError(
                f"{self.domain}: {whole.image} has {size[0]}×{size[1]} pixels, its label {whole.label} "
                f"{'×'.join(map(str, size_of(whole.label)))}; download both again"
            )
        return [
            RawSample(f"{whole.id}_{top:05d}_{left:05d}", whole.image, whole.label, (left, top, right, bottom))
            for top, bottom in _spans(size[1])
            for left, right in _spans(size[0])
        ]

    def read_image(self, sample: RawSample) -> tuple[bytes, str]:
        buffer = io.BytesIO()
        _rgb_tile(sample.image, "image").crop(sample.crop).save(buffer, "PNG")
        return buffer.getvalue(), ".png"

    def read_stored(self, sample: RawSample) -> np.ndarray:
        path = self.label_of(sample)
        left, top, right, bottom = sample.crop or (0, 0, *size_of(path))
        if not is_colour_coded(path):
            return _index_tile(path)[top:bottom, left:right]
        colours = np.asarray(_rgb_tile(path, "label").crop((left, top, right, bottom)))
        if path.stem.removesuffix("_noBoundary") in _INEXACT_TILES:
            colours = np.where(colours < 128, np.uint8(0), np.uint8(255))
        return ids_of_colours(colours, _COLOURS, str(path))


def _spans(length: int) -> list[tuple[int, int]]:
    """Return (start, end) of the pieces along one side; a side shorter than a piece is one short piece."""
    starts = [*range(0, max(length - PIECE, 0), PIECE), max(length - PIECE, 0)]
    return [(start, min(start + PIECE, length)) for start in starts]


# A tile has up to 144 pieces and takes 0.1 GB: read one after the other, all of them decode it once. Two entries,
# because a label is read beside its image.
@functools.lru_cache(maxsize=2)
def _rgb_tile(path: Path, column: str) -> PIL.Image.Image:
    return rgb_image(path, column)


@functools.lru_cache(maxsize=1)
def _index_tile(path: Path) -> np.ndarray:
    return stored_ids(path)
