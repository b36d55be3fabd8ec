"""Cityscapes (Cordts et al., CVPR 2016): city folders, one label id for each pixel."""

from __future__ import annotations

from pathlib import Path

from gkd_hf.data.raw_layouts.base import RawLayout, RawSample

_FOLDERS = {"train": "train", "validation": "val"}


class Cityscapes(RawLayout):
    """The fine annotations. The test split is left out: its public labels are empty."""

    domain = "cityscapes"
    domain_label_map = "cityscapes"
    splits = ("train", "validation")
    description = (
        "  leftImg8bit/{train,val}/CITY/CITY_SEQ_FRAME_leftImg8bit.png\n"
        "  gtFine/{train,val}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png   label ids 0..33"
    )

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        images = self.folder(root, f"leftImg8bit/{_FOLDERS[split]}")
        labels = self.folder(root, f"gtFine/{_FOLDERS[split]}")
        return self.pair(
            self.collect(images, ["_leftImg8bit.png"], recursive=True),
            self.collect(labels, ["_gtFine_labelIds.png"], recursive=True),
        )
