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
from gkd_hf.hub.model_card import GKDModelCard
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.hub.run_facts import RunFacts
from gkd_hf.hub.upload import check_push_rights, check_repo_id, tell, upload

__all__ = ["check_finished", "check_push_rights", "push_folder", "push_run", "repo_ids", "write_cards"]

ARTEFACTS = ("encoder", "segmenter")
# What a card reads of report.json.
REPORT_KEYS = ("source", "source_result", "targets", "baselines", "settings")
PUT_BACK = "put back what the run wrote, or begin the run again with its own recipe"


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
        check_own_card(run_dir, repo_id, private is not False)
        return [push_folder(run_dir, repo_id, private=private is not False, token=token)]
    settings = run_settings(run_dir)
    hub = settings.get("hub") or {}
    repo_id = repo_id or hub.get("repo_id")
    if repo_id is None:
        raise InputError(f"say where the run in '{run_dir}' goes: --repo-id org/name (its recipe has no hub.repo_id)")
    names = RepoNames.of(settings, repo_id)
    for name in repo_ids(settings, repo_id):
        check_repo_id(name)
    if private is None:
        private = hub.get("private", True)
    check_finished(run_dir, settings)
    write_cards(run_dir, repo_id)
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
    hub, stages = settings.get("hub") or {}, settings.get("stages") or {}
    if not isinstance(hub, dict):
        raise InputError(f"{path}: hub is {hub!r}: give repo_id, private and license below it, or leave it out")
    for key, kind in (("repo_id", str), ("private", bool), ("license", str)):
        if not isinstance(hub.get(key), kind | None):
            what = "true or false" if kind is bool else "a text"
            raise InputError(f"{path}: hub.{key} is {hub[key]!r}: {what} is needed, or leave it out")
    if "private" in hub and hub["private"] is None:
        raise InputError(f"{path}: hub.private is empty: give true or false, or leave it out")
    if not isinstance(stages, dict) or not all(isinstance(stage, dict | None) for stage in stages.values()):
        raise InputError(f"{path}: stages is no mapping of stages: {PUT_BACK}")
    task = stages.get("task")
    if task and not isinstance(task.get("data"), str):
        raise InputError(f"{path}: stages.task.data is missing: {PUT_BACK}")
    return settings


def repo_ids(settings: Mapping[str, Any], repo_id: str) -> list[str]:
    """The repos that a run with these settings is pushed to: the encoder's, then the segmenter's if there is one."""
    names = RepoNames.of(settings, repo_id)
    return [name for name in (names.encoder, names.segmenter) if name]


def check_own_card(folder: Path, repo_id: str, private: bool) -> None:
    """Say what is wrong with pushing an exported folder by itself, which takes its card along as it is.

    Raises:
        InputError: it belongs to a run, whose cards name both repos and are written for them by a push of the run.
    """
    run_dir = folder.resolve().parent
    if folder.resolve().name in ARTEFACTS and (run_dir / "recipe.yaml").is_file():
        command = shlex.join(
            ["python", "scripts/push.py", str(run_dir), "--repo-id", "org/name", _visibility(private)]
        )
        raise InputError(
            f"'{folder}' belongs to the run in '{run_dir}', and its card names the repos of both its encoder and its "
            f"segmenter: push the run, {command}"
        )
    readme = folder / "README.md"
    if readme.is_file() and repo_id not in readme.read_text(encoding="utf-8", errors="replace"):
        tell(f"{readme} does not name {repo_id} and is pushed as it is: see whether it was written for another repo")


def check_finished(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raise `InputError` if a run has not written everything that is pushed."""
    stages = [name for name, stage in (settings.get("stages") or {}).items() if stage]
    expected = [f"stages/{name}/finished.json" for name in stages]
    expected += ["card.json", "encoder/config.json"]
    if "task" in stages:
        expected += ["segmenter/config.json", "report.json", "segmenter/report.json"]
    missing = [name for name in expected if not (run_dir / name).is_file()]
    if missing:
        command = shlex.join(["python", "scripts/run_gkd.py", str(run_dir / "recipe.yaml")])
        raise InputError(
            f"the run in '{run_dir}' is not finished, {missing[0]} is missing: go on with it first, {command}"
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
    has_task = bool((facts.settings.get("stages") or {}).get("task"))
    report = run_report(run_dir) if has_task else None
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


def run_report(run_dir: Path) -> dict[str, Any]:
    """The content of a run's report.json; raises `InputError` if it is missing or broken."""
    path = run_dir / "report.json"
    command = shlex.join(["python", "scripts/run_gkd.py", str(run_dir / "recipe.yaml")])
    remedy = f"remove it and measure again, {command}"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}): {remedy}") from error
    missing = [key for key in REPORT_KEYS if not isinstance(report, dict) or key not in report]
    if missing:
        raise InputError(f"{path} is no report of a run, it has no {missing[0]}: {remedy}")
    return report


def _again(folder: str | os.PathLike, repo_id: str, private: bool) -> str:
    """How to go on after a push that failed."""
    command = ["python", "scripts/push.py", str(folder), "--repo-id", repo_id, _visibility(private)]
    return f"Nothing is lost; to push again: {shlex.join(command)}"


def _visibility(private: bool) -> str:
    # Always told: what is left out is the recipe's, which may say otherwise than the command that failed.
    return "--private" if private else "--public"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
