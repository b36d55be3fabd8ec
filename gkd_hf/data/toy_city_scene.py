"""Geometry of one toy street: a perspective world painted from far to near into an image of surface numbers.

A surface is one visible piece of one object (the glass of the third car). Its properties stand in a table, so that
everything that depends on light and weather is done later for a whole batch at once (``toy_city_photometry``).
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image, ImageDraw

from gkd_hf.data.toy_city_styles import Colour, Palette, Style
from gkd_hf.data.toy_city_surfaces import FAR, GROUND, NEAR, PART, PART_ID, PARTS, SKY, SUPERSAMPLING, UPRIGHT, WALL
from gkd_hf.data.toy_city_things import draw_car, draw_lamp, draw_person, draw_sign, draw_tree


class Scene:
    """One street, drawn at construction.

    Attributes:
        ids: int32 ``2H × 2W`` surface numbers.
        surfaces: float32 ``number of surfaces × COLUMNS`` table.
        horizon, centre, focal, camera_height: the camera, in pixels of the final image and metres.
    """

    def __init__(self, style: Style, size: int, rng: np.random.Generator) -> None:
        self.rng, self.style, self.size = rng, style, size
        # in blocks, because one call for each number would cost as much as drawing the polygons
        self.draws = itertools.chain.from_iterable(rng.random(4096).tolist() for _ in itertools.count())
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
            draw_tree(self, x + side * (2 + 5 * self.draw()), z0 + (z1 - z0) * (1 - step / 3), leaf)
        if self.draw() < 0.6:
            top = 0.9 + 0.6 * self.draw()
            self.polygon(hedge, [(x, 0, z0), (x, top, z0), (x, top, z1), (x, 0, z1)])

    # ---------------------------------------------------------------- things that stand on the ground
    def _things(self) -> None:
        geometry, draw, road, edge = self.style.geometry, self.draw, self.road, self.edge
        things: list[tuple[float, int, tuple]] = []
        kinds = (draw_tree, draw_lamp, draw_sign, draw_car, draw_person)
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
            kinds[kind](self, *arguments)


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
