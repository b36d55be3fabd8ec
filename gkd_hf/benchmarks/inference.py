"""Sliding-window segmentation: how fast, run in which way, and in how much memory."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gkd_hf.benchmarks.inference_arms import Forward, build, forwards
from gkd_hf.benchmarks.timing import check_device, machine, ratio, say, timed_in_turn
from gkd_hf.errors import InputError
from gkd_hf.evaluation.sliding_window import best_class, predict_labels, resize
from gkd_hf.training.live_memory import LiveMemory

MIB = 2**20


@dataclass(frozen=True)
class InferenceSettings:
    """What is measured. Sizes are (height, width) in pixels.

    Attributes:
        model, head, classes: see `gkd_hf.benchmarks.inference_arms.build`.
        image_size: of the timed images. label_size: of their labels. memory_size: of the image for the memory.
        window, stride: of the sliding windows. batch_size: windows in one forward.
        images: segmented at once for the images per second; the latency is that of one.
        precision: "fp32" or "bf16". device: "cpu" or "cuda". rounds: timed calls of each arm.

    Raises:
        InputError: a number below 1, an unknown precision, or no such device.
    """

    model: str = "vit-s"
    head: str | None = None
    classes: int = 19
    image_size: tuple[int, int] = (512, 1024)
    label_size: tuple[int, int] = (1024, 2048)
    memory_size: tuple[int, int] = (1024, 2048)
    window: int = 512
    stride: int = 341
    batch_size: int = 4
    images: int = 4
    precision: str = "fp32"
    device: str = "cpu"
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("classes", "window", "stride", "batch_size", "images", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.stride > self.window:
            raise InputError(f"stride is {self.stride}: give at most the window, {self.window}")
        check_device(self.device, self.precision)


def measure(settings: InferenceSettings, tell: Callable[[str], None] = say) -> dict[str, Any]:
    """Time the ways of segmenting in turn, then measure memory; return figures ready for JSON.

    ``tell`` is given a line about each thing that begins.

    ``latency_ms``, ``images_per_s``, ``peak_mb`` and ``bound_mb`` are of eager torch with batched windows; "…_by_arm"
    tells all arms. A ratio that needs an arm which was skipped is None, and ``skipped`` says why.
    """
    device = torch.device(settings.device)
    model = build(settings.model, settings.head, settings.classes, settings.window).to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.images, 3, *settings.image_size, generator=generator).to(device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        crops = torch.zeros(settings.batch_size, 3, settings.window, settings.window, device=device)
        tell("compiling, and exporting to ONNX")
        ways, skipped = forwards(model, settings.precision, settings.window, crops, Path(folder))
        arms = {"one by one": (ways["eager"], 1)}
        arms |= {name: (forward, settings.batch_size) for name, forward in ways.items()}
        found = {name: _segment(settings, *arm, images[:1]) for name, arm in arms.items()}
        tell(f"{settings.rounds} rounds of {', '.join(arms)}: one image, then {settings.images}")
        one = _timed(settings, arms, images[:1])
        many = _timed(settings, arms, images)
        tell("counting memory; taking the best class by tiles")
        memory = memory_of(settings, ways["eager"], [*model.parameters(), *model.buffers()], device)
        tiles = tiles_against_plain(settings, model.config.num_labels, device)
    return {
        "batched_over_one_by_one": ratio(many["one by one"], many["eager"]),
        "compiled_over_eager": ratio(many["eager"], many["compiled"]) if "compiled" in many else None,
        "onnx_over_eager": ratio(many["eager"], many["onnx"]) if "onnx" in many else None,
        "latency_ms": 1000 * statistics.median(one["eager"]),
        "images_per_s": settings.images / statistics.median(many["eager"]),
        **memory,
        **tiles,
        "latency_ms_by_arm": {name: 1000 * statistics.median(each) for name, each in one.items()},
        "images_per_s_by_arm": {name: settings.images / statistics.median(each) for name, each in many.items()},
        "labels_like_eager_by_arm": {
            name: (labels == found["eager"]).double().mean().item() for name, labels in found.items()
        },
        "skipped": skipped,
        "machine": machine(device),
    }


def memory_of(
    settings: InferenceSettings, forward: Forward, weights: list[torch.Tensor], device: torch.device
) -> dict[str, Any]:
    """Return what segmenting one image takes beyond the image and the weights, and its bound.

    Once the image has the memory size, as its labels have ("peak_mb"), and once half of that in height and width, so
    that the scores are resized to the labels ("peak_resized_mb"). The bound of each is the float32 scores of the
    image, and the peak of one batch of windows: the pixels cut out, and their forward. All are MiB of torch's
    allocator on a GPU; elsewhere of all tensors' storages, without what kernels take and give back inside themselves.
    """
    side, size = settings.window, settings.memory_size
    image, crop = torch.zeros(1, 3, *size, device=device), torch.zeros(3, side, side, device=device)
    half = torch.zeros(1, 3, *(max(1, length // 2) for length in size), device=device)
    classes = forward(crop[None]).shape[1]
    scores, fewer = (classes * 4 * max(side, each.shape[2]) * max(side, each.shape[3]) for each in (image, half))
    batch_size, given = settings.batch_size, [*weights, image, half, crop]
    one_batch = peak_bytes(lambda: forward(torch.stack([crop] * batch_size)), device, given)
    peak = peak_bytes(lambda: _segment(settings, forward, batch_size, image, size), device, given)
    resized = peak_bytes(lambda: _segment(settings, forward, batch_size, half, size), device, given)
    return {
        "peak_mb": peak / MIB,
        "bound_mb": (scores + one_batch) / MIB,
        "peak_resized_mb": resized / MIB,
        "bound_resized_mb": (fewer + one_batch) / MIB,
        "scores_mb": scores / MIB,
        "window_batch_mb": one_batch / MIB,
        "within_bound": peak <= scores + one_batch and resized <= fewer + one_batch,
    }


def tiles_against_plain(settings: InferenceSettings, classes: int, device: torch.device) -> dict[str, Any]:
    """Take the best class of random scores of the image size at the label size: by tiles, and from all at once."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(classes, *settings.image_size, generator=generator).to(device)
    arms: dict[str, Callable[[], torch.Tensor]] = {
        "tiles": partial(best_class, scores, settings.label_size),
        "plain": lambda: resize(scores[None], settings.label_size)[0].argmax(0),
    }
    seconds = timed_in_turn(arms, rounds=max(5, settings.rounds), device=device)
    peaks = {name: peak_bytes(arm, device, [scores]) / MIB for name, arm in arms.items()}
    return {
        "tile_fused_over_plain": ratio(seconds["plain"], seconds["tiles"]),
        "best_class_ms": {name: 1000 * statistics.median(each) for name, each in seconds.items()},
        "best_class_mb": peaks,
        "labels_equal": torch.equal(arms["tiles"](), arms["plain"]()),
    }


