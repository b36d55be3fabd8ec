"""The data sets as their publishers distribute them: which files make a sample, and what their labels say."""

from __future__ import annotations

from gkd_hf.data.domains import domain as known_domain
from gkd_hf.data.raw_layouts.acdc import ACDC
from gkd_hf.data.raw_layouts.base import BadSample, RawLayout, RawSample
from gkd_hf.data.raw_layouts.bdd100k import BDD100K
from gkd_hf.data.raw_layouts.camvid import CamVid
from gkd_hf.data.raw_layouts.cityscapes import Cityscapes
from gkd_hf.data.raw_layouts.gtav import GTAV
from gkd_hf.data.raw_layouts.imagenet import ImageNet
from gkd_hf.data.raw_layouts.isprs import ISPRS
from gkd_hf.data.raw_layouts.mapillary import Mapillary
from gkd_hf.data.raw_layouts.synthia import Synthia
from gkd_hf.data.raw_layouts.urbansyn import UrbanSyn
from gkd_hf.errors import InputError

__all__ = ["RAW_LAYOUTS", "BadSample", "RawLayout", "RawSample", "raw_layout"]

RAW_LAYOUTS: dict[str, RawLayout] = {
    layout.domain: layout
    for layout in (
        GTAV(),
        Synthia(),
        UrbanSyn(),
        Cityscapes(),
        BDD100K(),
        Mapillary(),
        *(ACDC(condition) for condition in ("night", "fog", "rain", "snow")),
        *(ISPRS(name) for name in ("potsdam_rgb", "potsdam_irrg", "vaihingen_irrg")),
        ImageNet(),
        CamVid("camvid_day"),
        CamVid("camvid_dusk"),
    )
}


def raw_layout(domain: str) -> RawLayout:
    """Return how ``domain`` is distributed.

    Raises ``InputError`` for an unknown domain, and for one that no publisher distributes: the toy city is rendered,
    and a user's own data ("custom") needs a list of classes, see ``custom_layout.CustomLayout``.
    """
    name = known_domain(domain).name
    if name not in RAW_LAYOUTS:
        raise InputError(f"'{name}' is not distributed by anyone; the domains that are: {', '.join(RAW_LAYOUTS)}")
    return RAW_LAYOUTS[name]
