from __future__ import annotations

import numpy as np
import pytest

from gkd_hf.data.label_maps import MAPILLARY_NAMES, label_map
from gkd_hf.errors import InputError


def mapped(name: object, values: list[int], num_classes: int = 19, dtype: type = np.uint8) -> list[int]:
    return label_map(name, num_classes).apply(np.array([values], dtype=dtype), "here")[0].tolist()


@pytest.mark.parametrize("name", ["gtav", "cityscapes"])
def test_cityscapes_ids(name: str):
    assert mapped(name, [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23]) == list(range(11))
    assert mapped(name, [24, 25, 26, 27, 28, 31, 32, 33]) == list(range(11, 19))
    assert mapped(name, [0, 6, 9, 10, 14, 18, 29, 30, 34, 255]) == [255] * 10


def test_synthia_ids_come_as_16_bit_values():
    order = [3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11]
    assert mapped("synthia", order, dtype=np.uint16) == list(range(19))
    assert mapped("synthia", [0, 13, 14, 22], dtype=np.uint16) == [255] * 4


def test_urbansyn_and_isprs():
    assert mapped("urbansyn", [0, 18, 19]) == [0, 18, 255]
    assert mapped("isprs", [0, 1, 2, 3, 4, 5, 6], num_classes=6) == [255, 0, 1, 2, 3, 4, 5]


def test_mapillary_rules_by_name():
    assert len(MAPILLARY_NAMES) == 66
    expected = {
        "Road": 0, "Crosswalk - Plain": 0, "Parking": 0, "Bike Lane": 0, "Service Lane": 0,
        "Lane Marking - Crosswalk": 0, "Lane Marking - General": 0, "Sidewalk": 1, "Curb": 1, "Curb Cut": 1,
        "Pedestrian Area": 1, "Building": 2, "Wall": 3, "Fence": 4, "Pole": 5, "Utility Pole": 5, "Street Light": 5,
        "Traffic Light": 6, "Traffic Sign (Front)": 7, "Traffic Sign (Back)": 7, "Traffic Sign Frame": 7,
        "Vegetation": 8, "Terrain": 9, "Sky": 10, "Person": 11, "Bicyclist": 12, "Motorcyclist": 12,
        "Other Rider": 12, "Car": 13, "Truck": 14, "Bus": 15, "On Rails": 16, "Motorcycle": 17, "Bicycle": 18,
    }  # fmt: skip
    everything = mapped("mapillary", list(range(66)))
    assert {name: train for name, train in zip(MAPILLARY_NAMES, everything, strict=True) if train != 255} == expected


def test_identity_and_recipe_mapping():
    assert mapped("identity", [0, 1, 2, 255], num_classes=3) == [0, 1, 2, 255]
    assert mapped({10: 0, 300: 1, 11: 255}, [10, 300, 11, 255], num_classes=2, dtype=np.uint16) == [0, 1, 255, 255]


def test_values_outside_the_map_are_named():
    with pytest.raises(
        InputError, match=r"row 'x': label value\(s\) 3, 9 are not in the label map 'identity'.*0–2, 255"
    ):
        label_map("identity", 3).apply(np.array([[0, 9, 3]], dtype=np.uint8), "row 'x'")
    with pytest.raises(InputError, match="70000"):
        label_map("identity", 3).apply(np.array([[0, 70000]], dtype=np.int32), "here")
    with pytest.raises(InputError, match="-1"):
        label_map("identity", 3).apply(np.array([[0, -1]], dtype=np.int32), "here")
    with pytest.raises(InputError) as caught:
        label_map("identity", 2).apply(np.arange(100, dtype=np.uint8)[None], "here")
    assert "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … are" in str(caught.value)


def test_wrong_maps_are_refused():
    with pytest.raises(InputError, match="unknown label map 'cityscape', did you mean 'cityscapes'"):
        label_map("cityscape", 19)
    with pytest.raises(InputError, match="'gtav'.*there are 11 classes"):
        label_map("gtav", 11)
    with pytest.raises(InputError, match="stored id 3 goes to 2, but there are 2 classes"):
        label_map({3: 2}, 2)
    with pytest.raises(InputError, match="stored id 'road'"):
        label_map({"road": 0}, 2)
    for given, shown in ((5, "5"), (None, "null"), ([0, 1], r"\[0, 1\]")):
        with pytest.raises(InputError, match=f"a label map is a name .* or a mapping .* not {shown}"):
            label_map(given, 2)
