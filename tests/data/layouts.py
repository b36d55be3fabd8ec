"""Raw layouts that misbehave, in a module that worker processes can import."""

from __future__ import annotations

import time

from gkd_hf.data.custom_layout import CustomLayout
from gkd_hf.data.raw_layouts import RawSample


class SlowLayout(CustomLayout):
    """One's own data on a slow disk, so that a kill hits the middle."""

    def read_image(self, sample: RawSample) -> tuple[bytes, str]:
        time.sleep(0.05)
        return super().read_image(sample)
