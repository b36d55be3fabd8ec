"""Time one stage-1 training step against the method as it is written and against the least it could cost."""

from __future__ import annotations

import copy
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gkd_hf.benchmarks.step_arms import Arm, Floor, Ours, Reference, frozen_batch_norms
from gkd_hf.benchmarks.timing import check_device, machine, ratio, ratio_range, say, synchronise, timed_in_turn
from gkd_hf.data.streaming import SampleStream
from gkd_hf.data.toy_city import toy_city
from gkd_hf.data.transforms import DistillationTransform
from gkd_hf.errors import InputError, nearest
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments
from gkd_hf.training.distillation_trainer import GKDDistillationTrainer
from gkd_hf.training.live_memory import LiveMemory

MIB = 2**20
PARTS = ("data", "teacher", "student", "heads", "optimiser")
_PARTS_ROUNDS = 5


def _dinov2(width: int, depth: int = 12) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    return {"model_type": "dinov2", "patch_size": 14, "image_size": 518} | sizes


# Random weights: how fast a step is does not depend on what they are.
PRESETS: dict[str, dict[str, Any]] = {
    "vit-s": _dinov2(384),
    "vit-b": _dinov2(768),
    "vit-l": _dinov2(1024, 24),
    "resnet-50": {"model_type": "resnet"},
    "convnext-t": {"model_type": "convnext"},
}

# Dense bf16 TFLOP/s without sparsity, from the makers' data sheets, by words of the name that CUDA gives the device.
PEAK_TFLOPS = {
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
}


@dataclass(frozen=True)
class StepSettings:
    """What is measured.

    Attributes:
        student, teacher: a name of `PRESETS`, a Hub id or a folder.
        batch_size: B images. image_size: S pixels of a side. patch_size: of the student; None keeps its own.
        precision: "fp32", or "bf16" (autocast). device: "cpu" or "cuda".
        early_backward: of `GKDDistillationArguments`; None does as a training would. rounds: timed steps of each arm.
        peak_tflops: of the GPU in this precision; None takes `PEAK_TFLOPS` for bf16.

    Raises:
        InputError: a number below 1, an unknown precision, or no such device.
    """

    student: str = "vit-s"
    teacher: str = "vit-b"
    batch_size: int = 8
    image_size: int = 224
    patch_size: int | None = None
    precision: str = "fp32"
    device: str = "cpu"
    early_backward: bool | None = None
    rounds: int = 15
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        least = {"batch_size": 2, "image_size": 1, "rounds": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} is {getattr(self, name)}: give {bound} or more")
        if self.patch_size is not None and self.patch_size < 1:
            raise InputError(f"patch_size is {self.patch_size}: give 1 or more, or leave it out for the student's own")
        check_device(self.device, self.precision)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise InputError(f"peak_tflops is {self.peak_tflops}: give what the GPU can do, more than 0")


