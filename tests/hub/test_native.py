"""Exported encoders and segmenters, loaded by transformers alone, give what the student gives."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel, pipeline
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel, InputError
from gkd_hf.hub import conversion, native
from gkd_hf.hub.native import Exported, class_logits, export_encoder, export_segmenter, load_segmenter
from gkd_hf.models.transformer_encoders import ViTAdapter
from tests.tiny import DPT, ENCODERS, EVERY_ENCODER, MASK2FORMER, UPERNET

SIZE = 64
CLASSES = ("road", "car", "tree", "sky", "wall")
KINDS = {
    **{kind: ENCODERS[kind] for kind in ("resnet", "convnext", "swin", "vit")},
    "dinov2": ENCODERS["dinov2"] | {"num_hidden_layers": 4, "layerscale_value": 0.3},
}
HEADS = {"linear": {"type": "linear"}, "mask2former": MASK2FORMER, "upernet": UPERNET, "dpt": DPT}
CODE = "GKDStudentForSemanticSegmentation"
UPERNET_CLASS, MASK2FORMER_CLASS = "UperNetForSemanticSegmentation", "Mask2FormerForUniversalSegmentation"
STAGES = {"upernet": UPERNET_CLASS, "mask2former": MASK2FORMER_CLASS, "linear": CODE}
ONE_GRID = {"upernet": UPERNET_CLASS, "dpt": "DPTForSemanticSegmentation", "mask2former": CODE}
ARCHITECTURES = {kind: ONE_GRID if kind in ("vit", "dinov2") else STAGES for kind in KINDS}


def make_segmenter(kind: str, head: str, **settings: object) -> GKDStudentForSemanticSegmentation:
    """A segmenter whose every weight and statistic is far from where it started."""
    torch.manual_seed(0)
    student = GKDStudentModel.from_encoder(KINDS[kind] | settings if kind in KINDS else EVERY_ENCODER[kind])
    segmenter = GKDStudentForSemanticSegmentation.from_student(
        student, num_labels=len(CLASSES), id2label=dict(enumerate(CLASSES)), decode_head=HEADS[head]
    )
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in segmenter.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        if head == "mask2former":  # random queries are all of one class
            segmenter.decode_head.class_predictor.weight.mul_(10)
            for name, parameter in segmenter.decode_head.named_parameters():
                if "mask_embedder" in name:
                    parameter.mul_(3)
    return segmenter.eval()


def plain_tokens(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The patch tokens of a plain transformers encoder, without this library's adapters."""
    any_size = {"interpolate_pos_encoding": True} if model.config.model_type == "vit" else {}
    states = model(pixels, **any_size).last_hidden_state
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    if model.config.model_type == "convnext":
        states = model.layernorm(states)
    return states[:, 1:] if model.config.model_type in ("vit", "dinov2") else states


def scores(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return class_logits(model(pixels), tuple(pixels.shape[-2:]))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_exported_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    square, wide = torch.randn(2, 3, SIZE, SIZE), torch.randn(1, 3, SIZE, 96)
    for head, architecture in ARCHITECTURES[kind].items():
        segmenter = make_segmenter(kind, head)
        exported = export_segmenter(segmenter, tmp_path / head, image_size=SIZE)
        assert (exported.architecture, exported.native) == (architecture, architecture != CODE), exported
        assert bool(exported.reason) != exported.native and exported.max_difference <= 1e-5
        assert json.loads((tmp_path / head / "config.json").read_text())["architectures"] == [architecture]
        assert bool(list((tmp_path / head).glob("*.py"))) != exported.native
        auto_class = getattr(transformers, exported.auto_class)
        loaded, report = auto_class.from_pretrained(tmp_path / head, output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.config.id2label == dict(enumerate(CLASSES))
        for pixels in (square,) if head == "dpt" else (square, wide):
            expected = scores(segmenter, pixels)
            assert expected.std() > 1e-2
            torch.testing.assert_close(scores(loaded, pixels), expected, atol=1e-5, rtol=1e-5)
        processor = AutoImageProcessor.from_pretrained(tmp_path / head)
        pixels = processor(Image.new("RGB", (90, 50)), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, SIZE, SIZE)
        torch.testing.assert_close(pixels[0, :, 0, 0], -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))

    exported = export_encoder(segmenter.student, tmp_path / "encoder", image_size=SIZE)
    assert exported.native and exported.auto_class == "AutoModel" and exported.max_difference <= 1e-5
    loaded, report = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert type(loaded).__name__ == exported.architecture
    assert not any(report.values()), report  # no weight is made up
    for pixels in (square, wide):
        expected = segmenter.student(pixels).last_hidden_state
        torch.testing.assert_close(plain_tokens(loaded, pixels), expected, atol=1e-5, rtol=1e-5)
    again = GKDStudentModel.from_encoder(tmp_path / "encoder").eval()
    torch.testing.assert_close(again(square).pooler_output, segmenter.student(square).pooler_output)


def test_an_architecture_with_all_its_defaults_is_exported(tmp_path: Path) -> None:
    student = GKDStudentModel.from_encoder({"model_type": "convnext", "depths": [1, 1, 1, 1]})
    segmenter = GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head=UPERNET)
    assert export_segmenter(segmenter, tmp_path / "segmenter", image_size=SIZE).native


