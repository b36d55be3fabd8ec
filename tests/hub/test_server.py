"""The loopback Hub, asked by the real clients: it must be as strict as the Hub, or what passes here proves little."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from .conftest import ROOT
from .repos import git_oid, sha256
from .server import LoopbackHub

WEIGHTS = bytes(range(256)) * 40

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client, to its own HTTP library


@pytest.fixture
def api(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    # Xet would take over LFS files; this constant is the one that the environment variable sets.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=hub.write_token)


def reader(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.read_token)


def anonymous(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


def test_push_list_and_delete(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "README.md").write_text("---\npipeline_tag: image-segmentation\ntags: [gkd]\n---\n# x\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "onnx" / "model.onnx").write_bytes(WEIGHTS[::-1])
    (tmp_path / "empty.txt").write_bytes(b"")
    assert api.create_repo("org/x", private=True).repo_id == "org/x"
    assert api.create_repo("org/x", private=True, exist_ok=True).repo_id == "org/x"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/x")
    first = api.upload_folder(repo_id="org/x", folder_path=tmp_path, commit_message="Add x")
    repo = hub.repos["model", "org/x"]
    assert [commit.summary for commit in repo.commits] == ["initial commit", "Add x"]
    assert repo.files()["model.safetensors"] == WEIGHTS
    assert repo.commits[-1].lfs == {"model.safetensors", "onnx/model.onnx"}
    names = [".gitattributes", "README.md", "config.json", "empty.txt", "model.safetensors", "onnx/model.onnx"]
    assert api.list_repo_files("org/x") == names
    info = api.model_info("org/x", files_metadata=True)
    assert (info.sha, info.private, info.pipeline_tag, info.tags) == (first.oid, True, "image-segmentation", ["gkd"])
    in_lfs = {each.rfilename: each.lfs.sha256 for each in info.siblings if each.lfs}
    assert in_lfs == {"model.safetensors": sha256(WEIGHTS), "onnx/model.onnx": sha256(WEIGHTS[::-1])}
    again = api.upload_folder(repo_id="org/x", folder_path=tmp_path, commit_message="Add x again")
    assert again.oid == first.oid and len(repo.commits) == 2
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == 2  # nothing was sent again
    (tmp_path / "config.json").write_text('{"a": 1}')
    api.upload_folder(repo_id="org/x", folder_path=tmp_path, delete_patterns="onnx/*")
    assert "onnx/model.onnx" in repo.files(first.oid) and repo.files()["config.json"] == b'{"a": 1}'
    api.delete_file("empty.txt", "org/x")
    assert "empty.txt" not in repo.files()
    assert [each.commit_id for each in api.list_repo_commits("org/x")] == [c.oid for c in reversed(repo.commits)]
    api.delete_repo("org/x")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/x")


def test_download_pins_and_hashes(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    repo = hub.add_model("org/x", {"config.json": b"1", "model.safetensors": WEIGHTS})
    old = repo.commits[-1].oid
    hub.add_model("org/x", {"config.json": b"22"})
    api.create_tag("org/x", tag="v2")
    api.create_branch("org/x", branch="side", revision=old)
    assert [each.name for each in api.list_repo_refs("org/x").branches] == ["main", "side"]
    for revision, content in ((old, b"1"), ("main", b"22"), ("v2", b"22"), ("side", b"1")):
        folder = Path(api.snapshot_download("org/x", revision=revision, cache_dir=tmp_path))
        assert (folder / "config.json").read_bytes() == content
        assert folder.name == (old if content == b"1" else repo.commits[-1].oid)
        assert (folder / "model.safetensors").resolve().name == sha256(WEIGHTS)
        assert (folder / "config.json").resolve().name == git_oid(content)
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    # The weights were fetched once, from the other host name, and without the token.
    assert len([path for method, path, _ in hub.requests if method == "GET" and path.startswith("/storage")]) == 1


def test_the_storage_wants_no_token_and_a_signature(hub: LoopbackHub) -> None:
    hub.add_model("org/x", {"model.safetensors": WEIGHTS})
    link = f"{hub.url}/org/x/resolve/main/model.safetensors"
    href = get_session().head(link, follow_redirects=False).headers["Location"]
    assert "//localhost:" in href
    assert get_session().get(href).content == WEIGHTS
    assert get_session().get(href.split("?")[0]).status_code == 403
    assert get_session().get(href, headers={"Authorization": f"Bearer {hub.read_token}"}).status_code == 400
    assert get_session().put(href, content=b"something else").status_code == 400


def test_ranges(hub: LoopbackHub) -> None:
    hub.add_model("org/x", {"model.safetensors": WEIGHTS, "a.txt": b"0123456789"})

    def ask(path: str, wanted: str) -> tuple[int, bytes]:
        answer = get_session().get(f"{hub.url}/org/x/resolve/main/{path}", headers={"Range": wanted})
        return answer.status_code, answer.content

    assert ask("a.txt", "bytes=2-4") == (206, b"234")
    assert ask("a.txt", "bytes=7-") == (206, b"789")
    assert ask("a.txt", "bytes=-3") == (206, b"789")
    assert ask("a.txt", "bytes=20-30")[0] == 416
    assert ask("model.safetensors", "bytes=300-309") == (206, WEIGHTS[300:310])


def test_who_may_do_what(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader(hub).whoami()["auth"]["accessToken"]["role"] == "read"
    hub.add_model("org/open", {"config.json": b"{}"})
    hub.add_model("org/closed", {"config.json": b"{}"}, private=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader(hub).create_repo("org/y")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader(hub).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/open")
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous(hub).create_repo("org/y")
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous(hub).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/open")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("someone-else/y")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_unknown").model_info("org/open")
    assert set(hub.repos) == {("model", "org/open"), ("model", "org/closed")}
    assert len(hub.repos["model", "org/open"].commits) == 1
    assert anonymous(hub).model_info("org/open").id == "org/open"
    assert [model.id for model in anonymous(hub).list_models(author="org")] == ["org/open"]
    assert [model.id for model in api.list_models(author="org")] == ["org/closed", "org/open"]
    assert not list(api.list_models(author="tester"))
    assert reader(hub).model_info("org/closed").private
    with pytest.raises(RepositoryNotFoundError, match="401"):
        anonymous(hub).hf_hub_download("org/closed", "config.json", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError, match="404"):
        api.model_info("org/missing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/open", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("org/open", "missing.json", cache_dir=tmp_path)


def test_a_gated_repo_gives_files_only_to_those_on_its_list(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    repo = hub.add_model("org/gated", {"config.json": b"{}"}, gated=True)
    assert api.model_info("org/gated").gated == "manual"
    with pytest.raises(GatedRepoError, match="403"):
        api.hf_hub_download("org/gated", "config.json", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError, match="401"):
        anonymous(hub).hf_hub_download("org/gated", "config.json", cache_dir=tmp_path)
    repo.granted.add(hub.write_token)
    assert Path(api.hf_hub_download("org/gated", "config.json", cache_dir=tmp_path)).read_bytes() == b"{}"


def test_a_commit_on_something_old_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    old = hub.add_model("org/x", {"a": b"1"}).commits[-1].oid
    hub.add_model("org/x", {"a": b"2"})
    operations = [CommitOperationAdd("b", b"3")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/x", operations, commit_message="late", parent_commit=old)
    assert "b" not in hub.repos["model", "org/x"].files()


def test_a_bad_card_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_model("org/x", {"a": b"1"})
    with pytest.raises(ValueError, match="not YAML"):
        api.upload_file(path_or_fileobj=b"---\na: [1\n---\n", path_in_repo="README.md", repo_id="org/x")


def test_spaces(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo("org/demo", repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="app.py", repo_id="org/demo", repo_type="space")
    assert api.space_info("org/demo").sdk == "gradio"
    assert hub.repos["space", "org/demo"].files()["app.py"] == b"x"
    assert ("model", "org/demo") not in hub.repos


@pytest.mark.parametrize("status", [401, 403, 404, 412, 503])
def test_injected_statuses(hub: LoopbackHub, status: int) -> None:
    hub.add_model("org/x", {"a": b"1"})
    hub.inject(status, method="GET", path="^/api/models/", after=1)
    link = f"{hub.url}/api/models/org/x"
    assert [get_session().get(link).status_code for _ in range(3)] == [200, status, 200]
    assert [each[2] for each in hub.requests] == [200, status, 200]


def test_injected_rate_limit_says_when_to_come_back(hub: LoopbackHub) -> None:
    hub.add_model("org/x", {"a": b"1"})
    hub.inject(429, retry_after=7, times=math.inf)
    answers = [get_session().get(f"{hub.url}/api/models/org/x") for _ in range(2)]
    assert [(each.status_code, each.headers["Retry-After"]) for each in answers] == [(429, "7")] * 2


def test_injected_damage(hub: LoopbackHub) -> None:
    content = b"0123456789" * 10
    hub.add_model("org/x", {"a.txt": content})
    link = f"{hub.url}/org/x/resolve/main/a.txt"
    hub.inject("flip")
    flipped = get_session().get(link).content
    assert sum(bin(a ^ b).count("1") for a, b in zip(content, flipped, strict=True)) == 1
    for fault in ("truncate", "drop"):
        hub.inject(fault)
        with pytest.raises(Exception, match="(?i)disconnected|closed|incomplete|without sending"):
            get_session().get(link)
    hub.inject("delay", seconds=0.2)
    began = time.monotonic()
    assert get_session().get(link).content == content
    assert time.monotonic() - began >= 0.2


def test_an_answer_that_is_lost_was_still_carried_out(hub: LoopbackHub, api: HfApi) -> None:
    hub.add_model("org/x", {"a": b"1"})
    hub.inject("drop", path="/commit/main")
    with pytest.raises(Exception, match="(?i)disconnected|closed|without sending"):
        api.create_commit("org/x", [CommitOperationAdd("b", b"3")], commit_message="add b")
    assert hub.repos["model", "org/x"].files()["b"] == b"3"


LIBRARIES = """
import json, sys
import datasets, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

