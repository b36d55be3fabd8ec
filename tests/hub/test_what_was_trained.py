"""Cards, plans and facts tell what was trained and by whom: frozen or not, with which teacher, with whose head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gkd_hf.distillation.one_stage import ONE_STAGE
from gkd_hf.hub.licences import ingredients, teacher_settings
from gkd_hf.hub.model_card import STAGES, GKDModelCard
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.hub.run_facts import RunFacts, StageFacts
from gkd_hf.methods import METHODS
from gkd_hf.training import artefacts
from gkd_hf.training.one_stage import TEACHER_HEAD
from gkd_hf.training.pipeline import Pipeline
from gkd_hf.training.plan import plan
from gkd_hf.training.recipe_file import load_recipe
from tests.hub.runs import ROOT, report_of
from tests.hub.test_model_card import run_dir  # noqa: F401
from tests.training.test_one_stage import one_stage_trainer
from tests.training.test_trainers import segmentation_trainer

QUICKSTART = ROOT / "scripts" / "recipes" / "quickstart.yaml"
ONLY_THE_TASK = ["stages.task_agnostic=null", "stages.domain_agnostic=null"]
UNFROZEN = "stages.task.freeze_encoder=false"
LINEAR = "stages.task.decode_head=linear"
DINOV2 = "teacher.name=facebook/dinov2-base"


def settings_of(*overrides: str) -> dict[str, Any]:
    return load_recipe(QUICKSTART, overrides).as_dict()


def words(card: GKDModelCard) -> str:
    """What a card says, without the recipe and with even spaces."""
    text = card.render().text
    return " ".join((text.partition("<details>")[0] + text.partition("## Intended")[2]).split())


@pytest.mark.parametrize(
    ("overrides", "task_row", "segmenter", "encoder"),
    [
        ([], STAGES["task"][1], "then frozen under a decode head", "on this frozen encoder."),
        (
            [UNFROZEN],
            "student and head, end to end",
            "then trained end to end under a decode head",
            "then trained end to end on the task.",
        ),
        (
            ["method=none", "baselines=[]"],
            "student and head, end to end",
            "weights, trained end to end under",
            "trained end to end, without a teacher.",
        ),
        (["method=kd"], METHODS["kd"].trains, "while it learned the task (KD), under", "learned the task (KD)."),
        (["method=vitkd"], METHODS["vitkd"].trains, "learned the task (ViTKD), under", "learned the task (ViTKD)."),
        (ONLY_THE_TASK, STAGES["task"][1], "as it was, its encoder frozen, under", "no stage distilled it."),
        (
            [*ONLY_THE_TASK, UNFROZEN],
            "student and head, end to end",
            "weights, trained end to end under",
            "trained end to end, without a teacher.",
        ),
    ],
)
def test_cards_follow_what_was_trained(
    overrides: list[str],
    task_row: str,
    segmenter: str,
    encoder: str,
    run_dir: Path,  # noqa: F811
) -> None:
    settings = settings_of(*overrides)
    report = {**report_of(run_dir), "settings": settings}
    cards = [
        GKDModelCard(kind, RunFacts(settings), RepoNames.of(settings), report) for kind in ("segmenter", "encoder")
    ]
    of_segmenter, of_encoder = map(words, cards)
    assert segmenter in of_segmenter and encoder in of_encoder
    frozen = task_row == STAGES["task"][1]
    for text in (of_segmenter, of_encoder):
        assert f"| `task` | {STAGES['task'][0]} | {task_row} |" in text
        assert frozen or "frozen" not in text
    assert ("on this frozen encoder" in of_encoder) == frozen
    assert ("with the segmenter, whose encoder this is" in of_encoder) != frozen
    distilled = "distilled from" in of_segmenter
    assert ("Distilling before the task" in of_segmenter) == (frozen and distilled)
    assert ("knowledge-distillation" in cards[0].metadata().tags) == distilled


@pytest.mark.parametrize(
    ("overrides", "role"),
    [
        (["method=none", "baselines=[]"], None),
        (ONLY_THE_TASK, None),
        ([*ONLY_THE_TASK, "baselines=[none, kd]"], "teacher of a baseline"),
        (["method=none", "baselines=[kd]"], "teacher of a baseline"),
        (["baselines=[none]"], "teacher"),
        (["method=cwd", "baselines=[none]"], "teacher"),
    ],
)
def test_only_a_teacher_that_teaches_is_told_of(
    overrides: list[str], role: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(QUICKSTART, [DINOV2, *overrides])
    settings = recipe.as_dict()
    told = [line for line in plan(recipe).splitlines() if "dinov2" in line]
    licensed = [each.role for each in ingredients(settings) if "dinov2" in each.name]
    text = words(GKDModelCard("segmenter", RunFacts(settings), RepoNames.of(settings)))
    monkeypatch.setattr(artefacts, "pulled_commit", lambda name, revision: "c0ffee")
    commits = artefacts.resolved_commits(recipe)
    if role is None:
        assert not told and not licensed and "dinov2" not in text and "teacher" not in commits
    else:
        assert [line.split(":")[0].strip() for line in told] == ["teacher (frozen)", "facebook/dinov2-base"]
        assert licensed == [role] and f"| {role} | `facebook/dinov2-base` |" in text
        assert commits["teacher"] == "c0ffee"
    assert ("teacher and student saw" in text) == ("distilled from" in text)


def test_the_toy_teacher_is_only_spoken_of_where_it_taught(run_dir: Path) -> None:  # noqa: F811
    for overrides, taught in (([], True), (["method=none", "baselines=[]"], False)):
        settings = settings_of(*overrides)
        card = GKDModelCard("segmenter", RunFacts(settings), RepoNames.of(settings), report_of(run_dir))
        assert ("its teacher, unlike DINOv2, was trained with labels" in words(card)) == taught


def test_a_trainers_teacher_is_told_of_without_stages() -> None:
    teacher = {"name": "org/x", "geometry": "native"}
    assert teacher_settings({"method": "mse", "teacher": teacher}) == [teacher]
    assert teacher_settings({"method": "none", "teacher": teacher}) == []


def test_the_plan_says_which_encoder_is_written() -> None:
    for overrides, kind in (([], "distilled"), (["method=kd"], "distilled"), (ONLY_THE_TASK, "untrained")):
        assert f"encoder/: the {kind} encoder" in plan(load_recipe(QUICKSTART, overrides))
    assert "encoder/: the trained encoder" in plan(load_recipe(QUICKSTART, ["method=none", "baselines=[]"]))


# -- the teacher's head -----------------------------------------------------------------------------------------------


def test_the_teachers_head_is_a_stage_of_the_card() -> None:
    assert TEACHER_HEAD in STAGES
    stage = StageFacts(10, 16, 1e-3, 12.3, {"loss": 0.5}, "fp32", "1 × CPU")
    for overrides, there in ((["method=cwd"], True), (["baselines=[none, cwd]"], True), (["method=kd"], False)):
        settings = settings_of(LINEAR, *overrides)
        names = [TEACHER_HEAD, "task", "cwd"]
        text = words(
            GKDModelCard("segmenter", RunFacts(settings, stages=dict.fromkeys(names, stage)), RepoNames("", ""))
        )
        head = f"| `{TEACHER_HEAD}` | {STAGES['task'][0]} | a head on the frozen teacher, whose logits are compared |"
        assert (head in text) == there
        if there:
            assert text.index(head) < text.index(f"| `task` | {STAGES['task'][0]} |")
        for name in names:
            assert f"| `{name}` | toy_city | 10 | 16 |" in text
        assert (f"stages/{TEACHER_HEAD}/" in plan(load_recipe(QUICKSTART, [LINEAR, *overrides]))) == there


def test_the_teachers_head_is_among_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [LINEAR, "method=kd", "kd.target=logits", "baselines=[none]", f"output_dir={tmp_path}"]
    pipeline = Pipeline(load_recipe(QUICKSTART, changes))
    stage = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "seconds": 60.0, "losses": {}}
    for folder in pipeline.folders.values():
        told = {"facts": stage | {"precision": "fp32", "hardware": "1 × CPU"}}
        monkeypatch.setattr(folder, "summary", lambda told=told: told)
    monkeypatch.setattr("gkd_hf.training.pipeline.write_cards", lambda *given: None)
    pipeline._write_cards()
    assert list(RunFacts.load(tmp_path).stages) == [TEACHER_HEAD, "task", "none"]
    assert "3 min" in pipeline._closing_words()


# -- trainers without a recipe ----------------------------------------------------------------------------------------


def card_of_trainer(folder: Path, trainer: Any) -> str:
    trainer.create_model_card()
    return " ".join((folder / "README.md").read_text(encoding="utf-8").split())


def test_the_card_of_a_one_stage_trainer_names_method_and_teacher(tmp_path: Path) -> None:
    trainer = one_stage_trainer(tmp_path, "kd", max_steps=1)
    assert trainer.card_settings()["teacher"] is None  # of random weights
    trainer.teacher.encoder.config.name_or_path = "facebook/dinov2-small"
    text = card_of_trainer(tmp_path, trainer)
    assert "facebook/dinov2-small" in text and "while it learned the task (KD), under a decode head" in text
    assert "Generalizable Knowledge Distillation* (GKD" not in text and "frozen" not in text and "None" not in text

    class Mine(ONE_STAGE["kd"]):
        """Losses of a user's own."""

    trainer.method.__class__ = Mine
    text = card_of_trainer(tmp_path, trainer)
    assert "while it learned the task (Mine)" in text and "student and head, end to end, by Mine" in text


@pytest.mark.parametrize("frozen", [True, False])
def test_the_card_of_a_segmentation_trainer_says_whether_the_encoder_learned(frozen: bool, tmp_path: Path) -> None:
    text = card_of_trainer(tmp_path, segmentation_trainer(tmp_path, freeze_encoder=frozen, max_steps=1))
    assert ("then frozen under a decode head" in text) == frozen
    assert ("trained end to end under a decode head" in text) != frozen
    assert ("distilled" in text) == frozen and "None" not in text