def test_no_folder_of_this_machine_is_written(tmp_path: Path) -> None:
    GKDStudentModel.from_encoder(KINDS["dinov2"]).save_encoder(tmp_path / "source")
    student = GKDStudentModel.from_encoder(tmp_path / "source")
    export_encoder(student, tmp_path / "encoder", image_size=SIZE)
    for head in ("upernet", "linear"):
        segmenter = GKDStudentForSemanticSegmentation.from_student(student, num_labels=5, decode_head=HEADS[head])
        export_segmenter(segmenter, tmp_path / head, image_size=SIZE)
    written = [path for path in tmp_path.rglob("*.json") if path.parent.name != "source"]
    assert len(written) == 6 and not any(str(tmp_path) in path.read_text() for path in written)
    assert student.config.encoder_config.name_or_path == str(tmp_path / "source")


def test_exporting_leaves_the_segmenter_as_it_was(tmp_path: Path) -> None:
    segmenter = make_segmenter("vit", "dpt").train()
    segmenter.freeze_encoder()
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    config = segmenter.config.to_dict()
    export_segmenter(segmenter, tmp_path / "segmenter", image_size=SIZE)  # positions for another size than 32
    assert segmenter.decode_head.training and segmenter.config.to_dict() == config
    assert segmenter.student.encoder.config.image_size == 32
    assert all(torch.equal(value, before[key]) for key, value in segmenter.state_dict().items())


