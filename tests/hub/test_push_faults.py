"""Every way in which a push can fail, and what is found out about it before training."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants

from gkd_hf.errors import InputError
from gkd_hf.hub import upload
from gkd_hf.hub.push import check_push_rights, push_run
from tests.hub.pushing import COMMIT, CREATE, ENCODER, SEGMENTER, files_below, own_commits
from tests.hub.server import LoopbackHub

# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CREATE, COMMIT, "/preupload/", "validate-yaml", "objects/batch", rf"{ENCODER}$"])
@pytest.mark.parametrize("fault", [429, 503, "drop"])
def test_passing_trouble_is_waited_out(
    run_dir: Path, online: LoopbackHub, waits: list[float], path: str, fault: int | str
) -> None:
    online.inject(fault, path=path, times=2)
    push_run(run_dir, ENCODER)
    assert len(own_commits(online, ENCODER)) == len(own_commits(online, SEGMENTER)) == 1
    assert online.repos["model", ENCODER].files()["README.md"] == (run_dir / "encoder" / "README.md").read_bytes()
    assert waits


def test_retry_after_is_honoured(run_dir: Path, online: LoopbackHub, waits: list[float]) -> None:
    online.inject(429, path=COMMIT, times=2, retry_after=7)
    push_run(run_dir, ENCODER)
    assert waits.count(7) == 2
    online.inject(429, path=CREATE, times=1, retry_after=10**6)
    push_run(run_dir, ENCODER)
    assert max(waits) == upload.LONGEST_WAIT


def test_a_head_that_moved_is_read_again(run_dir: Path, online: LoopbackHub) -> None:
    online.inject(412, path=COMMIT)
    push_run(run_dir, ENCODER)
    assert len(own_commits(online, ENCODER)) == 1


@pytest.mark.parametrize("path", [CREATE, COMMIT])
@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (401, "hf auth login"),
        (403, "the role write"),
        (404, "check that 'org' exists"),
        (412, "somebody else changed the repo"),
        (429, "429, 6 times"),
        (503, "503, 6 times"),
        ("drop", "check the network"),
    ],
)
def test_lasting_trouble_is_one_line_and_its_command_goes_on(
    run_dir: Path, online: LoopbackHub, refused, script: ModuleType, path: str, fault: int | str, advice: str
) -> None:
    if fault == "drop" and path == COMMIT:
        path = "/preupload/"  # a commit whose answer alone was lost has been made
    before = {name: content for name, content in files_below(run_dir).items() if "README" not in name}
    online.inject(fault, path=path, times=math.inf)
    line = refused(run_dir, "--repo-id", ENCODER)
    assert advice in line and online.write_token not in line
    assert not own_commits(online, ENCODER) and not own_commits(online, SEGMENTER)
    after = files_below(run_dir)
    assert all(after[name] == content for name, content in before.items() if name != "card.json")
    online.faults.clear()
    command = shlex.split(line.partition("to push again: ")[2])
    assert command[:2] == ["python", "scripts/push.py"] and script.main(command[2:]) == 0
    assert len(own_commits(online, ENCODER)) == len(own_commits(online, SEGMENTER)) == 1


@pytest.mark.parametrize(("recipe_says", "asked"), [("false", "--private"), ("true", "--public")])
def test_the_command_that_goes_on_keeps_the_visibility(
    run_dir: Path, online: LoopbackHub, refused, script: ModuleType, recipe_says: str, asked: str
) -> None:
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("private: true", f"private: {recipe_says}"))
    online.inject(403, path=COMMIT, times=math.inf)
    command = shlex.split(refused(run_dir, "--repo-id", "org/z", asked).partition("to push again: ")[2])
    assert asked in command
    online.faults.clear()
    assert script.main(command[2:]) == 0
    assert online.repos["model", "org/z-toy_city"].private is (asked == "--private")


def test_a_failure_between_the_two_says_which_is_there(run_dir: Path, online: LoopbackHub, refused) -> None:
    online.inject(403, path=COMMIT, times=math.inf, after=1)
    line = refused(run_dir, "--repo-id", ENCODER)
    assert f"could not push {SEGMENTER}" in line and f"({online.url}/{ENCODER} was pushed)" in line
    assert line.endswith(f"python scripts/push.py {run_dir} --repo-id {ENCODER} --private")
    assert len(own_commits(online, ENCODER)) == 1 and not own_commits(online, SEGMENTER)


def test_tokens_that_may_not_write(run_dir: Path, online: LoopbackHub, refused, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", online.read_token)
    assert "(403)" in refused(run_dir, "--repo-id", ENCODER)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    assert "(401)" in refused(run_dir, "--repo-id", ENCODER)
    assert not online.repos


# -- before training --------------------------------------------------------------------------------------------------


def test_rights_are_known_before_training(
    online: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_push_rights(ENCODER)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="may only read"):
        check_push_rights(ENCODER, token=online.read_token)
    with pytest.raises(InputError, match="does not accept the token"):
        check_push_rights(ENCODER, token="hf_" + "x" * 30)
    online.inject(503, path="whoami", times=math.inf)
    check_push_rights(ENCODER)
    assert "not known yet" in capsys.readouterr().err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check_push_rights(ENCODER)
    assert "check the network" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        check_push_rights(ENCODER)


def account(role: str = "write", **more: object) -> dict:
    """What the Hub says of a token."""
    orgs = [{"name": "org", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
    return {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role, **more}}}


def fine_grained(name: str, *permissions: str) -> dict:
    """What the Hub says of a fine-grained token with permissions for one account or repo."""
    scope = {"entity": {"type": "org", "name": name}, "permissions": list(permissions)}
    return account("fineGrained", fineGrained={"global": [], "scoped": [scope]})


@pytest.mark.parametrize(
    ("who", "repo_ids", "why"),
    [
        (account(), ["org/x", "org/x-y"], None),
        (account(), ["Me/x"], None),
        (account(), ["other/x"], "'other' is not an account that the token can write to"),
        (account(), ["club/x"], "may only read in 'club'"),
        (account("read"), ["me/x"], "may only read"),
        (fine_grained("org", "repo.write"), ["org/x", "org/x-y"], None),
        (fine_grained("other", "repo.write"), ["org/x"], "write access to other, not to org/x"),
        (fine_grained("org", "repo.content.read"), ["org/x"], "write access to no repos"),
        (fine_grained("org/x", "repo.write"), ["org/x"], None),
        (fine_grained("org/x", "repo.write"), ["org/x", "org/x-y"], "not to org/x-y"),
    ],
)
def test_rights_are_those_of_the_account_the_repo_is_in(
    online: LoopbackHub, monkeypatch: pytest.MonkeyPatch, who: dict, repo_ids: list[str], why: str | None
) -> None:
    monkeypatch.setattr(upload.HfApi, "whoami", lambda self: who)
    if why is None:
        check_push_rights(*repo_ids)
    else:
        with pytest.raises(InputError, match=why):
            check_push_rights(*repo_ids)
