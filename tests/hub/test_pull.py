"""Teachers, students and data from the Hub: what is fetched is what was pinned, whole, or there is one clear line."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from gkd_hf.models.loading import load_encoder
from gkd_hf.models.pull import TRIES
from tests.data.samples import make_rows, write_shard
from tests.tiny import ENCODERS

from .repos import sha256
from .server import LoopbackHub

Files = dict[str, bytes]
Process = Callable[..., subprocess.CompletedProcess[str]]

CASES = """
import json, logging, sys
import torch
from gkd_hf.errors import InputError
from gkd_hf.models import pull
from gkd_hf.models.loading import load_encoder
from gkd_hf.data.shards import count_rows, open_rows

pull.FIRST_WAIT = 0.01

def total(model):
    return round(next(model.parameters()).abs().sum().item(), 4)

def weights(source, **settings):
    return total(load_encoder(source, **settings)[0])

def rows(source, split="train", **settings):
    first = next(iter(open_rows(source, split, columns=("image",), **settings)))
    return [first["id"], count_rows(source, split, **settings)]

def pipeline(path):
    from gkd_hf.training.pipeline import Pipeline, new_student
    from gkd_hf.training.recipe_file import load_recipe
    from gkd_hf.training.recipe_data import DataUse
    recipe = load_recipe(path)
    run = Pipeline(recipe)
    use = DataUse("custom", "train", False)
    models = [new_student(recipe).encoder, *(teacher.encoder for teacher in run._teachers())]
    return [*map(total, models), next(iter(run.data.rows(use)))["id"], run.data.num_rows(use)]

def upload(source, folder):
    from huggingface_hub import HfApi
    HfApi().upload_folder(repo_id=source, folder_path=folder)

calls = {"weights": weights, "rows": rows, "pipeline": pipeline, "upload": upload, "commit": pull.pulled_commit}
found = {}
for name, call, arguments, settings in json.load(open(sys.argv[1])):
    try:
        found[name] = calls[call](*arguments, **settings)
    except InputError as error:
        found[name] = f"InputError: {error}"
    except BaseException as error:
        found[name] = f"crashed: {type(error).__name__}: {error}"
print(json.dumps(found))
"""


def tiny_model(folder: Path, seed: int, kind: str = "resnet") -> tuple[Files, float]:
    """Files of a tiny encoder, and the sum by which its weights are known."""
    torch.manual_seed(seed)
    encoder = load_encoder(ENCODERS[kind])[0]
    encoder.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, round(next(encoder.parameters()).abs().sum().item(), 4)


def config(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Files, float]]:
    """An old and a new state of a model."""
    made = [tiny_model(tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]
    assert made[0][1] != made[1][1]
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """An old and a new state of a data set: rows 0 … 4, and rows 1 … 3."""
    folder, made = tmp_path_factory.mktemp("rows"), []
    for first, last in ((0, 5), (1, 4)):
        write_shard(folder / "train.parquet", make_rows(5)[first:last])
        split = {"name": "train", "num_bytes": 1, "num_examples": last - first}
        card = f"---\ndataset_info: {json.dumps({'splits': [split]})}\n---\n".encode()
        shard = (folder / "train.parquet").read_bytes()
        made.append({"README.md": card, "data/train-00000-of-00001.parquet": shard})
    return made


class Script:
    """Cases for one process, by name, and what came of them."""

    def __init__(self, process: Process, tmp_path: Path):
        self._process, self._tmp_path = process, tmp_path
        self._cases: list[tuple[str, str, list[Any], dict[str, Any]]] = []

    def add(self, name: str, call: str, *arguments: Any, **settings: Any) -> None:
        self._cases.append((name, call, list(arguments), settings))

    def run(self, **settings: Any) -> dict[str, Any]:
        path = self._tmp_path / "cases.json"
        path.write_text(json.dumps(self._cases))
        self._cases = []
        done = self._process(CASES, str(path), **settings)
        self.log = done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def script(hub_process: Process, tmp_path: Path) -> Iterator[Script]:
    return Script(hub_process, tmp_path)


def test_revisions_and_then_offline(
    hub: LoopbackHub, script: Script, models: list[tuple[Files, float]], shards: list[Files], tmp_path: Path
) -> None:
    (old, old_sum), (new, new_sum) = models
    commits = {}
    for name in ("student", "teacher"):
        commits[name] = [hub.add_model(f"org/{name}", files).commits[-1].oid for files in (old, new)]
    data = [hub.add_dataset("org/rows", files).commits[-1].oid for files in shards]
    teachers = [tiny_model(tmp_path / f"teacher{seed}", seed, "dinov2") for seed in (2, 3)]
    for number, (files, _) in enumerate(teachers):
        repo = hub.add_model("org/vit", files)
        repo.tags[f"v{number}"] = repo.commits[-1].oid
    (tmp_path / "recipe.yaml").write_text(
        f"""
