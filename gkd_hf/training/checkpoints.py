"""Which checkpoint of a folder a run can go on from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from gkd_hf.errors import InputError

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """Return the optimiser steps a checkpoint has behind it.

    Raises:
        InputError: the checkpoint is not there or not whole.
    """
    state = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot resume from '{checkpoint}': {TRAINER_STATE_NAME} is missing or broken") from error


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest checkpoint of ``folder`` that was written to its end, or None.

    The trainer's state is the last file of a checkpoint, so a run killed while it saved leaves one without it: that
    one is passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    for _, checkpoint in sorted(found, reverse=True):
        try:
            checkpoint_step(checkpoint)
        except InputError:
            continue
        return str(checkpoint)
    return None
