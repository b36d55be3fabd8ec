"""One adapter for every vision encoder: a transformers model → class token, patch tokens, grid, stage maps.

Teacher and student both go through here, so nothing else in the library asks which architecture it holds. An adapter
is stateless: it describes an architecture and runs a plain transformers model, which stays what it was (a distilled
ResNet-50 is a ``ResNetModel``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Model, MobileNetV2Model, PreTrainedConfig, PreTrainedModel, ResNetModel, ViTModel

from .errors import InputError, nearest


@dataclass
class EncoderOutput:
    """What an encoder says of B images of H×W pixels.

    Attributes:
        cls: B×C, the class token after the final norm (ViTs) or the global average of the last map (CNNs).
        patches: B×N×C, the patch tokens after the final norm, or the last map's positions, row by row.
        grid: (h, w) with h·w = N.
        maps: stage maps B×C_i×h_i×w_i for a decode head, finest first; empty unless asked for.
    """

    cls: torch.Tensor
    patches: torch.Tensor
    grid: tuple[int, int]
    maps: tuple[torch.Tensor, ...] = ()


class EncoderAdapter(ABC):
    """Base of the adapters: one architecture, described in one place.

    Attributes:
        model_class: the transformers class that is trained and saved.
        native_mask: whether the model takes ``bool_masked_pos``; where it does not, the image is masked.
        fixed_grid: whether positions are learned for a grid, so that geometry has to be resampled when it changes.
        norm_epsilon: of the encoder's LayerNorms, where transformers' default is not what it was trained with.
    """

    model_class: type[PreTrainedModel]
    native_mask = False
    fixed_grid = False
    norm_epsilon: float | None = None
    constructor: dict[str, bool] = {}

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels C of ``cls`` and ``patches``."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels per patch token along one axis."""

    @property
    @abstractmethod
    def map_channels(self) -> tuple[int, ...]:
        """Channels C_i of the stage maps."""

    @property
    @abstractmethod
    def map_strides(self) -> tuple[int, ...]:
        """Pixels per position of each stage map along one axis."""

    def build(self) -> PreTrainedModel:
        """Return the model with random weights."""
        return self.model_class(self.config, **self.constructor)

    @abstractmethod
    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
    ) -> EncoderOutput:
        """Run ``model`` on B×3×H×W pixels.

        Args:
            bool_masked_pos: B×N, only for adapters with ``native_mask``.
            norm_maps: pass the stage maps through the final norm, where the architecture has one.
        """

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `InputError` if an H×W image does not cut into whole patches (edge pixels would be dropped)."""
        for name, size in (("height", height), ("width", width)):
            if size < self.stride or size % self.stride:
                best = max(1, round(size / self.stride)) * self.stride
                raise InputError(
                    f"image {name} {size} is not a multiple of the patch size {self.stride} of "
                    f"{self.config.model_type}; the nearest size that is: {best}"
                )


class _TransformerAdapter(EncoderAdapter):
    """Vision transformers with a class token, a final LayerNorm and a native mask token."""

    native_mask = True
    fixed_grid = True

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def stride(self) -> int:
        patch = self.config.patch_size
        return patch if isinstance(patch, int) else patch[0]

    @property
    def map_layers(self) -> tuple[int, ...]:
        """Blocks whose outputs are the stage maps: 4, 6, 8, 12 of 12; 8, 12, 16, 24 of 24 (GKD, arXiv 2603.02554)."""
        depth = self.config.num_hidden_layers
        return tuple(max(1, round(depth * part)) for part in (1 / 3, 1 / 2, 2 / 3, 1))

    @property
    def map_channels(self) -> tuple[int, ...]:
        return (self.width,) * 4

    @property
    def map_strides(self) -> tuple[int, ...]:
        return (self.stride,) * 4

    # The keyword that lets the model resample its positions to another image size; DINOv2 does so by itself.
    any_size: dict[str, bool] = {}

    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
    ) -> EncoderOutput:
        self.check_image_size(*pixel_values.shape[-2:])
        grid = (pixel_values.shape[-2] // self.stride, pixel_values.shape[-1] // self.stride)
        output = model(
            pixel_values, bool_masked_pos=bool_masked_pos, output_hidden_states=output_maps, **self.any_size
        )
        tokens = output.last_hidden_state
        maps = ()
        if output_maps:
            # hidden_states[0] is the embedding; entry i is block i's output, before the final norm.
            states = [output.hidden_states[layer] for layer in self.map_layers]
            if norm_maps:
                states = [model.layernorm(state) for state in states]
            maps = tuple(state[:, 1:].transpose(1, 2).unflatten(2, grid) for state in states)
        return EncoderOutput(tokens[:, 0], tokens[:, 1:], grid, maps)


class ViTAdapter(_TransformerAdapter):
    """ViT, DeiT without its distillation token, DINO (model type ``vit``)."""

    model_class = ViTModel
    constructor = {"add_pooling_layer": False, "use_mask_token": True}
    any_size = {"interpolate_pos_encoding": True}
    norm_epsilon = 1e-6  # DeiT's and DINO's; their conversions say 1e-12


class Dinov2Adapter(_TransformerAdapter):
    """DINOv2 without registers."""

    model_class = Dinov2Model


class _ConvolutionalAdapter(EncoderAdapter):
    """Convolutional encoders: tokens are the positions of the last map, the class token is its global average."""

    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
    ) -> EncoderOutput:
        if bool_masked_pos is not None:
            raise InputError(f"{self.config.model_type} has no mask token: mask the image instead")
        # Convolutions are faster with the channels innermost, and pass that layout on.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        output = model(pixel_values, output_hidden_states=output_maps)
        last = output.last_hidden_state
        maps = (*self.finer_maps(output.hidden_states), last) if output_maps else ()
        return EncoderOutput(last.mean((2, 3)), last.flatten(2).transpose(1, 2), tuple(last.shape[-2:]), maps)

    @abstractmethod
    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Pick all stage maps but the last, finest first, from the model's hidden states."""


