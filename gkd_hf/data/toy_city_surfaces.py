"""The vocabulary of the toy city: its classes and fine parts, and the columns of a scene's table of surfaces."""

from __future__ import annotations

import numpy as np

CLASSES = ("road", "sidewalk", "building", "vegetation", "sky", "pole", "car", "person")
PART_CLASSES = {  # fine part → class; the order gives the part ids
    "asphalt": "road",
    "marking": "road",
    "pavement": "sidewalk",
    "curb": "sidewalk",
    "wall": "building",
    "window": "building",
    "roof": "building",
    "crown": "vegetation",
    "trunk": "vegetation",
    "grass": "vegetation",
    "sky": "sky",
    "shaft": "pole",
    "sign": "pole",
    "car_body": "car",
    "car_glass": "car",
    "wheel": "car",
    "car_light": "car",
    "head": "person",
    "torso": "person",
    "legs": "person",
}
PARTS = tuple(PART_CLASSES)
PART_CLASS = np.array([CLASSES.index(name) for name in PART_CLASSES.values()], dtype=np.uint8)
PART = {name: number for number, name in enumerate(PARTS)}

UPRIGHT, GROUND, WALL, SKY = 0, 1, 2, 3
# columns of the surface table
RED, EMIT, TEXTURE, COVER, PART_ID, KIND, DEPTH, WALL_X, BAY, WINDOW = 0, 3, 6, 7, 8, 9, 10, 11, 12, 13
COLUMNS = 14
SUPERSAMPLING = 2
FAR = 200.0
NEAR = 1.2