@contextmanager
def arms_of(settings: StepSettings) -> Iterator[dict[str, Arm]]:
    """Build the three arms, ``reference``, ``ours`` and ``floor``, with the same weights and one batch for all.

    The batch is of rendered street scenes, as bytes, with its masks, as the trainer's loader gives it.

    Raises:
        InputError: student, teacher or image size that do not go together, or cannot be read.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        student = GKDStudentModel.from_encoder(
            _source(settings.student), image_size=settings.image_size, patch_size=settings.patch_size
        )
        teacher = GKDTeacher(_source(settings.teacher))
        args = GKDDistillationArguments(
            folder,
            max_steps=1000,
            per_device_train_batch_size=settings.batch_size,
            bf16=settings.precision == "bf16",
            use_cpu=settings.device == "cpu",
            early_backward=settings.early_backward,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        transform = DistillationTransform(settings.image_size, student.config.image_mean, student.config.image_std)
        rows = toy_city("clear_day", settings.batch_size, size=settings.image_size, seed=0)
        stream = SampleStream(rows, transform, seed=0, micro_batch_size=settings.batch_size, domain="toy_city")
        trainer = GKDDistillationTrainer(student, teacher, args, stream)
        samples = iter(stream)
        batch = trainer.data_collator([next(samples) for _ in range(settings.batch_size)])
        # Nothing here holds an arm: who takes one out of the dictionary frees its weights.
        yield {
            "reference": Reference(trainer, batch, copy.deepcopy(trainer.model)),
            "ours": Ours(trainer, batch),
            "floor": Floor(trainer, batch, copy.deepcopy(trainer.student)),
        }


def measure(settings: StepSettings, tell: Callable[[str], None] = say) -> dict[str, Any]:
    """Measure the arms, telling what is under way, and return what `scripts/benchmark_step.py` prints as JSON.

    Returns:
        speedup: reference / ours, over_floor: ours / floor, the medians of ratios of neighbouring steps.
        speedup_range, over_floor_range: the least and the greatest of these ratios.
        images_per_s: of ours. step_ms, parts_ms, peak_mb, activation_mb: by arm. peak_mb: also of ours alone, in MiB.
        loss_difference, gradient_difference: relative, of ours and the reference on the first weights.
        mfu: model FLOPs utilisation on a GPU whose speed is known, else None.
    """
    with arms_of(settings) as arms:
        device = next(arms["ours"].model.parameters()).device
        tell("comparing losses and gradients")
        equality, activations = compare(arms["reference"], arms["ours"])
        activations["floor"] = kept_for_backward(arms["floor"])
        for arm in arms.values():
            arm.optimise()  # makes its states
        tell("counting memory and operations")
        peaks, flops = {}, 0
        for name, arm in arms.items():
            peaks[name], counted = peak_bytes(arm, device)
            flops = counted if name == "ours" else flops
        tell("timing the parts of a step")
        parts = parts_seconds(arms, device, min(settings.rounds, _PARTS_ROUNDS))
        steps = {name: arm.step for name, arm in arms.items()}
        tell(f"timing {settings.rounds} steps of each arm in turn")
        # Each has warmed up by now.
        seconds = timed_in_turn(steps, rounds=settings.rounds, warmup=0, device=device)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "speedup": ratio(seconds["reference"], seconds["ours"]),
        "over_floor": ratio(seconds["ours"], seconds["floor"]),
        "speedup_range": ratio_range(seconds["reference"], seconds["ours"]),
        "over_floor_range": ratio_range(seconds["ours"], seconds["floor"]),
        "images_per_s": settings.batch_size / median["ours"],
        "peak_mb": peaks["ours"] / MIB,
        **equality,
        "step_ms": {name: 1000 * each for name, each in median.items()},
        "parts_ms": {name: {part: 1000 * each for part, each in own.items()} for name, own in parts.items()},
        "peak_mb_by_arm": {name: each / MIB for name, each in peaks.items()},
        "activation_mb": {name: each / MIB for name, each in activations.items()},
        "mfu": utilisation(settings, flops, median["ours"]) if device.type == "cuda" else None,
        "machine": machine(device),
    }


def compare(reference: Arm, ours: Arm) -> tuple[dict[str, float], dict[str, int]]:
    """Run both arms' forward and backward, batch norms in eval mode; the gradients stay.

    Returns:
        Relative differences, of the losses and of the gradients as one vector; and what each arm keeps for its
        backward pass, in bytes.
    """
    losses, kept = [], {}
    for name, arm in (("reference", reference), ("ours", ours)):
        with frozen_batch_norms(arm.model.student), keeping(_standing(arm)) as memory:
            losses.append(arm.learn().item())
        kept[name] = memory.most
    expected = dict(reference.model.named_parameters())
    pairs = [(own.grad, expected[name].grad) for name, own in ours.model.named_parameters() if own.grad is not None]
    difference = torch.stack([(own - wanted).norm() for own, wanted in pairs]).norm()
    whole = torch.stack([wanted.norm() for _, wanted in pairs]).norm()
    loss = abs(losses[1] - losses[0]) / abs(losses[0])
    return {"loss_difference": loss, "gradient_difference": (difference / whole).item()}, kept


def kept_for_backward(arm: Arm) -> int:
    """Run an arm's forward and backward, and return the bytes that it keeps from the one for the other."""
    with keeping(_standing(arm)) as memory:
        arm.learn()
    return memory.most


class Kept:
    """What autograd keeps for backward passes: each storage once, from its first keeper on until the last lets it go.

    Attributes:
        now: bytes that are kept. most: the most there were.
    """

    def __init__(self, left_out: Iterable[torch.Tensor] = ()):
        self.now = self.most = 0
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._keepers: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> _Keeper:
        """Return what stands for a tensor until it is needed."""
        return _Keeper(self, tensor)

    def count(self, tensor: torch.Tensor, keepers: int) -> None:
        """Note that a tensor's storage has one keeper more, or less."""
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._left_out:
            return
        before = self._keepers.get(place, 0)
        self._keepers[place] = before + keepers
        self.now += size * ((before + keepers > 0) - (before > 0))
        self.most = max(self.most, self.now)


