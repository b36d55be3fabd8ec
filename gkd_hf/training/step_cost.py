"""What one training step costs one process: a step of the real modules on tensors that have no memory.

Modules, losses and optimiser are those of the trainers; `FakeTensorMode` gives them tensors with a shape and a type
but no values, so a teacher of a billion parameters takes as much room as a small one. `LiveMemory` counts the
storages that are alive and the multiplications.

What a simulated GPU does differently from a CPU is done here too (`as_on_gpu`): attention takes the fused kernels,
which never hold the N×N matrix, and autocast keeps norms and softmax in fp32. Not counted: what a kernel needs inside
itself (cuDNN's workspaces), the allocator's gaps, and what torch and NCCL hold from the start.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.mask2former import modeling_mask2former

from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.objective import OBJECTIVES
from gkd_hf.methods import METHODS
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.encoders import common_grid
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.live_memory import LiveMemory
from gkd_hf.training.new_heads import joined_objective

FLASH_WIDTH = 256  # widest head of CUDA's flash attention; wider ones take the memory-efficient kernel
CLASSES_IN_AN_IMAGE = 12  # that a street scene's label map has, for Mask2Former's masks

# What comes and goes within a step. Autocast's bf16 copies of the weights live until the backward pass has used them.
MOVING = ("activations", "teacher's work", "weight copies", "student's gradients", "heads' gradients")


@dataclass(frozen=True)
class Weights:
    """Parameters of a module: what they weigh, how many are trained, and how they lie in the layers that FSDP cuts.

    ``largest_layer`` and ``outside`` are numbers of parameters: of the largest layer, and of what is in none.
    """

    bytes: int = 0
    parameters: int = 0
    trained: int = 0
    largest_layer: int = 0
    outside: int = 0

    @classmethod
    def of(cls, module: nn.Module, layers: Iterable[str] = ()) -> Weights:
        """Describe a module, ``layers`` being the class names that FSDP cuts it at."""
        parameters = list(module.parameters())
        tensors = {id(t): t for t in (*parameters, *module.buffers())}.values()
        names = set(layers)
        cut = [child for child in module.modules() if type(child).__name__ in names]
        inside = {id(parameter) for layer in cut for parameter in layer.parameters()}
        return cls(
            bytes=sum(t.numel() * t.element_size() for t in tensors),
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in cut), default=0),
            outside=sum(p.numel() for p in parameters if id(p) not in inside),
        )


@dataclass(frozen=True)
class StepCost:
    """Cost of a step for one process.

    Attributes:
        batch: its images. flops: of the step, in floating-point operations (a multiply-add is two).
        student, heads: their weights. teachers: those of each. optimiser: bytes of its states.
        moments: phase → bytes of the parts in `MOVING` after each operation, moments×5.
    """

    batch: int
    flops: int
    student: Weights
    heads: Weights
    teachers: tuple[Weights, ...]
    optimiser: int
    moments: dict[str, np.ndarray]

    def total(self) -> int:
        """Bytes at the worst moment of a step after the first, on one process, nothing sharded."""
        standing = self.student.bytes + self.heads.bytes + self.optimiser
        standing += sum(teacher.bytes for teacher in self.teachers)
        return standing + max(int(moments.sum(1).max()) for moments in self.moments.values())


@dataclass(frozen=True)
class _Lesson:
    """A batch, what the teacher says of it, and what that cost."""

    batch: int
    pixels: torch.Tensor
    taught: tuple[torch.Tensor, ...]
    history: dict[str, list[tuple[int, ...]]]
    flops: int


class Step(ABC):
    """A stage's training step: builds its modules, and computes the loss of a batch of empty images.

    Args:
        image_size: pixels S of a side. precision: "bf16" (autocast over fp32 weights, as the trainers have it) or
            "fp32". on_gpu: do as a GPU would; False does as this machine's CPU.
    """

    def __init__(self, image_size: int, *, precision: str = "bf16", on_gpu: bool = True) -> None:
        self.image_size = image_size
        self.bf16 = precision == "bf16"
        self.on_gpu = on_gpu

    @abstractmethod
    def build(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.ModuleList | None]:
        """Return the model that is trained, its student and its heads, and a list of teachers, if there are any."""

    @abstractmethod
    def teach(self, teachers: nn.ModuleList | None, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the teachers say of the images, nothing without any: tensors of one after those of another."""

    @abstractmethod
    def loss(self, model: nn.Module, pixels: torch.Tensor, taught: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run the model's forward, and return the total loss."""

    def costs(self, batches: tuple[int, ...]) -> dict[bool, tuple[StepCost, ...] | None]:
        """Simulate a step of each batch size: {False: as it is, True: with activation checkpointing}.

        The latter is None where the trainers refuse it, because transformers can recompute nothing.

        Raises:
            InputError: an image size, head or encoder that does not work.
        """
        with ExitStack() as stack:
            # Built without values first: constructors read some, such as the rates of stochastic depth.
            with torch.device("meta"):
                modules = self.build()
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model, _, _, teachers = modules
            for module in (model, teachers):
                if module is not None:
                    module.to_empty(device="cpu")
            model.train()
            if self.on_gpu:
                stack.enter_context(as_on_gpu())
            stack.enter_context(mock.patch.object(modeling_mask2former, "linear_sum_assignment", _any_assignment))
            # DINOv3 keeps its coordinates for later calls, which have to find values.
            uncached = modeling_dinov3_vit.get_patches_center_coordinates.__wrapped__
            stack.enter_context(mock.patch.object(modeling_dinov3_vit, "get_patches_center_coordinates", uncached))
            lessons = [self._lesson(teachers, batch) for batch in batches]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimiser = torch.optim.AdamW(trained, fused=True)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimiser.step()  # makes its states, which every later step finds
            plain = tuple(self._cost(modules, optimiser, lesson) for lesson in lessons)
            try:
                checked = model if isinstance(model, GKDStudentForSemanticSegmentation) else modules[1]
                checked.check_activation_checkpointing()
                # The random state of a fake tensor's device cannot be kept, and weighs nothing.
                settings = {"use_reentrant": False, "preserve_rng_state": False}
                model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
            except ValueError:
                return {False: plain, True: None}
            return {False: plain, True: tuple(self._cost(modules, optimiser, lesson) for lesson in lessons)}

    def _lesson(self, teachers: nn.ModuleList | None, batch: int) -> _Lesson:
        """Run the teachers, whose forward does not depend on how the student learns."""
        with LiveMemory(MOVING) as memory:
            # Loaders bring bytes, which are normalised on the device.
            pixels = torch.zeros(batch, 3, self.image_size, self.image_size, dtype=torch.uint8).float()
            if teachers is None:
                return _Lesson(batch, pixels, (), {}, 0)
            memory.claim((*teachers.parameters(), *teachers.buffers()), "teacher")
            with memory.phase("teacher", "teacher's work"):
                taught = self.teach(teachers, pixels)
            return _Lesson(batch, pixels, taught, memory.history, memory.flops)

    def _cost(self, modules: tuple[nn.Module, ...], optimiser: torch.optim.Optimizer, lesson: _Lesson) -> StepCost:
        model, student, heads, teachers = modules
        optimiser.zero_grad(set_to_none=True)
        hooks = []
        with LiveMemory(MOVING) as memory:
            # Its own copies: they are gone when the loss is known, unless the backward pass needs them.
            with memory.phase("forward", "teacher's work"):
                taught = tuple(torch.empty_like(each) for each in lesson.taught)
            with memory.phase("forward", "activations"):
                pixels = torch.empty_like(lesson.pixels)
            for part, module, gradients in zip(("student", "heads"), (student, heads), MOVING[-2:], strict=True):
                memory.claim((*module.parameters(), *module.buffers()), part, weights=True)
                hooks += _follow_gradients(memory, module, gradients)
            with memory.phase("forward", "activations"):
                loss = self.loss(model, pixels, taught)
                del pixels, taught
            with memory.phase("backward", "activations"):
                loss.backward()
            with memory.phase("optimiser", "optimiser"):
                optimiser.step()
        for hook in hooks:
            hook.remove()
        states = [value for state in optimiser.state.values() for value in state.values()]
        layers = set(getattr(model, "_no_split_modules", None) or ())
        return StepCost(
            lesson.batch,
            lesson.flops + memory.flops,
            Weights.of(student, layers),
            Weights.of(heads, layers),
            tuple(Weights.of(each, each.adapter.sharded_layers(each.encoder)) for each in teachers or ()),
            sum(state.untyped_storage().nbytes() for state in states),
            {phase: np.array(moments) for phase, moments in (lesson.history | memory.history).items()},
        )

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


class DistillationStep(Step):
    """The step of a distillation stage.

    Args:
        student: its configuration. teachers: those of its teachers. patch_size: of the student; None keeps its own.
        method: one with label-free stages. geometries, standardise: of each teacher; None for what is usual.
        mask_probability, mask_ratio: part of the images seen a second time, part of their patches hidden.
        early_backward: as the trainer does on GPUs unless models are sharded; see `GKDDistiller`.
        settings: those of `Step`.
    """

    def __init__(
        self,
        student: PreTrainedConfig,
        teachers: Sequence[PreTrainedConfig],
        image_size: int,
        *,
        patch_size: int | None = None,
        method: str = "gkd",
        geometries: Sequence[str] | None = None,
        standardise: Sequence[bool | None] | None = None,
        mask_probability: float = 0.5,
        mask_ratio: float = 0.5,
        early_backward: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(image_size, **settings)
        self.student, self.teachers, self.patch_size = student, tuple(teachers), patch_size
        self.early_backward = early_backward
        self.method = method
        self.geometries = geometries or ["native"] * len(teachers)
        self.standardise = standardise or [None] * len(teachers)
        self.mask_probability = mask_probability if mask_ratio > 0 else 0.0

    def build(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.ModuleList | None]:
        student = GKDStudentModel(GKDStudentConfig(encoder_config=copy.deepcopy(self.student)))
        student.set_geometry(self.image_size, self.patch_size)
        given = zip(copy.deepcopy(self.teachers), self.geometries, strict=True)
        teachers = nn.ModuleList(GKDTeacher(config, geometry=geometry) for config, geometry in given)
        self.grid = common_grid(student.adapter, teachers[0].adapter, self.image_size)
        for teacher in teachers:
            teacher.fit_geometry(self.image_size, self.grid)
            if self.bf16:
                teacher.halve()
        heads = OBJECTIVES[METHODS[self.method].objective]
        objective = joined_objective(
            [heads(student.adapter.width, teacher.width) for teacher in teachers],
            [teacher.called for teacher in teachers],
            [1.0] * len(teachers),
            self.standardise,
        )
        return GKDDistiller(student, objective, self.early_backward), student, objective, teachers

    def teach(self, teachers: nn.ModuleList | None, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, taught = torch.zeros(1, 3, 1, 1), []
        with self._autocast():
            for teacher in teachers:
                tokens = teacher(pixels, self.grid, mean, mean + 1)
                taught += [tokens.patches, tokens.cls]
        return tuple(taught)

    def loss(self, model: nn.Module, pixels: torch.Tensor, taught: tuple[torch.Tensor, ...]) -> torch.Tensor:
        masked = masked_images(self.mask_probability, len(pixels))
        masks = torch.zeros(masked, self.grid[0] * self.grid[1], dtype=torch.bool)
        patches, cls = taught[::2], taught[1::2]
        if not isinstance(model.objective, MultiTeacherObjective):
            (patches,), (cls,) = patches, cls
        with self._autocast():
            return model(pixels, patches, cls, self.grid, torch.arange(masked), masks)["total"]


def masked_images(probability: float, images: int) -> int:
    """How many images of a device's batch the trainer masks."""
    return int(probability * images + 1e-9)


class SegmentationStep(Step):
    """The step of the task stage: a decode head on a frozen student, or on one that is trained with it.

    Mask2Former assigns its queries to masks by their costs, which tensors without values do not have: any assignment
    stands in, and every image has min(classes, 12) of them. The rest of the loss runs as it is.

    Args:
        student: its configuration. decode_head, classes, norm_feature_maps: as the recipe has them.
        frozen: whether the encoder is; a baseline's is not.
        settings: those of `Step`.
    """

    def __init__(
        self,
        student: PreTrainedConfig,
        image_size: int,
        *,
        decode_head: str | dict[str, Any],
        classes: int,
        norm_feature_maps: bool = False,
        frozen: bool = True,
        patch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(image_size, **settings)
        self.student, self.patch_size, self.frozen = student, patch_size, frozen
        self.head = {"decode_head": decode_head, "num_labels": classes, "norm_feature_maps": norm_feature_maps}

    def build(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.ModuleList | None]:
        student = GKDStudentModel(GKDStudentConfig(encoder_config=copy.deepcopy(self.student)))
        student.set_geometry(self.image_size, self.patch_size)
        model = GKDStudentForSemanticSegmentation.from_student(student, **self.head)
        model.freeze_encoder(self.frozen)
        norms = [] if model.map_norms is None else list(model.map_norms)
        return model, student, nn.ModuleList([model.decode_head, *norms]), None

    def teach(self, teachers: nn.ModuleList | None, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    def loss(self, model: nn.Module, pixels: torch.Tensor, taught: tuple[torch.Tensor, ...]) -> torch.Tensor:
        labels = torch.zeros(len(pixels), self.image_size, self.image_size, dtype=torch.long)
        with self._autocast(), known_classes(self.head["num_labels"]):
            return model(pixel_values=pixels, labels=labels).loss


def known_classes(classes: int) -> TorchFunctionMode:
    """The context in which a decode head's loss runs on label maps without values."""
    return _KnownClasses(torch.arange(min(classes, CLASSES_IN_AN_IMAGE)))


class _KnownClasses(TorchFunctionMode):
    """Answer what depends on values: every label map has the same classes, and what is asked for (finite) is so."""

    def __init__(self, present: torch.Tensor):
        super().__init__()
        self.present = present

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.unique:
            return self.present
        if func is torch.Tensor.__getitem__ and args[0] is self.present and isinstance(args[1], torch.Tensor):
            return self.present  # those that are not ignored
        if func is torch.Tensor.__bool__:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let functions on CPU tensors choose the kernels and the precision that they would choose on a GPU.

    They are replaced, not intercepted by a `TorchFunctionMode`: activation checkpointing calls them from within the
    backward pass, where such a mode is not in force.
    """
    in_full = [(F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (F, "log_softmax"), (torch, "softmax")]
    with ExitStack() as stack:
        for place, name in (*in_full, (torch.Tensor, "softmax")):
            stack.enter_context(mock.patch.object(place, name, _in_full_precision(getattr(place, name))))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _fused_attention))
        yield


def _in_full_precision(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_full(each) for each in args)
            kwargs = {key: _full(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    return called


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    if attn_mask is None and query.dtype == torch.bfloat16 and query.shape[-1] <= FLASH_WIDTH:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def _follow_gradients(memory: LiveMemory, module: nn.Module, part: str) -> list[RemovableHandle]:
    def seen(parameter: torch.Tensor) -> None:
        memory.claim([parameter.grad], part)

    return [p.register_post_accumulate_grad_hook(seen) for p in module.parameters() if p.requires_grad]


def _any_assignment(costs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.arange(min(costs.shape))
    return pairs, pairs