class ResNetAdapter(_ConvolutionalAdapter):
    """ResNet with any number of stages."""

    model_class = ResNetModel

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if len(config.depths) != len(config.hidden_sizes):
            raise InputError(
                f"resnet needs as many depths as hidden_sizes, got {list(config.depths)} and "
                f"{list(config.hidden_sizes)}"
            )

    @property
    def width(self) -> int:
        return self.config.hidden_sizes[-1]

    @property
    def map_channels(self) -> tuple[int, ...]:
        return tuple(self.config.hidden_sizes)

    @property
    def map_strides(self) -> tuple[int, ...]:
        first = 8 if self.config.downsample_in_first_stage else 4
        return tuple(first * 2**stage for stage in range(len(self.config.depths)))

    @property
    def stride(self) -> int:
        return self.map_strides[-1]

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[1:-1])  # the first is the stem's


class MobileNetV2Adapter(_ConvolutionalAdapter):
    """MobileNetV2: maps are the last block of each resolution but the coarsest, which is the last 1×1 convolution.

    That is where the tokens are read, so a decode head sees what was distilled.
    """

    model_class = MobileNetV2Model
    constructor = {"add_pooling_layer": False}
    map_blocks = (1, 4, 11)
    block_channels = (24, 32, 96)

    def build(self) -> PreTrainedModel:
        model = super().build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # transformers hands TensorFlow's decay (0.997) to torch as its momentum, which means the opposite:
                # the running statistics would be those of the last batch alone.
                module.momentum = 0.1
        return model

    def _scaled(self, channels: int) -> int:
        divisor, least = self.config.depth_divisible_by, self.config.min_depth
        wanted = round(channels * self.config.depth_multiplier)
        scaled = max(least, int(wanted + divisor / 2) // divisor * divisor)
        return scaled + divisor if scaled < 0.9 * wanted else scaled

    @property
    def width(self) -> int:
        if self.config.finegrained_output and self.config.depth_multiplier < 1.0:
            return 1280
        return self._scaled(1280)

    @property
    def map_channels(self) -> tuple[int, ...]:
        return (*(self._scaled(channels) for channels in self.block_channels), self.width)

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(min(stride, self.config.output_stride) for stride in (4, 8, 16, 32))

    @property
    def stride(self) -> int:
        return self.map_strides[-1]

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[block] for block in self.map_blocks)