torch.manual_seed(0)
config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
model = ResNetModel(config).eval()
model.push_to_hub("org/tiny", private=True)
SegformerImageProcessorPil(size={"height": 32, "width": 32}).push_to_hub("org/tiny")
loaded = AutoModel.from_pretrained("org/tiny").eval()
pixels = torch.rand(1, 3, 32, 32)
same = torch.equal(model(pixels).pooler_output, loaded(pixels).pooler_output)

rows = datasets.Dataset.from_dict({"id": [f"r{i}" for i in range(50)], "x": [list(range(200))] * 50})
rows.push_to_hub("org/rows", private=True)
stream = datasets.load_dataset("org/rows", split="train", streaming=True)
print(json.dumps({
    "same": same,
    "type": AutoConfig.from_pretrained("org/tiny").model_type,
    "size": AutoImageProcessor.from_pretrained("org/tiny").size["height"],
    "ids": [row["id"] for row in stream],
}))
"""


def test_transformers_and_datasets(
    hub: LoopbackHub, hub_process: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    said = json.loads(hub_process(LIBRARIES).stdout.splitlines()[-1])
    assert said == {"same": True, "type": "resnet", "size": 32, "ids": [f"r{i}" for i in range(50)]}
    assert "model.safetensors" in hub.repos["model", "org/tiny"].commits[-1].lfs
    assert hub.repos["dataset", "org/rows"].private
    assert 206 in {status for _, path, status in hub.requests if path.startswith("/storage")}


def test_started_by_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tests.hub.server", "--model", f"org/x={tmp_path}", "--read-only"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        try:
            line = process.stdout.readline()
            found = re.match(r"export HF_ENDPOINT=(http://127\.0\.0\.1:\d+) HF_TOKEN=(hf_\w+) ", line)
            assert found, line
            info = HfApi(endpoint=found.group(1), token=found.group(2)).model_info("org/x")
            assert [each.rfilename for each in info.siblings] == ["config.json"]
        finally:
            process.terminate()


def test_environment_has_nothing_of_the_machines(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", os.devnull)
    environment = hub.environment(tmp_path, None, MORE="1")
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"} & set(environment)
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"], environment["MORE"]) == (hub.url, str(tmp_path), "1")
    assert hub.environment(tmp_path)["HF_TOKEN"] == hub.write_token
