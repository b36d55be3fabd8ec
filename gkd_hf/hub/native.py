"""From a trained student to folders that anybody's transformers loads, and back.

What is written was loaded again and compared first: the same tokens, the same class logits, or nothing is written.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from gkd_hf.hub.remote_code import save_with_code
from gkd_hf.hub.segmenters import class_logits, load_segmenter, quiet
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel

__all__ = ["Exported", "class_logits", "export_encoder", "export_segmenter", "image_processor", "load_segmenter"]

DPT = "DPTForSemanticSegmentation"
TOLERANCE = 1e-5  # of the largest absolute value that the student gives


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it is. native: whether transformers loads it by itself, without remote code.
        architecture: the class, for example ``UperNetForSemanticSegmentation``.
        auto_class: the Auto class that loads it.
        reason: why it is not native, "" if it is.
        max_difference: largest absolute difference to the student (tokens or class logits, fp32, random images). It
            is at most 1e-5 of the largest absolute value that the student gives for the same image: at most 1e-5
            where that value is at most 1, less for the small logits of a head that is hardly trained, and more than
            1e-5 only where logits are above 1, as far as fp32 can tell them apart.
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
        folder: a new or empty one.
        image_size: side in pixels of the square images that the preprocessor makes.

    Raises:
        InputError: the written encoder, loaded by ``AutoModel``, does not give the student's tokens (they differ by
            more than 1e-5 of the largest absolute value among them), or ``folder`` holds something or cannot be
            written; nothing is put into it then.
    """
    student = _own_copy(student)

    def tokens(encoder: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(pixels: torch.Tensor) -> torch.Tensor:
            output = student.adapter.forward(encoder, pixels)
            return torch.cat([output.cls[:, None], output.patches], dim=1)

        return run

    with _workshop(folder) as place, quiet():
        student.save_encoder(place)
        processor = image_processor(student.config, image_size)
        if student.adapter.pixel_statistics is not None:  # the plain model normalises by itself
            processor.image_mean, processor.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        processor.save_pretrained(place)
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

    Segmenters on any other encoder are written with this library's code.

    Native classes expect sides that are multiples of the encoder's stride, which the preprocessor sees to; the
    segmenter itself pads others.

    Args:
        folder: a new or empty one.
        image_size: side in pixels of the square images that the segmenter was trained on. There, and but for DPT at
            another, rectangular size, the logits are compared.

    Raises:
        InputError: what was written does not give the segmenter's class logits (they differ by more than 1e-5 of the
            largest absolute logit, see `Exported`), or ``folder`` holds something or cannot be written; nothing is
            put into it then.
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
    """The same for transformers' Mask2Former, whose outputs only its own processor can read.

    Its panoptic and instance post-processing are set to None, and saved so: pipelines then take the semantic one
    unasked, where they would look for single objects, which the segmenter was not trained to find.
    """
    return Mask2FormerImageProcessorPil(
        size={"height": image_size, "width": image_size},
        size_divisor=0,
        image_mean=config.image_mean,
        image_std=config.image_std,
        do_reduce_labels=False,
        ignore_index=config.semantic_loss_ignore_index,
        post_process_panoptic_segmentation=None,
        post_process_instance_segmentation=None,
    )


def _own_copy(model: Any) -> Any:
    """The same model in fp32 on the CPU and in eval mode; a trainer may have put the given one elsewhere."""
    config = copy.deepcopy(model.config)
    config.encoder_config.name_or_path = ""  # may be a folder of this machine, and is nothing that others can use
    own = type(model)(config)
    own.load_state_dict({key: value.detach().cpu() for key, value in model.state_dict().items()})
    return own.eval()


@contextmanager
def _workshop(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that becomes the given one, which has to be new or empty, unless an error is raised."""
    target = Path(folder).absolute()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(
                f"cannot export to '{folder}': there is something already, and what is not of this export must not "
                "lie beside it; name a new folder, or empty that one"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as outer:
            place = Path(outer) / "export"  # made with the usual rights, which the temporary folder does not have
            place.mkdir()
            yield place
            if not target.exists():
                place.rename(target)
                return
            # An empty folder is filled, not replaced: it may be the one that the process works in.
            for file in sorted(place.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(target / file.name)
    except OSError as error:
        raise InputError(f"cannot export to '{folder}': {error.strerror or error}") from error


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
        # Of the values themselves also where they are small: an untrained head's are below any absolute tolerance.
        allowed = TOLERANCE * expected.abs().max().item()
        if not difference <= allowed:
            raise InputError(
                f"the exported {name} does not give the student's {what} on an image of {height}×{width}: they differ "
                f"by {difference:.3g}, allowed is {allowed:.3g}; nothing was written"
            )
        worst = max(worst, difference)
    return worst