class _Keeper:
    """A tensor that autograd keeps; goes when autograd drops it."""

    def __init__(self, kept: Kept, tensor: torch.Tensor):
        self.kept, self.tensor = kept, tensor
        kept.count(tensor, 1)

    def __del__(self) -> None:
        self.kept.count(self.tensor, -1)


@contextmanager
def keeping(left_out: Iterable[torch.Tensor] = ()) -> Iterator[Kept]:
    """Count what autograd saves for its backward passes, but for tensors that stand there anyway, such as weights."""
    kept = Kept(left_out)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda keeper: keeper.tensor):
        yield kept


def _standing(arm: Arm) -> list[torch.Tensor]:
    """What is there between two steps: weights, the teacher's too, buffers and the optimiser's states."""
    modules: tuple[nn.Module, ...] = (arm.model, *arm.trainer.teachers)
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    states = [value for state in arm.optimiser.state.values() for value in state.values()]
    return held + [value for value in states if isinstance(value, torch.Tensor)]


def peak_bytes(arm: Arm, device: torch.device) -> tuple[int, int]:
    """Run a step; return what its arm takes at the most, and the step's floating-point operations.

    Bytes of weights, buffers and optimiser states, and the most that a step allocates beyond them: on a GPU by torch's
    allocator, elsewhere the storages of tensors, without what kernels take and give back inside themselves. CPU
    attention has no formula to count its operations.
    """
    held = _standing(arm)
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        arm.step()
        most = torch.cuda.max_memory_allocated(device) - before
    with LiveMemory(("step", "standing")) as memory:
        memory.claim(held, "standing")
        with memory.phase("step", "step"):
            arm.step()
    if device.type != "cuda":
        most = max(moment[0] for moment in memory.history["step"])
    return sum(own.values()) + most, memory.flops


def parts_seconds(arms: Mapping[str, Arm], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Return the seconds of each of `PARTS` by arm, forward and backward together: medians over steps in turn.

    Heads and student are cut apart at the student's tokens: the heads' backward pass ends, and the student's begins,
    with their gradients. Waiting for the device between the parts costs a little, so they add up to more than a step.
    """
    runs = [{name: _parts(arm, device) for name, arm in arms.items()} for _ in range(rounds)]
    return {name: {part: statistics.median(run[name][part] for run in runs) for part in PARTS} for name in arms}


def _parts(arm: Arm, device: torch.device) -> dict[str, float]:
    seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def lap(part: str) -> Iterator[None]:
        synchronise(device)
        began = time.perf_counter()
        yield
        synchronise(device)
        seconds[part] += time.perf_counter() - began

    arm.model.train()
    with lap("data"):
        inputs = arm.inputs()
        pixels = arm.trainer.pixels(inputs)
    with lap("teacher"):
        taught = arm.teach(pixels)
    with lap("student"):
        views = arm.views(pixels, inputs)
    cut = tuple(view.detach().requires_grad_() for view in views)
    with lap("heads"):
        arm.backward(cut, taught, inputs)
    with lap("student"):
        torch.autograd.backward(views, [view.grad for view in cut])
    with lap("optimiser"):
        arm.optimise()
    return seconds


def utilisation(settings: StepSettings, flops: int, seconds: float) -> float | None:
    """Return the part of the GPU's peak that the step's operations take; None where that is not known."""
    peak = settings.peak_tflops
    if peak is None and settings.precision == "bf16":
        peak = known_peak(torch.cuda.get_device_name())
    return None if peak is None else flops / seconds / (peak * 1e12)


def known_peak(device_name: str) -> int | None:
    """Return the dense bf16 TFLOP/s of a GPU by the name that CUDA gives it; None for unknown ones and MIG slices."""
    words = set(re.findall(r"\w+", device_name))
    known = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    if not known or "MIG" in words:
        return None
    return PEAK_TFLOPS[max(known, key=len)]


def _source(name: str) -> str | dict[str, Any]:
    if name not in PRESETS and "/" not in name and not Path(name).exists():
        known = ", ".join(PRESETS)
        raise InputError(
            f"unknown model '{name}'{nearest(name, PRESETS)}: give {known}, a Hub id ORG/NAME or a folder"
        )
    return PRESETS.get(name, name)
