"""A user's own data: a folder of images and one of masks, with ids that the user's class list explains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gkd_hf.data.label_maps import LabelMap, label_map
from gkd_hf.data.raw_layouts.base import RawLayout, RawSample, named, stored_ids
from gkd_hf.errors import InputError

_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_MASKS = (".png", ".tif", ".tiff", ".bmp")


class Custom(RawLayout):
    """Images and masks with the same names.

    Where ``images/`` has folders of the splits' names, so must ``masks/``; else everything is the training split.
    File names without suffix are matched; where one occurs twice, the sub-folders belong to it.

    Attributes:
        num_classes: number of train ids. None: the masks' values (0..255) are handed on as they are.
        id_map: value in the masks → train id or 255; the values are train ids themselves if there is none.
    """

    domain = "custom"
    splits = ("train", "validation", "test")
    description = (
        "  images/**/NAME.{jpg,png,tif,bmp,webp}   or images/{train,validation,test}/**\n"
        "  masks/**/NAME.{png,tif,bmp}             one value for each pixel, in the same folders"
    )

    def __init__(self, num_classes: int | None = None, id_map: Mapping[int, int] | None = None) -> None:
        if id_map is not None and num_classes is None:
            raise InputError("custom: an id map needs the class list that its train ids count")
        self.num_classes = num_classes
        self.id_map = id_map
        self._map: LabelMap | None = None
        if num_classes is not None:
            self._map = label_map("identity" if id_map is None else id_map, num_classes)

    def splits_in(self, root: Path) -> tuple[str, ...]:
        return tuple(split for split in self.splits if self._part(root, split) is not None) or ("train",)

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        images, masks = self.folder(root, "images"), self.folder(root, "masks")
        there = self.splits_in(root)
        if split not in there:
            raise InputError(f"custom: {images} has no folder '{split}'; its splits are: {', '.join(there)}")
        part = self._part(root, split)
        if part is not None:
            strays = [path.name for path in sorted(images.iterdir()) if self._is_stray(path)]
            if strays:
                raise InputError(
                    f"custom: {images} has folders for {', '.join(there)} and beside them {named(strays)}, "
                    "which belong to no split; move them into one"
                )
            images, masks = images / part, self.folder(root, f"masks/{part}")
        of_images = self.collect(images, _IMAGES, recursive=True, relative=True)
        of_masks = self.collect(masks, _MASKS, recursive=True, relative=True)
        by_stem = [{Path(key).name: path for key, path in found.items()} for found in (of_images, of_masks)]
        if [len(found) for found in by_stem] == [len(of_images), len(of_masks)]:
            of_images, of_masks = by_stem
        return self.pair(of_images, of_masks)

    def read_label(self, sample: RawSample) -> np.ndarray:
        path = self.label_of(sample)
        stored = stored_ids(path)
        if self._map is not None:
            return self._map.apply(stored, str(path))
        if stored.min(initial=0) < 0 or stored.max(initial=0) > 255:
            raise InputError(f"{path} has the value {stored.max()}, above 255: give a class list and an id map")
        return stored.astype(np.uint8)

    @staticmethod
    def _is_stray(path: Path) -> bool:
        names = {name for folders in _FOLDERS.values() for name in folders}
        return not path.name.startswith(".") and (path.name not in names or not path.is_dir())

    @staticmethod
    def _part(root: Path, split: str) -> str | None:
        return next((name for name in _FOLDERS[split] if (root / "images" / name).is_dir()), None)
