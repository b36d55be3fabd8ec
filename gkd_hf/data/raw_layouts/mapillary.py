"""Mapillary Vistas v1.2 (Neuhold et al., ICCV 2017): palette labels, named by a JSON file beside them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from gkd_hf.data.domains import CITYSCAPES_CLASSES
from gkd_hf.data.label_maps import LabelMap, cityscapes_ids_from_names, label_map
from gkd_hf.data.raw_layouts.base import RawLayout, RawSample, file_bytes
from gkd_hf.errors import InputError

_FOLDERS = {"train": "training", "validation": "validation"}
_CONFIGS = ("config_v1.2.json", "config.json")


class Mapillary(RawLayout):
    """The names in the configuration decide what the indices mean. The test split has no published labels."""

    domain = "mapillary"
    splits = ("train", "validation")
    description = (
        "  {training,validation}/images/KEY.jpg\n"
        "  {training,validation}/labels/KEY.png   palette images (in the v2.0 download: v1.2/labels/KEY.png)\n"
        "  config_v1.2.json                       or config.json: the readable name of each index"
    )

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        part = _FOLDERS[split]
        samples = self.pair(
            self.collect(self.folder(root, f"{part}/images"), [".jpg"]),
            self.collect(self.folder(root, f"{part}/labels", f"{part}/v1.2/labels"), [".png"]),
        )
        _ids_by(self._configuration(samples[0]))
        return samples

    def id_map(self, sample: RawSample) -> LabelMap:
        return _ids_by(self._configuration(sample))

    def _configuration(self, sample: RawSample) -> Path:
        root = sample.image.parents[2]
        for name in _CONFIGS:
            if (root / name).is_file():
                return root / name
        raise InputError(f"{self.domain}: {root} holds neither {' nor '.join(_CONFIGS)}; {self.expectation}")


@functools.lru_cache(maxsize=4)
def _ids_by(config: Path) -> LabelMap:
    """Return the map from the indices that ``config`` names to train ids."""
    try:
        names = [entry["readable"] for entry in json.loads(file_bytes(config))["labels"]]
        ids = cityscapes_ids_from_names(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{config} does not list labels with a 'readable' name each ({type(error).__name__}: {error}); use the "
            "file as distributed"
        ) from error
    if len(names) > 255 or CITYSCAPES_CLASSES.index("road") not in ids.values():
        raise InputError(f"{config} lists {len(names)} labels and is not that of Mapillary Vistas v1.2")
    return label_map(ids, len(CITYSCAPES_CLASSES))
