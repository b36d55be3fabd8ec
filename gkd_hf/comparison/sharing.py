"""Stages that several runs of a comparison have in common are trained once: later runs take them over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from gkd_hf.training.stage_folder import StageFolder


def settings_key(folder: StageFolder) -> str:
    """Everything that decides what a stage gives, the stages before it included, as text to compare."""
    return json.dumps(folder.settings, sort_keys=True)


def finished_stages(output_dir: Path) -> dict[str, Path]:
    """The finished stages and baselines of all runs under a comparison's folder: `settings_key` → folder."""
    found: dict[str, Path] = {}
    for run in ("*/seed*", "*/tuning/*"):
        for kind in ("stages", "baselines"):
            for record in sorted(output_dir.glob(f"{run}/{kind}/*/finished.json")):
                settings = json.loads((record.parent / "settings.json").read_text(encoding="utf-8"))
                found.setdefault(json.dumps(settings, sort_keys=True), record.parent)
    return found


def missing_stages(folders: Iterable[StageFolder]) -> list[str]:
    """`settings_key` of the stages that are not finished."""
    return [settings_key(folder) for folder in folders if not folder.finished]


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
