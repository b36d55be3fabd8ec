"""A run that publishes itself: what is pushed, what a failing push leaves, and that no token is written anywhere."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants

from gkd_hf.hub import upload
from gkd_hf.training import pipeline
from tests.hub.server import LoopbackHub

ROOT = Path(__file__).parents[2]
REPO = "hub.repo_id=org/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process's client uses, with a token that may write; its client does not wait."""
    with LoopbackHub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", running.write_token)
        monkeypatch.setattr(upload.time, "sleep", lambda seconds: None)
        yield running


@pytest.fixture
def push() -> Callable[[list[str]], int]:
    """scripts/push.py's main."""
    spec = importlib.util.spec_from_file_location("push_script", ROOT / "scripts" / "push.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def commits(hub: LoopbackHub, repo_id: str) -> int:
    """How many commits a repo has beside the one it was made with."""
    repo = hub.repos.get(("model", repo_id))
    return sum(commit.summary.startswith("Upload") for commit in repo.commits) if repo else 0


def holding(folder: Path, token: str) -> list[Path]:
    """The files that hold a token."""
    return [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_run_pushes_itself_and_tells_no_token(
    run_gkd: ModuleType, recipe: Path, hub: LoopbackHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_gkd.main([str(recipe), REPO]) == 0
    assert (commits(hub, "org/tiny"), commits(hub, "org/tiny-custom")) == (1, 1)
    files = hub.repos["model", "org/tiny-custom"].files()
    assert (
        json.loads(files["report.json"])["targets"]
        == json.loads((tmp_path / "out/report.json").read_text())["targets"]
    )
    card = files["README.md"].decode()
    assert "license: other" in card and 'model="org/tiny-custom"' in card and "`custom`" in card
    assert "example.png" not in files  # whether it may be passed on is not known
    said = capfd.readouterr()
    assert f"pushed: {hub.url}/org/tiny-custom" in said.out
    assert hub.write_token not in said.out + said.err and not holding(tmp_path, hub.write_token)

    trained = (tmp_path / "out/stages/task/finished.json").stat().st_mtime_ns
    assert run_gkd.main([str(recipe), REPO]) == 0
    said = capfd.readouterr()
    assert (
        "was finished before" in said.out
        and "mIoU in percent" in said.out
        and "[task]" not in said.out
        and said.err.count("unchanged") == 2
    )
    assert (commits(hub, "org/tiny"), commits(hub, "org/tiny-custom")) == (1, 1)
    assert (tmp_path / "out/stages/task/finished.json").stat().st_mtime_ns == trained


def test_a_failing_push_comes_last_and_loses_nothing(
    run_gkd: ModuleType,
    recipe: Path,
    hub: LoopbackHub,
    push: Callable[[list[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.inject(503, path="/commit/", times=math.inf)
    assert run_gkd.main([str(recipe), REPO]) == 2
    said = capsys.readouterr()
    assert "mIoU in percent" in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in said.err and commits(hub, "org/tiny") == 0
    for name in ("report.json", "card.json", "encoder/README.md", "segmenter/model.safetensors"):
        assert (tmp_path / "out" / name).is_file(), name
    hub.faults.clear()
    command = shlex.split(errors[0].partition("to push again: ")[2])
    assert command[:2] == ["python", "scripts/push.py"] and push(command[2:]) == 0
    assert (commits(hub, "org/tiny"), commits(hub, "org/tiny-custom")) == (1, 1)


def test_a_token_that_may_only_read_stops_the_run_before_training(
    refused: Callable[..., str], hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert "may only read" in refused(REPO)
    assert not (tmp_path / "out").exists() and not hub.repos


def test_an_account_without_the_organisation_stops_the_run_before_training(
    refused: Callable[..., str], hub: LoopbackHub, tmp_path: Path
) -> None:
    assert "'elsewhere' is not an account" in refused("hub.repo_id=elsewhere/tiny")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("died_in", ["write_encoder", "write_segmenter", "write_cards"])
def test_old_weights_are_not_pushed_with_new_figures(
    run_gkd: ModuleType,
    recipe: Path,
    hub: LoopbackHub,
    push: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    died_in: str,
) -> None:
    assert run_gkd.main([str(recipe)]) == 0
    changed = "stages.task.evaluation_images=2"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, died_in, killed)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            run_gkd.main([str(recipe), changed])
    if died_in != "write_cards":  # by then everything is new
        assert push([str(tmp_path / "out"), "--repo-id", "org/tiny"]) == 2
        assert "is not finished" in capsys.readouterr().err and not hub.repos
    assert run_gkd.main([str(recipe), changed, REPO]) == 0
    report = json.loads(hub.repos["model", "org/tiny-custom"].files()["report.json"])
    assert report["settings"]["stages"]["task"]["evaluation_images"] == 2


def test_a_run_without_a_task_pushes_its_encoder(
    run_gkd: ModuleType, recipe: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    assert run_gkd.main([str(recipe), REPO, "stages.task=null"]) == 0
    assert list(hub.repos) == [("model", "org/tiny")]
    card = hub.repos["model", "org/tiny"].files()["README.md"].decode()
    assert "Not evaluated." in card and "model-index" not in card and "image-feature-extraction" in card