ADAPTERS: dict[str, type[EncoderAdapter]] = {
    "vit": ViTAdapter,
    "dinov2": Dinov2Adapter,
    "resnet": ResNetAdapter,
    "mobilenet_v2": MobileNetV2Adapter,
}


def adapter_for(config: PreTrainedConfig) -> EncoderAdapter:
    """Return the adapter of an encoder configuration; raise `InputError` naming what is supported."""
    kind = config.model_type
    if kind not in ADAPTERS:
        raise InputError(
            f"encoders of type '{kind}' are not supported{nearest(kind, ADAPTERS)} "
            f"(supported: {', '.join(sorted(ADAPTERS))})"
        )
    return ADAPTERS[kind](config)


def mask_image(
    pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int], mask_pixel: torch.Tensor
) -> torch.Tensor:
    """Replace the masked cells of an h×w grid by one learned pixel, for encoders without a mask token.

    Args:
        pixel_values: B×3×H×W, normalised. bool_masked_pos: B×(h·w), True where masked. mask_pixel: 1×3×1×1.
    """
    mask = bool_masked_pos.to(pixel_values.dtype).unflatten(1, (1, *grid))
    mask = F.interpolate(mask, size=pixel_values.shape[-2:], mode="nearest")
    return pixel_values * (1 - mask) + mask_pixel * mask


def resample_tokens(tokens: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resample B×(h·w)×C tokens bilinearly to another grid; the same tokens if the grids agree."""
    if tuple(grid) == tuple(target):
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, size=target, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def resample_geometry(encoder: PreTrainedModel, image_size: int, patch_size: int | None = None) -> PreTrainedModel:
    """Return ``encoder`` rebuilt for another image size or patch size.

    Patch kernels and position embeddings are resized bicubically (align_corners false), as the GKD recipes do between
    their stages. Encoders without learned positions take any size and are returned as they are.

    Raises:
        InputError: the image does not cut into whole patches, or another patch size is asked of a CNN.
    """
    adapter = adapter_for(encoder.config)
    if not adapter.fixed_grid:
        if patch_size is not None and patch_size != adapter.stride:
            raise InputError(f"{encoder.config.model_type} has no patch size to change (asked for {patch_size})")
        return encoder
    config = copy.deepcopy(encoder.config)
    config.image_size, config.patch_size = image_size, patch_size or adapter.stride
    target = adapter_for(config)
    target.check_image_size(image_size, image_size)
    if (image_size, target.stride) == (encoder.config.image_size, adapter.stride):
        return encoder
    state = encoder.state_dict()
    kernel = state["embeddings.patch_embeddings.projection.weight"]
    state["embeddings.patch_embeddings.projection.weight"] = _resize(kernel, target.stride)
    positions = state["embeddings.position_embeddings"]
    grid = round((positions.shape[1] - 1) ** 0.5)
    patches = positions[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    patches = _resize(patches, image_size // target.stride).flatten(2).transpose(1, 2)
    state["embeddings.position_embeddings"] = torch.cat([positions[:, :1], patches], dim=1)
    with torch.device("meta"):
        rebuilt = target.build()
    rebuilt.load_state_dict(state, assign=True)
    for parameter, old in zip(rebuilt.parameters(), encoder.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    return rebuilt.train(encoder.training)


def _resize(maps: torch.Tensor, size: int) -> torch.Tensor:
    if maps.shape[-1] == size:
        return maps
    resized = F.interpolate(maps.float(), size=(size, size), mode="bicubic", align_corners=False)
    return resized.to(maps.dtype)
