"""What a run leaves behind for others: encoder and segmenter as they go to the Hub, with their cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image

from gkd_hf.data.domains import domain_names
from gkd_hf.data.shards import is_hub_id
from gkd_hf.errors import InputError
from gkd_hf.evaluation.domain_report import DomainReport
from gkd_hf.hub import handler
from gkd_hf.hub.licences import may_be_shown
from gkd_hf.hub.native import export_encoder, export_segmenter
from gkd_hf.hub.run_facts import ArtefactFacts, RunFacts
from gkd_hf.hub.short_paths import shortened
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.models.pull import pulled_commit
from gkd_hf.training.recipe import Recipe
from gkd_hf.training.recipe_data import data_root
from gkd_hf.training.recipe_file import load_recipe
from gkd_hf.training.stage_folder import replace_folder


def write_encoder(folder: Path, student: GKDStudentModel, facts: RunFacts, image_size: int) -> None:
    """Export a student's encoder in place of what was in the folder; the facts are told of it."""

    def save(place: Path) -> None:
        exported = export_encoder(student, place, image_size=image_size)
        facts.encoder = ArtefactFacts.of(exported, student.encoder, image_size)

    replace_folder(folder, save)


def write_segmenter(
    folder: Path,
    segmenter: GKDStudentForSemanticSegmentation,
    facts: RunFacts,
    image_size: int,
    report: DomainReport | None = None,
) -> None:
    """Export a segmenter in place of what was in the folder, with what serves it and, if there is one, its report."""

    def save(place: Path) -> None:
        exported = export_segmenter(segmenter, place, image_size=image_size)
        head = segmenter.config.decode_head["type"]
        facts.segmenter = ArtefactFacts.of(exported, segmenter, image_size, head)
        shutil.copyfile(handler.__file__, place / "handler.py")
        needed = ["transformers>=5.23", "pillow", *(["scipy"] if head == "mask2former" else [])]
        (place / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
        if report is not None:
            # The figures of the run's own, but nobody else's business where things lay on this machine.
            text = json.dumps(shortened(report.as_dict()), indent=2, ensure_ascii=False) + "\n"
            (place / "report.json").write_text(text, encoding="utf-8")
            _save_pictures(place, report, facts)

    replace_folder(folder, save)


def _save_pictures(place: Path, report: DomainReport, facts: RunFacts) -> None:
    """Keep the figure and, for the widget, an image of an unseen domain: of domains that may be passed on."""
    shown = [name for name in report.results if may_be_shown(facts.settings, name)]
    if shown:
        report.draw(place / "report.png", shown)
    for name in shown:
        examples = report.results[name].examples
        if name not in domain_names(report.source) and examples:
            Image.fromarray(examples[0][0]).save(place / "example.png")
            return


def resolved_commits(recipe: Recipe) -> dict[str, str]:
    """The Hub commits behind the names in a recipe whose models were loaded, as far as they can be found out."""
    named = {"student": (recipe.student.encoder, recipe.student.revision)}
    named |= {key: (each.name, each.revision) for key, each in recipe.used_teachers.items()}
    found: dict[str, str] = {}
    for role, (name, revision) in named.items():
        # A student may be a configuration in the recipe, and `toy` is the teacher in the package.
        commit = pulled_commit(name, revision) if isinstance(name, str) and name != "toy" else None
        if commit:
            found[role] = commit
    for domain in dict.fromkeys(name for _, stage in recipe.stages for name in stage.domains):
        root = data_root(recipe, domain)
        if root is None or not is_hub_id(root):
            continue
        try:
            sha = HfApi().dataset_info(root, revision=recipe.data.revisions.get(domain)).sha
        except (HTTPError, OSError, ValueError):
            continue  # it is only told, and the run does not hang on it
        if sha:
            found[f"data.{domain}"] = sha
    return found


def same_settings(report: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a report is of this recipe; where it is published and how long processes wait makes no difference."""
    try:
        # Read as a recipe, settings of an older report have the keys that came later, at their defaults.
        stored = load_recipe(report.get("settings", {}))
    except InputError:
        return False
    return _of_the_result(stored) == _of_the_result(recipe)


def _of_the_result(recipe: Recipe) -> dict[str, Any]:
    settings = json.loads(json.dumps(recipe.as_dict()))
    return {key: value for key, value in settings.items() if key not in ("hub", "timeout_minutes")}
