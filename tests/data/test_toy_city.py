"""The toy city: same seed same picture, styles that differ, shards that survive a kill, and the shipped teacher."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Model

import gkd_hf
from gkd_hf.data import toy_city as world
from gkd_hf.data.toy_city import CLASSES, PARTS, STYLES, TARGET_STYLES, render, toy_city, write_shards
from gkd_hf.data.toy_city_surfaces import PART_CLASS
from gkd_hf.errors import InputError

TEACHER = Path(gkd_hf.__file__).parent / "assets" / "toy_teacher"


@pytest.fixture(scope="module")
def source() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    return render("clear_day", 64, size=64, seed=3, extras=True)


@pytest.fixture
def own_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "STYLES", dict(STYLES))


@pytest.mark.parametrize("style", ["rain", "pool"])
def test_a_sample_depends_on_its_number_alone(style: str) -> None:
    whole = render(style, 8, size=32, seed=5, extras=True)
    first, second = (render(style, 4, size=32, seed=5, start=start, extras=True) for start in (0, 4))
    for one, two, three in zip(whole[:2], first[:2], second[:2], strict=True):
        np.testing.assert_array_equal(one, np.concatenate([two, three]))
    for name in ("parts", "depth"):
        np.testing.assert_array_equal(whole[2][name], np.concatenate([first[2][name], second[2][name]]))


def test_seed_and_style_change_the_scene() -> None:
    image, label = render("clear_day", 2, size=32, seed=0)
    assert not np.array_equal(image[0], image[1])
    assert not np.array_equal(image, render("clear_day", 2, size=32, seed=1)[0])
    assert not np.array_equal(label, render("night", 2, size=32, seed=0)[1])


def test_every_class_and_part_appears(source: tuple) -> None:
    images, labels, extras = source
    assert images.shape == (64, 64, 64, 3) and images.dtype == np.uint8
    assert labels.shape == (64, 64, 64) and labels.dtype == np.uint8
    assert set(np.unique(labels)) == set(range(len(CLASSES)))
    assert set(np.unique(extras["parts"])) == set(range(len(PARTS)))
    np.testing.assert_array_equal(PART_CLASS[extras["parts"]], labels)
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert share.min() > 0.003, dict(zip(CLASSES, share, strict=True))


def test_depth_grows_up_the_road_and_is_largest_in_the_sky(source: tuple) -> None:
    _, labels, extras = source
    depth = extras["depth"]
    assert depth.dtype == np.float32 and np.isfinite(depth).all() and depth.min() > 0
    assert (depth[labels == CLASSES.index("sky")] == depth.max()).all()
    road = np.where(labels == CLASSES.index("road"), depth, np.nan)
    assert np.nanmean(road[:, -4:]) < np.nanmean(road[:, 36:44]) / 2


@pytest.mark.parametrize("size", [32, 96])
def test_other_sizes(size: int) -> None:
    images, labels = render("snow", 3, size=size)
    assert images.shape == (3, size, size, 3) and labels.max() < len(CLASSES)


def test_targets_look_different_from_the_source_in_the_way_their_name_says(source: tuple) -> None:
    day = source[0] / 255.0
    looks = {style: render(style, 24, size=64, seed=3)[0] / 255.0 for style in TARGET_STYLES}
    assert looks["night"].mean() < 0.35 * day.mean()
    assert looks["night"].max() > 0.8, "lamps and windows are lit"
    assert looks["fog"].std(-1).mean() < 0.6 * day.std(-1).mean(), "fog is grey"
    middle = slice(24, 34)  # around the horizon, where everything is far
    assert looks["fog"][:, middle].std((1, 2, 3)).mean() < 0.6 * day[:, middle].std((1, 2, 3)).mean()
    assert looks["rain"].std(-1).mean() < 0.6 * day.std(-1).mean()
    assert (looks["snow"][:, 40:].min(-1) > 0.7).mean() > (day[:, 40:].min(-1) > 0.7).mean() + 0.1
    colours = {name: look.mean((0, 1, 2)) for name, look in looks.items()}
    assert np.abs(colours["other_city"] - day.mean((0, 1, 2))).max() > 0.1


def test_weather_targets_share_the_source_geometry_and_the_pool_stays_short_of_the_targets() -> None:
    pool, day, other = STYLES["pool"], STYLES["clear_day"], STYLES["other_city"]
    for name in ("night", "fog", "rain", "snow"):
        assert STYLES[name].geometry == day.geometry and STYLES[name].palette == day.palette
        assert getattr(STYLES[name], name)[0] >= 0.8
        assert getattr(pool, name)[1] <= 0.6
        assert getattr(day, name) == (0, 0)
    assert pool.palette == day.palette and other.palette.distance(pool.palette) >= 0.3
    outside = [
        name
        for name in vars(other.geometry)
        if name != "centre_line"
        and (
            getattr(other.geometry, name)[0] > getattr(pool.geometry, name)[1]
            or getattr(other.geometry, name)[1] < getattr(pool.geometry, name)[0]
        )
    ]
    assert {"camera_height", "road_half_width", "building_height", "crown_aspect"} <= set(outside)


@pytest.mark.usefixtures("own_styles")
def test_register_style() -> None:
    dusk = replace(STYLES["clear_day"], night=(0.4, 0.5))
    world.register_style("dusk", dusk)
    np.testing.assert_array_equal(render("dusk", 1, size=32)[0], render(dusk, 1, size=32)[0])
    world.register_style("dusk", dusk)
    with pytest.raises(InputError, match="exists already"):
        world.register_style("dusk", replace(dusk, fog=(0.1, 0.2)))
    with pytest.raises(InputError, match="letters, digits"):
        world.register_style("a:b", dusk)


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (world.Style, {"night": (0.5, 1.2)}, "night is .* within 0 and 1"),
        (world.Style, {"gain": (2.0, 1.0)}, "gain is .* low <= high"),
        (world.Geometry, {"tree_spacing": (0.0, 4.0)}, "tree_spacing is .* above 0"),
        (world.Geometry, {"centre_line": "dotted"}, "'dotted', must be"),
    ],
)
def test_a_style_that_cannot_be_rendered_is_refused(kind: type, setting: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**setting)


def test_stream_has_png_rows_equal_to_render() -> None:
    rows = toy_city("night", 5, size=32, seed=2)
    assert set(rows.features) == {"image", "label", "id"}
    images, labels = render("night", 5, size=32, seed=2)
    seen = list(rows)
    assert len({row["id"] for row in seen}) == len(seen) == 5
    for row, image, label in zip(seen, images, labels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), image)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["label"]["bytes"]))), label)
    assert rows.num_shards == 4


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_shards_are_written_once(tmp_path: Path) -> None:
    write_shards(tmp_path / "toy", "fog", "train", 10, size=32, seed=1, progress=False)
    before = _stamps(tmp_path / "toy")
    shards = sorted((tmp_path / "toy").glob("train-*.parquet"))
    assert [shard.name for shard in shards] == [f"train-{i:05d}-of-00004.parquet" for i in range(4)]
    write_shards(tmp_path / "toy", "fog", "train", 10, size=32, seed=1, progress=False)
    assert _stamps(tmp_path / "toy") == before
    write_shards(tmp_path / "toy", "fog", "validation", 4, size=32, seed=2, progress=False)
    with pytest.raises(InputError, match="other settings"):
        write_shards(tmp_path / "toy", "fog", "train", 11, size=32, seed=1, progress=False)


def test_a_killed_writer_leaves_no_half_shard_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "whole", "fog", "train", 8, size=32, progress=False)
    calls, replace_file = [], world.os.replace

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 3:  # the draft manifest and one shard are in place, the second shard is not
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(world.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "cut", "fog", "train", 8, size=32, progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "cut").glob("train-*.parquet"))) == 1
    first = _stamps(tmp_path / "cut")["train-00000-of-00004.parquet"]
    write_shards(tmp_path / "cut", "fog", "train", 8, size=32, progress=False)
    assert _stamps(tmp_path / "cut")["train-00000-of-00004.parquet"] == first
    for shard in (tmp_path / "whole").glob("train-*.parquet"):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes()


def test_a_folder_with_someone_elses_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"theirs")
    with pytest.raises(InputError, match="no toy city"):
        write_shards(tmp_path, "fog", "train", 4, size=32, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "nigth", "count": 1}, "did you mean 'night'"),
        ({"style": "night", "count": 0}, "count is 0, must be at least 1"),
        ({"style": "night", "count": 1, "size": 31}, "size is 31, must be at least 32"),
        ({"style": "night", "count": 1, "start": -1}, "start is -1"),
    ],
)
def test_bad_input(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        render(**arguments)
    if "start" not in arguments:
        with pytest.raises(InputError, match=message):
            toy_city(**arguments)
        with pytest.raises(InputError, match=message):
            write_shards(tmp_path / "none", split="train", **arguments)
        assert not (tmp_path / "none").exists()


def test_the_shipped_teacher_loads_and_is_small() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 4 * 2**20
    teacher, report = Dinov2Model.from_pretrained(TEACHER, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = torch.from_numpy(render("clear_day", 2, size=64)[0]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        tokens = teacher.eval()(images).last_hidden_state
    assert tokens.shape == (2, 65, 192) and tokens.isfinite().all()
