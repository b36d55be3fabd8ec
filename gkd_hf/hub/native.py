"""From a trained student to folders that anybody's transformers loads, and back.

What is written was loaded again and compared first: the same tokens, the same class logits, or nothing is written.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from gkd_hf.errors import InputError
from gkd_hf.hub.conversion import NotNativeError, to_native
from gkd_hf.hub.remote_code import model_files, save_with_code
from gkd_hf.hub.segmenters import class_logits, load_segmenter, quiet
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel

__all__ = ["Exported", "class_logits", "export_encoder", "export_segmenter", "image_processor", "load_segmenter"]

DPT = "DPTForSemanticSegmentation"
TOLERANCE = 1e-5  # of the largest value compared where that is above 1, else absolute


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it is. native: whether transformers loads it by itself, without remote code.
        architecture: the class, for example ``UperNetForSemanticSegmentation``.
        auto_class: the Auto class that loads it.
        reason: why it is not native, "" if it is.
        max_difference: largest absolute difference to the student (tokens or class logits, fp32, random images).
        limits: what the exported class cannot do or needs to be told, "" if nothing.
    """

    folder: Path
    native: bool
    architecture: str
    auto_class: str
    reason: str = ""
    max_difference: float | None = None
    limits: str = ""


def export_encoder(student: GKDStudentModel, folder: str | os.PathLike, *, image_size: int) -> Exported:
    """Write the student's encoder as the plain transformers model that it is, and its preprocessor configuration.

    Args:
        image_size: side in pixels of the square images that the preprocessor makes.

    Raises:
        InputError: the written encoder, loaded by ``AutoModel``, does not give the student's tokens; nothing is put
            into ``folder`` then.
    """
    student = _own_copy(student)

    def tokens(encoder: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(pixels: torch.Tensor) -> torch.Tensor:
            output = student.adapter.forward(encoder, pixels)
            return torch.cat([output.cls[:, None], output.patches], dim=1)

        return run

    with _workshop(folder) as place, quiet():
        student.save_encoder(place)
        image_processor(student.config, image_size).save_pretrained(place)
        loaded = AutoModel.from_pretrained(place).eval()
        sizes = _check_sizes(student, image_size)
        difference = _compare(tokens(student.encoder), tokens(loaded), sizes, "tokens", type(loaded).__name__)
    return Exported(Path(folder), True, type(loaded).__name__, "AutoModel", max_difference=difference)


def export_segmenter(
    segmenter: GKDStudentForSemanticSegmentation, folder: str | os.PathLike, *, image_size: int
) -> Exported:
    """Write the segmenter as one of transformers' own classes where there is one, else with this library's code.

    ============== =============================== ========================= ==============================
    decode head    ResNet, ConvNeXt, Swin          ViT, DINOv2               MobileNetV2
    ============== =============================== ========================= ==============================
    upernet        UperNet…                        UperNet… (Dinov2Backbone) code
    mask2former    Mask2FormerForUniversal…        code                      code
    dpt            –                               DPT… (square images)      –
    linear         code                            code                      code
    ============== =============================== ========================= ==============================

    Native classes expect sides that are multiples of the encoder's stride, which the preprocessor sees to; the
    segmenter itself pads others.

    Args:
        image_size: side in pixels of the square images that the segmenter was trained on. There, and but for DPT at
            another, rectangular size, the logits are compared.

    Raises:
        InputError: what was written does not give the segmenter's class logits; nothing is put into ``folder`` then.
    """
    segmenter = _own_copy(segmenter)
    head = segmenter.config.decode_head["type"]
    with _workshop(folder) as place, quiet():
        try:
            to_native(copy.deepcopy(segmenter), image_size).save_pretrained(place)
            reason = ""
        except NotNativeError as error:
            save_with_code(segmenter, place)
            reason = str(error)
        universal = head == "mask2former" and not reason
        processor = mask2former_processor if universal else image_processor
        processor(segmenter.config, image_size).save_pretrained(place)
        loaded = load_segmenter(place)
        name = type(loaded).__name__
        # DPT takes square images only, and resamples the positions of others differently.
        sizes = _check_sizes(segmenter.student, image_size)[: 1 if name == DPT else None]
        difference = _compare(_class_scores(segmenter), _class_scores(loaded), sizes, "class logits", name)
    limits = ""
    if name == DPT:
        limits = f"takes square images only, and gives the student's logits at {image_size}×{image_size}"
    elif universal:
        limits = 'pipeline("image-segmentation") needs subtask="semantic", or it looks for single objects'
    auto_class = "AutoModelForUniversalSegmentation" if universal else "AutoModelForSemanticSegmentation"
    return Exported(Path(folder), not reason, name, auto_class, reason, difference, limits)


def image_processor(config: GKDStudentConfig, image_size: int) -> SegformerImageProcessorPil:
    """What turns pictures into pixels as the student was trained on them: any encoder, square images."""
    return SegformerImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=config.image_mean,
        image_std=config.image_std,
        do_reduce_labels=False,
    )


