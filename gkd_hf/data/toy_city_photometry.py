"""Light, weather and camera of the toy city, computed for a whole batch of scenes at once.

Everything is looked up by surface number and then follows simple physics on the scenes' true depth: windows and
textures live in world coordinates, fog is Beer-Lambert extinction, night keeps an ambient light and adds what glows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from gkd_hf.data.toy_city_scene import Scene
from gkd_hf.data.toy_city_styles import Style
from gkd_hf.data.toy_city_surfaces import (
    BAY,
    COVER,
    DEPTH,
    FAR,
    GROUND,
    KIND,
    NEAR,
    PART,
    PART_CLASS,
    PART_ID,
    RED,
    SKY,
    SUPERSAMPLING,
    WALL,
    WALL_X,
    WINDOW,
)

BANK = 256
WEATHER = ("night", "fog", "rain", "snow")
CAMERA = (
    "clouds",
    "sun",
    "texture",
    "gain",
    "contrast",
    "saturation",
    "temperature",
    "tint",
    "blur",
    "noise",
    "storey",
)


@dataclass(frozen=True)
class Shot:
    """One sample before its light is computed: its scene, its factors and its random fields."""

    scene: Scene
    factors: dict[str, float]
    shifts: np.ndarray  # 8 offsets into the noise bank
    grain: np.ndarray  # float32 H × W × 3 standard normal


def take(style: Style, scene: Scene, rng: np.random.Generator) -> Shot:
    """Draw the factors of one sample of ``style``."""
    factors = {}
    for name in WEATHER:
        low, high = getattr(style, name)
        happens = rng.random() < style.weather_probability
        factors[name] = (low + (high - low) * rng.random()) if happens else 0.0
    for name in CAMERA:
        low, high = style.geometry.storey if name == "storey" else getattr(style, name)
        factors[name] = low + (high - low) * rng.random()
    shifts = rng.integers(0, BANK, 8)
    return Shot(scene, factors, shifts, rng.standard_normal((scene.size, scene.size, 3), dtype=np.float32))


@functools.cache
def _bank() -> np.ndarray:
    """Periodic noise, ``3 × 256 × 256``: fine (mean 0, about −1..1), cloudy (0..1) and white (0..1)."""
    rng = np.random.default_rng(20260302)

    def octave(cells: int) -> np.ndarray:
        grid = rng.random((cells, cells))
        at = np.arange(BANK) * cells / BANK
        low, part = at.astype(int), at - at.astype(int)
        part = part * part * (3 - 2 * part)
        rows = grid[low] * (1 - part[:, None]) + grid[(low + 1) % cells] * part[:, None]
        return rows[:, low] * (1 - part) + rows[:, (low + 1) % cells] * part

    fine = sum(octave(cells) for cells in (32, 64, 128, 256)) - 2.0
    cloudy = sum(octave(cells) * weight for cells, weight in ((4, 0.5), (8, 0.27), (16, 0.15), (32, 0.08)))
    return np.stack([fine * 1.2, np.clip((cloudy - 0.32) / 0.36, 0, 1), rng.random((BANK, BANK))]).astype(np.float32)


@functools.cache
def _streaks(scale: float) -> np.ndarray:
    """Rain, 8 slants of a ``256 × 256`` periodic layer of streaks, 0..1; ``scale`` is the image size over 64."""
    layers = np.zeros((8, BANK, BANK), dtype=np.float32)
    rng = np.random.default_rng(7)
    for layer in layers:
        slope = rng.uniform(-0.45, 0.45)
        for _ in range(round(900 / scale**2)):
            row, column, length = rng.uniform(0, BANK), rng.uniform(0, BANK), rng.uniform(4, 10) * scale
            along = np.arange(length)
            strength = rng.uniform(0.35, 1.0) * np.sin(np.pi * (along + 0.5) / length)
            rows, columns = (row + along).astype(int) % BANK, (column + slope * along).astype(int) % BANK
            layer[rows, columns] = np.maximum(layer[rows, columns], strength)
    return layers


@functools.cache
def _flakes(scale: float) -> np.ndarray:
    """Falling snow, a ``256 × 256`` periodic layer of soft dots, 0..1."""
    layer = np.zeros((BANK, BANK), dtype=np.float32)
    rng = np.random.default_rng(11)
    reach = int(np.ceil(2 * scale))
    span = np.arange(-reach, reach + 1)
    for _ in range(round(1700 / scale**2)):
        row, column, radius = rng.uniform(0, BANK), rng.uniform(0, BANK), rng.uniform(0.35, 0.95) * scale
        rows, columns = int(row) + span, int(column) + span
        square = (rows[:, None] - row) ** 2 + (columns[None] - column) ** 2
        dot = np.exp(-square / (2 * (0.6 * radius) ** 2)) * rng.uniform(0.5, 1)
        where = np.ix_(rows % BANK, columns % BANK)
        layer[where] = np.maximum(layer[where], dot)
    return layer


def develop(shots: list[Shot]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 ``n × H × W × 3``, labels and parts uint8 ``n × H × W``, depth float32 ``n × H × W`` in metres."""
    size = shots[0].scene.size
    bank = _bank()
    cells = BANK - 1
    value = {
        name: np.array([shot.factors[name] for shot in shots], np.float32)[:, None, None] for name in WEATHER + CAMERA
    }
    camera = np.array(
        [[s.scene.horizon, s.scene.centre, s.scene.focal, s.scene.camera_height, s.scene.offset] for s in shots],
        dtype=np.float32,
    )
    horizon, centre, focal, height, offset = (column[:, None, None] for column in camera.T)
    shifts = np.stack([shot.shifts for shot in shots]).astype(np.int64)

    # ---- surfaces: one table for the batch, ids made unique across it
    starts = np.cumsum([0] + [len(shot.scene.surfaces) for shot in shots])
    table = np.concatenate([shot.scene.surfaces for shot in shots])
    fine_ids = np.stack([shot.scene.ids for shot in shots]) + starts[:-1, None, None].astype(np.int32)
    ids = fine_ids[:, 1::SUPERSAMPLING, 1::SUPERSAMPLING]
    # random fields are shifted by the number within the scene, so that a sample does not know its batch
    own_ids = ids - starts[:-1, None, None].astype(np.int32)
    albedo, emission, grain_amplitude, cover = _averaged(table, fine_ids)
    part = table[:, PART_ID].astype(np.uint8)[ids]
    kind = table[:, KIND].astype(np.uint8)[ids]
    ground, wall, sky = kind == GROUND, kind == WALL, kind == SKY

    # ---- world coordinates of every pixel
    row = np.arange(size, dtype=np.float32)[None, :, None] + 0.5
    column = np.arange(size, dtype=np.float32)[None, None, :] + 0.5
    wall_x = table[:, WALL_X][ids]
    depth = table[:, DEPTH][ids]
    ground_depth = focal * height / np.maximum(row - horizon, 0.02)
    depth = np.where(ground, ground_depth, depth)
    across = column - centre
    toward = np.where(
        np.sign(across) == np.sign(wall_x), focal * np.abs(wall_x) / np.maximum(np.abs(across), 0.1), FAR
    )
    depth = np.where(wall, np.minimum(toward, depth), depth)
    depth = np.clip(np.where(sky, FAR, depth), NEAR, FAR)
    x = across * depth / focal + offset
    y = height - (row - horizon) * depth / focal
    along = np.where(wall, depth, x)  # the horizontal coordinate that runs along the surface

    # ---- windows and texture
    albedo, emission, glass, lit = _windows(
        albedo, emission, table, ids, own_ids, depth, along, y, focal, wall, wall_x, value["storey"]
    )
    part[glass > 0.5] = PART["window"]
    u = (along * 7 + own_ids * 37).astype(np.int32)
    v = (np.where(ground, depth * 7, y * 7) + shifts[:, 0, None, None]).astype(np.int32)
    grain = bank[0][v & cells, np.where(ground, (x * 7).astype(np.int32), u) & cells]
    patchy = bank[1][
        (np.where(ground, depth, y) * 5 + shifts[:, 1, None, None]).astype(np.int32) & cells,
        (along * 5 + shifts[:, 2, None, None]).astype(np.int32) & cells,
    ]
    nearness = np.minimum(1.0, 18.0 / depth)
    grain_amplitude = grain_amplitude * value["texture"]
    light = 1 + grain_amplitude * (grain * (0.25 + 0.75 * nearness) + 0.7 * (patchy - 0.5))

    # ---- sunlight: the houses' long shadow on one side of the street
    side = np.array([s.scene.sun_side for s in shots], np.float32)[:, None, None]
    reach = np.array([s.scene.edge - 0.75 * s.scene.road for s in shots], np.float32)[:, None, None]
    edge = np.array([s.scene.edge for s in shots], np.float32)[:, None, None]
    shaded = np.clip((side * x - (edge - reach)) * 1.5 + (patchy - 0.5), 0, 1) * ground * (y < 0.1)
    light = light * (1 - 0.42 * value["sun"] * shaded * (1 - value["night"]))
    image = albedo * light[..., None]

    # ---- snow lies on ground and on whatever has something lower in front of it, thickest at its upper edge
    snow = value["snow"]
    above = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1) != ids
    if size >= 48:
        above |= np.concatenate([ids[:, :2], ids[:, :-2]], axis=1) != ids
    rests = np.where(ground, cover, cover * np.where(above, 1.0, 0.35 + 0.5 * (patchy > 0.55)))
    lies = np.clip((rests * 1.5 - 0.95 + 0.55 * patchy + 0.5 * (snow - 0.5)) * 2.6, 0, 1) * np.minimum(1, snow * 1.35)
    white = np.array([0.90, 0.93, 0.98], np.float32) * (0.92 + 0.16 * grain * nearness)[..., None]
    image += (lies * (rests > 0))[..., None] * (white * (1 - 0.2 * shaded[..., None]) - image)

    image = _sky(image, sky, shots, value, shifts, row, horizon)

    # ---- overcast weather takes colour out and makes the ground shine
    dull = np.maximum(value["rain"] * 0.62, np.maximum(value["snow"] * 0.4, value["fog"] * 0.3))[..., None]
    grey = image.mean(-1, keepdims=True)
    image += dull * 0.75 * (grey - image)
    image *= 1 - 0.45 * value["rain"][..., None] * np.where(sky, 0.45, 1.0)[..., None]

    night = value["night"][..., None]
    dark = np.array([0.75, 0.88, 1.35], np.float32)
    beam = np.exp(-(((x - offset) / (1.2 + 0.16 * depth)) ** 2)) * np.exp(-depth / 16.0) * (y < 1.6)
    glow = _glow(emission)
    ambient = (1 - night) ** 1.6 * (1 - 0.35 * night) + night * 0.085 * dark
    warm = np.array([1.0, 0.93, 0.78], np.float32)
    image *= ambient + night * (0.62 * beam[..., None] * warm + 1.9 * glow)
    shining = np.where(lit[..., None], night, 0.22 + 0.78 * night)  # lit windows are invisible by day
    image += emission * shining * (1 - 0.25 * value["fog"][..., None])
    haze = (0.22 + 0.5 * value["rain"] + 0.6 * value["fog"])[..., None]
    image += night * haze * glow * 0.55

    image = _wet(image, ground, value["rain"], grain, horizon)

    # ---- fog: extinction along the line of sight
    density = 0.0015 + 0.085 * value["fog"] ** 2 + 0.012 * value["rain"] + 0.012 * value["snow"]
    through = np.exp(-density * np.minimum(depth, 160.0) * (0.85 + 0.3 * patchy * (value["fog"] > 0)))[..., None]
    veil = np.array([0.80, 0.82, 0.85], np.float32) * (1 - 0.9 * night) * (1 - 0.25 * value["rain"][..., None])
    veil = np.where(
        (value["fog"] + value["rain"] + value["snow"])[..., None] > 0, veil, image.mean((1, 2), keepdims=True)
    )
    image = veil + through * (image - veil)
    image += night * (value["fog"][..., None]) * glow * 0.5

    image = _precipitation(image, value, shifts, night)
    image = _camera(image, shots, value)
    labels = PART_CLASS[part]
    return image, labels, part, depth.astype(np.float32)


def _averaged(table: np.ndarray, fine_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Colour, emission, texture and snow cover of each pixel: the mean over its sub-pixels."""
    # eight bytes per surface travel as one integer: one look-up per sub-pixel instead of eight
    packed = np.ascontiguousarray(np.clip(table[:, RED : COVER + 1], 0, 1) * 255 + 0.5, dtype=np.float32)
    packed = packed.astype(np.uint8).view(np.uint64)[:, 0]
    total = np.zeros((*fine_ids[:, ::SUPERSAMPLING, ::SUPERSAMPLING].shape, 8), np.uint16)
    for i in range(SUPERSAMPLING):
        for j in range(SUPERSAMPLING):
            total += packed[fine_ids[:, i::SUPERSAMPLING, j::SUPERSAMPLING]][..., None].view(np.uint8)
    mean = total.astype(np.float32) / (255 * SUPERSAMPLING**2)
    return mean[..., :3], mean[..., 3:6], mean[..., 6], mean[..., 7]


def _windows(
    albedo: np.ndarray,
    emission: np.ndarray,
    table: np.ndarray,
    ids: np.ndarray,
    own_ids: np.ndarray,
    depth: np.ndarray,
    along: np.ndarray,
    y: np.ndarray,
    focal: np.ndarray,
    wall: np.ndarray,
    wall_x: np.ndarray,
    storey: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Put glass on the walls, with edges filtered by the pixel's footprint; some of it is lit."""
    glass = np.zeros(ids.shape, np.float32)
    lit = np.zeros(ids.shape, bool)
    fill = table[:, WINDOW][ids]
    at = np.nonzero(fill > 0)
    if not len(at[0]):
        return albedo, emission, glass, lit
    fill, bay, number = fill[at], table[:, BAY][ids[at]], own_ids[at]
    z, on_wall = depth[at], wall[at]
    scale = np.broadcast_to(focal, ids.shape)[at]
    storey = np.broadcast_to(storey, ids.shape)[at]
    step = z / scale
    step_along = np.where(on_wall, z * step / np.maximum(np.abs(wall_x[at]), 0.5), step)
    u, v = along[at] / bay, y[at] / storey

    def covered(phase: np.ndarray, width: np.ndarray | float, footprint: np.ndarray) -> np.ndarray:
        sharp = np.clip((width / 2 - np.abs(phase - 0.5)) / footprint + 0.5, 0, 1)
        return sharp + np.clip(1.6 * footprint - 0.6, 0, 1) * (width - sharp)

    cover = covered(u % 1, fill, step_along / bay) * covered((v + 0.06) % 1, 0.56, step / storey) * (v > 0.12)
    hashed = _bank()[2][
        (np.floor(v).astype(np.int32) * 71 + number) & (BANK - 1),
        (np.floor(u).astype(np.int32) * 53 + number * 11) & (BANK - 1),
    ]
    shines = hashed < 0.42
    pane = (0.20 + 0.28 * hashed)[:, None] * np.array([0.80, 0.98, 1.22], np.float32)
    albedo, emission = albedo.copy(), emission.copy()
    albedo[at] += cover[:, None] * (pane - albedo[at])
    warm = np.array([1.0, 0.78, 0.42], np.float32) * (0.75 + hashed)[:, None]
    emission[at] += (cover * shines)[:, None] * warm
    glass[at], lit[at] = cover, shines & (cover > 0)
    return albedo, emission, glass, lit


def _sky(
    image: np.ndarray,
    sky: np.ndarray,
    shots: list[Shot],
    value: dict[str, np.ndarray],
    shifts: np.ndarray,
    row: np.ndarray,
    horizon: np.ndarray,
) -> np.ndarray:
    """Gradient, clouds (a closed cover when it rains or snows), stars."""
    bank, size = _bank(), image.shape[1]
    palettes = [shot.scene.palette for shot in shots]
    top, low, cloud = (
        np.array([getattr(palette, name) for palette in palettes], np.float32)[:, None, None]
        for name in ("sky_top", "sky_low", "cloud")
    )
    rise = np.clip(row / horizon, 0, 1)[..., None] ** 1.5
    colour = top + (low - top) * rise
    at = np.arange(size)
    across = (shifts[:, 3, None] + at * 96 // size) & (BANK - 1)
    down = (shifts[:, 4, None] + at * 190 // size) & (BANK - 1)
    puffs = bank[1][down[:, :, None], across[:, None, :]]
    closed = np.maximum(value["rain"], np.maximum(value["snow"], value["fog"] * 0.8))
    amount = np.maximum(value["clouds"], closed)
    density = np.clip((puffs - 0.95 + amount) * 2.2, 0, 1) * (0.85 * (amount > 0.02))
    density = np.maximum(density, np.clip(closed * 1.3, 0, 1))[..., None]
    shade = (0.80 + 0.20 * puffs)[..., None] * (1 - 0.12 * closed[..., None])
    colour = colour + density * (cloud * shade - colour)
    white = bank[2][down[:, :, None], across[:, None, :]]
    star = (white > 0.992) * (1 - density[..., 0]) * value["night"] * 5.0
    colour = colour + star[..., None]
    return np.where(sky[..., None], colour, image).astype(np.float32)


@functools.cache
def _glow_matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pooling to a quarter and the smooth way back: wide blurs as two small matrix products."""
    small = max(8, size // 4)
    pool = np.zeros((small, size), np.float32)
    centres = (np.arange(size) + 0.5) * small / size
    pool[centres.astype(int), np.arange(size)] = 1
    pool /= pool.sum(1, keepdims=True)
    gap = centres[:, None] - (np.arange(small) + 0.5)[None]
    wide = np.exp(-(gap**2) / (2 * (0.085 * small) ** 2)) + 0.25 * np.exp(-(gap**2) / (2 * (0.2 * small) ** 2))
    return pool, (wide / wide.sum(1, keepdims=True).max()).astype(np.float32)


def _glow(emission: np.ndarray) -> np.ndarray:
    """Light that lamps, windows and headlights spread around them."""
    size = emission.shape[1]
    pool, spread = _glow_matrices(size)
    kernel = spread @ pool  # H × H
    count = len(emission)
    down = kernel @ emission.reshape(count, size, size * 3)
    down = down.reshape(count, size, size, 3).transpose(0, 2, 1, 3).reshape(count, size, size * 3)
    both = kernel @ down
    return np.minimum(both.reshape(count, size, size, 3).transpose(0, 2, 1, 3) * 2.2, 1.0)


def _wet(
    image: np.ndarray, ground: np.ndarray, rain: np.ndarray, grain: np.ndarray, horizon: np.ndarray
) -> np.ndarray:
    """A wet street mirrors what stands above the horizon, broken by its own roughness."""
    if not rain.any():
        return image
    size = image.shape[1]
    row = np.arange(size)[None]
    mirrored = 2 * horizon[:, 0] - row - 1
    rough = (grain * 1.5).astype(np.int64)
    mirrored = np.clip(mirrored.astype(np.int64)[:, :, None] + rough * (size // 32), 0, size - 1)
    # the mirror image of a far thing is compressed towards the horizon: good enough at this scale
    reflection = np.take_along_axis(image, np.broadcast_to(mirrored[..., None], image.shape), axis=1)
    strength = (ground * rain * 0.42 * (0.75 + 0.25 * grain))[..., None]
    return image + strength * (reflection - image * 0.6)


def _precipitation(
    image: np.ndarray, value: dict[str, np.ndarray], shifts: np.ndarray, night: np.ndarray
) -> np.ndarray:
    """Rain streaks and snow flakes between the lens and the street."""
    rain, snow, size = value["rain"][..., None], value["snow"][..., None], image.shape[1]
    at = np.arange(size)
    rows, columns = (shifts[:, 5, None] + at) & (BANK - 1), (shifts[:, 6, None] + at) & (BANK - 1)
    if rain.any():
        layers = _streaks(size / 64)
        which = shifts[:, 7] % 8
        streak = layers[which[:, None, None], rows[:, :, None], columns[:, None, :]][..., None]
        image = image + streak * np.minimum(rain * 0.62, 0.6) * (
            np.float32([0.86, 0.88, 0.92]) * (1 - 0.7 * night) - image
        )
    if snow.any():
        flake = _flakes(size / 64)[rows[:, :, None], columns[:, None, :]][..., None]
        image = image + flake * np.minimum(snow * 1.05, 0.95) * (0.97 * (1 - 0.6 * night) - image)
    return image


def _camera(image: np.ndarray, shots: list[Shot], value: dict[str, np.ndarray]) -> np.ndarray:
    """Lens blur, exposure, colour, sensor noise, quantisation."""
    size = image.shape[1]
    sigma = value["blur"] * (size / 64)
    blurred = np.nonzero(sigma[:, 0, 0] > 0.15)[0]
    if len(blurred):
        at = np.arange(size, dtype=np.float32)
        kernel = np.exp(-((at[:, None] - at[None]) ** 2)[None] / (2 * sigma[blurred] ** 2))
        kernel /= kernel.sum(-1, keepdims=True)
        shape = (len(blurred), size, size, 3)
        soft = (kernel @ image[blurred].reshape(len(blurred), size, size * 3)).reshape(shape)
        soft = soft.transpose(0, 2, 1, 3).reshape(len(blurred), size, size * 3)
        image = image.copy()
        image[blurred] = (kernel @ soft).reshape(shape).transpose(0, 2, 1, 3)
    balance = np.concatenate([1 + value["temperature"], 1 + value["tint"], 1 - value["temperature"]], axis=-1)[
        :, :, None, :
    ]
    image = image * (balance * value["gain"][..., None])
    middle = image.mean((1, 2, 3), keepdims=True)
    image = middle + (image - middle) * value["contrast"][..., None]
    grey = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    image = grey[..., None] + (image - grey[..., None]) * value["saturation"][..., None]
    image = image + np.stack([shot.grain for shot in shots]) * value["noise"][..., None]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
