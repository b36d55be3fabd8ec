"""The memory of a stage on disk: with which settings it was begun, whether it is finished, what it left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gkd_hf.errors import InputError
from gkd_hf.training.checkpoints import checkpoint_step, checkpoint_to_resume

# They change how a run goes, not what comes out of it, so they may differ when it is continued.
FREE_SETTINGS = (
    "save_steps",
    "logging_steps",
    "workers",
    "compile",
    "activation_checkpointing",
    "early_backward",
    "sharding",
    "window",
    "stride",
    "window_batch_size",
    "evaluation_images",
)

# Keys that came later. At this value they change nothing, and stages begun before them go on.
LATER_SETTINGS = {
    "ema_decay": None,
    "label_fraction": 1.0,
    "label_seed": 0,
    "freeze_encoder": True,
    "standardise": None,
    "views": None,
    "teacher_cache": None,
}


class StageFolder:
    """One stage's folder: `settings.json` from its first step, checkpoints, then the model and, last, `finished.json`.

    Args:
        path: the folder. settings: everything that decides what the stage gives, as nested plain values.

    Raises:
        InputError: the folder holds the same stage begun with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.settings = flatten(settings)
        record = path / "settings.json"
        if not record.is_file():
            return
        try:
            begun = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{record} is broken: remove {path} to run the stage again") from error
        wanted = json.loads(json.dumps(self.settings))
        for key in sorted({*begun, *wanted}):
            if begun.get(key) != wanted.get(key):
                raise InputError(
                    f"{path} was begun with {key} = {_told(begun, key)}, the recipe now says {_told(wanted, key)}: "
                    "choose another output_dir, or remove that folder to run the stage again"
                )

    @property
    def digest(self) -> str:
        """A short name of the settings, for the stage that follows."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def finished(self) -> bool:
        """Whether the stage ended and its model is whole."""
        return (self.path / "finished.json").is_file()

    @property
    def model(self) -> Path:
        """Where the stage's model is."""
        return self.path / "model"

    @property
    def heads(self) -> Path:
        """Where the heads of a label-free stage are."""
        return self.path / "heads.safetensors"

    def standing(self) -> str:
        """Where a stage that was begun before goes on, as words to add; "" for one that begins now.

        Raises:
            InputError: it has checkpoints, and all are damaged.
        """
        checkpoint = checkpoint_to_resume(self.path).checkpoint
        if checkpoint is not None:
            return f", going on from step {checkpoint_step(checkpoint)}"
        begun = (self.path / "settings.json").is_file()
        return ", from the start: it was interrupted before its first checkpoint" if begun else ""

    def begin(self) -> None:
        """Record the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "settings.json", self.settings)

    def finish(self, save: Callable[[Path], None], summary: Mapping[str, Any]) -> None:
        """Let ``save(folder)`` write the model, move it into place, then mark the stage as finished."""
        replace_folder(self.model, save)
        write_json(self.path / "finished.json", summary)

    def summary(self) -> dict[str, Any]:
        """What was recorded at the end."""
        return json.loads((self.path / "finished.json").read_text(encoding="utf-8"))


def replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` fill a folder under a temporary name, and put it where ``folder`` is.

    The old folder is whole until the new one is; one that an interruption left aside is put back first.
    """
    temporary, aside = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if aside.is_dir() and not folder.exists():
        os.replace(aside, folder)
    for leftover in (temporary, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    if folder.exists():
        os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except OSError:
        if aside.exists():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _told(settings: Mapping[str, Any], key: str) -> str:
    """A setting's value in words; one that is left out because it changes nothing has that value."""
    return repr(settings.get(key, LATER_SETTINGS.get(key.rpartition(".")[2])))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`, without the settings that are free to change or change nothing."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in FREE_SETTINGS or (key in LATER_SETTINGS and value == LATER_SETTINGS[key]):
            continue
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat
