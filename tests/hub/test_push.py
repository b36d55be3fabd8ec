"""Pushing over real HTTP with the real client: what arrives, what stays, and what is never sent."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars

from gkd_hf import (
    GKDDistillationArguments,
    GKDSegmentationArguments,
    GKDSegmentationTrainer,
    GKDStudentForSemanticSegmentation,
    GKDStudentModel,
)
from gkd_hf.errors import InputError
from gkd_hf.hub.push import push_folder, push_run
from tests.hub.pushing import ENCODER, SEGMENTER, files_below, own_commits
from tests.hub.runs import finished_run
from tests.hub.server import LoopbackHub
from tests.tiny import ENCODERS

# -- what arrives -----------------------------------------------------------------------------------------------------


def test_both_repos_get_one_commit_each_and_nothing_of_the_rest(run_dir: Path, online: LoopbackHub) -> None:
    urls = push_run(run_dir, ENCODER)
    assert urls == [f"{online.url}/{ENCODER}", f"{online.url}/{SEGMENTER}"]
    for repo_id, folder in ((ENCODER, "encoder"), (SEGMENTER, "segmenter")):
        repo = online.repos["model", repo_id]
        assert repo.private and len(own_commits(online, repo_id)) == 1
        pushed = {name: content for name, content in repo.files().items() if name != ".gitattributes"}
        assert pushed == files_below(run_dir / folder)
        assert not [name for name in pushed if name.endswith((".bin", ".pt", ".pth", ".pkl", ".md~"))]
    assert f'from_pretrained("{ENCODER}")' in (run_dir / "encoder" / "README.md").read_text()
    assert {"handler.py", "modeling_gkd.py", "requirements.txt", "report.png"} <= set(pushed)


def test_pushing_again_changes_nothing_and_a_change_is_one_commit(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    push_run(run_dir, ENCODER)
    capsys.readouterr()
    push_run(run_dir, ENCODER)
    said = capsys.readouterr().err
    assert said.count("unchanged") == 2 and "No files have been modified" not in said
    assert len(own_commits(online, ENCODER)) == len(own_commits(online, SEGMENTER)) == 1
    (run_dir / "segmenter" / "requirements.txt").write_text("pillow\n")
    push_run(run_dir, ENCODER)
    assert (len(own_commits(online, ENCODER)), len(own_commits(online, SEGMENTER))) == (1, 2)
    assert online.repos["model", SEGMENTER].files()["requirements.txt"] == b"pillow\n"


def change(hub: LoopbackHub, repo_id: str, **files: bytes) -> None:
    """Somebody else's commit."""
    hub.repos["model", repo_id].add_commit(
        "Edit", added={name.replace("__", "."): data for name, data in files.items()}
    )


def test_only_what_was_pushed_from_here_is_deleted(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = ["model-00001-of-00002.safetensors", "errors.py", "onnx/own.onnx", "notes.md", "logs/model.safetensors"]
    online.add_model(ENCODER, dict.fromkeys(foreign, b"theirs"), private=True)
    ours = run_dir / "encoder" / "onnx" / "model.onnx"
    ours.parent.mkdir()
    ours.write_bytes(b"\0graph")
    (run_dir / "encoder" / "handler.py").write_text("ours")
    push_run(run_dir, ENCODER)
    repo = online.repos["model", ENCODER]
    assert {*foreign, "onnx/model.onnx", "handler.py"} <= set(repo.files())
    change(online, ENCODER, handler__py=b"theirs now")
    ours.unlink()
    (run_dir / "encoder" / "handler.py").unlink()
    capsys.readouterr()
    push_run(run_dir, ENCODER)
    left = repo.files()
    assert {*foreign, "handler.py"} <= set(left) and "onnx/model.onnx" not in left
    said = capsys.readouterr().err
    assert f"deleted from {ENCODER}, since no longer exported: onnx/model.onnx" in said
    named = next(line for line in said.splitlines() if line.startswith(f"left in {ENCODER}, since"))
    assert all(name in named for name in ("errors.py", "onnx/own.onnx", "handler.py")) and "notes.md" not in named


def test_without_a_memory_nothing_is_deleted(run_dir: Path, online: LoopbackHub) -> None:
    (run_dir / "encoder" / "handler.py").write_text("ours")
    push_run(run_dir, ENCODER)
    (run_dir / "encoder" / "handler.py").unlink()
    for content in ("", "[]", '{"org/gkd-x": 3}'):
        (run_dir / "pushed.json").write_text(content)
        push_run(run_dir, ENCODER)
        assert "handler.py" in online.repos["model", ENCODER].files()


def test_a_card_changed_on_the_hub_stays(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    push_run(run_dir, ENCODER)
    repo, written = online.repos["model", ENCODER], (run_dir / "encoder" / "README.md").read_bytes()
    change(online, ENCODER, README__md=written + b"\nMine.\n")
    (run_dir / "recipe.yaml").write_text(
        (run_dir / "recipe.yaml").read_text().replace("license: null", "license: mit")
    )
    for _ in range(2):
        capsys.readouterr()
        push_run(run_dir, ENCODER)
        said = capsys.readouterr().err
        assert repo.files()["README.md"] == written + b"\nMine.\n"
        assert f"left in {ENCODER}: README.md" in said and f"left in {SEGMENTER}" not in said
    assert b"license: mit" in online.repos["model", SEGMENTER].files()["README.md"]
    repo.add_commit("Back", added={"README.md": written})
    push_run(run_dir, ENCODER)
    assert b"license: mit" in repo.files()["README.md"]


def test_a_card_of_unknown_origin_stays_and_other_files_are_named_when_replaced(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    online.add_model(ENCODER, {"README.md": b"# By hand\n", "config.json": b"{}"}, private=True)
    push_run(run_dir, ENCODER)
    files = online.repos["model", ENCODER].files()
    assert files["README.md"] == b"# By hand\n"
    assert files["config.json"] == (run_dir / "encoder" / "config.json").read_bytes()
    said = capsys.readouterr().err
    assert f"left in {ENCODER}: README.md" in said
    assert f"replaced in {ENCODER}, whose history keeps what was there: config.json" in said


@pytest.mark.parametrize("readme", [None, b"---\nlicense: mit\n---\n", b"", b"---\nlicense: mit\n---\n# Mine\n"])
def test_a_repo_made_on_the_page_takes_the_card(run_dir: Path, online: LoopbackHub, readme: bytes | None) -> None:
    files = {".gitattributes": b"*.bin filter=lfs\n"} | ({} if readme is None else {"README.md": readme})
    online.add_model(ENCODER, files, private=True)
    push_run(run_dir, ENCODER)
    there = online.repos["model", ENCODER].files()
    taken = not (readme or b"").endswith(b"Mine\n")
    assert there["README.md"] == ((run_dir / "encoder" / "README.md").read_bytes() if taken else readme)
    assert "model.safetensors" in there and b"bin filter" in there[".gitattributes"]


def test_bars_are_for_terminals(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enable_progress_bars()  # whatever a run in this process said
    push_run(run_dir, ENCODER)
    assert "%|" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    (run_dir / "encoder" / "model.safetensors").write_bytes(b"\0other")
    push_run(run_dir, ENCODER)
    assert "%|" in capsys.readouterr().err


def test_what_is_no_export_is_left_out_and_named(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    extra = ["training_args.bin", "optimizer.pt", "teacher.pth", "heads.safetensors", ".env", "sub/config.json"]
    for name in extra:
        (run_dir / "encoder" / name).parent.mkdir(exist_ok=True)
        (run_dir / "encoder" / name).write_bytes(b"x")
    (run_dir / "encoder" / "handler.py").symlink_to(secret)
    push_run(run_dir, ENCODER)
    assert not {*extra, "handler.py"} & set(online.repos["model", ENCODER].files())
    said = capsys.readouterr().err
    assert all(name in said for name in extra if name != ".env")


@pytest.mark.parametrize(("existing", "asked"), [(False, True), (True, False)])
def test_an_existing_repo_keeps_its_visibility(
    run_dir: Path, online: LoopbackHub, capsys: pytest.CaptureFixture[str], existing: bool, asked: bool
) -> None:
    online.add_model(ENCODER, {"notes.md": b""}, private=existing)
    push_run(run_dir, ENCODER, private=asked)
    assert online.repos["model", ENCODER].private is existing
    assert online.repos["model", SEGMENTER].private is asked
    assert f"{ENCODER} exists and stays {'private' if existing else 'public'}" in capsys.readouterr().err


def test_a_card_edited_by_hand_is_pushed_as_it_is(run_dir: Path, online: LoopbackHub) -> None:
    readme = run_dir / "encoder" / "README.md"
    readme.write_text(readme.read_text().replace("# ", "# My ", 1))
    push_run(run_dir, ENCODER)
    assert b"# My " in online.repos["model", ENCODER].files()["README.md"]
    assert f'"{ENCODER}"'.encode() not in online.repos["model", ENCODER].files()["README.md"]


def test_the_licence_may_be_named_after_the_training(run_dir: Path, online: LoopbackHub) -> None:
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("license: null", "license: mit"))
    push_run(run_dir, ENCODER)
    for repo_id in (ENCODER, SEGMENTER):
        assert b"license: mit" in online.repos["model", repo_id].files()["README.md"]


def test_the_recipe_says_where(tmp_path: Path, online: LoopbackHub, script: ModuleType) -> None:
    run_dir = finished_run(tmp_path / "run", "hub.repo_id=org/y", "hub.private=false", "stages.task.data=toy_city")
    assert script.main([str(run_dir)]) == 0
    assert not online.repos["model", "org/y"].private and not online.repos["model", "org/y-toy_city"].private


def test_source_names_become_repo_names() -> None:
    from gkd_hf.hub.repo_names import segmenter_repo

    assert segmenter_repo("org/gkd-x", "toy_city:night") == "org/gkd-x-toy_city-night"
    assert segmenter_repo("org/gkd-x", "custom:a b/ü") == "org/gkd-x-custom-a-b--"


# -- what may not be pushed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "config.json", "report.json"])
def test_a_token_in_a_text_file_stops_everything(run_dir: Path, online: LoopbackHub, refused, name: str) -> None:
    folder = run_dir / "segmenter"
    for token in ("hf_" + "a1B2" * 8, online.write_token):
        original = (folder / name).read_text()
        (folder / name).write_text(original + f"\n<!-- {token} -->\n")
        with pytest.raises(InputError, match=f"{name} holds an access token") as caught:
            push_folder(folder, SEGMENTER)
        assert token not in str(caught.value)
        (folder / name).write_text(original)
    assert not online.repos


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("stages/task/finished.json", "go on with it first, python scripts/run_gkd.py"),
        ("segmenter/config.json", "go on with it first"),
        ("encoder/config.json", "go on with it first"),
        ("card.json", "go on with it first"),
        ("report.json", "go on with it first"),
        ("recipe.yaml", "is no run's folder"),
        ("encoder/model.safetensors", "no finished export: it has no model.safetensors"),
    ],
)
def test_a_half_finished_run_is_refused(run_dir: Path, online: LoopbackHub, refused, missing: str, named: str) -> None:
    (run_dir / missing).unlink()
    assert named in refused(run_dir, "--repo-id", ENCODER)
    assert not online.repos


def test_bad_arguments_are_one_line(run_dir: Path, online: LoopbackHub, refused, tmp_path: Path) -> None:
    assert "there is no run in" in refused(tmp_path / "nowhere", "--repo-id", ENCODER)
    assert "--repo-id org/name" in refused(run_dir)
    assert "no repo id" in refused(run_dir, "--repo-id", "gkd-x")
    assert "no repo id" in refused(run_dir, "--repo-id", "org/x/y")
    long = "org/" + "x" * 90
    assert f"'{long}-toy_city' is no repo id" in refused(run_dir, "--repo-id", long)
    assert not online.requests


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("recipe.yaml", "hub: x\n", "hub is 'x'"),
        ("recipe.yaml", "hub: {repo_id: 3}\n", "hub.repo_id is 3"),
        ("recipe.yaml", "hub: {private: 'no'}\n", "hub.private is 'no'"),
        ("recipe.yaml", "hub: {private: null}\n", "hub.private is empty"),
        ("recipe.yaml", "stages: [task]\n", "stages is no mapping"),
        ("recipe.yaml", "stages: {task: 1}\n", "stages is no mapping"),
        ("recipe.yaml", "stages: {task: {epochs: 1}}\n", "stages.task.data"),
        ("report.json", "{", "report.json cannot be read"),
        ("report.json", "[]", "has no source"),
        ("report.json", "{}", "has no source"),
    ],
)
def test_broken_files_of_a_run_are_one_line(
    run_dir: Path, online: LoopbackHub, refused, name: str, content: str, named: str
) -> None:
    (run_dir / name).write_text(content)
    line = refused(run_dir, "--repo-id", ENCODER)
    assert named in line and name in line
    assert not online.repos


