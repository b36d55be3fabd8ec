"""The metric against the algorithm of `evaluate`'s mean_iou, and a whole evaluation against its model's forward."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig

from gkd_hf.benchmarks.timing import check_device, ratio, ratio_range, say, timed_in_turn
from gkd_hf.data.domains import label_space
from gkd_hf.data.label_maps import label_map
from gkd_hf.data.loader_benchmark import write_pairs
from gkd_hf.data.rows import ShardRows
from gkd_hf.data.shards import open_rows
from gkd_hf.data.streaming import EvaluationSet
from gkd_hf.data.toy_city import CLASSES, render
from gkd_hf.data.transforms import EvaluationTransform
from gkd_hf.errors import InputError
from gkd_hf.evaluation.mean_iou import IGNORE_INDEX, confusion_counts
from gkd_hf.evaluation.sliding_window import window_starts
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.loading import config_from_mapping
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.training.arguments import GKDSegmentationArguments
from gkd_hf.training.segmentation_trainer import GKDSegmentationTrainer

LABEL_SIZE, TEST_SIZE = (2048, 1024), (1024, 512)
"""Width and height of an image and its label as stored, and of the image as it is segmented: those of Cityscapes."""
_ENLARGED = 4
_HELD = 3  # batches of images
_RESNET = {"model_type": "resnet", "embedding_size": 64}
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet-18": _RESNET | {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet-50": _RESNET | {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "vit-s": {
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": 16,
        "image_size": 512,
    },
}


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated.

    Args:
        student: a name of `STUDENTS`; its weights are random, its head linear. classes: number of its classes.
        images: of 2048×1024 pixels with labels of that size; segmented at 1024×512, as Cityscapes is.
        rounds: how often all of them are evaluated, and forwarded.
        workers: processes that read them. window, stride: in pixels. window_batch_size: windows in a forward.
        precision: "fp32", or "bf16" (autocast). device: "cpu" or "cuda".

    Raises:
        InputError: an unknown student or precision, a number out of range, or no such device.
    """

    student: str = "resnet-18"
    classes: int = 19
    images: int = 100
    rounds: int = 3
    workers: int = 1
    window: int = 512
    stride: int = 341
    window_batch_size: int = 4
    precision: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.student not in STUDENTS:
            raise InputError(f"student is '{self.student}': choose from {', '.join(STUDENTS)}")
        if self.rounds < 1 or self.images < 1:
            raise InputError(f"{self.images} images in {self.rounds} rounds: give 1 or more of both")
        for name, least in {"workers": 0, "classes": len(CLASSES)}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: give {least} or more")
        check_device(self.device, self.precision)


def counted_by_histograms(
    prediction: np.ndarray, reference: np.ndarray, num_labels: int, ignore_index: int = IGNORE_INDEX
) -> tuple[np.ndarray, np.ndarray]:
    """Return intersections and unions of one pair of maps as `evaluate`'s mean_iou finds them.

    Ignored pixels are cut out of both maps; three histograms count the pixels that agree, those predicted and those
    true; the union is what the last two have together less the first.
    """
    # That metric copies what it is given, twice for the reference.
    prediction, reference = np.array(prediction), np.array(reference)
    counted = reference != ignore_index
    prediction, reference = prediction[counted], np.array(reference)[counted]
    agreed, predicted, true = (
        np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
        for values in (prediction[prediction == reference], prediction, reference)
    )
    return agreed, predicted + true - agreed