def mask2former_processor(config: GKDStudentConfig, image_size: int) -> Mask2FormerImageProcessorPil:
    """The same for transformers' Mask2Former, whose outputs only its own processor can read."""
    return Mask2FormerImageProcessorPil(
        size={"height": image_size, "width": image_size},
        size_divisor=0,
        image_mean=config.image_mean,
        image_std=config.image_std,
        do_reduce_labels=False,
        ignore_index=config.semantic_loss_ignore_index,
    )


def _own_copy(model: Any) -> Any:
    """The same model in fp32 on the CPU and in eval mode; a trainer may have put the given one elsewhere."""
    config = copy.deepcopy(model.config)
    config.encoder_config.name_or_path = ""  # may be a folder of this machine, and is nothing that others can use
    own = type(model)(config)
    own.load_state_dict({key: value.detach().cpu() for key, value in model.state_dict().items()})
    return own.eval()


class _workshop:
    """A temporary folder beside the given one; what was put there is moved into place unless an error is raised."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = tempfile.TemporaryDirectory(prefix=f".{self.folder.name}.", dir=self.folder.parent)
        return Path(self.temporary.name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.temporary:
            if kind is None:
                self.folder.mkdir(exist_ok=True)
                code = {path.name for path in model_files()}
                for old in self.folder.iterdir():
                    # An earlier export may have had other shards, or code that this one does not need.
                    if old.suffix == ".safetensors" or old.name in code or old.name.endswith(".index.json"):
                        old.unlink()
                for new in Path(self.temporary.name).iterdir():
                    os.replace(new, self.folder / new.name)


def _class_scores(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixels: class_logits(model(pixels), tuple(pixels.shape[-2:]))


def _check_sizes(student: GKDStudentModel, image_size: int) -> list[tuple[int, int]]:
    stride = student.adapter.stride
    side = max(1, round(image_size / stride)) * stride
    return [(side, side), (side + stride, side + 2 * stride)]


@torch.no_grad()
def _compare(
    ours: Callable[[torch.Tensor], torch.Tensor],
    theirs: Callable[[torch.Tensor], torch.Tensor],
    sizes: list[tuple[int, int]],
    what: str,
    name: str,
) -> float:
    """Return the largest absolute difference on random images; raise `InputError` if it is above the tolerance."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for height, width in sizes:
        pixels = torch.randn(1, 3, height, width, generator=generator)
        # The layout in which convolutional students run: another would round otherwise.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        expected, got = ours(pixels), theirs(pixels)
        difference = (expected - got).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise InputError(
                f"the exported {name} does not give the student's {what} on an image of {height}×{width}: they differ "
                f"by {difference:.3g}, allowed is {allowed:.3g}; nothing was written"
            )
        worst = max(worst, difference)
    return worst
