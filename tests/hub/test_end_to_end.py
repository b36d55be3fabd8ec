"""Everything over HTTP with the real clients, and loaded by a Python that has never heard of this library."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.data.toy_city import toy_city
from gkd_hf.hub.native import class_logits, export_encoder, export_segmenter, load_segmenter
from gkd_hf.models.loading import load_encoder
from tests.hub.server import LoopbackHub
from tests.tiny import ENCODERS, MASK2FORMER

ROOT = Path(__file__).parents[2]
SIZE = 32
STAGES = ("task_agnostic", "domain_agnostic", "task")
TOYS = {"": "city", ":pool": "pool", ":night": "night"}
UPERNET = {"type": "upernet", "hidden_size": 16}
DPT = {"type": "dpt", "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
# repository → (encoder, decode head, Auto class, whether its code has to be trusted)
SEGMENTERS = {
    "org/resnet-upernet": ("resnet", UPERNET, "AutoModelForSemanticSegmentation", False),
    "org/resnet-mask2former": ("resnet", MASK2FORMER, "AutoModelForUniversalSegmentation", False),
    "org/vit-upernet": ("vit", UPERNET, "AutoModelForSemanticSegmentation", False),
    "org/vit-dpt": ("vit", DPT, "AutoModelForSemanticSegmentation", False),
    "org/vit-mask2former": ("vit", MASK2FORMER, "AutoModelForSemanticSegmentation", True),
}

PUSH = """
import json, sys
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from gkd_hf.hub.push import push_folder

for folder, repo_id in json.loads(sys.argv[1]).items():
    print(push_folder(folder, repo_id, private=True))
Dataset.from_dict({"number": [1, 2, 3]}).push_to_hub("org/numbers", private=True)
ModelCard("---\\nlicense: apache-2.0\\n---\\n# A card\\n").push_to_hub("org/resnet-encoder")
api = HfApi()
print(json.dumps(sorted(model.id for model in api.list_models(author="org"))))
print(json.dumps(api.list_repo_files("org/resnet-encoder")))
"""

LOAD = """
import json, sys
import torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, pipeline

encoders, segmenters, picture, pixels, out = json.loads(sys.argv[1])
pixels, outputs, seen = load_file(pixels)["pixels"], {}, {}
with torch.no_grad():
    for name in encoders:
        outputs[name] = AutoModel.from_pretrained(name).eval()(pixels).last_hidden_state
    for name, (auto_class, trust) in segmenters.items():
        auto_class = getattr(transformers, auto_class)
        for refusal in ({}, {"trust_remote_code": False}) if trust else ():
            try:
                auto_class.from_pretrained(name, **refusal)
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
            else:
                raise SystemExit(f"{name} ran its code unasked")
        model = auto_class.from_pretrained(name, **({"trust_remote_code": True} if trust else {})).eval()
        given = model(pixels)
        for key in ("logits", "class_queries_logits", "masks_queries_logits"):
            if key in given:
                outputs[f"{name}/{key}"] = given[key]
        task = pipeline("image-segmentation", model=name, trust_remote_code=trust or None)
        masks = task(Image.open(picture))
        seen[name] = [(entry["label"], entry["mask"].size) for entry in masks]
save_file({key: value.contiguous() for key, value in outputs.items()}, out)
print("\\n" + json.dumps(seen))  # what refused has left a question without an end of line
"""


def ran(command: list[object], environment: dict[str, str], cwd: Path = ROOT) -> str:
    """What a command printed; it has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,  # nobody is there to be asked
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def new_segmenter(encoder: str, head: dict) -> GKDStudentForSemanticSegmentation:
    """A segmenter whose logits depend on the picture by far more than what is compared."""
    student = GKDStudentModel.from_encoder(ENCODERS[encoder])
    names = {0: "road", 1: "sky", 2: "car"}
    segmenter = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, decode_head=head, id2label=names)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if head["type"] == "mask2former":  # else all queries are of one class
            segmenter.decode_head.class_predictor.weight.mul_(10)
            for name, parameter in segmenter.decode_head.named_parameters():
                if "mask_embedder" in name:
                    parameter.mul_(3)
    return segmenter.eval()


