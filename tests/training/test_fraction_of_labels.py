"""`stages.task.label_fraction`: how it is written, what it counts, and that it must leave every class some pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers.trainer import TRAINER_STATE_NAME

from gkd_hf.data.label_fraction import kept_rows
from gkd_hf.data.row_decoder import RowDecoder
from gkd_hf.data.shards import open_rows
from gkd_hf.data.toy_city import CLASSES, render
from gkd_hf.data.transforms import DistillationTransform, SegmentationTransform
from gkd_hf.errors import InputError
from gkd_hf.training import recipe_data
from gkd_hf.training.plan import plan
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.stage_folder import StageFolder, flatten
from gkd_hf.training.stream_position import StreamPosition
from tests.data.samples import encode, make_rows, write_shard

QUICKSTART = Path(__file__).parents[2] / "scripts/recipes/quickstart.yaml"
TASK_ALONE = ["stages.task_agnostic=null", "stages.domain_agnostic=null", "baselines=[]", "source_test=false"]
STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
IMAGES = 32
Written = Callable[[dict[int, int]], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a folder of 32 training images, all road but those whose class is given."""

    def write(others: dict[int, int]) -> Path:
        labels = {number: encode(np.full((8, 8), others.get(number, 0), dtype=np.uint8)) for number in range(IMAGES)}
        rows = make_rows(IMAGES, labels=labels)
        for number in range(2):
            write_shard(tmp_path / "city" / f"train-{number}.parquet", rows[16 * number :][:16], group=4)
        return tmp_path / "city"

    return write


def city(folder: Path, *overrides: str) -> RecipeData:
    """A recipe of one task stage on a folder whose classes are road, car, bus and sky."""
    settings = ["stages.task.data=custom", f"data.roots.custom={folder}", "data.classes=[road,car,bus,sky]"]
    settings += [*TASK_ALONE, "evaluate=[]", f"output_dir={folder.parent / 'out'}", "stages.task.label_fraction=1/4"]
    return RecipeData(load_recipe(QUICKSTART, [*settings, *overrides]))


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def ids(data: RecipeData) -> list[str]:
    """The ids of the rows that the task stage is trained on."""
    transform = SegmentationTransform(8, *STATISTICS, short_sides=(8,))
    (source,) = data.stream(data.recipe.stages.task, transform, 1).sources
    return [row["id"] for row in source.rows]


