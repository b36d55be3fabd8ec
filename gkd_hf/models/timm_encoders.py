"""Adapter of timm's encoders, which transformers wraps (model type ``timm_wrapper``); needs the extra ``timm``.

EVA-02 is there, among hundreds of others. What an architecture of timm's looks like stands in no configuration, so it
is read off a pass over tensors that have a shape and no data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .encoder_adapter import EncoderAdapter, EncoderOutput
from .errors import InputError

FINAL_NORMS = ("fc_norm", "head.norm")  # where timm has the norm of pooled features, if features themselves have none


@dataclass(frozen=True)
class Anatomy:
    """What a timm model gives for an image.

    Attributes:
        image_size: side of square images it takes. any_size: whether it takes others as well.
        resizable: whether it takes ``dynamic_img_size``, which resamples its positions to the image.
        layout: of its features: "tokens" on one grid, or in stages "NCHW", "NHWC", "NLC".
        prefix: number of tokens before those of the patches. has_class_token: whether the first one is the class's.
        final_norm: name of the norm that features have yet to pass, "" if none.
        width, stride: of the features.
        map_indices, map_channels, map_strides: of the stage maps; the last map in stages is that of the features.
        depth: number of entries that intermediate features can be taken from.
        layers: names of the classes its stages or blocks consist of.
        beside_maps, beside_normed_maps: parameters that only tokens pass.
    """

    image_size: int
    any_size: bool
    resizable: bool
    layout: str
    prefix: int
    has_class_token: bool
    final_norm: str
    width: int
    stride: int
    map_indices: tuple[int, ...]
    map_channels: tuple[int, ...]
    map_strides: tuple[int, ...]
    depth: int
    layers: frozenset[str]
    beside_maps: tuple[str, ...] = ()
    beside_normed_maps: tuple[str, ...] = ()


class TimmAdapter(EncoderAdapter):
    """Any timm encoder with intermediate features: vision transformers of one resolution, or stages of falling one.

    The class token is the model's own, or else the average of the last map. Both lie after the final norm, which timm
    keeps behind the pooling in some architectures.

    Raises:
        InputError: timm has no such architecture, or one whose features have no such form.
    """

    model_name = "TimmWrapperModel"
    whole_patches = True
    extra = "timm"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        arguments = dict(config.model_args or {})
        if arguments.get("features_only"):
            raise InputError(
                "timm_wrapper with features_only is not supported: leave it out, stage maps are given anyway"
            )
        self.anatomy = _anatomy(config.architecture, json.dumps(arguments, sort_keys=True))
        if self.anatomy.resizable and "dynamic_img_size" not in arguments:
            # Saved with the model, so that AutoModel builds one that takes the same images.
            self.adjust(model_args=arguments | {"dynamic_img_size": True})

    @property
    def width(self) -> int:
        return self.anatomy.width

    @property
    def stride(self) -> int:
        return self.anatomy.stride

    @property
    def num_blocks(self) -> int | None:
        return self.anatomy.depth if self.anatomy.layout == "tokens" else None

    @property
    def map_channels(self) -> tuple[int, ...]:
        return self.anatomy.map_channels

    @property
    def map_strides(self) -> tuple[int, ...]:
        return self.anatomy.map_strides

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        names = self.anatomy.beside_normed_maps if norm_maps else self.anatomy.beside_maps
        return tuple(f"timm_model.{name}" for name in names)

    def sharded_layers(self, model: PreTrainedModel) -> set[str]:
        return set(self.anatomy.layers)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        height, width = super().padded_size(height, width)
        least = 0 if self.anatomy.any_size else self.anatomy.image_size
        return torch.sym_max(height, least), torch.sym_max(width, least)

    def check_image_size(self, height: int, width: int) -> None:
        """Also raise `InputError` for another size than a model was built for that takes only that one."""
        super().check_image_size(height, width)
        size = self.anatomy.image_size
        if not self.anatomy.any_size and (height, width) != (size, size):
            raise InputError(
                f"timm's {self.config.architecture} takes images of {size}×{size} pixels only, got {height}×{width} "
                "(model_args: {img_size: …} builds it for another size)"
            )

    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
        output_blocks: tuple[int, ...] = (),
    ) -> EncoderOutput:
        self.refuse_mask(bool_masked_pos)
        self.check_blocks(output_blocks)
        self.check_image_size(*pixel_values.shape[-2:])
        return _run(model.timm_model, self.anatomy, pixel_values, output_maps, norm_maps, output_blocks)


def _run(
    model: nn.Module,
    anatomy: Anatomy,
    pixel_values: torch.Tensor,
    output_maps: bool = False,
    norm_maps: bool = False,
    output_blocks: tuple[int, ...] = (),
) -> EncoderOutput:
    grid = (pixel_values.shape[-2] // anatomy.stride, pixel_values.shape[-1] // anatomy.stride)
    norm = model.get_submodule(anatomy.final_norm) if anatomy.final_norm else nn.Identity()
    tokens_only = anatomy.layout == "tokens"
    indices = set(anatomy.map_indices) if output_maps else set()
    indices = sorted(indices | {block - 1 for block in output_blocks})
    states: dict[int, torch.Tensor] = {}
    if indices:
        features, found = model.forward_intermediates(pixel_values, indices=indices)
        states = dict(zip(indices, found, strict=True))
    else:
        features = model.forward_features(pixel_values)
    maps = tuple(states[index] for index in anatomy.map_indices) if output_maps else ()
    if tokens_only:
        tokens = norm(features)
        patches = tokens[:, anatomy.prefix :]
        if norm_maps:
            last = norm if anatomy.final_norm else model.norm
            maps = tuple(last(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for m in maps)
        blocks = tuple(states[block - 1].flatten(2).transpose(1, 2) for block in output_blocks)
        return EncoderOutput(tokens[:, 0] if anatomy.has_class_token else patches.mean(1), patches, grid, maps, blocks)
    if anatomy.layout == "NHWC":
        features = features.permute(0, 3, 1, 2)
    elif anatomy.layout == "NLC":
        features = features.transpose(1, 2).unflatten(2, grid)
    maps = (*maps, features) if output_maps else ()
    pooled = norm(features.mean((2, 3), keepdim=True)).flatten(1)
    return EncoderOutput(pooled, norm(features).flatten(2).transpose(1, 2), grid, maps)


def _accepted(model: nn.Module, sizes: tuple[Any, ...]) -> Any:
    """Return the first size of images, a side or both, that a model takes; the last one if it takes none."""
    for size in sizes[:-1]:
        height, width = (size, size) if isinstance(size, int) else size
        try:
            model.forward_features(torch.empty(1, 3, height, width, device="meta"))
        except Exception:  # assertions, mostly, and shapes that do not go together
            continue
        return size
    return sizes[-1]


@lru_cache(maxsize=64)
def _anatomy(architecture: str, arguments: str) -> Anatomy:
    """Find out what a timm model looks like; raise `InputError` if it does not fit."""
    # No import statement: transformers would ask for timm wherever this file travels with a model.
    timm = import_module("timm")
    settings: dict[str, Any] = json.loads(arguments)
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **settings)
            resizable = "dynamic_img_size" in vars(model)
            if resizable:
                settings.setdefault("dynamic_img_size", True)
                model = timm.create_model(architecture, pretrained=False, num_classes=0, **settings)
    except Exception as error:  # a name, an argument, or a combination of both that timm does not know
        raise InputError(f"timm {timm.__version__} cannot build '{architecture}': {_first_line(error)}") from error
    model.eval()
    size = settings.get("img_size", model.default_cfg["input_size"][-1])
    size = size if isinstance(size, int) else size[0]
    size = _accepted(model, (-(-size // 128) * 128, size))  # which most strides divide, if it takes any but its own
    try:
        features, states = model.forward_intermediates(torch.empty(1, 3, size, size, device="meta"))
        anatomy = _described(model, architecture, size, resizable, features, states)
        return _with_idle_parameters(model, architecture, anatomy)
    except InputError:
        raise
    except Exception as error:  # no intermediate features, none without data, or none that can be placed in the model
        raise InputError(f"timm's {architecture} is not supported as an encoder: {_first_line(error)}") from error


def _described(
    model: nn.Module, architecture: str, size: int, resizable: bool, features: torch.Tensor, states: list[torch.Tensor]
) -> Anatomy:
    grids = [tuple(state.shape[-2:]) for state in states]
    names, modules = {name for name, _ in model.named_parameters()}, dict(model.named_modules())
    final_norm = next((n for n in FINAL_NORMS if n in modules and any(True for _ in modules[n].parameters())), "")
    depth, count = len(states), grids[-1][0] * grids[-1][1]
    if any(size % side for grid in grids for side in grid):
        raise InputError(
            f"timm's {architecture} is not supported as an encoder: its maps of {grids[-1][0]}×{grids[-1][1]} "
            f"positions do not divide an image of {size}×{size}"
        )
    if features.ndim == 3 and len(set(grids)) == 1:
        layout, width, prefix = "tokens", features.shape[-1], features.shape[1] - count
        indices = tuple(max(1, round(depth * part)) - 1 for part in (1 / 3, 1 / 2, 2 / 3, 1))  # as other ViTs' maps
        channels = tuple(states[index].shape[1] for index in indices)
        strides = (size // grids[-1][1],) * 4
    else:
        shapes = {
            (1, features.shape[1], *grids[-1]): "NCHW",
            (1, *grids[-1], features.shape[-1]): "NHWC",
            (1, count, features.shape[-1]): "NLC",
        }
        if tuple(features.shape) not in shapes:
            raise InputError(
                f"timm's {architecture} is not supported as an encoder: its features of shape "
                f"{tuple(features.shape)[1:]} are no map of {grids[-1][0]}×{grids[-1][1]} positions"
            )
        layout, prefix = shapes[tuple(features.shape)], 0
        width = features.shape[1] if layout == "NCHW" else features.shape[-1]
        by_stride = {size // grid[1]: index for index, grid in enumerate(grids)}  # the last map of each resolution
        finer = {stride: index for stride, index in by_stride.items() if 4 <= stride < size // grids[-1][1]}
        indices = tuple(finer.values())
        channels = (*(states[index].shape[1] for index in indices), width)
        strides = (*finer, size // grids[-1][1])
    oblong = (size + 2 * strides[-1], size + strides[-1])
    any_size = _accepted(model, (oblong, size)) == oblong
    parts = [model.get_submodule(entry["module"]) for entry in model.feature_info]
    parts = [inner for part in parts for inner in (part if isinstance(part, nn.Sequential) else (part,))]
    layers = frozenset(type(part).__name__ for part in parts if any(True for _ in part.parameters()))
    return Anatomy(
        image_size=size,
        any_size=any_size,
        resizable=resizable,
        layout=layout,
        prefix=prefix,
        has_class_token="cls_token" in names and prefix > 0,
        final_norm=final_norm,
        width=width,
        stride=strides[-1],
        map_indices=indices,
        map_channels=channels,
        map_strides=strides,
        depth=depth,
        layers=layers,
    )


def _with_idle_parameters(model: nn.Module, architecture: str, anatomy: Anatomy) -> Anatomy:
    """Fill in which parameters only tokens pass; raise `InputError` if there are some that not even these do."""
    pixels = torch.empty(1, 3, anatomy.image_size, anatomy.image_size, device="meta")

    def idle(outputs: tuple[torch.Tensor, ...]) -> tuple[str, ...]:
        parameters = dict(model.named_parameters())
        total = sum(output.sum() for output in outputs)
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return tuple(name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None)

    with torch.enable_grad():
        output = _run(model, anatomy, pixels)
        unused = idle((output.cls, output.patches))
        if unused:
            raise InputError(
                f"timm's {architecture} is not supported as an encoder: it has parameters that no token passes "
                f"({', '.join(unused[:3])}); choose another architecture or other model_args"
            )
        plain, normed = (idle(_run(model, anatomy, pixels, True, norm_maps).maps) for norm_maps in (False, True))
    return replace(anatomy, beside_maps=plain, beside_normed_maps=normed)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
