"""The endpoint's handler: the pipeline's masks for whatever form an image comes in, and clear refusals."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from gkd_hf import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.hub import handler as shipped
from gkd_hf.hub.native import export_segmenter
from tests.tiny import ENCODERS

LABELS = {0: "road", 1: "sky", 2: "person"}
SIZE = (70, 46)  # width, height


def upernet() -> PreTrainedModel:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, id2label=LABELS)
    return UperNetForSemanticSegmentation(config)


def large_weights(model: nn.Module) -> nn.Module:
    """Weights that make the classes depend on the picture."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(4 / parameter[0].numel()) ** 0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    large_weights(upernet()).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}, do_reduce_labels=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code") / "segmenter"
    student = GKDStudentModel.from_encoder(ENCODERS["vit"])
    model = GKDStudentForSemanticSegmentation.from_student(student, num_labels=3, id2label=LABELS)
    export_segmenter(large_weights(model), folder, image_size=32)
    return folder


@pytest.fixture(scope="module")
def handler(native: Path) -> shipped.EndpointHandler:
    return shipped.EndpointHandler(str(native))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Coarse random colours: neighbouring pixels get different classes."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(SIZE, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def mask_of(entry: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["mask"]))))


def test_masks_are_the_pipelines(handler: shipped.EndpointHandler, native: Path, picture: Image.Image) -> None:
    answer = handler({"inputs": picture})
    expected = pipeline("image-segmentation", model=str(native))(picture)
    assert len(expected) > 1
    assert [entry["label"] for entry in answer] == [entry["label"] for entry in expected]
    for entry, other in zip(answer, expected, strict=True):
        np.testing.assert_array_equal(mask_of(entry), np.asarray(other["mask"]))
    json.dumps(answer)  # what the endpoint's server does with it


def test_masks_cover_the_image_once(handler: shipped.EndpointHandler, picture: Image.Image) -> None:
    masks = [mask_of(entry) for entry in handler({"inputs": picture})]
    assert {mask.shape for mask in masks} == {SIZE[::-1]}
    assert {value for mask in masks for value in np.unique(mask)} == {0, 255}
    assert (np.sum([mask == 255 for mask in masks], axis=0) == 1).all()


def test_scores_are_mean_probabilities(handler: shipped.EndpointHandler, picture: Image.Image) -> None:
    answer = handler({"inputs": picture})
    inputs = handler.processor(picture, return_tensors="pt")
    with torch.no_grad():
        logits = handler.model(**inputs).logits
    probabilities = nn.functional.interpolate(logits, SIZE[::-1], mode="bilinear").softmax(1)[0]
    for entry in answer:
        index = list(LABELS.values()).index(entry["label"])
        mean = probabilities[index][torch.from_numpy(mask_of(entry) == 255)].mean().item()
        assert entry["score"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("form", ["bytes", "base64", "data url", "wrapped base64"])
def test_forms_of_one_image(handler: shipped.EndpointHandler, picture: Image.Image, form: str) -> None:
    png = encoded(picture)
    text = base64.b64encode(png).decode()
    wrapped = base64.encodebytes(png).decode()
    forms = {"bytes": png, "base64": text, "data url": f"data:image/png;base64,{text}", "wrapped base64": wrapped}
    assert handler({"inputs": forms[form], "parameters": {}}) == handler({"inputs": picture})


def test_threshold_drops_what_is_less_sure(handler: shipped.EndpointHandler, picture: Image.Image) -> None:
    everything = handler({"inputs": picture, "parameters": {"subtask": "semantic", "threshold": 0}})
    surest = max(entry["score"] for entry in everything)
    kept = handler({"inputs": picture, "parameters": {"threshold": surest - 1e-4}})
    assert [entry["score"] for entry in kept] == [surest] and len(everything) > 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_modes_become_rgb(handler: shipped.EndpointHandler, picture: Image.Image, mode: str) -> None:
    if mode == "I;16":
        grey = picture.convert("L")
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
        same = grey.convert("RGB")
    else:
        image = picture.convert(mode)
        same = image.convert("RGB")
    assert handler({"inputs": image}) == handler({"inputs": same})


def test_image_is_turned_upright(handler: shipped.EndpointHandler, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: turn by 90° to see it upright
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    assert handler({"inputs": encoded(lying, exif=exif)}) == handler({"inputs": picture})


def png_bomb(side: int) -> bytes:
    """A PNG of side×side pixels that ends where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + (struct.pack(">I", 1000) + b"IDAT")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no 'inputs'"),
        ({"inputs": None}, "no 'inputs'"),
        ({"inputs": 5}, "must be an image, its bytes or base64, not int"),
        ({"inputs": b"GIF89a, not really"}, "not an image that pillow can read"),
        ({"inputs": b""}, "not an image that pillow can read"),
        ({"inputs": "https://example.org/street.jpg"}, "links are not fetched"),
        ({"inputs": base64.b64encode(b"text").decode()}, "not an image that pillow can read"),
        ({"inputs": png_bomb(8_000)}, "too large: 8000×8000"),
        ({"inputs": png_bomb(100_000)}, "too large"),
        ({"inputs": png_bomb(50)}, "cannot be decoded"),
        ("picture.png", "the request is a str: an object with 'inputs' is needed"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": "x"}, "'parameters' is 'x': an object is needed"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": [0.5]}, "an object is needed"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"treshold": 1}}, "unknown parameter treshold"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"threshold": 2}}, "a number from 0 to 1"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"threshold": "0.5"}}, "a number from 0 to 1"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"subtask": "panoptic"}}, "semantic segmentation only"),
    ],
)
def test_bad_requests(handler: shipped.EndpointHandler, data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        handler(data)


def test_weights_of_mask2former() -> None:
    classes = torch.log(torch.tensor([[[0.6, 0.1, 0.3], [0.1, 0.7, 0.2]]]))
    masks = torch.logit(torch.tensor([[[[0.9, 0.2]], [[0.1, 0.5]]]]))
    scores, are_logits = shipped.class_scores({"class_queries_logits": classes, "masks_queries_logits": masks})
    labels, probability = shipped.best_classes(scores, are_logits, (1, 2))
    assert labels.tolist() == [[0, 1]]
    # By hand: class 0: .6·.9+.1·.1=.55, .6·.2+.1·.5=.17; class 1: .1·.9+.7·.1=.16, .1·.2+.7·.5=.37.
    assert probability.tolist() == [[pytest.approx(0.55 / 0.71), pytest.approx(0.37 / 0.54)]]


def test_shipped_with_code_in_a_strangers_python(
    with_code: Path, picture: Image.Image, bare_python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(with_code, folder)
    shutil.copy(shipped.__file__, folder / "handler.py")
    (tmp_path / "picture.png").write_bytes(encoded(picture))
    program = (
        "import json, sys; sys.path.insert(0, 'repository')\n"
        "from handler import EndpointHandler\n"
        "answer = EndpointHandler()({'inputs': open('picture.png', 'rb').read()})\n"
        "assert 'gkd_hf' not in sys.modules\n"
        "print(json.dumps(answer))"
    )
    done = subprocess.run([bare_python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == shipped.EndpointHandler(str(with_code))({"inputs": picture})
