"""Recipes: what is read from YAML and overrides, what the shipped ones say, what --plan tells of them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gkd_hf.data.domains import CITYSCAPES_CLASSES, own_label_space
from gkd_hf.data.manifest import Manifest
from gkd_hf.errors import InputError
from gkd_hf.training import recipe_data
from gkd_hf.training.checks import train_steps
from gkd_hf.training.plan import KNOWN_ENCODERS, count, plan, planned_encoder
from gkd_hf.training.recipe import recipe_domain
from gkd_hf.training.recipe_data import RecipeData, is_rendered
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.stage_arguments import stage_arguments
from gkd_hf.training.stage_folder import StageFolder, replace_folder

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "scripts/recipes/quickstart.yaml"
RECIPES = [path for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml")) if "_compare" not in path.stem]
PAPER = [path for path in RECIPES if "dinov2" in path.name]
TEACHER = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def overrides_of(path: Path) -> list[str]:
    return ["teacher.name=org/teacher"] if "camvid" in path.name else []


def test_six_recipes_ship() -> None:
    assert len(RECIPES) == 6
    assert len(PAPER) == 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_parses_and_plans_without_network(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("--plan opened a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("run_gkd", ROOT / "scripts" / "run_gkd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([str(path), "--plan", *overrides_of(path)]) == 0
    text = capsys.readouterr().out
    recipe = load_recipe(path, overrides_of(path))
    for name, _ in recipe.stages:
        assert f"stage {name}:" in text
    for wanted in ("effective batch", "learning rate", "trainable", "frozen", recipe.output_dir, "downloads"):
        assert wanted in text
    assert Path(recipe.output_dir).name == path.stem


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_recipes_follow_the_paper(path: Path) -> None:
    recipe = load_recipe(path)
    first, second, task = (stage for _, stage in recipe.stages)
    assert (first.data, first.image_size, first.epochs, first.batch_size) == ("imagenet", 224, 100, 512)
    assert (second.data, second.image_size, second.epochs, second.batch_size) == (task.data, 512, 300, 128)
    assert (task.max_steps, task.batch_size, task.learning_rate, task.decode_head) == (40000, 4, 1e-4, "mask2former")
    assert (task.window, task.stride, task.max_class_fraction) == (512, 341, 0.75)
    for stage in (first, second):
        assert stage.learning_rate is None  # 5e-4 · batch / 512
        assert (stage.min_learning_rate, stage.weight_decay) == (1e-5, 0.05)
        assert (stage.crop_scale, stage.rand_augment, stage.erase_probability) == ([0.08, 1.0], True, 0.25)
        assert (stage.mask_probability, stage.mask_ratio) == (0.5, 0.5)
        assert (stage.query_warmup_steps, stage.attention_scale, stage.carry_heads) == (0, 1.0, True)
    if "deit" in path.name:
        assert (first.patch_size, second.patch_size, task.patch_size) == (14, 16, 16)
    assert recipe.method == "gkd"


def test_plan_of_the_main_setting() -> None:
    text = plan(load_recipe(ROOT / "scripts" / "recipes" / "gtav_dinov2b_deits.yaml"))
    assert "steps: 250,229 (100 epochs)" in text or "steps: 250,228 (100 epochs)" in text
    assert "steps: 29,070 (300 epochs)" in text
    assert "learning rate: 0.000125, cosine to 1e-05" in text
    assert "facebook/dinov2-base: about 347 MB" in text
    assert "data.roots.gtav=FOLDER_OR_HUB_ID" in text


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("facebook/dinov2-small", 22.06),
        ("facebook/dinov2-base", 86.58),
        ("facebook/dinov2-large", 304.37),
        ("facebook/dinov2-giant", 1136.48),
        ("facebook/dinov2-with-registers-base", 86.58),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", 21.6),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", 303.13),
        ("facebook/deit-tiny-patch16-224", 5.53),
        ("facebook/deit-base-patch16-224", 85.80),
        ("microsoft/resnet-18", 11.18),
        ("microsoft/resnet-50", 23.51),
        ("microsoft/resnet-101", 42.50),
    ],
)
def test_known_architectures_have_their_published_size(name: str, millions: float) -> None:
    assert planned_encoder(name, True).parameters == pytest.approx(millions * 1e6, rel=2e-3)
    assert name in KNOWN_ENCODERS


def test_plan_does_not_need_to_know_an_encoder() -> None:
    recipe = load_recipe(ROOT / "scripts/recipes/gtav_dinov2b_deits.yaml", ["student.encoder=org/other"])
    text = plan(recipe)
    assert "org/other, unknown without the Hub parameters" in text
    assert "org/other: size unknown" in text


def test_plan_counts_what_is_trained(tmp_path: Path) -> None:
    from gkd_hf.models.loading import load_encoder

    encoder = load_encoder(TEACHER | {"image_size": 32, "patch_size": 8, "intermediate_size": 48})[0]
    encoder.save_pretrained(tmp_path)
    planned = planned_encoder(str(tmp_path), True)
    assert planned.parameters == count(encoder)
    assert not planned.downloaded


def test_overrides_replace_values_and_leave_stages_out() -> None:
    path = ROOT / "scripts/recipes/quickstart.yaml"
    recipe = load_recipe(path, ["stages.task_agnostic=null", "seed=7", "data.roots.custom:berlin=/a/b.c"])
    assert [name for name, _ in recipe.stages] == ["domain_agnostic", "task"]
    assert recipe.seed == 7
    assert recipe.data.roots == {"custom:berlin": "/a/b.c"}
    changed = load_recipe(path, ["student.encoder.depths=[1, 1]"]).student.encoder
    assert changed == recipe.student.encoder | {"depths": [1, 1]}
    # A whole encoder replaces the recipe's: the fields of a ResNet mean nothing to a ViT.
    assert load_recipe(path, ["student.encoder={model_type: vit}"]).student.encoder == {"model_type": "vit"}


def test_revisions_and_hub_are_read_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_data, "find_manifest", lambda location, revision: None)  # without the Hub
    changes = ["student.encoder=org/student", "student.revision=v1", "teacher.name=org/teacher", "teacher.revision=v2"]
    changes += ["data.roots.cityscapes=org/city", "data.revisions.cityscapes=v3", "data.revisions.toy_city:night=v4"]
    changes += ["data.roots.toy_city:night=org/night", "hub.repo_id=org/gkd-x", "hub.license=cc-by-nc-4.0"]
    recipe = load_recipe(QUICKSTART, changes)
    assert (recipe.student.revision, recipe.teacher.revision) == ("v1", "v2")
    assert recipe.data.revisions == {"cityscapes": "v3", "toy_city:night": "v4"}
    assert RecipeData(recipe).revision("cityscapes") == "v3"
    assert RecipeData(recipe).revision("gtav") is None
    assert (recipe.hub.repo_id, recipe.hub.private, recipe.hub.license) == ("org/gkd-x", True, "cc-by-nc-4.0")
    recipe.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["hub.repo_id=name"], "hub.repo_id is 'name': give org/name"),
        (["hub.repo_id=org/a/b"], "hub.repo_id is 'org/a/b': give org/name"),
        (["hub.repo_id=org/-x"], "hub.repo_id is 'org/-x': give org/name"),
        (["hub.token=hf_x"], "unknown key 'hub.token'; known there: repo_id, private, license"),
        (["hub.license=My Own"], "hub.license is 'My Own': give the Hub's id of a licence"),
        (["hub.private=maybe"], "hub.private"),
        (["student.revision=v1"], "student.revision is 'v1', but the encoder is given by its fields"),
        (["teacher.name=toy", "teacher.revision=v1"], "teacher.revision is 'v1', but 'toy' ships with the package"),
        (["teacher.name=.", "teacher.revision=v1"], "teacher.revision is 'v1', but '.' is a folder here"),
        (["teacher.name=org/t", "teacher.revision=''"], "teacher.revision is empty"),
        (["data.revisions.gtav=v1"], "data.revisions.gtav is given, but data.roots.gtav is not"),
        (["data.revisions.gtav5=v1"], "data.revisions: "),
    ],
)
def test_wrong_revisions_and_hub_are_told(changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(QUICKSTART, changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("timeout_minutes=1e13", "timeout_minutes is 10000000000000.0: it must be between 0.1"),
        ("timeout_minutes=.nan", "timeout_minutes is nan"),
        ("stages.task.ema_decay=1", "stages.task.ema_decay is 1.0: it must be between 0 and 1"),
        ("teacher.sharding=alwys", "teacher.sharding is 'alwys', did you mean 'always'?"),
    ],
)
def test_wrong_settings_of_large_runs_are_told(change: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(QUICKSTART, [change])


@pytest.mark.parametrize("stage", ["task_agnostic", "task"])
def test_the_plan_refuses_to_compute_again_what_cannot_be(stage: str) -> None:
    recipe = load_recipe(QUICKSTART, [f"stages.{stage}.activation_checkpointing=true"])
    with pytest.raises(InputError, match=f"^stages.{stage}: .*activation"):
        plan(recipe)


def test_settings_of_large_runs_reach_the_trainers(tmp_path: Path) -> None:
    large = ("ema_decay=0.9", "activation_checkpointing=true", "compile=true")
    changes = [f"stages.{stage}.{change}" for stage in ("task_agnostic", "task") for change in large]
    recipe = load_recipe(QUICKSTART, [*changes, "teacher.sharding=never", "timeout_minutes=2", "baselines=[]"])
    for name, stage in recipe.stages:
        if name == "domain_agnostic":
            continue
        arguments = stage_arguments(recipe, name, stage, tmp_path, 4, 1)
        assert (arguments.ema_decay, arguments.torch_compile, arguments.ddp_timeout) == (0.9, True, 120)
        assert arguments.activation_checkpointing
        assert getattr(arguments, "teacher_sharding", "never") == "never"


def test_a_stage_begun_before_a_key_was_known_goes_on(tmp_path: Path) -> None:
    StageFolder(tmp_path, {"stages": {"task": {"batch_size": 4}}}).begin()
    now = StageFolder(tmp_path, {"stages": {"task": {"batch_size": 4, "ema_decay": None}}})
    assert now.digest == StageFolder(tmp_path / "other", {"stages": {"task": {"batch_size": 4}}}).digest
    with pytest.raises(InputError, match="ema_decay"):
        StageFolder(tmp_path, {"stages": {"task": {"batch_size": 4, "ema_decay": 0.9}}})


def test_recipe_survives_being_saved(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART, ["data.label_maps.custom={0: 1, 7: 255}"])
    recipe.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["label_maps"]["custom"] == {0: 1, 7: 255}


def test_quickstart_has_four_unseen_styles_and_a_baseline() -> None:
    recipe = load_recipe(QUICKSTART)
    assert len(recipe.evaluate) >= 4
    assert recipe.baselines == ["none"]
    data = RecipeData(recipe)
    assert data.evaluated()[0] == "toy_city"
    places = {data.location(use.domain) for use in data.uses()}
    assert len(places) == 2 + len(recipe.evaluate)


def test_training_and_test_scenes_differ() -> None:
    uses = RecipeData(load_recipe(QUICKSTART)).uses()
    assert {use.split for use in uses if use.domain == "toy_city"} == {"train", "test"}
    assert [use.labelled for use in uses if use.domain == "toy_city:pool"] == [False]


def test_the_source_style_is_the_source() -> None:
    names = ["evaluate=['toy_city:clear_day', 'toy_city:night']", "stages.domain_agnostic.data=toy_city:clear_day"]
    recipe = load_recipe(QUICKSTART, names)
    assert recipe.evaluate == ["toy_city", "toy_city:night"]
    assert recipe.stages.domain_agnostic.data == "toy_city"
    assert recipe_domain("toy_city:clear_day").name == "toy_city"
    data = RecipeData(recipe)
    assert data.evaluated() == recipe.evaluate
    assert [use.role for use in data.uses() if use.domain == "toy_city"] == ["train", "test"]


def test_epochs_of_a_toy_city_are_known_before_it_is_rendered(tmp_path: Path) -> None:
    changes = [f"output_dir={tmp_path}", "stages.task.max_steps=null", "stages.task.epochs=2"]
    changes += ["stages.task_agnostic.max_steps=null", "stages.task_agnostic.epochs=3"]
    recipe = load_recipe(QUICKSTART, changes)
    data = RecipeData(recipe)
    assert train_steps(data, "task_agnostic", recipe.stages.task_agnostic) == 3 * 8000 // 16
    assert train_steps(data, "task", recipe.stages.task) == math.ceil(2 * 1500 / 32)
    text = plan(recipe)
    assert "steps: 1,500 (3 epochs)" in text
    assert "steps: 94 (2 epochs)" in text


def test_colours_of_own_classes_differ() -> None:
    assert len(set(own_label_space([str(number) for number in range(40)]).palette)) == 40


def test_stage_folder_names_the_setting_that_changed(tmp_path: Path) -> None:
    StageFolder(tmp_path, {"stages": {"task": {"batch_size": 4, "workers": 2}}}).begin()
    StageFolder(tmp_path, {"stages": {"task": {"batch_size": 4, "workers": 8}}})
    with pytest.raises(InputError, match=re.escape("stages.task.batch_size = 4, the recipe now says 8")):
        StageFolder(tmp_path, {"stages": {"task": {"batch_size": 8, "workers": 2}}})


def test_stage_is_finished_only_once_its_model_is_whole(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path, {})
    assert folder.standing() == ""
    folder.begin()
    assert "before its first checkpoint" in folder.standing()

    def fails(place: Path) -> None:
        (place / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.finish(fails, {"steps": 1})
    assert not folder.finished
    assert not folder.model.exists()
    folder.finish(lambda place: (place / "whole").write_text("x"), {"steps": 1})
    assert folder.finished
    assert [path.name for path in folder.model.iterdir()] == ["whole"]
    assert folder.summary() == {"steps": 1}
    replace_folder(folder.model, lambda place: (place / "newer").write_text("x"))
    assert [path.name for path in folder.model.iterdir()] == ["newer"]


def test_a_folder_is_replaced_by_a_whole_one_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"

    def save(name: str) -> Callable[[Path], None]:
        return lambda place: (place / name).write_text("x")

    def names() -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]

    replace_folder(folder, save("first"))
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if target == folder and len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("gkd_hf.training.stage_folder.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(folder, save("second"))
    assert any(name.endswith("/first") for name in names())

    def fails(place: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, fails)
    assert names() == ["model/first"]

    def refused(source: Path, target: Path) -> None:
        if source.name.endswith(".new"):
            raise OSError("busy")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("gkd_hf.training.stage_folder.os.replace", refused)
        with pytest.raises(OSError, match="busy"):
            replace_folder(folder, save("second"))
    assert (folder / "first").is_file()
    replace_folder(folder, save("third"))
    assert names() == ["model/third"]


@pytest.mark.parametrize("data", ["toy_city", "custom:a b/ü"])
def test_the_segmenters_repo_needs_a_name_too(data: str) -> None:
    path = ROOT / "scripts/recipes/quickstart.yaml"
    name = "org/" + ("x" * 90 if data == "toy_city" else "x")
    with pytest.raises(InputError, match="so the segmenter would be"):
        load_recipe(path, [f"hub.repo_id={name}", f"stages.task.data={data}"])
    load_recipe(path, [f"hub.repo_id={name}", "stages.task=null", "evaluate=[]", "baselines=[]"])


def test_a_toy_city_with_a_place_of_its_own_is_read_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_data, "find_manifest", lambda location, revision: None)  # without the Hub
    places = ["data.roots.toy_city=org/toy-city", "data.roots.toy_city:night=/data/night"]
    recipe = load_recipe(QUICKSTART, [*places, f"output_dir={tmp_path}"])
    data = RecipeData(recipe)
    assert (data.location("toy_city"), data.location("toy_city:night")) == ("org/toy-city", "/data/night")
    assert data.location("toy_city:fog") == str(tmp_path / "data" / "toy_city_fog")
    assert [is_rendered(recipe, name) for name in ("toy_city", "toy_city:night", "toy_city:fog")] == [
        False,
        False,
        True,
    ]


def test_labels_of_a_prepared_folder_are_train_ids_already(tmp_path: Path) -> None:
    folder = tmp_path / "cityscapes"
    folder.mkdir()
    changes = [f"data.roots.{name}={folder}" for name in ("imagenet", "cityscapes")]
    changes += [f"data.roots.acdc_{name}={folder}" for name in ("night", "snow", "fog", "rain")]
    recipe = load_recipe(ROOT / "scripts/recipes/cityscapes_dinov2b_deits.yaml", changes)
    assert RecipeData(recipe).label_map("cityscapes").name == "cityscapes"
    manifest = Manifest("cityscapes", "train_ids", CITYSCAPES_CLASSES, {}, {})
    (folder / "manifest.json").write_text(manifest.to_json())
    assert RecipeData(recipe).label_map("cityscapes").name == "identity"
    (folder / "manifest.json").write_text(replace(manifest, classes=("sky", "road")).to_json())
    with pytest.raises(InputError, match="prepared for the classes sky, road, but those of this run are road, side"):
        RecipeData(recipe)
    (folder / "manifest.json").write_text(manifest.to_json())
    recipe.data.label_maps["cityscapes"] = "gtav"
    with pytest.raises(InputError, match="holds train ids .* a second time: leave data.label_maps.cityscapes out"):
        RecipeData(recipe)
    for same in ("identity", {number: number for number in range(19)}):
        recipe.data.label_maps["cityscapes"] = same
        assert RecipeData(recipe).label_map("cityscapes").table[18] == 18
    (folder / "manifest.json").write_text(replace(manifest, classes=("sky", "road")).to_json())
    recipe.data.label_maps = {name: {0: 10, 1: 0} for name in ("cityscapes", *recipe.evaluate)}
    assert RecipeData(recipe).label_map("cityscapes").table[0] == 10