@pytest.mark.parametrize("kind, head", [("resnet", "upernet"), ("swin", "mask2former"), ("dinov2", "dpt")])
def test_a_wrong_conversion_is_refused(kind: str, head: str, tmp_path: Path, monkeypatch) -> None:
    right = conversion.HEADS[head]

    def wrong(*arguments: object) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        model, state = right(*arguments)
        name = next(name for name in reversed(state) if name.endswith("weight") and state[name].ndim == 4)
        state[name] = state[name].clone()
        state[name][0] += 1e-2
        return model, state

    monkeypatch.setitem(conversion.HEADS, head, wrong)
    folder = tmp_path / "segmenter"
    with pytest.raises(
        InputError, match=r"does not give the student's class logits .*64×64.* differ by .*nothing was"
    ):
        export_segmenter(make_segmenter(kind, head), folder, image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, head", [("resnet", "upernet"), ("convnext", "mask2former"), ("vit", "dpt")])
def test_a_lost_encoder_is_seen_through_an_untrained_head(kind: str, head: str, tmp_path: Path, monkeypatch) -> None:
    right = conversion.HEADS[head]

    def wrong(*arguments: object) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        model, state = right(*arguments)
        encoder = ("backbone.", "model.pixel_level_module.encoder.", "dpt.")
        return model, {key: value * 0 if key.startswith(encoder) else value for key, value in state.items()}

    torch.manual_seed(0)
    segmenter = GKDStudentForSemanticSegmentation.from_student(
        GKDStudentModel.from_encoder(KINDS[kind]), num_labels=len(CLASSES), decode_head=HEADS[head]
    )
    assert export_segmenter(segmenter, tmp_path / "right", image_size=SIZE).native
    monkeypatch.setitem(conversion.HEADS, head, wrong)
    with pytest.raises(InputError, match="does not give the student's class logits"):
        export_segmenter(segmenter, tmp_path / "wrong", image_size=SIZE)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("scale", [1e-6, 0.1, 30.0])
def test_what_may_differ_is_1e5_of_the_largest_value(scale: float) -> None:
    def ours(pixels: torch.Tensor) -> torch.Tensor:
        return scale * pixels / pixels.abs().max()

    def off_by(part: float) -> float:
        return native._compare(ours, lambda pixels: ours(pixels) + part * scale, [(8, 8)], "class logits", "Model")

    assert off_by(0.8e-5) == pytest.approx(0.8e-5 * scale, rel=0.2)
    for part in (1.3e-5, float("nan")):
        with pytest.raises(InputError, match="they differ by"):
            off_by(part)


def test_a_class_with_other_weights_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "_VIT_TO_DINOV2", conversion._VIT_TO_DINOV2[:-1])
    with pytest.raises(InputError, match="UperNetForSemanticSegmentation does not have the weights expected"):
        export_segmenter(make_segmenter("vit", "upernet"), tmp_path / "segmenter", image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_encoder_is_refused(tmp_path: Path, monkeypatch) -> None:
    right = ViTAdapter.plain_state
    monkeypatch.setattr(ViTAdapter, "plain_state", lambda *a: right(*a) | {"layernorm.bias": torch.full((24,), 1e-3)})
    with pytest.raises(InputError, match="the exported ViTModel does not give the student's tokens"):
        export_encoder(make_segmenter("vit", "linear").student, tmp_path / "encoder", image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind, head, settings, size, reason",
    [
        ("vit", "linear", {}, SIZE, "no class for decode_head linear"),
        ("mobilenet_v2", "upernet", {}, SIZE, "for mobilenet_v2 no conversion to transformers.* backbone classes"),
        ("vit", "mask2former", {}, SIZE, "does not make a pyramid of the maps of a vit"),
        ("vit", "upernet", {"intermediate_size": 40}, SIZE, "whole multiple of its width, this ViT's is 40 for 24"),
        ("dinov2", "upernet", {"num_hidden_layers": 3}, SIZE, r"reads blocks \[1, 2, 2, 3\]"),
        ("dinov2", "dpt", {"use_swiglu_ffn": True}, SIZE, "no SwiGLU"),
        ("clip", "dpt", {}, SIZE, "not those of clip_vision_model"),
        ("swin", "upernet", {"window_size": 4}, SIZE, "maps of 4×4, no larger than its window of 4"),
        ("resnet", "upernet", {}, 72, "72 is not a multiple of the encoder's stride 16"),
    ],
)
def test_what_cannot_be_native_says_why(
    kind: str, head: str, settings: dict[str, object], size: int, reason: str, tmp_path: Path
) -> None:
    segmenter = make_segmenter(kind, head, **settings)
    exported = export_segmenter(segmenter, tmp_path / "segmenter", image_size=size)
    assert not exported.native and exported.architecture == CODE
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(exported.reason)
    loaded = load_segmenter(tmp_path / "segmenter")
    pixels = torch.randn(1, 3, size, size)
    assert torch.equal(scores(loaded, pixels), scores(segmenter, pixels))


def test_with_this_library_its_own_code_is_used(tmp_path: Path) -> None:
    export_segmenter(make_segmenter("resnet", "linear"), tmp_path / "segmenter", image_size=SIZE)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "segmenter")
    assert type(loaded) is GKDStudentForSemanticSegmentation
    assert type(load_segmenter(tmp_path / "segmenter", trust_remote_code=True)) is GKDStudentForSemanticSegmentation


@pytest.mark.parametrize("there", ["my_lora.safetensors", "loading.py", "README.md", "config.json"])
def test_nothing_of_the_users_is_touched(there: str, tmp_path: Path) -> None:
    segmenter, folder = make_segmenter("resnet", "linear"), tmp_path / "folder"
    folder.mkdir()
    (folder / there).write_text("mine")
    for export, model in ((export_segmenter, segmenter), (export_encoder, segmenter.student)):
        with pytest.raises(InputError, match=r"cannot export to .*folder': there is something already"):
            export(model, folder, image_size=SIZE)
    assert [path.read_text() for path in folder.iterdir()] == ["mine"] and list(tmp_path.iterdir()) == [folder]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    student = make_segmenter("resnet", "linear").student
    for folder in (tmp_path / "file", tmp_path / "file" / "encoder"):
        with pytest.raises(InputError, match="cannot export to .*file"):
            export_encoder(student, folder, image_size=SIZE)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_encoder(make_segmenter("resnet", "linear").student, ".", image_size=SIZE)
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in Path().iterdir()} == names and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "usual").mkdir()
    export_encoder(make_segmenter("resnet", "linear").student, tmp_path / "new", image_size=SIZE)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_mask2formers_scores_are_summed_over_its_queries() -> None:
    classes, masks = torch.randn(1, 3, 6), torch.randn(1, 3, 4, 4)
    outputs = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    expected = sum(classes[0, query].softmax(0)[:5, None, None] * masks[0, query].sigmoid() for query in range(3))
    torch.testing.assert_close(class_logits(outputs, (4, 4))[0], expected)
    assert class_logits(outputs, (8, 12)).shape == (1, 5, 8, 12)


