"""What a toy city can look like: palettes, geometry and weather of each style, and the presets by name.

Every number is a range ``(low, high)`` from which each scene draws its own value, so that a style is a distribution.
Colours are sRGB in 0..1, lengths are metres unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from gkd_hf.errors import InputError

SOURCE_STYLE = "clear_day"
"""The style that labels are used of: ``toy_city`` without a style."""

Range = tuple[float, float]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Palette:
    """Mean colour of each material, with several to choose from where a real street has several.

    A scene draws one colour per object from the alternatives; what varies around it is ``Style.palette_jitter``.
    """

    asphalt: Colour = (0.33, 0.33, 0.35)
    marking: Colour = (0.90, 0.90, 0.88)
    pavement: Colour = (0.62, 0.58, 0.54)
    curb: Colour = (0.74, 0.72, 0.69)
    walls: tuple[Colour, ...] = ((0.66, 0.44, 0.34), (0.72, 0.58, 0.42), (0.58, 0.52, 0.48), (0.74, 0.68, 0.56))
    roof: Colour = (0.42, 0.24, 0.19)
    glass: Colour = (0.24, 0.30, 0.37)
    leaves: tuple[Colour, ...] = ((0.21, 0.45, 0.16), (0.30, 0.50, 0.18), (0.16, 0.38, 0.17))
    trunk: Colour = (0.34, 0.24, 0.16)
    grass: Colour = (0.34, 0.52, 0.22)
    sky_top: Colour = (0.30, 0.55, 0.90)
    sky_low: Colour = (0.72, 0.86, 0.98)
    cloud: Colour = (0.97, 0.97, 0.98)
    metal: Colour = (0.36, 0.37, 0.39)
    signs: tuple[Colour, ...] = ((0.80, 0.12, 0.12), (0.12, 0.28, 0.72), (0.92, 0.90, 0.86), (0.92, 0.76, 0.12))
    cars: tuple[Colour, ...] = (
        (0.75, 0.10, 0.10),
        (0.12, 0.25, 0.62),
        (0.88, 0.88, 0.90),
        (0.10, 0.10, 0.12),
        (0.60, 0.62, 0.66),
        (0.16, 0.42, 0.24),
        (0.88, 0.66, 0.14),
    )
    skin: tuple[Colour, ...] = ((0.86, 0.66, 0.52), (0.62, 0.42, 0.30), (0.36, 0.24, 0.18))
    clothes: tuple[Colour, ...] = (
        (0.16, 0.18, 0.28),
        (0.72, 0.16, 0.18),
        (0.18, 0.42, 0.62),
        (0.82, 0.78, 0.68),
        (0.22, 0.42, 0.24),
        (0.84, 0.52, 0.16),
        (0.12, 0.12, 0.13),
    )

    def class_means(self) -> np.ndarray:
        """Mean colour of the six background classes road, sidewalk, building, vegetation, sky, pole: ``6 × 3``."""
        sky = np.mean([self.sky_top, self.sky_low], axis=0)
        rows = [
            self.asphalt,
            self.pavement,
            np.mean(self.walls, axis=0),
            np.mean(self.leaves, axis=0),
            sky,
            self.metal,
        ]
        return np.array(rows, dtype=np.float64)

    def distance(self, other: Palette) -> float:
        """Root mean square difference of :meth:`class_means`."""
        return float(np.sqrt(np.mean((self.class_means() - other.class_means()) ** 2)))


_POSITIVE = (
    "focal",
    "camera_height",
    "road_half_width",
    "sidewalk_width",
    "building_height",
    "building_length",
    "window_width",
    "window_bay",
    "storey",
    "tree_spacing",
    "crown_aspect",
    "lamp_spacing",
    "car_height",
)


def _check_ranges(settings: Geometry | Style) -> None:
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, tuple) and not (len(value) == 2 and -np.inf < value[0] <= value[1] < np.inf):
            raise InputError(f"toy city style: {item.name} is {value}, must be (low, high) with low <= high")


@dataclass(frozen=True)
class Geometry:
    """The layout a style's scenes are drawn from."""

    horizon: Range = (0.42, 0.50)  # fraction of the image height
    vanishing_x: Range = (0.42, 0.58)  # fraction of the image width
    focal: Range = (0.74, 0.92)  # image widths
    camera_height: Range = (1.35, 1.75)
    road_half_width: Range = (3.3, 5.0)
    sidewalk_width: Range = (2.0, 3.6)
    setback: Range = (0.0, 1.5)
    building_height: Range = (6.0, 15.0)
    building_length: Range = (8.0, 20.0)
    gap_rate: Range = (0.10, 0.30)  # probability that a lot holds greenery instead of a house
    gabled_rate: Range = (0.2, 0.6)
    window_width: Range = (0.40, 0.60)  # fraction of one window bay
    window_bay: Range = (2.2, 3.6)
    storey: Range = (2.8, 3.5)
    tree_spacing: Range = (9.0, 26.0)
    crown_aspect: Range = (0.85, 1.25)  # height / width
    lamp_spacing: Range = (14.0, 26.0)
    sign_count: Range = (1, 4)
    car_count: Range = (2, 6)
    car_height: Range = (1.35, 1.75)
    person_count: Range = (3, 8)
    centre_line: str = "dashed"  # or "double"

    def __post_init__(self) -> None:
        _check_ranges(self)
        for name in _POSITIVE:
            if getattr(self, name)[0] <= 0:
                raise InputError(f"toy city geometry: {name} is {getattr(self, name)}, must be above 0")
        if self.centre_line not in ("dashed", "double"):
            raise InputError(f"toy city geometry: centre_line is {self.centre_line!r}, must be 'dashed' or 'double'")


