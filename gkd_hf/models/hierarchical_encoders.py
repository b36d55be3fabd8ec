"""Adapters of the encoders in stages of falling resolution: ResNet, MobileNetV2, ConvNeXt, Swin."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from transformers import ConvNextModel, MobileNetV2Model, PreTrainedConfig, PreTrainedModel, ResNetModel, SwinModel

from .encoder_adapter import EncoderAdapter, EncoderOutput
from .errors import InputError


class _HierarchicalAdapter(EncoderAdapter):
    """Encoders in stages: tokens are the positions of the last map, the class token is its global average.

    A final norm, where there is one, is applied to both, but not to the stage maps.
    """

    @property
    def stride(self) -> int:
        return self.map_strides[-1]

    def refuse_mask(self, bool_masked_pos: torch.Tensor | None) -> None:
        """Raise `InputError` if there is a mask."""
        if bool_masked_pos is not None:
            raise InputError(f"{self.config.model_type} has no mask token: mask the image instead")


class _ConvolutionalAdapter(_HierarchicalAdapter):
    """Convolutional encoders."""

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
        # Convolutions are faster with the channels innermost, and pass that layout on.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        output = model(pixel_values, output_hidden_states=output_maps)
        last = output.last_hidden_state
        maps = (*self.finer_maps(output.hidden_states), last) if output_maps else ()
        tokens = last.flatten(2).transpose(1, 2)
        return EncoderOutput(
            self.normed(model, last.mean((2, 3))), self.normed(model, tokens), tuple(last.shape[-2:]), maps
        )

    def normed(self, model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
        """Apply the final norm to …×C features, if the architecture has one."""
        return features

    @abstractmethod
    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Pick all stage maps but the last, finest first, from the model's hidden states."""


class _StagedAdapter(_ConvolutionalAdapter):
    """Convolutional encoders whose configuration lists the channels of every stage."""

    @property
    def width(self) -> int:
        return self.config.hidden_sizes[-1]

    @property
    def map_channels(self) -> tuple[int, ...]:
        return tuple(self.config.hidden_sizes)


class ResNetAdapter(_StagedAdapter):
    """ResNet with any number of stages."""

    model_class = ResNetModel
    layer_classes = ("ResNetStage",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if len(config.depths) != len(config.hidden_sizes):
            raise InputError(
                f"resnet needs as many depths as hidden_sizes, got {list(config.depths)} and "
                f"{list(config.hidden_sizes)}"
            )

    @property
    def map_strides(self) -> tuple[int, ...]:
        first = 8 if self.config.downsample_in_first_stage else 4
        return tuple(first * 2**stage for stage in range(len(self.config.depths)))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[1:-1])  # the first is the stem's


class MobileNetV2Adapter(_ConvolutionalAdapter):
    """MobileNetV2: maps are the last block of each resolution but the coarsest, which is the last 1×1 convolution.

    That is where the tokens are read, so a decode head sees what was distilled.
    """

    model_class = MobileNetV2Model
    constructor = {"add_pooling_layer": False}
    layer_classes = ("MobileNetV2InvertedResidual",)
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

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[block] for block in self.map_blocks)


class ConvNextAdapter(_StagedAdapter):
    """ConvNeXt with any number of stages.

    Its final norm belongs to the pooled features, which is what the class token is (``pooler_output``); the tokens
    pass it too, so that both lie in one space and are, as a ViT's, "after the final norm".
    """

    model_class = ConvNextModel

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if not len(config.depths) == len(config.hidden_sizes) == config.num_stages:
            raise InputError(
                f"convnext needs num_stages ({config.num_stages}) depths and hidden_sizes, got {list(config.depths)} "
                f"and {list(config.hidden_sizes)}"
            )

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(self.config.patch_size * 2**stage for stage in range(self.config.num_stages))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[1:-1])  # the first is the stem's

    def normed(self, model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
        return model.layernorm(features)

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        return ("layernorm",)

    def map_norms(self) -> nn.ModuleList:
        return nn.ModuleList(MapNorm(c, eps=1e-6, layout=torch.channels_last) for c in self.map_channels)


class SwinAdapter(_HierarchicalAdapter):
    """Swin with any number of stages; the stage maps are taken before each stage's downsampling.

    Its own mask token would stand on the grid of the first stage, while tokens live on the last: the image is masked.
    """

    model_class = SwinModel
    whole_patches = True
    constructor = {"add_pooling_layer": False}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.use_absolute_embeddings:
            raise InputError("swin with use_absolute_embeddings is not supported: it would take one image size only")
        if len(config.depths) != len(config.num_heads):
            raise InputError(
                f"swin needs as many depths as num_heads, got {list(config.depths)} and {list(config.num_heads)}"
            )

    @property
    def width(self) -> int:
        return self.map_channels[-1]

    @property
    def map_channels(self) -> tuple[int, ...]:
        return tuple(self.config.embed_dim * 2**stage for stage in range(len(self.config.depths)))

    @property
    def map_strides(self) -> tuple[int, ...]:
        patch = self.config.patch_size
        first = patch if isinstance(patch, int) else patch[0]
        return tuple(first * 2**stage for stage in range(len(self.config.depths)))

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        return ("layernorm",)

    def map_norms(self) -> nn.ModuleList:
        return nn.ModuleList(MapNorm(c, eps=1e-5, layout=torch.contiguous_format) for c in self.map_channels)

    def check_image_size(self, height: int, width: int) -> None:
        """Also raise `InputError` if the last map would be smaller than a window, for which Swin has no attention."""
        super().check_image_size(height, width)
        least = self.config.window_size * self.stride
        if min(height, width) < least:
            raise InputError(
                f"swin with windows of {self.config.window_size} needs images of {least} pixels or more along both "
                f"axes, got {height}×{width}"
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
        self._forget_sizes(model)
        output = model(
            pixel_values, output_hidden_states=output_maps, output_hidden_states_before_downsampling=output_maps
        )
        tokens = output.last_hidden_state
        grid = (pixel_values.shape[-2] // self.stride, pixel_values.shape[-1] // self.stride)
        maps = tuple(output.reshaped_hidden_states[1:]) if output_maps else ()  # the first is the stem's
        return EncoderOutput(tokens.mean(1), tokens, grid, maps)

    def _forget_sizes(self, model: PreTrainedModel) -> None:
        # A block that has once seen a map of one window stops shifting for good; what an image gives must not
        # depend on the images before it.
        for stage in model.encoder.layers:
            for index, block in enumerate(stage.blocks):
                block.window_size = self.config.window_size
                block.shift_size = 0 if index % 2 == 0 else self.config.window_size // 2


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of B×C×h×w maps.

    Args:
        layout: of the result in memory. transformers' backbones differ in it, and convolutions round by it.
    """

    def __init__(self, channels: int, *, eps: float, layout: torch.memory_format):
        super().__init__(channels, eps=eps)
        self.layout = layout

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        normed = super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed.contiguous(memory_format=self.layout)