def test_mask2formers_pipeline_is_semantic_unasked(tmp_path: Path) -> None:
    """Of an untrained one as well, none of whose queries is sure enough of anything to be an object."""
    torch.manual_seed(0)
    segmenter = GKDStudentForSemanticSegmentation.from_student(
        GKDStudentModel.from_encoder(KINDS["resnet"]), num_labels=len(CLASSES), decode_head=MASK2FORMER
    )
    exported = export_segmenter(segmenter, tmp_path / "segmenter", image_size=SIZE)
    assert exported.auto_class == "AutoModelForUniversalSegmentation" and not exported.limits
    segment = pipeline("image-segmentation", model=str(tmp_path / "segmenter"))
    image = Image.new("RGB", (90, 60), (200, 30, 90))
    found = segment(image)
    assert found and found == segment(image, subtask="semantic")
    for subtask in ("panoptic", "instance"):
        with pytest.raises(ValueError, match=f"Subtask {subtask} is not supported"):
            segment(image, subtask=subtask)
    again = AutoImageProcessor.from_pretrained(tmp_path / "segmenter")
    again.save_pretrained(tmp_path / "again")  # what fine-tuning would do
    again = AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert again.post_process_panoptic_segmentation is None and again.post_process_semantic_segmentation


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "cannot read a segmenter from"),
        ({"model_type": "resnet"}, "is a resnet, which is no semantic segmenter"),
        ({"model_type": "gkd_student"}, "a student without a decode head"),
        ({"model_type": "other", "auto_map": {"AutoConfig": "x.Y"}}, "read it, then allow it with trust_remote_code"),
        ({"model_type": "upernet"}, "cannot read a segmenter from .*safetensors"),
        ({"model_type": "dpt", "hidden_size": "wide"}, "cannot read a segmenter from .*hidden_size"),
    ],
)
def test_what_is_no_segmenter_is_refused(config: dict | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as refusal:
        load_segmenter(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no segmenter at '/nowhere/at/all': that folder does not exist"):
        load_segmenter("/nowhere/at/all")


def test_a_segmenter_comes_from_the_hub(hub, hub_process, tmp_path: Path) -> None:
    """Native and GKD segmenters are pulled with the checks of every pull; a revision pins the commit."""
    export_segmenter(make_segmenter("resnet", "upernet"), tmp_path / "native", image_size=SIZE)
    export_segmenter(make_segmenter("resnet", "linear"), tmp_path / "code", image_size=SIZE)
    hub.add_model("org/native", tmp_path / "native")
    hub.add_model("org/code", tmp_path / "code")
    hub.inject("flip", path=r"safetensors|blob|lfs", times=1)
    run = hub_process(
        "from gkd_hf.hub.native import load_segmenter\n"
        "for name in ('org/native', 'org/code'):\n"
        "    model = load_segmenter(name, revision='main')\n"
        "    print(type(model).__name__, model.config.name_or_path)\n"
    )
    assert run.stdout.split() == [UPERNET_CLASS, "org/native", CODE, "org/code"]
    # Where the code is known it is not fetched.
    assert not any(path.endswith(".py") for _, path, _ in hub.requests)


def test_a_segmenter_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    export_segmenter(make_segmenter("resnet", "upernet"), tmp_path, image_size=SIZE)
    state = load_file(tmp_path / "model.safetensors")
    del state["decode_head.classifier.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors of the segmenter .decode_head\.classifier\.bias"):
        load_segmenter(tmp_path)


STRANGER = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import load_file
import transformers
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline

folder, cases, label2id = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
recorded = load_file(folder + "/recorded.safetensors")
pixels, report = recorded["pixels"], {}
image = Image.open(folder + "/image.png")

def segments(name, **settings):
    found = pipeline("image-segmentation", model=f"{folder}/{name}", **settings)(image)
    masks = [torch.tensor(list(s["mask"].getdata())).view(60, 90) == 255 for s in found]
    classes = sum(mask * label2id[s["label"]] for s, mask in zip(found, masks))
    agreement = (classes == recorded["classes of " + name]).float().mean().item()
    return [[s["label"] for s in found], sum(mask.int() for mask in masks).unique().tolist(), agreement]

with torch.no_grad():
    for name, auto_class, settings in cases:
        model = getattr(transformers, auto_class).from_pretrained(f"{folder}/{name}", **settings)
        output = model(pixels)
        key = {"AutoModel": "last_hidden_state", "AutoModelForUniversalSegmentation": "masks_queries_logits"}
        got = output[key.get(auto_class, "logits")]
        report[name] = [type(model).__name__, (got - recorded[name]).abs().max().item()]
    report["pipelines"] = {
        "upernet": segments("upernet"),
        "mask2former": segments("mask2former"),
        "dpt": segments("dpt"),
        "code": segments("code", trust_remote_code=True),
    }
    student = AutoModel.from_pretrained(f"{folder}/code", trust_remote_code=True)
    report["student"] = (student(pixels).last_hidden_state - recorded["student"]).abs().max().item()
try:
    AutoModelForSemanticSegmentation.from_pretrained(f"{folder}/code")
except ValueError as error:
    report["refusal"] = str(error)
report["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "gkd_hf")
print("REPORT" + json.dumps(report))
"""


def test_a_stranger_loads_it_all(tmp_path: Path, bare_python: Path) -> None:
    """In an environment with only torch, transformers, pillow and scipy: models, remote code, the pipeline."""
    torch.manual_seed(2)
    pixels = torch.randn(1, 3, SIZE, SIZE)
    recorded, cases = {"pixels": pixels}, []
    noise = torch.randint(0, 256, (6, 9, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise).resize((90, 60))
    image.save(tmp_path / "image.png")

    def record(name: str, exported: Exported, output: torch.Tensor) -> None:
        recorded[name] = output.detach().contiguous()
        settings = {} if exported.native else {"trust_remote_code": True}
        cases.append((name, exported.auto_class, settings))

    with torch.no_grad():
        for kind in KINDS:
            student = make_segmenter(kind, "linear").student
            student.set_geometry(SIZE)  # AutoModel knows of no other size than the one that positions are for
            exported = export_encoder(student, tmp_path / kind, image_size=SIZE)
            record(kind, exported, student.encoder(pixels).last_hidden_state)
        heads = {"upernet": "vit", "dpt": "dinov2", "code": "vit", "mask2former": "resnet"}
        for name, kind in heads.items():
            segmenter = make_segmenter(kind, "mask2former" if name == "code" else name)
            exported = export_segmenter(segmenter, tmp_path / name, image_size=SIZE)
            if name == "mask2former":
                record(name, exported, load_segmenter(tmp_path / name)(pixels).masks_queries_logits)
            else:
                record(name, exported, scores(segmenter, pixels) if name == "upernet" else segmenter(pixels).logits)
            inputs = AutoImageProcessor.from_pretrained(tmp_path / name)(image, return_tensors="pt")["pixel_values"]
            recorded[f"classes of {name}"] = class_logits(segmenter(inputs), (60, 90)).argmax(1)[0]
            if name == "code":
                recorded["student"] = segmenter.student(pixels).last_hidden_state.contiguous()
    save_file(recorded, tmp_path / "recorded.safetensors")

    run = subprocess.run(
        [bare_python, "-c", STRANGER, tmp_path, json.dumps(cases), json.dumps(segmenter.config.label2id)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.split("REPORT")[1])
    assert report["modules"] == [] and report["student"] <= 1e-5
    for name, *_ in cases:
        assert report[name][1] <= 1e-5, (name, report[name])
    assert [report[name][0] for name in ("swin", "vit", "code")] == ["SwinModel", "ViTModel", CODE]
    assert "trust_remote_code=True" in report["refusal"]
    assert "newly initialized" not in run.stderr
    for name, (labels, covered, agreement) in report["pipelines"].items():
        assert len(labels) > 1 and set(labels) <= set(CLASSES), name
        assert covered == [1], name  # every pixel is in exactly one mask
        # Mask2Former's processor resizes the masks before their sigmoid, the report the scores after it.
        assert agreement > (0.85 if name == "mask2former" else 0.97), name