@dataclass(frozen=True)
class Style:
    """One look of the city. ``night``, ``fog``, ``rain`` and ``snow`` are strengths from 0 (none) to 1 (full)."""

    palette: Palette = field(default_factory=Palette)
    palette_jitter: Range = (0.03, 0.06)  # standard deviation of each object's colour around its material's
    palette_chaos: Range = (0.0, 0.0)  # weight of a random colour in each material's mean, 0 keeps the palette
    geometry: Geometry = field(default_factory=Geometry)
    night: Range = (0.0, 0.0)
    fog: Range = (0.0, 0.0)
    rain: Range = (0.0, 0.0)
    snow: Range = (0.0, 0.0)
    weather_probability: float = 1.0  # of each of the four, drawn apart; otherwise its strength is 0
    clouds: Range = (0.1, 0.5)
    sun: Range = (0.6, 1.0)
    texture: Range = (0.8, 1.1)
    gain: Range = (0.95, 1.05)
    contrast: Range = (0.95, 1.05)
    saturation: Range = (0.95, 1.1)
    temperature: Range = (-0.03, 0.03)
    tint: Range = (-0.02, 0.02)
    blur: Range = (0.0, 0.2)  # standard deviation in pixels of a 64-pixel image
    noise: Range = (0.005, 0.012)

    def __post_init__(self) -> None:
        _check_ranges(self)
        for name in ("night", "fog", "rain", "snow", "clouds", "sun", "palette_chaos"):
            low, high = getattr(self, name)
            if low < 0 or high > 1:
                raise InputError(f"toy city style: {name} is {(low, high)}, must lie within 0 and 1")


OTHER_CITY_PALETTE = Palette(  # red asphalt, straw-coloured pavements, pink houses, yellow leaves, a cream sky
    asphalt=(0.72, 0.46, 0.36),
    marking=(0.97, 0.92, 0.78),
    pavement=(0.97, 0.90, 0.60),
    curb=(0.85, 0.78, 0.60),
    walls=((0.90, 0.35, 0.50), (0.95, 0.50, 0.60), (0.85, 0.30, 0.40), (0.80, 0.42, 0.55)),
    roof=(0.20, 0.30, 0.40),
    glass=(0.14, 0.20, 0.30),
    leaves=((0.78, 0.70, 0.14), (0.84, 0.78, 0.22), (0.66, 0.62, 0.12)),
    trunk=(0.62, 0.56, 0.50),
    grass=(0.75, 0.72, 0.30),
    sky_top=(0.98, 0.84, 0.70),
    sky_low=(1.00, 0.93, 0.84),
    cloud=(0.99, 0.84, 0.74),
    metal=(0.95, 0.85, 0.20),
)