@pytest.mark.parametrize(
    ("given", "fraction"), [("1/16", 0.0625), ("0.25", 0.25), ("' 1 / 2'", 0.5), ("1", 1.0), ("3/3", 1.0)]
)
def test_a_fraction_is_a_number_or_a_ratio(given: str, fraction: float, tmp_path: Path) -> None:
    recipe = quickstart(f"stages.task.label_fraction={given}")
    assert recipe.stages.task.label_fraction == fraction
    recipe.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    path = tmp_path / "short.yaml"
    path.write_text(QUICKSTART.read_text().replace("  task:\n", f"  task:\n    label_fraction: {given}\n"))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("label_fraction=0", "stages.task.label_fraction is 0.0: it must be more than 0 and at most 1"),
        ("label_fraction=17/16", "stages.task.label_fraction is 1.0625: it must be more than 0 and at most 1"),
        ("label_fraction=.nan", "stages.task.label_fraction is nan: it must be more than 0"),
        ("label_fraction=1/0", "key stages.task.label_fraction: Value '1/0'"),
        ("label_fraction=half", "key stages.task.label_fraction: Value 'half'"),
        ("label_seed=-1", "stages.task.label_seed is -1: it must be 0 or more"),
    ],
)
def test_a_wrong_fraction_is_told(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        quickstart(f"stages.task.{override}")


def test_plan_and_epochs_count_the_images_of_the_fraction() -> None:
    recipe = quickstart(
        "stages.task.label_fraction=1/16",
        "stages.task.data=toy_city+toy_city:pool",
        "stages.task.max_steps=null",
        "stages.task.epochs=10",
    )
    images = -(-1500 // 16) + 8000 // 16
    assert RecipeData(recipe).train_images(recipe.stages.task) == images
    assert RecipeData(recipe).train_images(recipe.stages.domain_agnostic) == 1500
    text = plan(recipe)
    assert f"stage task: toy_city+toy_city:pool, {images} images" in text
    assert f"steps: {-(-10 * images // 32)} (10 epochs)" in text
    assert "stage domain_agnostic: toy_city, 1,500 images" in text


def test_stages_begun_with_all_labels_go_on_and_no_others(tmp_path: Path) -> None:
    before = {"stages": {"task": {"batch_size": 4}}}
    StageFolder(tmp_path, before).begin()
    whole = {"stages": {"task": {"batch_size": 4, "label_fraction": 1.0, "label_seed": 0}}}
    assert StageFolder(tmp_path, whole).digest == StageFolder(tmp_path / "other", before).digest
    part = {"stages": {"task": {"batch_size": 4, "label_fraction": 0.5, "label_seed": 0}}}
    assert flatten(part)["stages.task.label_fraction"] == 0.5
    with pytest.raises(InputError, match="was begun with stages.task.label_fraction = 1.0, the recipe now says 0.5"):
        StageFolder(tmp_path, part)


def test_the_labelled_images_depend_on_data_fraction_and_label_seed_alone(written: Written) -> None:
    folder = written({})
    wanted = [f"row{number:03d}" for number in kept_rows(IMAGES, 1 / 4, 0)]
    assert ids(city(folder)) == wanted
    assert ids(city(folder, "seed=5", "method=mse", "stages.task.batch_size=2", "stages.task.workers=0")) == wanted
    assert set(ids(city(folder, "stages.task.label_fraction=1/8"))) < set(wanted)
    assert ids(city(folder, "stages.task.label_seed=1")) != wanted
    assert ids(city(folder, "stages.task.label_fraction=1")) == [f"row{number:03d}" for number in range(IMAGES)]


def test_stages_without_labels_read_all_images(written: Written) -> None:
    data = city(written({}))
    stage = quickstart("stages.domain_agnostic.data=custom").stages.domain_agnostic
    data.recipe.stages.domain_agnostic = stage
    assert data.stream(stage, DistillationTransform(8, *STATISTICS), 1).num_rows == IMAGES
    data.check_rows()


def test_a_class_that_loses_all_its_pixels_is_told_before_any_training(written: Written) -> None:
    kept = kept_rows(IMAGES, 1 / 4, 0).tolist()
    lost = [number for number in range(IMAGES) if number not in kept]
    folder = written({kept[-1]: 1, lost[-1]: 1, lost[3]: 2})  # no image has sky
    with pytest.raises(InputError) as caught:
        city(folder).check_rows()
    assert str(caught.value) == (
        "stages.task.label_fraction 0.25 with label_seed 0 keeps 8 of the 32 images of custom, and none of these has "
        "a pixel of: bus; give a larger label_fraction, or another label_seed"
    )
    city(folder, "stages.task.label_fraction=1").check_rows()
    found = next(seed for seed in range(99) if {lost[3], kept[-1]} <= set(kept_rows(IMAGES, 1 / 4, seed).tolist()))
    city(folder, f"stages.task.label_seed={found}").check_rows()


def test_classes_are_looked_for_once_and_no_longer_than_needed(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    classes = RowDecoder.classes
    monkeypatch.setattr(RowDecoder, "classes", lambda self, row: looked.append(row["id"]) or classes(self, row))
    kept = kept_rows(IMAGES, 1 / 4, 0).tolist()

    def check(folder: Path, *overrides: str) -> set[str]:
        looked.clear()
        city(folder, *overrides).check_rows()
        return set(looked)

    folder = written(dict(zip(kept, (0, 1, 2, 3), strict=False)))
    assert check(folder) <= {f"row{number:03d}" for number in kept}
    assert check(folder) == set()  # remembered
    assert check(folder, "stages.task.label_fraction=1/2") and check(folder, "stages.task.label_fraction=1") == set()
    assert len(check(written({kept[0]: 1, kept[1]: 2}))) == IMAGES  # nobody has sky
    assert check(folder) == set()


def test_only_labels_that_are_trained_on_are_checked(written: Written) -> None:
    kept = kept_rows(IMAGES, 1 / 4, 0).tolist()
    lost = [number for number in range(IMAGES) if number not in kept]
    folder = written(dict.fromkeys(lost[:8], 77))  # 77 is no class
    city(folder).check_rows()
    with pytest.raises(InputError, match="2 bad rows among 32"):
        city(folder, "stages.task.label_fraction=1").check_rows()
    with pytest.raises(InputError, match="2 bad rows among 8"):
        city(written(dict.fromkeys(kept[:2], 77))).check_rows()


def test_a_class_that_one_of_several_domains_keeps_is_there(written: Written) -> None:
    kept = kept_rows(IMAGES, 1 / 4, 0).tolist()
    lost = [number for number in range(IMAGES) if number not in kept]
    folder = written({lost[0]: 1})
    other = written({lost[0]: 1}).rename(folder.with_name("other"))
    both = ["stages.task.data=custom:a+custom:b", f"data.roots.custom:a={folder}", f"data.roots.custom:b={other}"]
    written({lost[0]: 1})
    with pytest.raises(InputError, match="keeps 16 of the 64 images of custom:a\\+custom:b, .* pixel of: car;"):
        city(folder, *both).check_rows()
    written({kept[0]: 1})
    city(folder, *both).check_rows()


def test_rendered_scenes_are_looked_at(tmp_path: Path) -> None:
    sizes = ["data.toy_city.size=32", "data.toy_city.train_images=16", "stages.task.label_fraction=1/16"]
    recipe = quickstart(*TASK_ALONE, "evaluate=[]", *sizes, f"output_dir={tmp_path}")
    data = RecipeData(recipe)
    data.render_toy_city(progress=False)
    _, labels = render("clear_day", 16, size=32, seed=0)
    poorest = min(range(16), key=lambda number: len(np.unique(labels[number])))
    lost = [name for number, name in enumerate(CLASSES) if number in labels and number not in labels[poorest]]
    recipe.stages.task.label_seed = next(seed for seed in range(999) if kept_rows(16, 1 / 16, seed) == [poorest])
    message = f"keeps 1 of the 16 images of toy_city, and none of these has a pixel of: {', '.join(lost)}; give"
    with pytest.raises(InputError, match=message):
        data.check_rows()
    recipe.stages.task.label_fraction = 15 / 16
    data.check_rows()


def test_hub_data_is_read_where_it_can_be_picked(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_rows(IMAGES, 1 / 4, 0).tolist()
    folder = written({number: 1 for number in range(IMAGES) if number not in kept})  # not looked at: it is far away
    monkeypatch.setattr(recipe_data, "find_manifest", lambda location, revision: None)  # without the Hub
    monkeypatch.setattr(recipe_data, "open_rows", lambda *args, **kwargs: open_rows(folder, "train"))
    data = city(folder, "data.roots.custom=org/city")
    data.check_rows()
    monkeypatch.setattr(recipe_data, "count_rows", lambda *args, **kwargs: IMAGES)
    assert ids(data) == [f"row{number:03d}" for number in kept]
    cells = datasets.Dataset.from_list([dict(row) for row in open_rows(folder, "train")]).to_iterable_dataset()
    monkeypatch.setattr(recipe_data, "open_rows", lambda *args, **kwargs: cells)
    with pytest.raises(InputError, match="label_fraction is 0.25, but the rows of 'custom' .org/city. can neither be"):
        data.check_rows()


def test_a_checkpoint_of_another_subset_is_refused(written: Written, tmp_path: Path) -> None:
    folder = written({})
    transform = SegmentationTransform(8, *STATISTICS, short_sides=(8,))

    def position(*overrides: str) -> StreamPosition:
        data = city(folder, *overrides)
        return StreamPosition(data.stream(data.recipe.stages.task, transform, 1), 4)

    begun = position()
    begun.on_step_end()
    (tmp_path / TRAINER_STATE_NAME).write_text(json.dumps({"stateful_callbacks": {"StreamPosition": begun.state()}}))
    again = position()
    again.begin(tmp_path)
    assert again.start == 4
    for other in ("stages.task.label_fraction=1/2", "stages.task.label_seed=1", "stages.task.label_fraction=1"):
        with pytest.raises(InputError, match="domains was .* and is .* now, so the samples would come in another"):
            position(other).begin(tmp_path)