student: {{encoder: org/student, revision: {commits["student"][0]}}}
teacher: {{name: org/vit, revision: v0}}
stages:
  task_agnostic: {{data: custom, image_size: 32, batch_size: 2, max_steps: 1}}
data: {{roots: {{custom: org/rows}}, revisions: {{custom: {data[0]}}}}}
output_dir: {tmp_path / "run"}
"""
    )
    script.add("pinned run", "pipeline", str(tmp_path / "recipe.yaml"))
    script.add("main", "weights", "org/teacher")
    script.add("pinned", "weights", "org/teacher", revision=commits["teacher"][0])
    script.add("commit of main", "commit", "org/teacher")
    script.add("commit of a tag", "commit", "org/vit", "v0")
    script.add("rows", "rows", "org/rows")
    script.add("pinned rows", "rows", "org/rows", revision=data[0])
    assert script.run() == {
        "pinned run": [old_sum, teachers[0][1], "row000", 5],
        "main": new_sum,
        "pinned": old_sum,
        "commit of main": commits["teacher"][1],
        "commit of a tag": hub.repos["model", "org/vit"].tags["v0"],
        "rows": ["row001", 3],
        "pinned rows": ["row000", 5],
    }

    asked = len(hub.requests)
    script.add("cached", "weights", "org/teacher")
    script.add("cached tag", "weights", "org/vit", revision="v0")
    script.add("not cached", "weights", "org/never")
    script.add("not cached tag", "weights", "org/vit", revision="v1")
    script.add("rows not cached", "rows", "org/never", revision="v1")
    script.add("rows", "rows", "org/rows")
    script.add("pinned rows", "rows", "org/rows", revision=data[0])
    blob = next((tmp_path / "home/hub/models--org--student/blobs").glob(sha256(old["model.safetensors"])))
    blob.chmod(0o644)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    script.add("damaged in the cache", "weights", "org/student", revision=commits["student"][0])
    said = script.run(HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    assert said["cached"] == new_sum
    assert said["cached tag"] == teachers[0][1]
    for name, place in (("not cached", "'org/never'"), ("not cached tag", "'org/vit' at revision 'v1'")):
        assert said[name].startswith(f"InputError: {place} is not (or not whole) in the cache {tmp_path / 'home/hub'}")
        assert "unset HF_HUB_OFFLINE" in said[name]
    assert "'org/never' at revision 'v1' is not (or not whole) in the cache" in said["rows not cached"]
    assert "`hf download org/never --repo-type dataset`" in said["rows not cached"]
    assert said["rows"] == ["row001", 3]
    assert said["pinned rows"] == ["row000", 5]
    assert "model.safetensors of 'org/student' is damaged in the cache" in said["damaged in the cache"]
    assert not blob.exists()


def test_faults_on_the_way(
    hub: LoopbackHub, script: Script, models: list[tuple[Files, float]], shards: list[Files], tmp_path: Path
) -> None:
    (old, old_sum), (new, new_sum) = models
    expected: dict[str, float | str] = {}

    def case(name: str, outcome: float | str, *faults: tuple[int | str, str, float, int]) -> None:
        """A model of its own with faults on what is asked for it: (fault, where, times, after)."""
        # The storage knows files by their hash alone: each case has a file of its own, with the same weights.
        content = save(load(old["model.safetensors"]), metadata={"format": "pt", "case": name})
        hub.add_model(f"org/{name}", old | {"model.safetensors": content})
        places = {
            "info": f"^/api/models/org/{name}$",
            "tree": f"^/api/models/org/{name}/tree/",
            "main": f"^/api/models/org/{name}/revision/main$",
            "config": f"^/org/{name}/resolve/.*/config.json$",
            "weights": f"^/org/{name}/resolve/.*/model.safetensors$",
            "storage": f"^/storage/{sha256(content)}$",
        }
        for fault, where, times, after in faults:
            hub.inject(fault, path=places[where], times=times, after=after)
        script.add(name, "weights", f"org/{name}")
        expected[name] = outcome

    case("limited-twice", old_sum, (429, "info", 2, 0))
    case("busy-once", old_sum, *((503, where, 1, 0) for where in ("info", "main", "tree", "weights", "storage")))
    case("dropped-once", old_sum, *(("drop", where, 1, 0) for where in ("info", "tree", "config", "storage")))
    case("truncated-once", old_sum, *(("truncate", where, 1, 0) for where in ("tree", "storage")))
    case("flipped-once", old_sum, ("flip", "storage", 1, 0), ("flip", "config", 1, 1))
    case("flipped", "model.safetensors of 'org/flipped' came damaged twice", ("flip", "storage", math.inf, 0))
    case("dropped", f"cannot reach {hub.url}/org/dropped (", ("drop", "info", math.inf, 0))
    case(
        "down",
        "the Hub answered 503 (it is busy or down) to every try to fetch 'org/down'",
        (503, "info", math.inf, 0),
    )
    case("limited", "the Hub answered 429 (too many requests) to every try to fetch", (429, "info", math.inf, 0))
    case("unwelcome", "the Hub refuses access to 'org/unwelcome' (401, it does not accept", (401, "info", 1, 0))
    case("forbidden", "the Hub refuses access to 'org/forbidden' (403, the token does not", (403, "weights", 1, 0))
    case("gone", "there is no model 'org/gone' on the Hub, or it is private", (404, "info", 1, 0))
    # Fetched once, then the Hub is down for good: the cache serves.
    case("lost", old_sum, (503, "info", math.inf, 1))
    script.add("lost again", "weights", "org/lost")
    # The client alone would answer this from its cache, silently, although the Hub has something newer.
    case("moved", old_sum, (503, "main", 1, 1))
    (tmp_path / "new").mkdir()
    for name, content in new.items():
        (tmp_path / "new" / name).write_bytes(content)
    script.add("upload", "upload", "org/moved", str(tmp_path / "new"))
    script.add("moved again", "weights", "org/moved")
    for name in ("rows-busy", "rows-down"):
        hub.add_dataset(f"org/{name}", shards[0])
        hub.inject(
            503, path=f"^/api/datasets/org/{name}(/revision/.*)?$", times=1 if name == "rows-busy" else math.inf
        )
        script.add(name, "rows", f"org/{name}")

    said = script.run()
    assert hub.faults.left() == []
    for name, outcome in expected.items():
        if isinstance(outcome, float):
            assert said[name] == outcome, (name, said[name])
        else:
            assert said[name].startswith(f"InputError: {outcome}"), (name, said[name])
            assert "\n" not in said[name]
    assert not list((tmp_path / "home/hub/models--org--flipped").rglob("model.safetensors"))
    assert said["lost again"] == old_sum
    assert "'org/lost' is taken from the cache" in script.log
    assert said["upload"] is None
    assert said["moved again"] == new_sum
    assert said["rows-busy"] == ["row000", 5]
    assert "the Hub answered 503 (it is busy or down) to every try to fetch 'org/rows-down'," in said["rows-down"]
    tries = [path for _, path, _ in hub.requests if path == "/api/models/org/down"]
    assert len(tries) == TRIES


def test_what_is_refused(
    hub: LoopbackHub, script: Script, models: list[tuple[Files, float]], shards: list[Files], tmp_path: Path
) -> None:
    good, _ = models[0]
    own_code = b"from pathlib import Path\nPath('ran').write_text('')\nclass M: pass\n"
    pickled = {"config.json": good["config.json"], "pytorch_model.bin": b"\x80\x04."}
    known = {"AutoModel": "modeling_x.M", "AutoConfig": "modeling_x.M"}
    code = {"modeling_x.py": own_code, "model.safetensors": good["model.safetensors"]}
    scenes: dict[str, tuple[Files, str]] = {
        "pickled": (pickled, "'org/pickled' has its weights only as pytorch_model.bin, a pickle, and reading"),
        "weightless": ({"config.json": good["config.json"]}, "'org/weightless' has no weights in safetensors"),
        "empty": ({"README.md": b""}, "no encoder at 'org/empty': it has no config.json"),
        "own-type": (
            code | {"config.json": config(model_type="my_net", auto_map=known)},
            "'org/own-type' (model_type 'my_net') brings its own",
        ),
        "unknown-type": (
            {"config.json": config(model_type="resnett")},
            "'org/unknown-type' is of model_type 'resnett'",
        ),
        "no-type": (
            {"config.json": config(hidden=1)},
            "cannot read 'org/no-type/config.json': it names no model_type",
        ),
        "broken": ({"config.json": b"{"}, "cannot read 'org/broken/config.json'"),
        "not-safetensors": (good | {"model.safetensors": b"{}"}, "cannot read safetensors weights of 'org/not-safe"),
    }
    for name, (files, _) in scenes.items():
        hub.add_model(f"org/{name}", files)
        script.add(name, "weights", f"org/{name}")
    hub.add_model("org/gated", good, gated=True)
    hub.add_dataset("org/gated", shards[0], gated=True)
    hub.add_model("org/private", good, private=True)
    hub.add_dataset("org/rows", shards[0])
    script.add("gated", "weights", "org/gated")
    script.add("missing", "weights", "org/missing")
    script.add("private", "weights", "org/private")
    script.add("revision", "weights", "org/pickled", revision="v9")
    script.add("no id", "weights", "org/-x-")
    script.add("gated rows", "rows", "org/gated")
    script.add("missing rows", "rows", "org/missing")
    script.add("rows revision", "rows", "org/rows", revision="v9")
    script.add("split", "rows", "org/rows", "night")
    said = script.run(token=None)
    for name, (_, outcome) in scenes.items():
        assert said[name].startswith(f"InputError: {outcome}"), (name, said[name])
    assert ", did you mean 'resnet'?" in said["unknown-type"]
    page = f"{hub.url}/org/gated"
    assert said["gated"] == (
        f"InputError: 'org/gated' is gated: ask for access on {page}, then log in with `hf auth login` or set "
        "HF_TOKEN, and start again"
    )
    for name in ("missing", "private"):
        assert said[name].startswith(f"InputError: there is no model 'org/{name}' on the Hub, or it is private: check")
        assert f"{hub.url}/org/{name}" in said[name] and "hf auth login" in said[name]
    assert said["revision"].startswith("InputError: 'org/pickled' has no revision 'v9'")
    assert "'org/-x-' is neither a folder here nor a Hub id" in said["no id"]
    assert "gated: ask for access on " + f"{hub.url}/datasets/org/gated" in said["gated rows"]
    assert "there is no data set 'org/missing' on the Hub, or it is private" in said["missing rows"]
    assert "'org/rows' has no revision 'v9'" in said["rows revision"]
    assert "cannot open split 'night' of 'org/rows'" in said["split"] and "train" in said["split"]
    assert not list(tmp_path.rglob("ran"))
    asked = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert not asked & {"pytorch_model.bin", "modeling_x.py"}
    # No conversion by a bot was asked for, and no pull request with a converted copy looked for.
    assert not [path for _, path, _ in hub.requests if "discussions" in path or "spaces" in path]