def test_what_was_pushed_gives_the_same_outputs_to_a_stranger(
    tmp_path: Path, hub: LoopbackHub, bare_python: Path
) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    Image.new("RGB", (70, 50), (200, 30, 90)).save(tmp_path / "street.png")
    folders, expected = {}, {}
    with torch.no_grad():
        for kind in ("resnet", "vit"):
            student = GKDStudentModel.from_encoder(ENCODERS[kind]).eval()
            folders[str(tmp_path / kind)] = f"org/{kind}-encoder"
            export_encoder(student, tmp_path / kind, image_size=SIZE)
            expected[f"org/{kind}-encoder"] = student.encoder(pixels).last_hidden_state
        for name, (encoder, head, auto_class, trust) in SEGMENTERS.items():
            segmenter, folder = new_segmenter(encoder, head), tmp_path / name.replace("/", "-")
            exported = export_segmenter(segmenter, folder, image_size=SIZE)
            assert (exported.native, exported.auto_class) == (not trust, auto_class)
            folders[str(folder)] = name
            expected[name] = class_logits(segmenter(pixels), (SIZE, SIZE))
            assert expected[name].std((2, 3)).max() > 1e-2, name

    said = ran([sys.executable, "-c", PUSH, json.dumps(folders)], hub.environment(tmp_path / "home")).splitlines()
    assert json.loads(said[-2]) == sorted(folders.values())
    assert "model.safetensors" in json.loads(said[-1])
    assert all(hub.repos["model", name].private for name in folders.values())
    assert [path for path in hub.repos["dataset", "org/numbers"].files() if path.endswith(".parquet")]
    assert b"# A card" in hub.repos["model", "org/resnet-encoder"].files()["README.md"]

    encoders = [name for name in folders.values() if name.endswith("-encoder")]
    flags = {name: (auto_class, trust) for name, (_, _, auto_class, trust) in SEGMENTERS.items()}
    asked = [encoders, flags, *(str(tmp_path / name) for name in ("street.png", "pixels.safetensors", "out"))]
    # Another home: nothing of the push is in the cache.
    said = ran([bare_python, "-c", LOAD, json.dumps(asked)], hub.environment(tmp_path / "other"), cwd=tmp_path)
    seen, outputs = json.loads(said.splitlines()[-1]), load_file(tmp_path / "out")
    for name in encoders:
        assert (outputs[name] - expected[name]).abs().max() <= 1e-5, name
    for name in SEGMENTERS:
        given = {key.removeprefix(f"{name}/"): value for key, value in outputs.items() if key.startswith(f"{name}/")}
        assert (class_logits(given, (SIZE, SIZE)) - expected[name]).abs().max() <= 1e-5, name
        assert {label for label, _ in seen[name]} <= {"road", "sky", "car"} and seen[name]
        assert {tuple(size) for _, size in seen[name]} == {(70, 50)}


@pytest.fixture
def toy_hub(tmp_path: Path, hub: LoopbackHub) -> LoopbackHub:
    """A Hub with a teacher, and toy-city data sets that the real client has pushed."""
    teacher = tmp_path / "teacher"
    load_encoder(ENCODERS["dinov2"])[0].save_pretrained(teacher)
    hub.add_model("org/tiny-dinov2", teacher)
    script = """
import sys
from datasets import Dataset, Image
from gkd_hf.data.toy_city import toy_city
toys = {"city": ("clear_day", "train test"), "pool": ("pool", "train"), "night": ("night", "test")}
for name, (style, splits) in toys.items():
    for split in splits.split():
        rows = list(toy_city(style, 12, size=32, seed=len(split)))
        columns = {key: [row[key] for row in rows] for key in ("image", "label")}
        data = Dataset.from_dict(columns).cast_column("image", Image()).cast_column("label", Image())
        data.push_to_hub(f"org/toy-{name}", split=split)
"""
    ran([sys.executable, "-c", script], hub.environment(tmp_path / "publisher"))
    return hub