OTHER_CITY_GEOMETRY = Geometry(  # wide streets of tall blocks seen from a lorry; most ranges lie outside the pool's
    horizon=(0.44, 0.52),
    vanishing_x=(0.40, 0.60),
    focal=(0.72, 0.86),
    camera_height=(2.25, 2.45),
    road_half_width=(6.05, 6.50),
    sidewalk_width=(2.6, 3.8),
    setback=(0.0, 0.5),
    building_height=(24.0, 34.0),
    building_length=(22.5, 30.0),
    gap_rate=(0.10, 0.25),
    gabled_rate=(0.0, 0.0),
    window_width=(0.72, 0.80),
    window_bay=(4.1, 4.6),
    storey=(3.8, 4.2),
    tree_spacing=(9.0, 16.0),
    crown_aspect=(1.75, 1.90),
    lamp_spacing=(28.0, 40.0),
    car_count=(3, 8),
    car_height=(1.15, 1.30),
    centre_line="double",
)

_POOL_GEOMETRY = Geometry(
    horizon=(0.36, 0.54),
    vanishing_x=(0.34, 0.66),
    focal=(0.66, 1.0),
    camera_height=(1.2, 2.2),
    road_half_width=(2.8, 6.0),
    sidewalk_width=(1.4, 4.2),
    setback=(0.0, 3.0),
    building_height=(4.0, 22.0),
    building_length=(6.0, 22.0),
    gap_rate=(0.05, 0.5),
    gabled_rate=(0.0, 0.8),
    window_width=(0.3, 0.7),
    window_bay=(1.8, 4.0),
    storey=(2.6, 3.7),
    tree_spacing=(9.0, 40.0),
    crown_aspect=(0.7, 1.7),
    lamp_spacing=(10.0, 27.0),
    sign_count=(0, 6),
    car_count=(1, 8),
    car_height=(1.32, 2.0),
    person_count=(1, 10),
)

_CLEAR_DAY = Style()

PRESETS: dict[str, Style] = {
    "clear_day": _CLEAR_DAY,
    "night": replace(_CLEAR_DAY, night=(0.82, 1.0), noise=(0.015, 0.03)),
    "fog": replace(_CLEAR_DAY, fog=(0.8, 1.0), clouds=(0.8, 1.0), sun=(0.0, 0.1)),
    "rain": replace(_CLEAR_DAY, rain=(0.82, 1.0), clouds=(0.8, 1.0), sun=(0.0, 0.1)),
    "snow": replace(_CLEAR_DAY, snow=(0.85, 1.0), clouds=(0.6, 1.0), sun=(0.0, 0.3)),
    "other_city": replace(_CLEAR_DAY, palette=OTHER_CITY_PALETTE, geometry=OTHER_CITY_GEOMETRY, sun=(0.3, 0.8)),
    # a worn monochrome camera: every one of its ranges lies outside the pool's
    "other_camera": replace(
        _CLEAR_DAY, saturation=(0.0, 0.12), contrast=(1.4, 1.6), gain=(0.45, 0.58), blur=(1.0, 1.3), noise=(0.07, 0.1)
    ),
    "pool": Style(
        palette_jitter=(0.02, 0.12),
        palette_chaos=(0.0, 0.9),
        geometry=_POOL_GEOMETRY,
        night=(0.05, 0.6),
        fog=(0.05, 0.6),
        rain=(0.05, 0.6),
        snow=(0.05, 0.6),
        weather_probability=0.35,
        clouds=(0.0, 1.0),
        sun=(0.0, 1.0),
        texture=(0.4, 2.0),
        gain=(0.6, 1.35),
        contrast=(0.6, 1.35),
        saturation=(0.2, 1.6),
        temperature=(-0.14, 0.14),
        tint=(-0.1, 0.1),
        blur=(0.0, 0.9),
        noise=(0.0, 0.06),
    ),
}
