"""UrbanSyn (Gómez et al., 2023): rendered street scenes whose labels are already train ids."""

from __future__ import annotations

from pathlib import Path

from gkd_hf.data.raw_layouts.base import RawLayout, RawSample


class UrbanSyn(RawLayout):
    """7,539 rendered frames, all of them for training."""

    domain = "urbansyn"
    domain_label_map = "urbansyn"
    splits = ("train",)
    description = "  rgb/rgb_NNNN.png\n  ss/ss_NNNN.png   Cityscapes' train ids, 19 = unlabelled"

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        return self.pair(
            self.collect(self.folder(root, "rgb"), [".png"], prefix="rgb_"),
            self.collect(self.folder(root, "ss"), [".png"], prefix="ss_"),
        )
