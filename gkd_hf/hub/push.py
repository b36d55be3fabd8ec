"""Publish a finished run: its encoder in one repo, its segmenter in another, their cards with the names they get.

A push can fail in many ways, and none of them may cost what was trained: the folders stay, and the message says what
to do and which command pushes them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gkd_hf.errors import InputError
from gkd_hf.hub.model_card import GKDModelCard, RepoNames
from gkd_hf.hub.run_facts import RunFacts
from gkd_hf.hub.upload import check_push_rights, check_repo_id, upload

__all__ = ["check_push_rights", "push_folder", "push_run", "write_cards"]

ARTEFACTS = ("encoder", "segmenter")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    summary: str = "Upload a student of gkd_hf",
) -> str:
    """Upload an exported encoder or segmenter as one commit; see `upload` for what goes and what stays.

    Args:
        folder: what `export_encoder` or `export_segmenter` wrote, with its card.
        repo_id: ``org/name``; created if it does not exist.
        private: whether a new repo is; that of an existing one stays as it is.
        token: None takes HF_TOKEN or what ``hf auth login`` stored.
        summary: first line of the commit.

    Returns:
        URL of the repo.

    Raises:
        InputError: folder not whole, a token in one of its files, no or a read-only token, no such organisation, the
            Hub cannot be reached; the message ends with the command that tries again.
    """
    try:
        return upload(Path(folder), repo_id, private=private, token=token, summary=summary)
    except InputError as error:
        raise InputError(f"{error}. {_again(folder, repo_id, private)}") from error


def push_run(
    run_dir: str | os.PathLike, repo_id: str | None = None, *, private: bool | None = None, token: str | None = None
) -> list[str]:
    """Push what a finished run left behind; may be repeated, and then only commits what changed.

    Args:
        run_dir: the run's output folder; or one exported folder, that of a trainer for example.
        repo_id: ``org/name`` of the encoder, ``org/name-SOURCE`` is the segmenter's; None: the recipe's.
        private: whether new repos are; None: as the recipe says.
        token: None takes HF_TOKEN or what ``hf auth login`` stored.

    Returns:
        URLs of the repos.

    Raises:
        InputError: the run is not finished, or the push failed; the message ends with the command that tries again.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"there is no run in '{run_dir}': give the output_dir of a finished run")
    if (run_dir / "config.json").is_file():
        if repo_id is None:
            raise InputError(f"say where '{run_dir}' goes: --repo-id org/name")
        return [push_folder(run_dir, repo_id, private=private is not False, token=token)]
    settings = run_settings(run_dir)
    hub = settings.get("hub") or {}
    repo_id = repo_id or hub.get("repo_id")
    if repo_id is None:
        raise InputError(f"say where the run in '{run_dir}' goes: --repo-id org/name (its recipe has no hub.repo_id)")
    check_repo_id(repo_id)
    if private is None:
        private = hub.get("private", True)
    check_finished(run_dir, settings)
    write_cards(run_dir, repo_id)
    names = RepoNames.of(settings, repo_id)
    urls: list[str] = []
    for artefact, name in (("encoder", names.encoder), ("segmenter", names.segmenter)):
        if not name:
            continue
        try:
            summary = f"Upload the {artefact} of {Path(run_dir).resolve().name}"
            urls.append(upload(run_dir / artefact, name, private=private, token=token, summary=summary))
        except InputError as error:
            done = f" ({', '.join(urls)} was pushed)" if urls else ""
            raise InputError(f"{error}{done}. {_again(run_dir, repo_id, private)}") from error
    return urls


def run_settings(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe of a run; raises `InputError` if there is none."""
    path = run_dir / "recipe.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"'{run_dir}' is no run's folder: it has no recipe.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no recipe")
    return settings


def check_finished(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` if a run has not written everything that is pushed."""
    stages = [name for name, stage in (settings.get("stages") or {}).items() if stage]
    expected = [f"stages/{name}/finished.json" for name in stages]
    expected += ["card.json", "encoder/config.json"]
    if "task" in stages:
        expected += ["segmenter/config.json", "report.json", "segmenter/report.json"]
    missing = [name for name in expected if not (run_dir / name).is_file()]
    if missing:
        raise InputError(
            f"the run in '{run_dir}' is not finished, {missing[0]} is missing: go on with it first, "
            f"python scripts/run_gkd.py {run_dir / 'recipe.yaml'}"
        )


def write_cards(run_dir: str | os.PathLike, repo_id: str | None = None) -> None:
    """Write README.md of a run's encoder and segmenter, for `repo_id` or for use from the folder.

    A card that was edited by hand is left as it is.

    Raises:
        InputError: the run did not leave what a card tells.
    """
    run_dir = Path(run_dir)
    facts = RunFacts.load(run_dir)
    # Where and under which licence it is published may be decided after the training.
    facts.settings["hub"] = run_settings(run_dir).get("hub")
    report_path = run_dir / "report.json"
    has_task = bool((facts.settings.get("stages") or {}).get("task"))
    report = json.loads(report_path.read_text(encoding="utf-8")) if has_task else None
    names = RepoNames.of(facts.settings, repo_id)
    for artefact in ARTEFACTS if has_task else ARTEFACTS[:1]:
        folder = run_dir / artefact
        readme = folder / "README.md"
        if readme.is_file() and _digest(readme) != facts.readmes.get(artefact):
            continue
        files = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        GKDModelCard(artefact, facts, names, report, files).save(folder)
        facts.readmes[artefact] = _digest(readme)
    facts.save(run_dir)


def _again(folder: str | os.PathLike, repo_id: str, private: bool) -> str:
    """How to go on after a push that failed."""
    command = ["python", "scripts/push.py", str(folder), "--repo-id", repo_id, *([] if private else ["--public"])]
    return f"Nothing is lost; to push again: {shlex.join(command)}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
