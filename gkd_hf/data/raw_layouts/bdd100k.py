"""BDD100K (Yu et al., CVPR 2020), semantic segmentation of the 10k images: masks of train ids."""

from __future__ import annotations

from pathlib import Path

from gkd_hf.data.raw_layouts.base import RawLayout, RawSample

_FOLDERS = {"train": "train", "validation": "val"}


class BDD100K(RawLayout):
    """The test split is left out: its labels are not published."""

    domain = "bdd100k"
    splits = ("train", "validation")
    description = (
        "  images/10k/{train,val}/NAME.jpg\n"
        "  labels/sem_seg/masks/{train,val}/NAME.png   Cityscapes' train ids, 255 = unlabelled"
    )

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        return self.pair(
            self.collect(self.folder(root, f"images/10k/{_FOLDERS[split]}"), [".jpg"]),
            self.collect(self.folder(root, f"labels/sem_seg/masks/{_FOLDERS[split]}"), [".png"]),
        )
