"""A finished run without a training: random weights, invented counts, everything else as a run leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.data.domains import label_space
from gkd_hf.evaluation.domain_report import DomainReport, DomainResult, package_versions
from gkd_hf.hub.push import write_cards
from gkd_hf.hub.run_facts import RunFacts, StageFacts
from gkd_hf.training.artefacts import write_encoder, write_segmenter
from gkd_hf.training.recipe_file import load_recipe
from tests.tiny import ENCODERS

ROOT = Path(__file__).parents[2]
SIZE = 32


def finished_run(folder: Path, *overrides: str, encoder: str = "resnet", head: object = "linear") -> Path:
    """Write a run of the quickstart's recipe with overrides; its figures are of random counts."""
    recipe = load_recipe(ROOT / "scripts/recipes/quickstart.yaml", [f"output_dir={folder}", *overrides])
    folder.mkdir(parents=True)
    recipe.save(folder)
    names = [name for name, _ in recipe.stages]
    losses = {"loss": 0.5, "loss_patch": 0.25}
    stage = StageFacts(10, 16, 1e-3, 12.3, losses, "fp32", "1 × CPU")
    command = "python scripts/run_gkd.py scripts/recipes/quickstart.yaml"
    facts = RunFacts(recipe.as_dict(), command, dict.fromkeys([*names, "none"], stage), {}, package_versions())
    for name in names:
        (folder / "stages" / name).mkdir(parents=True)
        (folder / "stages" / name / "finished.json").write_text("{}")
        (folder / "stages" / name / "optimizer.pt").write_bytes(b"state")
    space = label_space("toy_city")
    report = DomainReport("toy_city", space, recipe.as_dict(), 0)
    rng = np.random.default_rng(0)
    for name in ("toy_city", *recipe.evaluate):
        for baseline in (None, "none"):
            counts = torch.from_numpy(rng.integers(0, 50, (8, 8))) + 100 * torch.eye(8, dtype=torch.int64)
            counts[7], counts[:, 7] = 0, 0  # a class that does not occur
            image = invented_image(name)
            examples = [(image, image[..., 0] % 8, image[..., 1] % 8)]
            report.add(DomainResult(name, counts, 20, examples=examples), baseline)
    report.add_skipped_rows([{"domain": "toy_city", "id": "7", "reason": f"no image in {folder}/7.png"}])
    report.write(folder)
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(ENCODERS[encoder])
    segmenter = GKDStudentForSemanticSegmentation.from_student(
        student, num_labels=8, id2label=dict(enumerate(space.classes)), decode_head=head
    )
    write_encoder(folder / "encoder", student, facts, SIZE)
    write_segmenter(folder / "segmenter", segmenter, facts, SIZE, report)
    facts.save(folder)
    write_cards(folder, recipe.hub.repo_id)
    return folder


def invented_image(domain: str) -> np.ndarray:
    """The picture that stands for a domain's: uint8 H×W×3, noise that no other domain has."""
    seed = int.from_bytes(domain.encode(), "little")
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def report_of(folder: Path) -> dict:
    """The content of report.json."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
