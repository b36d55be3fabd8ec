"""ACDC (Sakaridis et al., ICCV 2021): the same streets by night and in fog, rain and snow; labels are train ids."""

from __future__ import annotations

from pathlib import Path

from gkd_hf.data.raw_layouts.base import RawLayout, RawSample

_FOLDERS = {"train": "train", "validation": "val"}


class ACDC(RawLayout):
    """One condition. The test split is left out: its labels are not published."""

    splits = ("train", "validation")

    def __init__(self, condition: str) -> None:
        self.condition = condition
        self.domain = f"acdc_{condition}"
        self.description = (
            f"  rgb_anon/{condition}/{{train,val}}/GOPRNNNN/GOPRNNNN_frame_NNNNNN_rgb_anon.png\n"
            f"  gt/{condition}/{{train,val}}/GOPRNNNN/GOPRNNNN_frame_NNNNNN_gt_labelTrainIds.png"
        )

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        part = f"{self.condition}/{_FOLDERS[split]}"
        return self.pair(
            self.collect(self.folder(root, f"rgb_anon/{part}"), ["_rgb_anon.png"], recursive=True),
            self.collect(self.folder(root, f"gt/{part}"), ["_gt_labelTrainIds.png"], recursive=True),
        )
