"""Serve this repository's segmenter on Hugging Face Inference Endpoints: an image in, one mask per class out.

Needs torch, transformers and pillow (and scipy for Mask2Former), nothing else.
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING

MAX_PIXELS = 40_000_000
PARAMETERS = ("subtask", "threshold")


class EndpointHandler:
    """What the endpoint's server makes once and calls for every request.

    Args:
        path: folder of the repository; "" is the folder of this file.
    """

    def __init__(self, path: str = ""):
        path = path or str(Path(__file__).resolve().parent)
        # The code that this allows to run is that of the repository which this file came with.
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        universal = type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        auto_class = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = auto_class.from_pretrained(path, trust_remote_code=True, use_safetensors=True)
        self.model = self.model.float().to(self.device).eval()
        # An export's preprocessor never comes with code; unless told so, transformers may ask on the terminal.
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Segment one image.

        Args:
            data: ``inputs``: a PIL image, an image file's bytes, or those bytes in base64 (a ``data:`` URL as well).
                ``parameters``, optional: ``threshold``, leave out classes whose score is below (0 to 1, default 0);
                ``subtask``, "semantic" if given.

        Returns:
            For every class that is seen, in the order of the class ids: ``label``; ``score``, the mean probability of
            the class over its pixels; ``mask``, a PNG in base64, 255 where the class is, of the image's own size
            (upright, if its EXIF data says that it was taken otherwise).

        Raises:
            ValueError: no image in ``inputs``, one of more than 40 million pixels, or parameters that are not known.
        """
        if not isinstance(data, dict):
            raise ValueError(f"the request is a {type(data).__name__}: an object with 'inputs' is needed")
        threshold = _threshold(data.get("parameters"))
        if data.get("inputs") is None:
            raise ValueError("no 'inputs': send an image, for example {'inputs': '<base64 of a JPEG or PNG file>'}")
        image = read_image(data["inputs"])
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            scores, are_logits = class_scores(self.model(pixel_values=pixels))
            classes, probabilities = best_classes(scores, are_logits, image.size[::-1])
        found = []
        for index in classes.unique().tolist():
            mask = classes == index
            score = probabilities[mask].mean().item()
            if score >= threshold:
                label = self.model.config.id2label[index]
                found.append({"label": label, "score": round(score, 6), "mask": _png(mask)})
        return found


def read_image(inputs: Image.Image | bytes | str) -> Image.Image:
    """Return ``inputs`` as an upright RGB image; raise `ValueError` saying what is wrong with it."""
    if isinstance(inputs, str):
        text = "".join(inputs.partition("base64,")[2].split() if inputs.startswith("data:") else inputs.split())
        try:
            inputs = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("'inputs' is text, but not base64 of an image file (links are not fetched)") from error
    if isinstance(inputs, bytes | bytearray | memoryview):
        try:
            image = Image.open(io.BytesIO(inputs))
        except Image.DecompressionBombError as error:
            raise ValueError(f"the image is too large: {error}") from error
        except Exception as error:  # pillow's plugins raise types of their own on bytes that they half recognise
            raise ValueError(f"'inputs' is not an image that pillow can read ({len(inputs)} bytes)") from error
    elif isinstance(inputs, Image.Image):
        image = inputs
    else:
        raise ValueError(f"'inputs' must be an image, its bytes or base64, not {type(inputs).__name__}")
    width, height = image.size
    # Pillow has read the header only: a bomb is refused before it unfolds.
    if width * height > MAX_PIXELS:
        raise ValueError(f"the image is too large: {width}×{height}, at most {MAX_PIXELS:,} pixels are taken")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value / 256).convert("L")  # convert() alone would clip at 255
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"the image cannot be decoded (is the file complete?): {error}") from error


def class_scores(outputs: Any) -> tuple[torch.Tensor, bool]:
    """Return K×h×w class scores of a segmenter's outputs for one image, and whether they are logits.

    Of Mask2Former's queries, as its semantic inference has it: Σ_q softmax(class)[:-1] · sigmoid(mask). Those are
    weights, not logits.
    """
    if "class_queries_logits" in outputs:
        classes = outputs["class_queries_logits"].softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, outputs["masks_queries_logits"].sigmoid())[0], False
    return outputs["logits"][0], True


def best_classes(scores: torch.Tensor, are_logits: bool, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize K×h×w scores to ``size`` (H, W); return the best class and its probability, both H×W, on the CPU."""
    best = total = classes = None
    # Class by class: all scores of a large photograph at once would take gigabytes.
    for index, score in enumerate(scores):
        score = F.interpolate(score[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best, total, classes = score, score, torch.zeros_like(score, dtype=torch.int64)
            continue
        classes = torch.where(score > best, index, classes)
        best = torch.maximum(best, score)
        total = torch.logaddexp(total, score) if are_logits else total + score
    probability = (best - total).exp() if are_logits else best / total
    return classes.cpu(), probability.cpu()


def _threshold(parameters: dict[str, Any] | None) -> float:
    if not isinstance(parameters, dict | None):
        raise ValueError(f"'parameters' is {parameters!r:.50}: an object is needed, for example {{'threshold': 0.5}}")
    parameters = {key: value for key, value in (parameters or {}).items() if value is not None}
    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}; this model takes: {', '.join(PARAMETERS)}")
    if parameters.get("subtask", "semantic") != "semantic":
        raise ValueError(f"subtask '{parameters['subtask']}': this model does semantic segmentation only")
    threshold = parameters.get("threshold", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}: a number from 0 to 1 is needed")
    return float(threshold)


def _png(mask: torch.Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray((mask * 255).to(torch.uint8).numpy()).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
