"""The domains of the benchmarks: label spaces, splits, test sizes, licences; which source is tested on which target.

Numbers and pairings follow GKD (arXiv 2603.02554) and the data sets' own publications, as do the palettes.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gkd_hf.errors import InputError, nearest

IGNORE_INDEX = 255
MIXING_BLOCK = 1024
"""Samples among which the weights of mixed domains are kept exactly: a share is a multiple of 1/1024."""
MAX_CLASSES = 254  # 255 is "ignore", and label maps mark unlisted values with 254


@dataclass(frozen=True)
class LabelSpace:
    """Class names in train-id order, and one RGB colour (0..255) for each. 255 is always "ignore"."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.palette):
            raise InputError(
                f"label space '{self.name}' has {len(self.classes)} classes but {len(self.palette)} colours: "
                "give one RGB colour per class"
            )
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise InputError(
                f"label space '{self.name}' has {len(self.classes)} classes: 1 to {MAX_CLASSES} are possible"
            )


@dataclass(frozen=True)
class Domain:
    """What is known about a domain before any of its data is read.

    Attributes:
        label_space: key of ``LABEL_SPACES``; ``None`` for unlabelled data and for ``custom`` (the recipe gives it).
        label_map: default map from the ids stored in the label PNGs to train ids (see ``label_maps.label_map``).
        train_images: published number of training images, for planning; ``None`` if it depends on the user.
        splits: role (``train``, ``validation``, ``test``) → split name; a role that does not exist is absent.
        test_size: (width, height) in pixels at which the encoder sees test images; ``None`` keeps their own size.
        keep_ratio: fit inside ``test_size`` keeping the aspect ratio, instead of stretching to it.
        licence: the terms in words. licence_id: the Hub's id of them, "other" for terms of their own, "" if unknown.
        home_page: where the data and its terms are.
    """

    name: str
    label_space: str | None
    label_map: str = "identity"
    train_images: int | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    test_size: tuple[int, int] | None = None
    keep_ratio: bool = False
    licence: str = ""
    licence_id: str = "other"
    home_page: str = ""

    def split(self, role: str) -> str:
        """Return the split that plays ``role``; raises ``InputError`` naming the roles that exist."""
        if role not in self.splits:
            raise InputError(f"domain '{self.name}' has no '{role}' split; it has: {', '.join(self.splits) or 'none'}")
        return self.splits[role]


CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