def test_a_run_with_spaces_in_its_name_gets_a_command_that_can_be_pasted(run_dir: Path, refused) -> None:
    place = run_dir.rename(run_dir.with_name("my run; 1"))
    (place / "card.json").unlink()
    command = shlex.split(refused(place, "--repo-id", ENCODER).partition("go on with it first, ")[2])
    assert command == ["python", "scripts/run_gkd.py", str(place / "recipe.yaml")]


def test_one_folder_of_a_run_is_not_pushed_with_a_card_for_other_repos(
    run_dir: Path, online: LoopbackHub, refused, script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for artefact in ("encoder", "segmenter"):
        line = refused(run_dir / artefact, "--repo-id", "org/enc")
        assert f"push the run, python scripts/push.py {run_dir} --repo-id org/name --private" in line
    assert not online.requests
    alone = shutil.copytree(run_dir / "encoder", tmp_path / "alone")
    assert script.main([str(alone), "--repo-id", "org/enc"]) == 0
    assert "README.md does not name org/enc" in capsys.readouterr().err


def test_offline_and_logged_out_are_told_before_anything_is_sent(
    run_dir: Path, online: LoopbackHub, refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(run_dir, "--repo-id", ENCODER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in refused(run_dir, "--repo-id", ENCODER)
    assert not online.requests


# -- trainers ---------------------------------------------------------------------------------------------------------


def test_trainers_push_the_finished_model_and_no_checkpoint(
    tmp_path: Path, online: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.test_trainers import distillation_trainer, segmentation_trainer

    torch.manual_seed(0)
    for make, repo_id, auto in (
        (distillation_trainer, "org/of-trainer", "AutoModel.from_pretrained"),
        (segmentation_trainer, "org/of-task", "AutoModelForSemanticSegmentation.from_pretrained"),
    ):
        trainer = make(tmp_path / repo_id, max_steps=2)
        trainer.train()
        with pytest.raises(InputError, match="say where to push"):
            trainer.push_to_hub()
        assert trainer.push_to_hub(repo_id=repo_id) == f"{online.url}/{repo_id}"
        repo = online.repos["model", repo_id]
        assert repo.private and len(repo.commits) == 2 and repo.commits[-1].summary == "End of training"
        assert "model.safetensors" in repo.files() and not [name for name in repo.files() if name.endswith(".bin")]
        card = repo.files()["README.md"].decode()
        assert f'{auto}("{repo_id}"' in card and "license: other" in card and str(tmp_path) not in card
        trainer.create_model_card(license="mit")
        assert "license: mit" in (tmp_path / repo_id / "README.md").read_text()


def test_arguments_that_would_push_checkpoints_are_refused(tmp_path: Path) -> None:
    for kind in (GKDDistillationArguments, GKDSegmentationArguments):
        with pytest.raises(InputError, match="trainer.push_to_hub"):
            kind(str(tmp_path), push_to_hub=True, use_cpu=True)
        with pytest.raises(InputError, match="hub_token"):
            kind(str(tmp_path), hub_token="hf_secret", use_cpu=True)
    arguments = GKDSegmentationArguments(str(tmp_path), use_cpu=True, max_steps=1)
    arguments.set_push_to_hub("org/x")
    model = GKDStudentForSemanticSegmentation.from_student(
        GKDStudentModel.from_encoder(ENCODERS["resnet"]), num_labels=3
    )
    with pytest.raises(InputError, match="trainer.push_to_hub"):
        GKDSegmentationTrainer(model, arguments, [])
