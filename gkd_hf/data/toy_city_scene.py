"""Geometry of one toy street: a perspective world painted from far to near into an image of surface numbers.

A surface is one visible piece of one object (the glass of the third car). Its properties stand in a table, so that
everything that depends on light and weather is done later for a whole batch at once (``toy_city_photometry``).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from gkd_hf.data.toy_city_styles import Colour, Palette, Style

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


class Scene:
    """One street, drawn at construction.

    Attributes:
        ids: int32 ``2H × 2W`` surface numbers.
        surfaces: float32 ``number of surfaces × COLUMNS`` table.
        horizon, centre, focal, camera_height: the camera, in pixels of the final image and metres.
    """

    def __init__(self, style: Style, size: int, rng: np.random.Generator) -> None:
        self.rng, self.style, self.size = rng, style, size
        self.draws = iter(rng.random(4096).tolist())
        geometry = style.geometry
        self.horizon = self.between(geometry.horizon) * size
        self.centre = self.between(geometry.vanishing_x) * size
        self.focal = self.between(geometry.focal) * size
        self.camera_height = self.between(geometry.camera_height)
        self.road = self.between(geometry.road_half_width)
        self.edge = self.road + self.between(geometry.sidewalk_width)
        # the camera stands in the right lane (left for a few), so the street is seen off its middle
        self.offset = self.road * (0.15 + 0.3 * self.draw())
        self.sun_side = 1.0 if self.draw() < 0.5 else -1.0
        self.jitter = self.between(style.palette_jitter)
        self.palette = _disturbed(style.palette, self.between(style.palette_chaos), rng)
        self.rows: list[tuple[float, ...]] = []
        side = size * SUPERSAMPLING
        self.picture = Image.new("I", (side, side))
        self.pen = ImageDraw.Draw(self.picture)
        self._ground()
        self._buildings()
        self._things()
        self.ids = np.asarray(self.picture, dtype=np.int32)
        self.surfaces = np.array(self.rows, dtype=np.float32)

    # ---------------------------------------------------------------- drawing helpers
    def draw(self) -> float:
        return next(self.draws)

    def between(self, bounds: tuple[float, float]) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * self.draw()

    def pick(self, options: tuple[Colour, ...]) -> Colour:
        return options[int(self.draw() * len(options))]

    def add(
        self,
        part: str,
        colour: Colour,
        z: float = FAR,
        *,
        kind: int = UPRIGHT,
        shade: float = 1.0,
        emit: Colour = (0.0, 0.0, 0.0),
        texture: float = 0.1,
        cover: float = 0.0,
        wall_x: float = 1.0,
        bay: float = 1.0,
        window: float = 0.0,
    ) -> int:
        red, green, blue = (min(1.0, max(0.0, channel * shade)) for channel in colour)
        self.rows.append(
            (red, green, blue, *emit, texture, cover, PART[part], kind, max(z, NEAR), wall_x, bay, window)
        )
        return len(self.rows) - 1

    def varied(self, colour: Colour) -> Colour:
        """The colour of one object: its material's, a little lighter or darker and a little off in hue."""
        light = (self.draw() - 0.5) * 2.4 * self.jitter
        return tuple(channel + light + (self.draw() - 0.5) * 1.6 * self.jitter for channel in colour)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Point (metres right of the street's middle, above ground, ahead) to supersampled pixels."""
        scale = self.focal / z * SUPERSAMPLING
        return (
            self.centre * SUPERSAMPLING + (x - self.offset) * scale,
            self.horizon * SUPERSAMPLING + (self.camera_height - y) * scale,
        )

    def polygon(self, surface: int, points: list[tuple[float, float, float]]) -> None:
        self.pen.polygon([self.project(*point) for point in points], fill=surface)

    def box(self, surface: int, x0: float, x1: float, y0: float, y1: float, z: float, minimum: float = 1.0) -> None:
        """Upright rectangle at depth ``z``, at least ``minimum`` supersampled pixels wide and high."""
        left, bottom = self.project(x0, y0, z)
        right, top = self.project(x1, y1, z)
        least = minimum - 1
        self.pen.rectangle((left, top, max(right - 1, left + least), max(bottom - 1, top + least)), surface)

    def ellipse(self, surface: int, x: float, y: float, radius_x: float, radius_y: float, z: float) -> None:
        left, top = self.project(x - radius_x, y + radius_y, z)
        right, bottom = self.project(x + radius_x, y - radius_y, z)
        self.pen.ellipse((left, top, max(right, left + 1), max(bottom, top + 1)), surface)

    def strip(self, surface: int, x0: float, x1: float, z0: float, z1: float) -> None:
        self.polygon(surface, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)])

    # ---------------------------------------------------------------- ground
    def _ground(self) -> None:
        palette, side = self.palette, self.size * SUPERSAMPLING
        sky = self.add("sky", palette.sky_low, kind=SKY, texture=0.0)
        self.pen.rectangle((0, 0, side, side), sky)
        ridge_colour = palette.leaves[0] if self.draw() < 0.6 else palette.walls[0]
        ridge = self.add("crown" if ridge_colour == palette.leaves[0] else "wall", ridge_colour, 150.0, cover=0.5)
        x = -160.0
        while x < 160.0:
            width, height = 14 + 30 * self.draw(), 3 + 9 * self.draw() ** 2
            if PARTS[int(self.rows[ridge][PART_ID])] == "crown":
                self.ellipse(ridge, x, 0, width, height, 150.0)
            else:
                self.box(ridge, x, x + width, -1, height * 1.4, 150.0)
            x += width
        below = self.horizon * SUPERSAMPLING
        grass = self.add("grass", self.varied(palette.grass), kind=GROUND, texture=0.30, cover=1.0)
        self.pen.rectangle((0, below, side, side), grass)
        pavement = self.add("pavement", self.varied(palette.pavement), kind=GROUND, texture=0.16, cover=0.95)
        self.strip(pavement, -self.edge - 8, self.edge + 8, NEAR, FAR)
        curb = self.add("curb", self.varied(palette.curb), kind=GROUND, texture=0.08, cover=0.85)
        self.strip(curb, -self.road - 0.28, self.road + 0.28, NEAR, FAR)
        asphalt = self.add("asphalt", self.varied(palette.asphalt), kind=GROUND, texture=0.18, cover=0.42)
        self.strip(asphalt, -self.road, self.road, NEAR, FAR)
        paint = self.add("marking", self.varied(palette.marking), kind=GROUND, texture=0.12, cover=0.35)
        if self.style.geometry.centre_line == "double":
            for x0 in (-0.32, 0.14):
                self.strip(paint, x0, x0 + 0.18, NEAR, 90)
        else:
            z = NEAR + 5.0 * self.draw()
            while z < 55:
                self.strip(paint, -0.09, 0.09, z, z + 2.6)
                z += 5.5
        if self.draw() < 0.45:
            for x0 in (-self.road + 0.25, self.road - 0.40):
                self.strip(paint, x0, x0 + 0.15, NEAR, FAR)
        if self.draw() < 0.22:  # a zebra crossing
            z, x = 6 + 9 * self.draw(), -self.road + 0.3
            while x < self.road - 0.4:
                self.strip(paint, x, x + 0.5, z, z + 2.8)
                x += 1.0

    # ---------------------------------------------------------------- buildings
    def _buildings(self) -> None:
        geometry, lots = self.style.geometry, []
        gap_rate, gabled_rate = self.between(geometry.gap_rate), self.between(geometry.gabled_rate)
        for side in (-1, 1):
            z = NEAR - 6 * self.draw()
            while z < 110:
                length = self.between(geometry.building_length)
                lots.append((z, z + length, side, self.draw() < gap_rate))
                z += length + (1.5 * self.draw() if self.draw() < 0.3 else 0.0)
        for z0, z1, side, empty in sorted(lots, reverse=True):
            if z1 <= NEAR + 0.5:
                continue
            if empty:
                self._garden(max(z0, NEAR + 1), z1, side)
            else:
                self._building(max(z0, NEAR), z1, side, gabled_rate)

    def _building(self, z0: float, z1: float, side: int, gabled_rate: float) -> None:
        geometry = self.style.geometry
        x = side * (self.edge + self.between(geometry.setback))
        height = self.between(geometry.building_height)
        wall = self.varied(self.pick(self.palette.walls))
        bay, width = self.between(geometry.window_bay), self.between(geometry.window_width)
        lit = 1.10 if side == -self.sun_side else 0.82
        far_x = x + side * 14.0
        roof_height = 0.28 * height * (0.6 + 0.5 * self.draw()) if self.draw() < gabled_rate else 0.0
        front = self.add(
            "wall", wall, z0, shade=0.96, texture=0.14, bay=bay, window=width if self.draw() < 0.7 else 0.0
        )
        facade = self.add(
            "wall", wall, z1, kind=WALL, shade=lit, texture=0.14, wall_x=x - self.offset, bay=bay, window=width
        )
        roof = self.add("roof", self.varied(self.palette.roof), z0, shade=0.9 if roof_height else 0.75, cover=1.0)
        if roof_height:
            ridge = x + side * 7.0
            self.polygon(
                roof,
                [
                    (x, height, z0),
                    (x, height, z1),
                    (ridge, height + roof_height, z1),
                    (ridge, height + roof_height, z0),
                ],
            )
            self.polygon(
                front,
                [(x, 0, z0), (x, height, z0), (ridge, height + roof_height, z0), (far_x, height, z0), (far_x, 0, z0)],
            )
        else:
            self.polygon(front, [(x, 0, z0), (x, height, z0), (far_x, height, z0), (far_x, 0, z0)])
        self.polygon(facade, [(x, 0, z0), (x, height, z0), (x, height, z1), (x, 0, z1)])
        if not roof_height and z1 < 70:  # a cornice, which also closes the wall against the sky
            self.polygon(roof, [(x, height, z0), (x, height + 0.35, z0), (x, height + 0.35, z1), (x, height, z1)])

    def _garden(self, z0: float, z1: float, side: int) -> None:
        x = side * (self.edge + 0.5)
        ground = self.add("grass", self.varied(self.palette.grass), kind=GROUND, texture=0.30, cover=1.0)
        self.strip(ground, min(x, x + side * 20), max(x, x + side * 20), z0, z1)
        leaf = self.varied(self.pick(self.palette.leaves))
        hedge = self.add("crown", leaf, z1, shade=0.9, texture=0.45, cover=0.8)
        for step in range(3):
            self._tree(x + side * (2 + 5 * self.draw()), z0 + (z1 - z0) * (1 - step / 3), leaf)
        if self.draw() < 0.6:
            top = 0.9 + 0.6 * self.draw()
            self.polygon(hedge, [(x, 0, z0), (x, top, z0), (x, top, z1), (x, 0, z1)])

    # ---------------------------------------------------------------- things that stand on the ground
    def _things(self) -> None:
        geometry, draw, road, edge = self.style.geometry, self.draw, self.road, self.edge
        things: list[tuple[float, int, tuple]] = []
        kinds = (self._tree, self._lamp, self._sign, self._car, self._person)
        for side in (-1, 1):
            for kind, spacing in ((0, self.between(geometry.tree_spacing)), (1, self.between(geometry.lamp_spacing))):
                z = 4 + spacing * draw()
                while z < 70:
                    beside = road + (0.7 + 0.5 * draw() if kind == 0 else 0.45)
                    if draw() < (0.75 if kind == 0 else 0.9):
                        things.append((z, kind, (side * beside, z)))
                    z += spacing * (0.8 + 0.4 * draw())
        for _ in range(round(self.between(geometry.sign_count))):
            z = 5 + 25 * draw() ** 1.5
            things.append((z, 2, ((1 if draw() < 0.65 else -1) * (road + 0.5 + 0.4 * draw()), z)))
        taken: list[tuple[float, float]] = []
        for _ in range(round(self.between(geometry.car_count))):
            kind = draw()
            lane = (
                (0.5 if draw() < 0.5 else -0.5) * road if kind < 0.5 else (1 if draw() < 0.5 else -1) * (road - 1.05)
            )
            z, crossing = 5.5 + 34 * draw() ** 1.4, draw() < 0.10
            if all(abs(lane - x) > 1.9 or abs(z - other) > 5.5 for x, other in taken):
                taken.append((lane, z))
                things.append((z, 3, (lane, z, crossing)))
        for _ in range(round(self.between(geometry.person_count))):
            z, walking = 3.6 + 13 * draw() ** 1.2, draw() < 0.82
            x = (
                (1 if draw() < 0.5 else -1) * (road + 0.4 + (edge - road - 0.6) * draw())
                if walking
                else road * (2 * draw() - 1)
            )
            if all(abs(x - other) > 1.3 or abs(z - far) > 3 for other, far in taken):
                things.append((z, 4, (x, z)))
        for _, kind, arguments in sorted(things, key=lambda thing: -thing[0]):
            kinds[kind](*arguments)

    def _tree(self, x: float, z: float, leaf: Colour | None = None) -> None:
        leaf = leaf or self.varied(self.pick(self.palette.leaves))
        aspect = self.between(self.style.geometry.crown_aspect)
        radius = 0.9 + 0.9 * self.draw()
        tall = radius * aspect
        stem = 1.5 + 1.2 * self.draw()
        trunk = self.add("trunk", self.varied(self.palette.trunk), z, texture=0.25, cover=0.15)
        self.box(trunk, x - 0.13, x + 0.13, 0, stem + tall * 0.6, z, 2)
        shades = [self.add("crown", leaf, z, shade=shade, texture=0.5, cover=0.8) for shade in (0.72, 0.98, 1.22)]
        if aspect > 1.9:  # a pointed crown: cypress, fir
            for shade, inner in zip(shades, (1.0, 0.7, 0.35), strict=True):
                shift = -0.12 * self.sun_side * radius * (1 - inner)
                self.polygon(
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
                self.ellipse(
                    shade,
                    x + radius * (lobe * inner + self.sun_side * -lift * 0.6),
                    stem + tall * (1 + lift + (0.35 if lobe == 0 else -0.1) * inner),
                    0.72 * radius * inner,
                    0.72 * tall * inner,
                    z,
                )

    def _lamp(self, x: float, z: float) -> None:
        metal = self.add("shaft", self.varied(self.palette.metal), z, texture=0.05, cover=0.1)
        lamp = self.add("sign", (0.92, 0.90, 0.82), z, emit=(1.0, 0.82, 0.50), texture=0.0)
        height, arm = 4.6 + 1.4 * self.draw(), -np.sign(x) * 1.5
        self.box(metal, x - 0.09, x + 0.09, 0, height, z, 2)
        self.box(metal, min(x, x + arm), max(x, x + arm), height - 0.1, height + 0.06, z, 2)
        self.box(lamp, x + arm - 0.35, x + arm + 0.35, height - 0.30, height, z, 2)

    def _sign(self, x: float, z: float) -> None:
        metal = self.add("shaft", self.varied(self.palette.metal), z, texture=0.05, cover=0.1)
        self.box(metal, x - 0.07, x + 0.07, 0, 2.5, z, 2)
        if self.draw() < 0.3:  # a traffic light
            case = self.add("sign", (0.10, 0.11, 0.11), z, texture=0.0)
            glow = ((1.0, 0.10, 0.05), (1.0, 0.70, 0.05), (0.10, 0.95, 0.35))
            lit = int(self.draw() * 3)
            bulb = self.add("sign", glow[lit], z, emit=glow[lit], texture=0.0)
            self.box(case, x - 0.22, x + 0.22, 2.3, 3.3, z, 3)
            self.box(bulb, x - 0.13, x + 0.13, 3.0 - 0.3 * lit, 3.25 - 0.3 * lit, z, 2)
            return
        colour = self.varied(self.pick(self.palette.signs))
        plate = self.add("sign", colour, z, texture=0.03, cover=0.1)
        inner = self.add("sign", (0.95, 0.95, 0.95), z, texture=0.0, cover=0.1)
        radius = 0.36 + 0.1 * self.draw()
        if self.draw() < 0.5:
            self.ellipse(plate, x, 2.6, radius, radius, z)
            self.box(inner, x - radius * 0.6, x + radius * 0.6, 2.6 - 0.09, 2.6 + 0.09, z)
        else:
            self.polygon(plate, [(x - radius, 2.3, z), (x + radius, 2.3, z), (x, 2.3 + 1.7 * radius, z)])
            self.polygon(
                inner, [(x - radius * 0.45, 2.4, z), (x + radius * 0.45, 2.4, z), (x, 2.4 + 0.75 * radius, z)]
            )

    def _car(self, x: float, z: float, crossing: bool) -> None:
        body_colour = self.varied(self.pick(self.palette.cars))
        height = self.between(self.style.geometry.car_height) * (
            1.35 if self.draw() < 0.12 else 1.0
        )  # a van now and then
        body = self.add("car_body", body_colour, z, texture=0.03, cover=0.75)
        dark = self.add("car_body", body_colour, z + 2, shade=0.66, texture=0.03, cover=0.5)
        bumper = self.add("car_body", body_colour, z, shade=0.55, texture=0.03)
        glass = self.add("car_glass", (0.13, 0.17, 0.21), z, texture=0.02, cover=0.3)
        wheel = self.add("wheel", (0.06, 0.06, 0.07), z, texture=0.02)
        shadow = self.add("asphalt", self.palette.asphalt, kind=GROUND, shade=0.35, texture=0.05)
        if crossing:
            self._car_from_the_side(x, z, height, (body, bumper, glass, wheel, shadow))
            return
        oncoming = x < 0
        light = (1.0, 0.96, 0.84) if oncoming else (0.85, 0.06, 0.05)
        lamp = self.add("car_light", light, z, emit=light, texture=0.0)
        half, length, waist, sill = 0.92, 4.1, 0.58 * height, 0.28
        self.strip(shadow, x - half - 0.15, x + half + 0.15, max(z - 0.3, NEAR), z + length)
        inner = -np.sign(x - self.offset) * half  # the flank that faces the camera
        back = z + length
        if abs(x - self.offset) > 0.5 * half:
            flank = x + inner
            self.polygon(dark, [(flank, sill, z), (flank, waist, z), (flank, waist, back), (flank, sill, back)])
            roof = flank * 0.98 + x * 0.02
            self.polygon(
                dark,
                [(flank, waist, z), (roof, height, z + 0.7), (roof, height, back - 1.5), (flank, waist, back - 0.8)],
            )
            self.polygon(
                glass,
                [
                    (flank, waist, z + 0.4),
                    (roof, height - 0.12, z + 0.8),
                    (roof, height - 0.12, back - 1.7),
                    (flank, waist, back - 1.2),
                ],
            )
            for along in (0.75, length - 0.8):
                self.polygon(
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
            self.box(wheel, x + side * 0.72 - 0.16, x + side * 0.72 + 0.16, 0, 0.5, z, 2)
        top = 0.74
        self.polygon(
            body,
            [(x - half * 0.97, waist, z), (x - top, height, z), (x + top, height, z), (x + half * 0.97, waist, z)],
        )
        self.polygon(
            glass,
            [
                (x - half * 0.86, waist + 0.03, z),
                (x - top * 0.9, height - 0.13, z),
                (x + top * 0.9, height - 0.13, z),
                (x + half * 0.86, waist + 0.03, z),
            ],
        )
        self.box(body, x - half, x + half, sill, waist, z, 3)
        self.box(bumper, x - half, x + half, sill, sill + 0.17, z)
        for side in (-1, 1):
            self.box(lamp, x + side * 0.70 - 0.19, x + side * 0.70 + 0.19, waist - 0.26, waist - 0.06, z, 2)
        if z < 16:
            plate = self.add("car_body", (0.92, 0.92, 0.86), z, texture=0.0)
            self.box(plate, x - 0.26, x + 0.26, sill + 0.18, sill + 0.32, z)

    def _car_from_the_side(self, x: float, z: float, height: float, surfaces: tuple[int, ...]) -> None:
        body, bumper, glass, wheel, shadow = surfaces
        nose = 1 if self.draw() < 0.5 else -1
        waist = 0.58 * height
        self.strip(shadow, x - 2.15, x + 2.15, max(z - 0.4, NEAR), z + 1.6)
        at = [
            (-2.1, 0.3),
            (-2.1, waist),
            (-1.7, height),
            (0.5, height),
            (1.15, waist),
            (2.1, waist * 0.86),
            (2.1, 0.3),
        ]
        self.polygon(body, [(x + nose * along, up, z) for along, up in at])
        self.polygon(bumper, [(x - 2.1, 0.26, z), (x + 2.1, 0.26, z), (x + 2.1, 0.42, z), (x - 2.1, 0.42, z)])
        windows = [(-1.75, waist), (-1.5, height - 0.14), (0.4, height - 0.14), (0.92, waist)]
        self.polygon(glass, [(x + nose * along, up, z) for along, up in windows])
        for along in (-1.3, 1.3):
            self.ellipse(wheel, x + along, 0.33, 0.36, 0.36, z)
        lamp = self.add("car_light", (1.0, 0.96, 0.84), z, emit=(1.0, 0.96, 0.84), texture=0.0)
        self.box(lamp, x + nose * 1.95 - 0.14, x + nose * 1.95 + 0.14, waist - 0.3, waist - 0.1, z, 2)

    def _person(self, x: float, z: float) -> None:
        tall = 1.55 + 0.35 * self.draw()
        skin = self.add("head", self.varied(self.pick(self.palette.skin)), z, texture=0.0)
        hair = self.add("head", (0.14, 0.10, 0.08), z, shade=0.5 + 2 * self.draw(), texture=0.0, cover=0.5)
        coat_colour = self.varied(self.pick(self.palette.clothes))
        coat = self.add("torso", coat_colour, z, texture=0.08, cover=0.15)
        sleeve = self.add("torso", coat_colour, z, shade=0.75, texture=0.08, cover=0.15)
        trousers = self.add("legs", self.varied(self.pick(self.palette.clothes)), z, shade=0.8, texture=0.05)
        stride = 0.08 + 0.2 * self.draw()
        hip, neck = 0.48 * tall, 0.83 * tall
        for side in (-1, 1):
            foot = x + side * stride
            self.polygon(
                trousers,
                [
                    (x + side * 0.03 - 0.11, hip, z),
                    (x + side * 0.03 + 0.11, hip, z),
                    (foot + 0.09, 0, z),
                    (foot - 0.09, 0, z),
                ],
            )
            self.polygon(
                sleeve,
                [
                    (x + side * 0.2, neck, z),
                    (x + side * 0.31, neck - 0.08, z),
                    (x + side * (0.3 + stride * 0.5), hip - 0.02, z),
                    (x + side * 0.24, hip, z),
                ],
            )
        self.polygon(
            coat, [(x - 0.23, neck, z), (x + 0.23, neck, z), (x + 0.19, hip - 0.06, z), (x - 0.19, hip - 0.06, z)]
        )
        radius = 0.075 * tall
        self.ellipse(hair, x, tall - radius * 0.9, radius, radius, z)
        self.ellipse(skin, x, tall - radius * 1.25, radius * 0.8, radius * 0.8, z)


def _disturbed(palette: Palette, chaos: float, rng: np.random.Generator) -> Palette:
    """The palette with every material's mean colour moved by ``chaos`` towards a random one."""
    if chaos == 0:
        return palette

    def moved(colour: Colour) -> Colour:
        weight = chaos * rng.random()
        return tuple(
            float((1 - weight) * channel + weight * other)
            for channel, other in zip(colour, rng.random(3), strict=True)
        )

    return Palette(
        **{
            name: tuple(moved(colour) for colour in value) if isinstance(value[0], tuple) else moved(value)
            for name, value in vars(palette).items()
        }
    )
