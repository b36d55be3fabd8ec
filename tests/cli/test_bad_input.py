"""Whatever a user gets wrong is one clear line and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gkd_hf.data.row_decoder import RowDecoder
from gkd_hf.training.recipe_data import RecipeData
from gkd_hf.training.recipe_file import load_recipe
from tests.cli.conftest import SIZE, good_rows, png, write_shard
from tests.tiny import ENCODERS

Refused = Callable[..., str]


def test_good_recipe_runs(run_gkd: ModuleType, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gkd.main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "custom (source)" in out
    folder = recipe.parent / "out"
    report = json.loads((folder / "report.json").read_text())
    assert report["source"] == "custom"
    assert report["source_result"]["images"] == 4
    for name in ("encoder/model.safetensors", "segmenter/model.safetensors", "report.md", "report.png", "recipe.yaml"):
        assert (folder / name).is_file()


def test_settings_that_changed_since(run_gkd: ModuleType, recipe: Path, refused: Refused) -> None:
    assert run_gkd.main([str(recipe), "stages.task=null"]) == 0
    message = refused("stages.task=null", "stages.domain_agnostic.max_steps=3")
    assert "stages.domain_agnostic.max_steps = 2, the recipe now says 3" in message
    assert "choose another output_dir" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.task.imagesize=64", "unknown key 'stages.task.imagesize', did you mean 'image_size'?"),
        (
            "stages.task.views=4",
            "unknown key 'stages.task.views': it is a key of stages.task_agnostic, stages.domain_agnostic",
        ),
        ("teacher_cache=kept", "'teacher_cache': it is a key of stages.task_agnostic, stages.domain_agnostic"),
        ("stages.seed=1", "unknown key 'stages.seed': it is a key of the recipe itself"),
        ("methode=gkd", "unknown key 'methode', did you mean 'method'?"),
        ("method=gkt", "method is 'gkt', did you mean 'gkd'? (available: gkd, mse, proteus, kd, cwd, af_dcd, vitkd,"),
        ("teacher.geometry=natve", "did you mean 'native'?"),
        ("evaluate=[cityscape]", "unknown domain 'cityscape', did you mean 'cityscapes'?"),
        ("evaluate=[toy_city:nigt]", "'toy_city:nigt'"),
        ("baselines=[gkd]", "baselines is 'gkd', did you mean 'kd'? (available: none, kd, cwd, af_dcd, vitkd)"),
        ("stages.task.decode_head=upnet", "did you mean 'upernet'? (available: linear, mask2former, upernet, dpt)"),
        ("stages.task.batch_size=many", "key stages.task.batch_size: Value 'many'"),
        ("stages.task.batch_size=0", "stages.task.batch_size is 0: it must be more than 0"),
        ("stages.task.epochs=3", "both are given"),
        ("data.label_maps.custom=gtaw", "unknown label map 'gtaw', did you mean 'gtav'?"),
        ("data.classes=[]", "data.classes"),
        ("evaluate=[gtav]", "has the classes of cityscapes"),
        ("teacher=null", "need a teacher"),
        ("seed", "not of the form key.sub=value"),
        ("seed=4294967296", "seed is 4294967296: it must be between 0 and 4294967295"),
        ("data.label_maps.custom=5", "data.label_maps.custom: a label map is a name"),
        ("data.label_maps.custom=null", "such as {7: 0, 8: 1}, not null"),
        ("data.classes=[a, b, a]", "data.classes names the same entry twice: a, b, a"),
        ("stages.task.short_sides=[32, 0]", "stages.task.short_sides is [32, 0]: give lengths of 1 pixel or more"),
        ("stages.task.short_sides=[]", "give lengths of 1 pixel or more, or null"),
        ("evaluate=[toy_city, 'toy_city:clear_day']", "evaluate names the same entry twice: toy_city, toy_city"),
        ("stages.domain_agnostic.gradient_accumulation_steps=3", "choose a multiple of 3"),
        ("stages.task.decode_head={type: linear, chanels: 3}", "chanels"),
        ("student.encoder={model_type: resnet, depth: [1]}", "resnet has no configuration field 'depth'"),
    ],
)
def test_unknown_keys_and_values(refused: Refused, override: str, expected: str) -> None:
    assert expected in refused(override)


def test_missing_recipe_names_the_nearest(refused: Refused, recipe: Path) -> None:
    message = refused(path=recipe.with_name("recipee.yaml"))
    assert "recipee.yaml' does not exist, did you mean 'recipe.yaml'?" in message


def test_broken_yaml_says_where(refused: Refused, recipe: Path) -> None:
    recipe.write_text("student: {encoder: [\n")
    message = refused()
    assert "not readable YAML" in message
    assert "line" in message


def test_missing_required_keys(refused: Refused, recipe: Path) -> None:
    recipe.write_text("student: {encoder: x/y}\nstages: {task: {data: gtav, max_steps: 1}}\n")
    message = refused()
    assert "nothing is given for output_dir, stages.task.batch_size, stages.task.image_size" in message


def test_missing_data_folder(refused: Refused) -> None:
    assert "/no/such/folder" in refused("data.roots.custom=/no/such/folder")


def test_domain_without_a_place(refused: Refused) -> None:
    assert "add data.roots.custom:mine=FOLDER_OR_HUB_ID" in refused("evaluate=[custom:mine]")


def test_missing_encoder_folder(refused: Refused) -> None:
    assert "no encoder at '/no/such/encoder'" in refused("student.encoder=/no/such/encoder")
    assert "no encoder at '/no/such/teacher'" in refused("teacher.name=/no/such/teacher")


def test_unknown_architecture(refused: Refused, teacher: Path) -> None:
    assert "'resnett'" in refused("student.encoder={model_type: resnett}")
    message = refused("student.encoder={model_type: bert}")
    assert "'bert' are not supported" in message
    assert "resnet" in message
    config = teacher / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "bert"}))
    assert "'bert' are not supported" in refused()


def test_teacher_with_half_of_its_weights(refused: Refused, teacher: Path) -> None:
    weights = load_file(teacher / "model.safetensors")
    kept = dict(sorted(weights.items())[: len(weights) // 2])
    save_file(kept, teacher / "model.safetensors", metadata={"format": "pt"})
    message = refused()
    assert str(teacher) in message
    assert "%" in message
    assert "tensors" in message


def test_image_size_that_is_no_multiple_of_the_patch(refused: Refused) -> None:
    fields = json.dumps(ENCODERS["vit"])
    message = refused(f"student.encoder={fields}", "stages.domain_agnostic.image_size=36")
    assert "stages.domain_agnostic" in message
    assert "36 is not a multiple of the patch size 8" in message
    assert "nearest" in message
    assert "nearest that is: 42" in refused(
        "stages.domain_agnostic.image_size=40", "stages.domain_agnostic.patch_size=14"
    )


def test_grid_that_no_patch_size_gives(refused: Refused) -> None:
    message = refused("teacher.geometry=resample_patch_embed", "stages.domain_agnostic.image_size=44")
    assert "6×6 grid" in message
    assert "44" in message
    assert "geometry native" in message


def test_label_outside_the_map(refused: Refused, recipe: Path) -> None:
    rows = good_rows(8)
    for index in (2, 5):
        rows[index]["label"] = png(np.full((SIZE, SIZE), 75 + index, dtype=np.uint8))
    write_shard(recipe.parent / "data", "test", rows)
    message = refused()
    assert "domain 'custom': 2 bad rows among 8" in message
    assert "row2 in test-00000-of-00001.parquet row 2" in message
    assert "77" in message
    assert "correct the label map" in message
    assert not (recipe.parent / "out" / "stages").exists()


def test_label_of_another_size(refused: Refused, recipe: Path) -> None:
    rows = good_rows(8)
    rows[1]["label"] = rows[6]["label"] = png(np.zeros((SIZE, SIZE // 2), dtype=np.uint8))
    write_shard(recipe.parent / "data", "train", rows)
    message = refused()
    assert "2 × label: of another size than its image" in message
    assert "row1" in message
    assert "(16×32, the image 32×32)" in message
    assert not (recipe.parent / "out" / "stages").exists()


def test_wrong_labels_are_found_in_every_row_before_any_training(refused: Refused, recipe: Path) -> None:
    rows = good_rows(40)
    rows[37]["label"] = png(np.full((SIZE, SIZE), 78, dtype=np.uint8))
    rows[39]["label"] = png(np.zeros((SIZE, SIZE // 2), dtype=np.uint8))
    write_shard(recipe.parent / "data", "test", rows)
    message = refused()
    for part in ("2 bad rows among 40", "row37", "78", "row39", "16×32"):
        assert part in message
    assert not (recipe.parent / "out" / "stages").exists()


def test_labels_are_checked_once(
    run_gkd: ModuleType, refused: Refused, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check_row = RowDecoder.check

    def noting(decoder: RowDecoder, row: dict) -> str | None:
        checked.append(row["id"])
        return check_row(decoder, row)

    monkeypatch.setattr(RowDecoder, "check", noting)
    rows = good_rows(4)
    rows[3]["image"] = b"not an image"  # one may be skipped
    write_shard(recipe.parent / "data", "test", rows)

    def check(*overrides: str) -> int:
        checked.clear()
        RecipeData(load_recipe(recipe, overrides)).check_rows()
        return len(checked)

    assert check() == 24 + 4
    assert check() == 0
    assert check("data.label_maps.custom={0: 0, 1: 1, 2: 2}") == 0  # says the same
    assert check("data.label_maps.custom={0: 2, 1: 1, 2: 0}") == 24 + 4
    assert check("data.label_maps.custom={0: 2, 1: 1, 2: 0}", "stages.task.evaluation_images=3") == 3
    rows[2]["label"] = png(np.full((SIZE, SIZE), 77, dtype=np.uint8))
    write_shard(recipe.parent / "data", "test", rows)
    message = refused("data.label_maps.custom={0: 2, 1: 1, 2: 0}")
    assert "2 bad rows among 4" in message
    assert "row2" in message
    (recipe.parent / "out" / "checked_labels.json").write_text("{")
    write_shard(recipe.parent / "data", "test", good_rows(4))
    assert check() == 24 + 4


def test_no_rows(refused: Refused, recipe: Path) -> None:
    write_shard(recipe.parent / "data", "train", [])
    message = refused()
    assert "no rows" in message
    assert "'train'" in message


def test_missing_column(refused: Refused, recipe: Path) -> None:
    write_shard(recipe.parent / "data", "train", good_rows(4), columns=("image", "id"))
    message = refused()
    assert "column 'label' is missing" in message
    assert "columns present: image, id" in message


def test_one_corrupt_row_is_listed_and_many_stop_the_run(run_gkd: ModuleType, refused: Refused, recipe: Path) -> None:
    rows = good_rows(24)
    rows[5]["image"] = b"not an image"
    write_shard(recipe.parent / "data", "train", rows)
    assert run_gkd.main([str(recipe), "stages.domain_agnostic.max_steps=12", "stages.task.max_steps=12"]) == 0
    report = json.loads((recipe.parent / "out" / "report.json").read_text())
    shard = "train-00000-of-00001.parquet"
    assert [(row["id"], row["shard"], row["row"]) for row in report["skipped_rows"]] == [("row5", shard, 5)]
    assert list(report["skipped_by_reason"].values()) == [1]
    assert f"| custom | row5 | {shard} | 5 |" in (recipe.parent / "out" / "report.md").read_text()
    for index in (7, 9, 11):
        rows[index]["image"] = b"not an image"
    write_shard(recipe.parent / "data", "train", rows)
    message = refused(f"output_dir={recipe.parent / 'again'}", "stages.domain_agnostic.max_steps=12")
    assert "bad rows among 24" in message
    assert "domain 'custom'" in message


def test_loss_that_is_not_finite(refused: Refused, recipe: Path) -> None:
    message = refused(
        "stages.domain_agnostic.learning_rate=1e30",
        "stages.domain_agnostic.max_steps=8",
        "stages.domain_agnostic.save_steps=1",
        expected=3,
    )
    assert "not finite" in message
    assert "step" in message
    assert "checkpoint" in message


def test_output_that_cannot_be_written(refused: Refused, recipe: Path) -> None:
    assert "output_dir" in refused(f"output_dir={recipe}/out")
