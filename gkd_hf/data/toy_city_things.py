"""The things that stand in a toy street: trees, lamps, signs, cars and persons, each painted back to front.

Positions are metres: ``x`` to the right of the street's middle, ``z`` ahead of the camera.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gkd_hf.data.toy_city_styles import Colour
from gkd_hf.data.toy_city_surfaces import GROUND, NEAR

if TYPE_CHECKING:
    from gkd_hf.data.toy_city_scene import Scene


def draw_tree(scene: Scene, x: float, z: float, leaf: Colour | None = None) -> None:
    leaf = leaf or scene.varied(scene.pick(scene.palette.leaves))
    aspect = scene.between(scene.style.geometry.crown_aspect)
    radius = 0.9 + 0.9 * scene.draw()
    tall = radius * aspect
    stem = 1.5 + 1.2 * scene.draw()
    trunk = scene.add("trunk", scene.varied(scene.palette.trunk), z, texture=0.25, cover=0.15)
    scene.box(trunk, x - 0.13, x + 0.13, 0, stem + tall * 0.6, z, 2)
    shades = [scene.add("crown", leaf, z, shade=shade, texture=0.5, cover=0.8) for shade in (0.72, 0.98, 1.22)]
    if aspect > 1.9:  # a pointed crown: cypress, fir
        for shade, inner in zip(shades, (1.0, 0.7, 0.35), strict=True):
            shift = -0.12 * scene.sun_side * radius * (1 - inner)
            scene.polygon(
                shade,
                [
                    (x - 0.55 * radius * inner + shift, stem, z),
                    (x + shift, stem + 2 * tall, z),
                    (x + 0.55 * radius * inner + shift, stem, z),
                ],
            )
        return
    for shade, inner in zip(shades, (1.0, 0.75, 0.42), strict=True):
        lift = (1 - inner) * 0.55
        for lobe in (-0.45, 0.45, 0.0):
            scene.ellipse(
                shade,
                x + radius * (lobe * inner + scene.sun_side * -lift * 0.6),
                stem + tall * (1 + lift + (0.35 if lobe == 0 else -0.1) * inner),
                0.72 * radius * inner,
                0.72 * tall * inner,
                z,
            )


def draw_lamp(scene: Scene, x: float, z: float) -> None:
    metal = scene.add("shaft", scene.varied(scene.palette.metal), z, texture=0.05, cover=0.1)
    lamp = scene.add("sign", (0.92, 0.90, 0.82), z, emit=(1.0, 0.82, 0.50), texture=0.0)
    height, arm = 4.6 + 1.4 * scene.draw(), -np.sign(x) * 1.5
    scene.box(metal, x - 0.09, x + 0.09, 0, height, z, 2)
    scene.box(metal, min(x, x + arm), max(x, x + arm), height - 0.1, height + 0.06, z, 2)
    scene.box(lamp, x + arm - 0.35, x + arm + 0.35, height - 0.30, height, z, 2)


def draw_sign(scene: Scene, x: float, z: float) -> None:
    metal = scene.add("shaft", scene.varied(scene.palette.metal), z, texture=0.05, cover=0.1)
    scene.box(metal, x - 0.07, x + 0.07, 0, 2.5, z, 2)
    if scene.draw() < 0.3:  # a traffic light
        case = scene.add("sign", (0.10, 0.11, 0.11), z, texture=0.0)
        glow = ((1.0, 0.10, 0.05), (1.0, 0.70, 0.05), (0.10, 0.95, 0.35))
        lit = int(scene.draw() * 3)
        bulb = scene.add("sign", glow[lit], z, emit=glow[lit], texture=0.0)
        scene.box(case, x - 0.22, x + 0.22, 2.3, 3.3, z, 3)
        scene.box(bulb, x - 0.13, x + 0.13, 3.0 - 0.3 * lit, 3.25 - 0.3 * lit, z, 2)
        return
    colour = scene.varied(scene.pick(scene.palette.signs))
    plate = scene.add("sign", colour, z, texture=0.03, cover=0.1)
    inner = scene.add("sign", (0.95, 0.95, 0.95), z, texture=0.0, cover=0.1)
    radius = 0.36 + 0.1 * scene.draw()
    if scene.draw() < 0.5:
        scene.ellipse(plate, x, 2.6, radius, radius, z)
        scene.box(inner, x - radius * 0.6, x + radius * 0.6, 2.6 - 0.09, 2.6 + 0.09, z)
    else:
        scene.polygon(plate, [(x - radius, 2.3, z), (x + radius, 2.3, z), (x, 2.3 + 1.7 * radius, z)])
        scene.polygon(inner, [(x - radius * 0.45, 2.4, z), (x + radius * 0.45, 2.4, z), (x, 2.4 + 0.75 * radius, z)])


def draw_car(scene: Scene, x: float, z: float, crossing: bool) -> None:
    body_colour = scene.varied(scene.pick(scene.palette.cars))
    height = scene.between(scene.style.geometry.car_height) * (
        1.35 if scene.draw() < 0.12 else 1.0
    )  # a van now and then
    body = scene.add("car_body", body_colour, z, texture=0.03, cover=0.75)
    dark = scene.add("car_body", body_colour, z + 2, shade=0.66, texture=0.03, cover=0.5)
    bumper = scene.add("car_body", body_colour, z, shade=0.55, texture=0.03)
    glass = scene.add("car_glass", (0.13, 0.17, 0.21), z, texture=0.02, cover=0.3)
    wheel = scene.add("wheel", (0.06, 0.06, 0.07), z, texture=0.02)
    shadow = scene.add("asphalt", scene.palette.asphalt, kind=GROUND, shade=0.35, texture=0.05)
    if crossing:
        draw_car_from_the_side(scene, x, z, height, (body, bumper, glass, wheel, shadow))
        return
    oncoming = x < 0
    light = (1.0, 0.96, 0.84) if oncoming else (0.85, 0.06, 0.05)
    lamp = scene.add("car_light", light, z, emit=light, texture=0.0)
    half, length, waist, sill = 0.92, 4.1, 0.58 * height, 0.28
    scene.strip(shadow, x - half - 0.15, x + half + 0.15, max(z - 0.3, NEAR), z + length)
    inner = -np.sign(x - scene.offset) * half  # the flank that faces the camera
    back = z + length
    if abs(x - scene.offset) > 0.5 * half:
        flank = x + inner
        scene.polygon(dark, [(flank, sill, z), (flank, waist, z), (flank, waist, back), (flank, sill, back)])
        roof = flank * 0.98 + x * 0.02
        scene.polygon(
            dark,
            [(flank, waist, z), (roof, height, z + 0.7), (roof, height, back - 1.5), (flank, waist, back - 0.8)],
        )
        scene.polygon(
            glass,
            [
                (flank, waist, z + 0.4),
                (roof, height - 0.12, z + 0.8),
                (roof, height - 0.12, back - 1.7),
                (flank, waist, back - 1.2),
            ],
        )
        for along in (0.75, length - 0.8):
            scene.polygon(
                wheel,
                [
                    (flank, height_, z + along + shift)
                    for height_, shift in (
                        (0, -0.2),
                        (0.35, -0.34),
                        (0.62, -0.15),
                        (0.62, 0.15),
                        (0.35, 0.34),
                        (0, 0.2),
                    )
                ],
            )
    for side in (-1, 1):
        scene.box(wheel, x + side * 0.72 - 0.16, x + side * 0.72 + 0.16, 0, 0.5, z, 2)
    top = 0.74
    scene.polygon(
        body,
        [(x - half * 0.97, waist, z), (x - top, height, z), (x + top, height, z), (x + half * 0.97, waist, z)],
    )
    scene.polygon(
        glass,
        [
            (x - half * 0.86, waist + 0.03, z),
            (x - top * 0.9, height - 0.13, z),
            (x + top * 0.9, height - 0.13, z),
            (x + half * 0.86, waist + 0.03, z),
        ],
    )
    scene.box(body, x - half, x + half, sill, waist, z, 3)
    scene.box(bumper, x - half, x + half, sill, sill + 0.17, z)
    for side in (-1, 1):
        scene.box(lamp, x + side * 0.70 - 0.19, x + side * 0.70 + 0.19, waist - 0.26, waist - 0.06, z, 2)
    if z < 16:
        plate = scene.add("car_body", (0.92, 0.92, 0.86), z, texture=0.0)
        scene.box(plate, x - 0.26, x + 0.26, sill + 0.18, sill + 0.32, z)


def draw_car_from_the_side(scene: Scene, x: float, z: float, height: float, surfaces: tuple[int, ...]) -> None:
    body, bumper, glass, wheel, shadow = surfaces
    nose = 1 if scene.draw() < 0.5 else -1
    waist = 0.58 * height
    scene.strip(shadow, x - 2.15, x + 2.15, max(z - 0.4, NEAR), z + 1.6)
    at = [
        (-2.1, 0.3),
        (-2.1, waist),
        (-1.7, height),
        (0.5, height),
        (1.15, waist),
        (2.1, waist * 0.86),
        (2.1, 0.3),
    ]
    scene.polygon(body, [(x + nose * along, up, z) for along, up in at])
    scene.polygon(bumper, [(x - 2.1, 0.26, z), (x + 2.1, 0.26, z), (x + 2.1, 0.42, z), (x - 2.1, 0.42, z)])
    windows = [(-1.75, waist), (-1.5, height - 0.14), (0.4, height - 0.14), (0.92, waist)]
    scene.polygon(glass, [(x + nose * along, up, z) for along, up in windows])
    for along in (-1.3, 1.3):
        scene.ellipse(wheel, x + along, 0.33, 0.36, 0.36, z)
    lamp = scene.add("car_light", (1.0, 0.96, 0.84), z, emit=(1.0, 0.96, 0.84), texture=0.0)
    scene.box(lamp, x + nose * 1.95 - 0.14, x + nose * 1.95 + 0.14, waist - 0.3, waist - 0.1, z, 2)


def draw_person(scene: Scene, x: float, z: float) -> None:
    tall = 1.55 + 0.35 * scene.draw()
    skin = scene.add("head", scene.varied(scene.pick(scene.palette.skin)), z, texture=0.0)
    hair = scene.add("head", (0.14, 0.10, 0.08), z, shade=0.5 + 2 * scene.draw(), texture=0.0, cover=0.5)
    coat_colour = scene.varied(scene.pick(scene.palette.clothes))
    coat = scene.add("torso", coat_colour, z, texture=0.08, cover=0.15)
    sleeve = scene.add("torso", coat_colour, z, shade=0.75, texture=0.08, cover=0.15)
    trousers = scene.add("legs", scene.varied(scene.pick(scene.palette.clothes)), z, shade=0.8, texture=0.05)
    stride = 0.08 + 0.2 * scene.draw()
    hip, neck = 0.48 * tall, 0.83 * tall
    for side in (-1, 1):
        foot = x + side * stride
        scene.polygon(
            trousers,
            [
                (x + side * 0.03 - 0.11, hip, z),
                (x + side * 0.03 + 0.11, hip, z),
                (foot + 0.09, 0, z),
                (foot - 0.09, 0, z),
            ],
        )
        scene.polygon(
            sleeve,
            [
                (x + side * 0.2, neck, z),
                (x + side * 0.31, neck - 0.08, z),
                (x + side * (0.3 + stride * 0.5), hip - 0.02, z),
                (x + side * 0.24, hip, z),
            ],
        )
    scene.polygon(
        coat, [(x - 0.23, neck, z), (x + 0.23, neck, z), (x + 0.19, hip - 0.06, z), (x - 0.19, hip - 0.06, z)]
    )
    radius = 0.075 * tall
    scene.ellipse(hair, x, tall - radius * 0.9, radius, radius, z)
    scene.ellipse(skin, x, tall - radius * 1.25, radius * 0.8, radius * 0.8, z)
