"""The data sets as their publishers distribute them: which files make a sample, and what their labels say."""

from __future__ import annotations

from collections.abc import Mapping

from gkd_hf.data.domains import domain as known_domain
from gkd_hf.data.raw_layouts.acdc import ACDC
from gkd_hf.data.raw_layouts.base import RawLayout, RawSample
from gkd_hf.data.raw_layouts.bdd100k import BDD100K
from gkd_hf.data.raw_layouts.camvid import CamVid
from gkd_hf.data.raw_layouts.cityscapes import Cityscapes
from gkd_hf.data.raw_layouts.custom import Custom
from gkd_hf.data.raw_layouts.gtav import GTAV
from gkd_hf.data.raw_layouts.imagenet import ImageNet
from gkd_hf.data.raw_layouts.isprs import ISPRS
from gkd_hf.data.raw_layouts.mapillary import Mapillary
from gkd_hf.data.raw_layouts.synthia import Synthia
from gkd_hf.data.raw_layouts.urbansyn import UrbanSyn
from gkd_hf.errors import InputError

__all__ = ["RAW_LAYOUTS", "RawLayout", "RawSample", "raw_layout"]

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
        Custom(),
    )
}


def raw_layout(domain: str, *, num_classes: int | None = None, id_map: Mapping[int, int] | None = None) -> RawLayout:
    """Return how ``domain`` is distributed.

    ``num_classes`` and ``id_map`` (value in the masks → train id or 255) are for ``custom`` alone, whose masks are
    otherwise handed on as they are. Raises ``InputError`` for an unknown domain, for one that needs no preparation
    (the toy city is rendered), and for classes or a map given to a domain that has its own.
    """
    name = known_domain(domain).name
    if name not in RAW_LAYOUTS:
        raise InputError(f"'{name}' has no files to prepare; domains that have: {', '.join(RAW_LAYOUTS)}")
    if num_classes is None and id_map is None:
        return RAW_LAYOUTS[name]
    if name != "custom":
        raise InputError(f"'{name}' has its own classes and ids; a class list or an id map is for 'custom' alone")
    return Custom(num_classes, id_map)
