"""The data sets as their publishers distribute them: which files make a sample, and what their labels say."""

from __future__ import annotations

from gkd_hf.data.domains import domain as known_domain
from gkd_hf.data.raw_layouts.base import RawLayout, RawSample
from gkd_hf.data.raw_layouts.cityscapes import Cityscapes
from gkd_hf.errors import InputError

__all__ = ["RAW_LAYOUTS", "RawLayout", "RawSample", "raw_layout"]

RAW_LAYOUTS: dict[str, RawLayout] = {layout.domain: layout for layout in (Cityscapes(),)}


def raw_layout(domain: str) -> RawLayout:
    """Return how ``domain`` is distributed.

    Raises ``InputError`` for an unknown domain, and for one that needs no preparation (the toy city is rendered).
    """
    name = known_domain(domain).name
    if name not in RAW_LAYOUTS:
        raise InputError(f"'{name}' has no files to prepare; domains that have: {', '.join(RAW_LAYOUTS)}")
    return RAW_LAYOUTS[name]