LABEL_SPACES: dict[str, LabelSpace] = {
    space.name: space
    for space in (
        LabelSpace(
            "cityscapes",
            CITYSCAPES_CLASSES,
            (
                (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
                (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
            ),
        ),
        LabelSpace(
            "isprs",
            ("impervious surface", "building", "low vegetation", "tree", "car", "clutter"),
            ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
        ),
        LabelSpace(
            "camvid",
            (
                "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                "bicyclist",
            ),
            (
                (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
                (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
            ),
        ),
        LabelSpace(
            "toy_city",
            ("road", "sidewalk", "building", "vegetation", "sky", "pole", "car", "person"),
            (
                (128, 64, 128), (244, 35, 232), (70, 70, 70), (107, 142, 35), (70, 130, 180), (220, 220, 0),
                (0, 0, 142), (220, 20, 60),
            ),
        ),
    )
}  # fmt: skip

_TRAIN_VALIDATION = {"train": "train", "validation": "validation", "test": "validation"}
_TRAIN_VALIDATION_TEST = {"train": "train", "validation": "validation", "test": "test"}
_ACDC = "ACDC licence, non-commercial, registration"
_ACDC_PAGE = "https://acdc.vision.ee.ethz.ch"
_ISPRS = "ISPRS benchmark terms, research, on request"
_ISPRS_PAGE = "https://www.isprs.org/resources/datasets/benchmarks/UrbanSemLab/"
_CAMVID = "CC BY-NC 4.0, research only"
_CAMVID_PAGE = "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/"

# The benchmarks publish no test labels: their "test" role is the labelled validation split, as in the paper.
DOMAINS: dict[str, Domain] = {
    entry.name: entry
    for entry in (
        Domain(
            "gtav", "cityscapes", "gtav", 12403, _TRAIN_VALIDATION_TEST, (1280, 720),
            licence="research only", home_page="https://download.visinf.tu-darmstadt.de/data/from_games/",
        ),
        Domain(
            "synthia", "cityscapes", "synthia", 9400, {"train": "train"}, (1280, 760),
            licence="CC BY-NC-SA 3.0", licence_id="cc-by-nc-sa-3.0", home_page="https://synthia-dataset.net",
        ),
        Domain(
            "urbansyn", "cityscapes", "urbansyn", 7539, {"train": "train"}, (1024, 512),
            licence="CC BY-SA 4.0", licence_id="cc-by-sa-4.0", home_page="https://www.urbansyn.org",
        ),
        Domain(
            "cityscapes", "cityscapes", "cityscapes", 2975, _TRAIN_VALIDATION, (1024, 512),
            licence="Cityscapes terms, non-commercial, registration", home_page="https://www.cityscapes-dataset.com",
        ),
        Domain(
            "bdd100k", "cityscapes", "identity", 7000, _TRAIN_VALIDATION, (1280, 720),
            licence="BDD100K terms, registration", home_page="https://bdd-data.berkeley.edu",
        ),
        Domain(
            "mapillary", "cityscapes", "mapillary", 18000, _TRAIN_VALIDATION, (1024, 512), keep_ratio=True,
            licence="CC BY-NC-SA 4.0, registration", licence_id="cc-by-nc-sa-4.0",
            home_page="https://www.mapillary.com/dataset/vistas",
        ),
        Domain(
            "acdc_night", "cityscapes", "identity", 400, _TRAIN_VALIDATION, (960, 540),
            licence=_ACDC, home_page=_ACDC_PAGE,
        ),
        Domain(
            "acdc_fog", "cityscapes", "identity", 400, _TRAIN_VALIDATION, (960, 540),
            licence=_ACDC, home_page=_ACDC_PAGE,
        ),
        Domain(
            "acdc_rain", "cityscapes", "identity", 400, _TRAIN_VALIDATION, (960, 540),
            licence=_ACDC, home_page=_ACDC_PAGE,
        ),
        Domain(
            "acdc_snow", "cityscapes", "identity", 400, _TRAIN_VALIDATION, (960, 540),
            licence=_ACDC, home_page=_ACDC_PAGE,
        ),
        Domain(
            "potsdam_rgb", "isprs", "isprs", 3456, _TRAIN_VALIDATION, (512, 512),
            licence=_ISPRS, home_page=_ISPRS_PAGE,
        ),
        Domain(
            "potsdam_irrg", "isprs", "isprs", 3456, _TRAIN_VALIDATION, (512, 512),
            licence=_ISPRS, home_page=_ISPRS_PAGE,
        ),
        Domain(
            "vaihingen_irrg", "isprs", "isprs", 344, _TRAIN_VALIDATION, (512, 512),
            licence=_ISPRS, home_page=_ISPRS_PAGE,
        ),
        Domain(
            "imagenet", None, "identity", 1281167, {"train": "train", "validation": "validation"},
            licence="ImageNet terms, non-commercial, registration", home_page="https://www.image-net.org",
        ),
        Domain(
            "toy_city", "toy_city", "identity", None, _TRAIN_VALIDATION_TEST,
            licence="Apache-2.0 (rendered by this package)", licence_id="apache-2.0",
        ),
        Domain(
            "camvid_day", "camvid", "identity", 305, _TRAIN_VALIDATION_TEST,
            licence=_CAMVID, licence_id="cc-by-nc-4.0", home_page=_CAMVID_PAGE,
        ),
        Domain(
            "camvid_dusk", "camvid", "identity", None, {"test": "test"},
            licence=_CAMVID, licence_id="cc-by-nc-4.0", home_page=_CAMVID_PAGE,
        ),
        Domain("custom", None, "identity", None, _TRAIN_VALIDATION_TEST, licence_id=""),
    )
}  # fmt: skip

_STREETS = ("cityscapes", "bdd100k", "mapillary")
_ACDC_TARGETS = ("acdc_night", "acdc_snow", "acdc_fog", "acdc_rain")

BENCHMARKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gtav": (("gtav",), _STREETS),
    "gtav_to_acdc": (("gtav",), _ACDC_TARGETS),
    "cityscapes_to_acdc": (("cityscapes",), _ACDC_TARGETS),
    "gtav_synthia": (("gtav", "synthia"), _STREETS),
    "gtav_synthia_urbansyn": (("gtav", "synthia", "urbansyn"), _STREETS),
    "potsdam_rgb": (("potsdam_rgb",), ("potsdam_irrg", "vaihingen_irrg")),
    "camvid_day_to_dusk": (("camvid_day",), ("camvid_dusk",)),
}


def domain(name: str) -> Domain:
    """Return the domain called ``name``.

    A toy-city style is part of the name: ``toy_city:night`` is ``toy_city`` in the style ``night`` (whether the style
    exists is checked where the scenes are rendered). Raises ``InputError`` for any other unknown name.
    """
    base, colon, style = name.partition(":")
    if colon and base == "toy_city":
        if not style:
            raise InputError("domain 'toy_city:' names no style: write for example 'toy_city:night'")
        return dataclasses.replace(DOMAINS[base], name=name)
    if name not in DOMAINS:
        raise InputError(f"unknown domain '{name}'{nearest(name, DOMAINS) or ': known are ' + ', '.join(DOMAINS)}")
    return DOMAINS[name]


def domain_names(joined: str) -> tuple[str, ...]:
    """Return the domains of `gtav+synthia`: names joined by "+" stand for the mixture of these domains."""
    return tuple(name.strip() for name in joined.split("+"))


def label_space(domain_name: str) -> LabelSpace:
    """Return the label space of a domain; raises ``InputError`` for a domain that has none of its own."""
    entry = domain(domain_name)
    if entry.label_space is None:
        raise InputError(
            f"domain '{domain_name}' has no label space of its own: give the class names in the recipe, "
            "or use it for the label-free stages only"
        )
    return LABEL_SPACES[entry.label_space]


def own_label_space(classes: Sequence[str]) -> LabelSpace:
    """Return the label space of a user's own classes, in colours that can be told apart.

    Their hues are spread by the golden ratio, in two brightnesses.
    """
    colours = [
        colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, (0.95, 0.6)[index % 2]) for index in range(len(classes))
    ]
    palette = tuple(tuple(round(255 * channel) for channel in colour) for colour in colours)
    return LabelSpace("custom", tuple(classes), palette)