def peak_bytes(run: Callable[[], object], device: torch.device, given: list[torch.Tensor]) -> int:
    """Return the most bytes alive while ``run`` runs, beyond those before; ``given`` are tensors that it works on."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveMemory(("run", "given")) as memory:
        memory.claim(given, "given")
        with memory.phase("run", "run"):
            run()
    return max(moment[0] for moment in memory.history["run"])


def _segment(
    settings: InferenceSettings,
    forward: Forward,
    batch_size: int,
    images: torch.Tensor,
    label_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    options = {"window": settings.window, "stride": settings.stride, "batch_size": batch_size}
    return predict_labels(forward, images, label_size or settings.label_size, **options)


def _timed(
    settings: InferenceSettings, arms: dict[str, tuple[Forward, int]], images: torch.Tensor
) -> dict[str, list[float]]:
    calls = {name: partial(_segment, settings, *arm, images) for name, arm in arms.items()}
    return timed_in_turn(calls, rounds=settings.rounds, device=settings.device)


def table(result: dict[str, Any]) -> str:
    """Return what `measure` returns as lines to read."""
    latency, speed, alike = (result[f"{name}_by_arm"] for name in ("latency_ms", "images_per_s", "labels_like_eager"))
    lines = [f"{'':<12}{'latency, ms':>14}{'images/s':>12}{'labels as eager':>18}"]
    for name in latency:
        lines.append(f"{name:<12}{latency[name]:>14.1f}{speed[name]:>12.2f}{100 * alike[name]:>16.3f} %")
    lines += [f"{name:<12}skipped: {reason}" for name, reason in result["skipped"].items()]
    lines.append(
        f"memory of one image: {result['peak_mb']:.0f} MiB; its scores {result['scores_mb']:.0f} and one batch of "
        f"windows {result['window_batch_mb']:.0f} are {result['bound_mb']:.0f}; with "
        f"scores resized twofold {result['peak_resized_mb']:.0f}, of {result['bound_resized_mb']:.0f}"
    )
    own, plain = (
        f"{result['best_class_ms'][n]:.0f} ms, {result['best_class_mb'][n]:.0f} MiB" for n in ("tiles", "plain")
    )
    equal = "the same labels" if result["labels_equal"] else "labels differ where two classes are equally good"
    lines.append(f"best class at the labels' size: by tiles {own}; from all scores {plain}; {equal}")
    return "\n".join(lines)