def test_a_recipe_from_the_hub_and_back(tmp_path: Path, toy_hub: LoopbackHub, bare_python: Path) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", ROOT / "scripts/run_gkd.py"]
    places = [f"data.roots.toy_city{style}=org/toy-{name}" for style, name in TOYS.items()]
    small = [f"stages.{stage}.{key}" for stage in STAGES for key in ("max_steps=3", "image_size=32", "batch_size=4")]
    small += ["stages.task_agnostic.query_warmup_steps=1", "evaluate=[toy_city:night]"]
    command = [*launch, ROOT / "scripts/recipes/quickstart.yaml", "teacher.name=org/tiny-dinov2", *places, *small]
    command += ["hub.repo_id=org/gkd-tiny", f"output_dir={out}"]
    environment = toy_hub.environment(tmp_path / "home", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    said = ran(command, environment)
    assert "org/gkd-tiny-toy_city" in said

    asked = {path for _, path, _ in toy_hub.requests}
    assert any("org/tiny-dinov2" in path and "model.safetensors" in path for path in asked)
    assert any("toy-city" in path and path.endswith(".parquet") for path in asked)
    assert not (out / "data").exists()  # streamed, not rendered
    encoder, segmenter = (toy_hub.repos["model", name] for name in ("org/gkd-tiny", "org/gkd-tiny-toy_city"))
    for repo in (encoder, segmenter):
        assert repo.private and len(repo.commits) <= 2  # the Hub's own first one, and ours
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= repo.files().keys()
        pickles = (".bin", ".pt", ".pth", ".pkl")
        assert not [path for path in repo.files() if path.endswith(pickles) or "optimizer" in path]
    assert {"handler.py", "modeling_gkd.py", "report.json"} <= segmenter.files().keys()
    report = json.loads((out / "report.json").read_text())
    assert json.loads(segmenter.files()["report.json"])["targets"] == report["targets"]
    sources = {"teacher": ("model", "org/tiny-dinov2"), "data.toy_city": ("dataset", "org/toy-city")}
    for role, repo in sources.items():
        commit = toy_hub.repos[repo].commits[-1].oid
        assert json.loads((out / "card.json").read_text())["commits"][role] == commit
        assert f"{role} `{commit}`" in " ".join(encoder.files()["README.md"].decode().split())

    for path in [*out.rglob("*"), *(tmp_path / "home").rglob("*.log")]:
        assert not path.is_file() or toy_hub.write_token.encode() not in path.read_bytes(), path
    assert toy_hub.write_token not in said
    for repo in toy_hub.repos.values():
        assert not any(toy_hub.write_token.encode() in content for content in repo.files().values())

    row = next(iter(toy_city("night", 1, size=48, seed=5)))
    (tmp_path / "street.png").write_bytes(row["image"]["bytes"])
    pixels = torch.randn(1, 3, SIZE, SIZE)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    flags = {"org/gkd-tiny-toy_city": ("AutoModelForSemanticSegmentation", True)}
    files = [str(tmp_path / name) for name in ("street.png", "pixels.safetensors", "out")]
    load = [bare_python, "-c", LOAD, json.dumps([["org/gkd-tiny"], flags, *files])]
    said = ran(load, toy_hub.environment(tmp_path / "other", token=toy_hub.read_token), cwd=tmp_path)
    outputs = load_file(tmp_path / "out")
    local = load_segmenter(out / "segmenter")
    with torch.no_grad():
        assert (outputs["org/gkd-tiny-toy_city/logits"] - local(pixels).logits).abs().max() <= 1e-5
        tokens = outputs["org/gkd-tiny"]
        assert (tokens - local.student.encoder(pixels).last_hidden_state).abs().max() <= 1e-5
    size = Image.open(io.BytesIO(row["image"]["bytes"])).size
    masks = json.loads(said.splitlines()[-1])["org/gkd-tiny-toy_city"]
    assert masks and {tuple(each) for _, each in masks} == {size}
