"""ImageNet (Russakovsky et al., IJCV 2015) or any folder of class folders like it: images without labels."""

from __future__ import annotations

from pathlib import Path

from gkd_hf.data.raw_layouts.base import RawLayout, RawSample

_FOLDERS = {"train": "train", "validation": "val"}
_ENDINGS = (".jpeg", ".jpg", ".png")


class ImageNet(RawLayout):
    """The class of an image is part of its id and nothing else: distillation needs no labels here."""

    domain = "imagenet"
    splits = ("train", "validation")
    description = "  train/CLASS/NAME.JPEG\n  val/NAME.JPEG or val/CLASS/NAME.JPEG   if there is a validation split"

    def splits_in(self, root: Path) -> tuple[str, ...]:
        return tuple(split for split in self.splits if split == "train" or (root / _FOLDERS[split]).is_dir())

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        images = self.collect(self.folder(root, _FOLDERS[split]), _ENDINGS, recursive=True, relative=True)
        return [RawSample(key, images[key], None) for key in sorted(images)]
