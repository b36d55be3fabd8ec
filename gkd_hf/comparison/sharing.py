"""Stages that several runs of a comparison have in common are trained once: later runs take them over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gkd_hf.evaluation.report_text import write_whole
from gkd_hf.training.label_check import remembered
from gkd_hf.training.stage_folder import StageFolder, write_json

LABEL_MEMORY = "checked_labels.json"
ORIGIN = "started_from.txt"


def settings_key(folder: StageFolder) -> str:
    """Everything that decides what a stage gives, the stages before it included, as text to compare."""
    return json.dumps(folder.settings, sort_keys=True)


def origin_of(run: Path) -> str | None:
    """The digest of the run whose encoder a run started from, as it was recorded; None without a record."""
    record = run / ORIGIN
    return record.read_text(encoding="utf-8").strip() if record.is_file() else None


def record_origin(run: Path, origin: str) -> None:
    """Record the digest of the run whose encoder a run starts from."""
    write_whole(run / ORIGIN, lambda place: place.write_text(f"{origin}\n", encoding="utf-8"))


def finished_stages(output_dir: Path, origin: str) -> dict[str, Path]:
    """The finished stages and baselines of runs under a comparison's folder: `settings_key` → folder.

    Args:
        output_dir: the comparison's folder.
        origin: of runs that start from another one, those that started from the one with this digest.
    """
    found: dict[str, Path] = {}
    for run in ("*/seed*", "*/tuning/*"):
        for kind in ("stages", "baselines"):
            for record in sorted(output_dir.glob(f"{run}/{kind}/*/finished.json")):
                if origin_of(record.parents[2]) not in (None, origin):
                    continue
                settings = json.loads((record.parent / "settings.json").read_text(encoding="utf-8"))
                found.setdefault(json.dumps(settings, sort_keys=True), record.parent)
    return found


def take_over(folders: Mapping[str, StageFolder], donors: Mapping[str, Path]) -> list[str]:
    """Put what other runs have trained with the same settings into a run's own folders; return the stages' names.

    Models are hard links where the file system has them: a run replaces a model, and never writes into it.
    """
    taken = []
    for name, folder in folders.items():
        donor = donors.get(settings_key(folder))
        if folder.finished or donor is None:
            continue
        folder.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder.model, ignore_errors=True)  # of a take-over that was interrupted
        shutil.copytree(donor / "model", folder.model, copy_function=_link)
        if (donor / "heads.safetensors").is_file():
            # A run writes into this file if it trains the stage again, so it is never the same file.
            shutil.copy2(donor / "heads.safetensors", folder.heads)
        for record in ("settings.json", "finished.json"):  # the last one says that all is there
            _replace(donor / record, folder.path / record)
        taken.append(name)
    return taken


def take_over_label_checks(output_dir: Path, folder: Path) -> None:
    """Let a run know which labels other runs have checked; it looks itself whether that still holds."""
    known: dict[str, Any] = {}
    for run in ("*/seed*", "*/tuning/*"):
        for memory in sorted(output_dir.glob(f"{run}/{LABEL_MEMORY}")):
            known |= remembered(memory)
    if known:
        write_json(folder / LABEL_MEMORY, known | remembered(folder / LABEL_MEMORY))


def _replace(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.taken")
    temporary.unlink(missing_ok=True)
    _link(source, temporary)
    os.replace(temporary, target)


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
