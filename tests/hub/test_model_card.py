"""The cards: numbers to the digit, metadata the Hub accepts, the right lines to load with, nothing private."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image

from gkd_hf.evaluation.report_text import percent, signed
from gkd_hf.hub.licences import Terms, derived_licence, weight_terms
from gkd_hf.hub.model_card import ARXIV, TEMPLATE, GKDModelCard
from gkd_hf.hub.onnx import onnx_usage
from gkd_hf.hub.push import write_cards
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.hub.run_facts import RunFacts, StageRecorder, command_line
from gkd_hf.hub.short_paths import shortened
from gkd_hf.training.recipe_file import load_recipe
from tests.hub.runs import ROOT, finished_run, invented_image, report_of
from tests.hub.server import LoopbackHub
from tests.tiny import MASK2FORMER

RECIPES = [path for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml")) if "_compare" not in path.stem]
HUB_KEYS = {
    "base_model", "base_model_relation", "datasets", "library_name", "license", "license_link", "license_name",
    "metrics", "model-index", "pipeline_tag", "tags", "widget",
}  # fmt: skip
QUICKSTART = ROOT / "scripts" / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("private_place") / "my_run", "hub.repo_id=org/gkd-x")


@pytest.fixture(scope="module")
def cards(run_dir: Path) -> dict[str, ModelCard]:
    return {name: ModelCard.load(run_dir / name / "README.md") for name in ("encoder", "segmenter")}


@pytest.fixture(scope="module")
def render_cards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_cards", ROOT / "scripts" / "render_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def card_of(path: Path, *overrides: str, artefact: str = "segmenter", **facts: Any) -> ModelCard:
    settings = load_recipe(path, overrides).as_dict()
    return GKDModelCard(artefact, RunFacts(settings, **facts), RepoNames.of(settings)).render()


def settings_of(*overrides: str, path: Path = QUICKSTART) -> dict[str, Any]:
    return load_recipe(path, overrides).as_dict()


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_the_index_has_the_reports_numbers_to_the_digit(run_dir: Path, cards: dict[str, ModelCard]) -> None:
    report = report_of(run_dir)
    expected = {"toy_city": report["source_result"]["miou"]}
    expected |= {name: result["miou"] for name, result in report["targets"].items()}
    for card in cards.values():
        assert {result.dataset_type: result.metric_value for result in card.data.eval_results} == expected
        assert {result.metric_type for result in card.data.eval_results} == {"mean_iou"}


def test_the_tables_have_the_reports_numbers(run_dir: Path, cards: dict[str, ModelCard]) -> None:
    report, text = report_of(run_dir), cards["segmenter"].text
    alone = report["baselines"]["none"]
    for name, result in report["targets"].items():
        miou, other = result["miou"], alone["targets"][name]["miou"]
        row = f"| {name} | {percent(other)} | {percent(miou)} | {signed(miou - other)} | 20 |"
        assert row in text and row in cards["encoder"].text
    mean, other = report["mean_target_miou"], alone["mean_target_miou"]
    assert f"| **{percent(other)}** | **{percent(mean)}** | **{signed(mean - other)}** |" in text
    road = next(line for line in text.splitlines() if line.startswith("| road |"))
    figures = [report["source_result"]["per_class"]["road"]]
    figures += [result["per_class"]["road"] for result in report["targets"].values()]
    assert [cell.split()[0] for cell in road.split("|")[2:-1]] == [percent(value) for value in figures]
    night = (
        report["targets"]["toy_city:night"]["per_class"]["road"]
        - alone["targets"]["toy_city:night"]["per_class"]["road"]
    )
    assert f"({signed(night)})" in road.split("|")[3]
    assert "| person | – | – |" in text  # a class that does not occur has no figure and no gain


def test_a_pushed_report_has_the_same_figures_and_no_places(run_dir: Path) -> None:
    ours, pushed = report_of(run_dir), report_of(run_dir / "segmenter")
    places = {"settings": None, "skipped_rows": None, "skipped_by_reason": None}
    assert {**ours, **places} == {**pushed, **places}
    assert pushed["skipped_rows"] == [{"domain": "toy_city", "id": "7", "reason": "no image in 7.png"}]
    assert pushed["settings"]["output_dir"] == "my_run"


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_metadata(cards: dict[str, ModelCard], run_dir: Path) -> None:
    encoder, segmenter = cards["encoder"].data, cards["segmenter"].data
    assert encoder.pipeline_tag == "image-feature-extraction" and segmenter.pipeline_tag == "image-segmentation"
    for data in (encoder, segmenter):
        assert (data.library_name, data.license, data.metrics) == ("transformers", "apache-2.0", ["mean_iou"])
        assert {"gkd", "knowledge-distillation", "domain-generalization", f"arxiv:{ARXIV}"} <= set(data.tags)
        assert data.base_model is None and data.datasets is None  # random weights, rendered data
    assert segmenter.widget == [{"src": "example.png", "example_title": "An image of a domain unseen in training"}]
    assert (run_dir / "segmenter" / "example.png").is_file() and "widget" not in encoder
    assert (encoder.model_name, segmenter.model_name) == ("gkd-x", "gkd-x-toy_city")


def test_the_hub_accepts_them(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, cards: dict[str, ModelCard], render_cards: ModuleType
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for card in [*cards.values(), *(ModelCard(render_cards.recipe_card(path)) for path in RECIPES)]:
        card.validate()
        data = yaml.safe_load(str(card).split("---\n")[1])
        assert data == card.data.to_dict()
        # What the Hub's own schema asks for beyond YAML.
        assert re.fullmatch(r"[a-z0-9.-]+", data["license"])
        if data["license"] == "other":
            assert re.fullmatch(r"[a-z0-9.-]+", data["license_name"]) and data["license_link"].startswith("http")
        assert all(isinstance(tag, str) for tag in data["tags"])
        assert set(data) <= HUB_KEYS
    assert [status for _, path, status in hub.requests if "validate-yaml" in path] == [200] * (2 + len(RECIPES))


def test_hub_ids_become_base_model_and_datasets() -> None:
    path = ROOT / "scripts" / "recipes" / "gtav_dinov2b_deits.yaml"
    roots = ["data.roots.gtav=org/gtav", "data.roots.imagenet=/data/imagenet", "data.roots.cityscapes=org/cityscapes"]
    data = card_of(path, *roots).data
    assert (data.base_model, data.base_model_relation) == ("facebook/deit-small-patch16-224", "finetune")
    assert data.datasets == ["org/gtav"]  # what it was trained on; the targets were only measured
    assert "base_model" not in card_of(path, "student.pretrained=false").data.to_dict()


# -- licences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected", "link"),
    [
        ([], "apache-2.0", None),
        (["hub.license=mit"], "mit", None),
        (["teacher.name=facebook/dinov2-base"], "apache-2.0", None),
        (["teacher.name=org/secret-model"], "other", "https://huggingface.co/org/secret-model"),
        (["teacher.name=/home/me/teacher"], "other", "https://huggingface.co/org/x#licences"),
        (["student.encoder=org/unknown"], "other", "https://huggingface.co/org/unknown"),
        (["student.encoder=org/unknown", "student.pretrained=false"], "apache-2.0", None),
        (["stages.task_agnostic.data=imagenet"], "other", "https://www.image-net.org"),
        (
            ["stages.task_agnostic.data=imagenet", "stages.domain_agnostic.data=gtav"],
            "other",
            "https://huggingface.co/org/x#licences",
        ),
        (["stages.domain_agnostic.data=custom:mine"], "other", "https://huggingface.co/org/x#licences"),
        (["hub.license=other"], "other", "https://huggingface.co/org/x#licences"),
        # Called like the toy city, and somebody's pictures.
        (
            ["data.roots={toy_city: org/cityscapes}"],
            "other",
            "https://huggingface.co/datasets/org/cityscapes",
        ),
        (["data.roots={toy_city: /data/mine}"], "other", "https://huggingface.co/org/x#licences"),
    ],
)
def test_licence(overrides: list[str], expected: str, link: str | None) -> None:
    licence = derived_licence(settings_of(*overrides), "https://huggingface.co/org/x")
    assert (licence.id, licence.link) == (expected, link)
    assert (licence.name is not None) == (expected == "other")


def test_a_folder_called_like_a_repository_has_unknown_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "facebook/dinov2-base"
    assert weight_terms(name, "teacher").licence_id == "apache-2.0"
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert weight_terms(name, "teacher") == Terms("teacher", name, "unknown here", "")
    assert derived_licence(settings_of(f"teacher.name={name}")).id == "other"


FREE = "and so is the model"
BOUND = "may be bound by the terms"


@pytest.mark.parametrize(
    ("overrides", "there", "missing"),
    [
        ([], FREE, BOUND),
        (["hub.license=mit"], "the model itself is `mit`", FREE),
        (["hub.license=apache-2.0"], FREE, BOUND),
        (["hub.license=apache-2.0", "stages.domain_agnostic.data=gtav"], BOUND, FREE),
        (["data.roots={toy_city: org/cityscapes}"], BOUND, FREE),
    ],
)
def test_only_what_was_made_from_free_things_is_called_free(overrides: list[str], there: str, missing: str) -> None:
    text = " ".join(card_of(QUICKSTART, *overrides).text.split())
    assert there in text and missing not in text
    assert ("All that this model was made from is Apache-2.0" in text) == (missing != FREE or "mit" in there)


def test_pictures_of_unknown_terms_stay_at_home(tmp_path: Path) -> None:
    mine = "data.roots={toy_city: org/cityscapes, 'toy_city:night': /data/mine}"
    folder = finished_run(tmp_path / "run", mine)
    ours, pushed = (Image.open(place / "report.png").size for place in (folder, folder / "segmenter"))
    assert pushed[0] == ours[0] and pushed[1] < 0.8 * ours[1]  # two rows of six are gone
    text = (folder / "segmenter" / "README.md").read_text()
    assert "rendered by this package" in text and text.count("| see its page |") == 1
    assert "The toy city is rendered" not in text  # what it was trained on was not
    assert "No picture of toy_city, toy_city:night is shown" in text
    for name in ("toy_city (source)", "toy_city:night", "toy_city:fog"):
        assert f"| {name} |" in text
    widget = np.asarray(Image.open(folder / "segmenter" / "example.png"))
    assert (widget == invented_image("toy_city:fog")).all()


def test_a_run_of_unknown_terms_is_pushed_without_pictures(tmp_path: Path) -> None:
    names = ("toy_city", "toy_city:night")
    roots = ", ".join(f"'{name}': /data/mine" for name in names)
    folder = finished_run(tmp_path / "run", f"data.roots={{{roots}}}", "evaluate=[toy_city:night]")
    assert (folder / "report.png").is_file() and not list((folder / "segmenter").glob("*.png"))
    card = ModelCard.load(folder / "segmenter" / "README.md")
    assert "report.png" not in card.text and "widget" not in card.data.to_dict()
    assert [result.dataset_config for result in card.data.eval_results] == list(names)


def test_domains_of_one_data_set_keep_their_results_apart(tmp_path: Path) -> None:
    roots = "data.roots={'toy_city:night': org/toys, 'toy_city:fog': org/toys}"
    folder = finished_run(tmp_path / "run", roots, "evaluate=[toy_city:night, toy_city:fog]")
    data = ModelCard.load(folder / "segmenter" / "README.md").data
    index = data.to_dict()["model-index"][0]["results"]
    found = {each["dataset"]["config"]: [metric["value"] for metric in each["metrics"]] for each in index}
    report = report_of(folder)
    for name, result in report["targets"].items():
        assert found[name] == [result["miou"]]
    assert {each["dataset"]["type"] for each in index} == {"toy_city", "org/toys"}


def test_licences_of_data_and_teacher_are_listed_with_their_pages() -> None:
    text = card_of(ROOT / "scripts" / "recipes" / "cityscapes_dinov2b_deits.yaml").text
    for expected in (
        "https://www.cityscapes-dataset.com",
        "https://www.image-net.org",
        "https://acdc.vision.ee.ethz.ch",
    ):
        assert expected in text
    assert "| teacher | `facebook/dinov2-base` | Apache-2.0 |" in text


# -- body -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "there", "missing"),
    [
        ("linear", 'model="org/gkd-x-toy_city", trust_remote_code=True)', "transformers alone"),
        ({"type": "upernet", "hidden_size": 16}, "UperNetForSemanticSegmentation", "trust_remote_code"),
        (MASK2FORMER, "Mask2FormerForUniversalSegmentation", "trust_remote_code"),
    ],
)
def test_how_to_load_is_what_was_exported(tmp_path: Path, head: Any, there: str, missing: str) -> None:
    folder = finished_run(tmp_path / "run", "hub.repo_id=org/gkd-x", head=head)
    text = (folder / "segmenter" / "README.md").read_text()
    assert there in text and missing not in text
    assert ("scipy" in text) == ("scipy" in (folder / "segmenter" / "requirements.txt").read_text())
    assert "trust_remote_code" not in (folder / "encoder" / "README.md").read_text()
    assert "python scripts/export_onnx.py org/gkd-x-toy_city" in text
    (folder / "segmenter" / "onnx").mkdir()
    (folder / "segmenter" / "onnx" / "model.onnx").write_bytes(b"")
    write_cards(folder, "org/gkd-x")
    text = (folder / "segmenter" / "README.md").read_text()
    assert "`onnx/model.onnx` is the same model" in text
    assert f"```python\n{onnx_usage()}```\n" in text
    assert '`hf download org/gkd-x-toy_city --include "onnx/*" --local-dir .`' in text


def test_the_square_inputs_of_dpt_are_told(tmp_path: Path) -> None:
    head = {"type": "dpt", "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
    text = (finished_run(tmp_path / "run", encoder="vit", head=head) / "segmenter" / "README.md").read_text()
    assert "DPTForSemanticSegmentation" in text and "square" in text


def test_the_body_tells_how_it_was_made(cards: dict[str, ModelCard]) -> None:
    text = " ".join(cards["segmenter"].text.split())
    for expected in (
        "python scripts/run_gkd.py scripts/recipes/quickstart.yaml",
        "| `task_agnostic` | toy_city:pool | 10 | 16 | 0.001 | loss 0.5, patch 0.25 | 12 s | 1 × CPU, fp32 |",
        "| transformers |",
        "](report.png)",
        "seed 0",
        f"https://arxiv.org/abs/{ARXIV}",
        "@inproceedings{",
        "{Generalizable Knowledge Distillation from Vision Foundation Models for Semantic Segmentation}",
        "## Intended use and limits",
        "says nothing about real streets",
    ):
        assert expected in text, expected
    assert "org/gkd-x-toy_city" in cards["encoder"].text
    assert not re.search(r"\{\{|\}\}|\{%|None|nan", text)


def test_prose_is_broken_into_even_lines_and_nothing_else(cards: dict[str, ModelCard]) -> None:
    for card in cards.values():
        text = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
        for paragraph in re.split(r"\n\n+", text.strip()):
            *full, _ = lines = paragraph.splitlines()
            if lines[0].startswith(("#", "|", "<", "![")):
                continue
            assert all(len(line) <= 100 or "](" in line or "`" in line for line in lines), paragraph
            assert all(len(line) >= 50 for line in full), paragraph
        assert text.count("`") % 2 == 0 and not re.search(r"(?m)^[^`\n]*(`[^`\n]*`[^`\n]*)*`[^`\n]*$", text)


def test_nothing_private_is_told(run_dir: Path) -> None:
    for path in [*(run_dir / "encoder").rglob("*"), *(run_dir / "segmenter").rglob("*")]:
        if path.suffix in (".md", ".json", ".txt", ".py"):
            assert "private_place" not in path.read_text(), path


def test_paths_are_cut_to_their_last_component() -> None:
    assert shortened({"a": ["/data/x/gtav", "~/y", 3], "b": "org/name"}) == {"a": ["gtav", "y", 3], "b": "org/name"}
    assert shortened("{gtav: /data/my/gtav, b: ~/x/y}") == "{gtav: gtav, b: y}"
    assert shortened(["../../joe/x", "a/../../joe/x", "/home/joe/My Data/gtav", "runs/x"]) == [
        "x",
        "x",
        "gtav",
        "runs/x",
    ]
    assert (
        shortened(["file:///home/joe/x", "file:/home/joe/x", r"C:\Users\joe\x", "C:/joe/x", r"\\joe\x"]) == ["x"] * 5
    )
    assert shortened(r"no image in /home/joe/a.png, C:\joe\b.png") == "no image in a.png, b.png"
    assert shortened(["~joe", "..", "/"]) == ["."] * 3
    assert shortened("see https://example.org/a/b or ../up") == "see https://example.org/a/b or ../up"
    argv = ["/home/me/gkd/scripts/run_gkd.py", "/home/me/gkd/scripts/recipes/quickstart.yaml", "output_dir=/tmp/a b/c"]
    assert command_line(argv, 1) == "python scripts/run_gkd.py scripts/recipes/quickstart.yaml output_dir=c"
    several = command_line(argv, 2)
    assert several.startswith("accelerate launch --multi_gpu --num_processes 2 scripts/run_gkd.py")
    assert command_line(["/usr/bin/jupyter"], 1) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{gtav: /home/joe/My Data/gtav, synthia: org/synthia}", "{gtav: gtav, synthia: org/synthia}"),
        ("[../../joe/x, 1e-4]", "[x, 1e-4]"),
        (r"{gtav: 'C:\Users\joe\x'}", "{gtav: x}"),
        ("file:///home/joe/x", "x"),
        ("'/home/joe/My Data'", "My Data"),
        ("{type:  upernet}", "{type:  upernet}"),  # nothing to cut: as it was typed
        ("null", "null"),
    ],
)
def test_a_command_tells_no_places(value: str, expected: str) -> None:
    told = command_line(["scripts/run_gkd.py", f"data.roots={value}"], 1)
    assert shlex.split(told)[2:] == [f"data.roots={expected}"]


def test_facts_survive_the_disk(tmp_path: Path, run_dir: Path) -> None:
    facts = RunFacts.load(run_dir)
    facts.save(tmp_path)
    assert RunFacts.load(tmp_path) == facts and facts.segmenter.architecture


def test_a_recorder_takes_what_the_trainer_tells(tmp_path: Path) -> None:
    from tests.training.test_trainers import segmentation_trainer

    trainer = segmentation_trainer(tmp_path)
    trainer.train()
    assert isinstance(trainer.recorder, StageRecorder)
    facts = trainer.recorder.facts
    assert (facts.steps, facts.batch_size, facts.learning_rate) == (6, 4, 1e-3)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert facts.losses["loss"] == logged[-1]["loss"] and facts.seconds > 0


# -- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_its_card_as_rendered(recipe: Path, render_cards: ModuleType) -> None:
    path = ROOT / "model_cards" / f"{recipe.stem}.md"
    text = path.read_text(encoding="utf-8")
    card = ModelCard(text)
    if card.data.eval_results:  # of a real run, which no test repeats
        for result in card.data.eval_results:
            assert f"{result.metric_value:.1f}" in card.text
        settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
        ours = {key: value for key, value in settings_of(path=recipe).items() if key != "hub"}
        assert settings == shortened(ours)
    else:
        assert text == render_cards.recipe_card(recipe)
        assert "**Not run.**" in text and "no numbers are claimed" in re.sub(r"\s>?\s*", " ", text)
        assert "## Results" not in text


def test_a_run_in_a_folder_of_no_recipes_name_is_refused(
    render_cards: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render_cards.main([str(tmp_path)]) == 2
    assert "is not called like a recipe, one of camvid_day_to_dusk" in capsys.readouterr().err


def test_the_template_is_part_of_the_package() -> None:
    assert TEMPLATE.is_file() and TEMPLATE.is_relative_to(ROOT / "gkd_hf")
    assert TEMPLATE.read_text() == (ROOT / "model_cards" / "TEMPLATE.md").read_text()