def label_pair(height: int, width: int, num_labels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 H×W maps: a truth of 32×32 blocks with 5 % ignored, a prediction that is wrong in 20 %."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, num_labels, (-(-height // 32), -(-width // 32)))
    truth = np.kron(blocks, np.ones((32, 32), np.int64))[:height, :width]
    prediction = truth.copy()
    wrong = rng.random(truth.shape) < 0.2
    prediction[wrong] = rng.integers(0, num_labels, int(wrong.sum()))
    truth[rng.random(truth.shape) < 0.05] = IGNORE_INDEX
    return torch.from_numpy(prediction), torch.from_numpy(truth)


def measure_metric(
    height: int = 1024, width: int = 2048, num_labels: int = 19, rounds: int = 15, device: str = "cpu"
) -> dict[str, Any]:
    """Time one pair of int64 maps: by histograms in numpy, and `confusion_counts` (also of uint8 references).

    The histograms are numpy's, which has one thread on the CPU; ours takes all of torch's threads, or the GPU.

    Returns:
        ``speedup``: histograms / ours, the median over the rounds; ``speedup_range``: the least and the greatest.
        ``equal``: whether intersections and unions are the same numbers. ``*_ms``.

    Raises:
        InputError: a size or a number of classes below 1, more classes than uint8 labels can tell from ignored ones,
            or no such device.
    """
    check_device(device)
    if num_labels > IGNORE_INDEX:
        raise InputError(f"classes is {num_labels}: give at most {IGNORE_INDEX}, as uint8 labels hold no more")
    if min(height, width, num_labels) < 1:
        raise InputError(f"a pair of {height}×{width} pixels with {num_labels} classes: all must be 1 or more")
    prediction, truth = label_pair(height, width, num_labels)
    arrays = prediction.numpy(), truth.numpy()
    prediction, truth = prediction.to(device), truth.to(device)
    found: dict[str, Any] = {}

    def keep(name: str, count: Callable[[], Any]) -> Callable[[], None]:
        return lambda: found.__setitem__(name, count())

    narrow = truth.to(torch.uint8)
    arms = {
        "histograms": keep("histograms", lambda: counted_by_histograms(*arrays, num_labels)),
        "ours": keep("ours", lambda: confusion_counts(prediction, truth, num_labels)),
        "ours_uint8": keep("ours_uint8", lambda: confusion_counts(prediction, narrow, num_labels)),
    }
    seconds = timed_in_turn(arms, rounds=rounds, warmup=2, device=device)
    expected = [counts.tolist() for counts in found["histograms"]]
    return {
        "speedup": ratio(seconds["histograms"], seconds["ours"]),
        "speedup_range": ratio_range(seconds["histograms"], seconds["ours"]),
        "speedup_uint8": ratio(seconds["histograms"], seconds["ours_uint8"]),
        "equal": all(_areas(found[name]) == expected for name in ("ours", "ours_uint8")),
        **{f"{name}_ms": 1e3 * float(np.median(times)) for name, times in seconds.items()},
    }


def _areas(confusion: torch.Tensor) -> list[list[int]]:
    hits = confusion.diagonal()
    return [hits.tolist(), (confusion.sum(0) + confusion.sum(1) - hits).tolist()]


def segmenter(config: Mapping[str, Any] | PreTrainedConfig, classes: int) -> GKDStudentForSemanticSegmentation:
    """Return a segmenter with random weights and a linear head."""
    encoder = config_from_mapping(dict(config)) if isinstance(config, Mapping) else config
    torch.manual_seed(0)
    return GKDStudentForSemanticSegmentation(
        GKDStudentConfig(encoder_config=encoder, num_labels=classes, decode_head={"type": "linear"})
    )


def measure_evaluation(settings: EvaluationSettings, tell: Callable[[str], None] = say) -> dict[str, Any]:
    """Time `GKDSegmentationTrainer.evaluate_domains` on rendered street scenes against the bare forward of its model.

    The evaluation reads, decodes and resizes images, segments them, resizes the scores to the labels' size, twice the
    images' each way, and counts there, starting its readers among the rest. The forward has the same windows in the
    same batches, already on its device: half of them before the evaluation, half after it.

    Args:
        tell: called with a line where something takes long.

    Returns:
        ``evaluation_over_forward``: the median over the rounds. ``images_per_s``. ``evaluation_s``, ``forward_s``: of
        all rounds.
    """
    model = segmenter(STUDENTS[settings.student], settings.classes)
    seconds: dict[str, list[float]] = {"evaluation": [], "forward": []}
    with tempfile.TemporaryDirectory() as folder:
        tell(f"rendering {settings.images} images")
        write_pairs(_street_scenes(settings.images), folder)
        rows = open_rows(folder, "train")
        arguments = GKDSegmentationArguments(
            folder,
            max_steps=1,
            use_cpu=settings.device == "cpu",
            bf16=settings.precision == "bf16",
            dataloader_num_workers=settings.workers,
            window=settings.window,
            stride=settings.stride,
            window_batch_size=settings.window_batch_size,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = GKDSegmentationTrainer(model, arguments, train_dataset=[])
        model.to(arguments.device).eval()
        tell(f"evaluating {settings.images} images and forwarding their windows, {settings.rounds} time(s)")
        whole = _evaluation_set(rows, model.config)
        # Windows of a few batches at a time: of all of them there would be gigabytes.
        at_once, held = arguments.per_device_eval_batch_size, _HELD * arguments.per_device_eval_batch_size
        parts = [range(first, min(first + held, settings.images)) for first in range(0, settings.images, held)]

        def timed(name: str, call: Callable[[], object]) -> None:
            seconds[name][-1] += timed_in_turn({name: call}, rounds=1, warmup=0, device=settings.device)[name][0]

        def forward(some: list[range]) -> None:
            for part in some:
                images = _evaluation_set(rows.subset(np.array(part)), model.config)
                timed("forward", partial(_forward, trainer, model, _windows(images, settings, at_once)))

        _forward(trainer, model, _windows(whole, settings, at_once, limit=1))  # sets up what later ones find
        for _ in range(settings.rounds):
            for name in seconds:
                seconds[name].append(0.0)
            forward(parts[: len(parts) // 2])
            timed("evaluation", partial(trainer.evaluate_domains, {"toy_city": whole}, examples=0))
            forward(parts[len(parts) // 2 :])
    evaluation, forward = (sum(seconds[name]) for name in ("evaluation", "forward"))
    return {
        "evaluation_over_forward": ratio(seconds["evaluation"], seconds["forward"]),
        "images_per_s": settings.images * settings.rounds / evaluation,
        "evaluation_s": evaluation,
        "forward_s": forward,
    }


def _street_scenes(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``count`` pictures of 2048×1024 pixels with labels: two scenes of the toy city, enlarged.

    To render them at that size would take longer than all that is measured.
    """
    side = LABEL_SIZE[1] // _ENLARGED
    for start in range(0, 2 * count, 2):
        scenes, labels = render("clear_day", 2, size=side, start=start)
        picture = Image.fromarray(np.hstack(scenes)).resize(LABEL_SIZE, Image.Resampling.BILINEAR)
        yield np.asarray(picture), np.hstack(labels).repeat(_ENLARGED, 0).repeat(_ENLARGED, 1)


def _evaluation_set(rows: ShardRows, config: GKDStudentConfig) -> EvaluationSet:
    return EvaluationSet(
        rows,
        EvaluationTransform(config.image_mean, config.image_std, size=TEST_SIZE),
        label_map=label_map("identity", len(CLASSES)),
        label_space=label_space("toy_city"),
        domain="toy_city",
    )


def _windows(
    images: EvaluationSet, settings: EvaluationSettings, images_at_once: int, limit: int | None = None
) -> list[torch.Tensor]:
    """Return the windows of all images, or of the first ``limit``, as the evaluation batches them."""
    side, batches = settings.window, []
    samples = itertools.islice(images, limit)
    while group := list(itertools.islice(samples, images_at_once)):
        crops = [
            images.normalised(sample["pixel_values"])[:, top : top + side, left : left + side]
            for sample in group
            for top in window_starts(sample["pixel_values"].shape[1], side, settings.stride)
            for left in window_starts(sample["pixel_values"].shape[2], side, settings.stride)
        ]
        at_once = settings.window_batch_size
        batches += [torch.stack(crops[i : i + at_once]).to(settings.device) for i in range(0, len(crops), at_once)]
    return batches


@torch.no_grad()
def _forward(
    trainer: GKDSegmentationTrainer, model: GKDStudentForSemanticSegmentation, windows: list[torch.Tensor]
) -> None:
    for crops in windows:
        with trainer.autocast():
            model(pixel_values=crops)
