"""Adapters of the convolutional encoders: ResNet, ConvNeXt and its kin, MobileNet, EfficientNet, MobileViT."""

from __future__ import annotations

from itertools import accumulate
from math import ceil
from operator import mul

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .errors import InputError
from .hierarchical_encoders import ListedStagesAdapter, MapNorm, StageMapAdapter, one_side

logger = logging.get_logger(__name__)


class ResNetAdapter(ListedStagesAdapter):
    """ResNet with any number of stages."""

    model_name = "ResNetModel"
    channels_last = True
    layer_classes = ("ResNetStage",)

    @property
    def map_strides(self) -> tuple[int, ...]:
        first = 8 if self.config.downsample_in_first_stage else 4
        return tuple(first * 2**stage for stage in range(len(self.config.depths)))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[1:-1])  # the first is the stem's


class ConvNextAdapter(ListedStagesAdapter):
    """ConvNeXt with any number of stages.

    Its final norm belongs to the pooled features, which is what the class token is (``pooler_output``); the tokens
    pass it too, so that both lie in one space and are, as a ViT's, "after the final norm". Its stages are cut into
    patches without padding, so an image that does not fill them would lose its edge.
    """

    model_name = "ConvNextModel"
    channels_last = True
    whole_patches = True
    final_norm = "layernorm"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if len(config.depths) != config.num_stages:
            raise InputError(
                f"{config.model_type} needs num_stages ({config.num_stages}) depths and hidden_sizes, got "
                f"{list(config.depths)} and {list(config.hidden_sizes)}"
            )

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(one_side(self.config.patch_size) * 2**stage for stage in range(self.config.num_stages))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[1:-1])  # the first is the stem's

    def map_norms(self) -> nn.ModuleList | None:
        return nn.ModuleList(MapNorm(c, eps=1e-6, layout=torch.channels_last) for c in self.map_channels)


class ConvNextV2Adapter(ConvNextAdapter):
    """ConvNeXt V2: the same stages, with a response normalisation in each block."""

    model_name = "ConvNextV2Model"


class DINOv3ConvNextAdapter(ConvNextAdapter):
    """DINOv3's ConvNeXt. Its norm is applied here: the model class hands out no map of its last stage."""

    model_name = "DINOv3ConvNextModel"
    final_norm = "layer_norm"

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(4 * 2**stage for stage in range(self.config.num_stages))

    def encode(self, model: PreTrainedModel, pixel_values: torch.Tensor, output_maps: bool) -> ModelOutput:
        return model.model(pixel_values, output_hidden_states=output_maps)

    def map_norms(self) -> None:
        return None


class _BatchNormAdapter(StageMapAdapter):
    """Encoders with batch norms that transformers does not set up as torch means them.

    Attributes:
        momentum: of the running statistics, in torch's sense: the weight of the new batch.
    """

    momentum = 0.1
    channels_last = True

    def build(self) -> PreTrainedModel:
        model = super().build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # transformers hands TensorFlow's decay (0.99 and more) to torch as its momentum, which means the
                # opposite: the running statistics would be those of the last batch alone. And it draws the scales of
                # some architectures around 0, so that no signal gets through one that has learned nothing yet.
                module.momentum = self.momentum
                nn.init.ones_(module.weight)
        return model


class MobileNetV1Adapter(_BatchNormAdapter):
    """MobileNetV1: maps are the last 1×1 convolution of each resolution."""

    model_name = "MobileNetV1Model"
    constructor = {"add_pooling_layer": False}
    layer_classes = ("MobileNetV1ConvLayer",)
    map_strides = (4, 8, 16, 32)

    @property
    def map_channels(self) -> tuple[int, ...]:
        scale, least = self.config.depth_multiplier, self.config.min_depth
        return tuple(max(int(channels * scale), least) for channels in (128, 256, 512, 1024))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[layer] for layer in (5, 9, 21))  # two layers a block: depthwise, then 1×1


class MobileNetV2Adapter(_BatchNormAdapter):
    """MobileNetV2: maps are the last block of each resolution but the coarsest, which is the last 1×1 convolution.

    That is where the tokens are read, so a decode head sees what was distilled.
    """

    model_name = "MobileNetV2Model"
    constructor = {"add_pooling_layer": False}
    layer_classes = ("MobileNetV2InvertedResidual",)

    @property
    def map_channels(self) -> tuple[int, ...]:
        config = self.config
        scaled = [
            _divisible(round(channels * config.depth_multiplier), config.depth_divisible_by, config.min_depth)
            for channels in (24, 32, 96, 1280)
        ]
        last = 1280 if config.finegrained_output and config.depth_multiplier < 1.0 else scaled[-1]
        return (*scaled[:-1], last)

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(min(stride, self.config.output_stride) for stride in (4, 8, 16, 32))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[block] for block in (1, 4, 11))


class EfficientNetAdapter(_BatchNormAdapter):
    """EfficientNet: as with MobileNetV2, the coarsest map is the last 1×1 convolution's.

    Its pooling layer is left out: it averages at most ``hidden_dim`` positions along an axis. Where a convolution
    halves an odd map, its one-sided padding would drop the edge.
    """

    model_name = "EfficientNetModel"
    whole_patches = True
    momentum = 0.01  # TensorFlow's decay of 0.99
    per_stage = ("in_channels", "out_channels", "strides", "kernel_sizes", "num_block_repeats", "expand_ratios")

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.hidden_dim != self._scaled(1280):
            raise InputError(
                f"efficientnet with width_coefficient {config.width_coefficient:g} needs hidden_dim "
                f"{self._scaled(1280)}, got {config.hidden_dim}"
            )

    def _scaled(self, channels: int) -> int:
        divisor = self.config.depth_divisor
        return _divisible(channels * self.config.width_coefficient, divisor, divisor)

    @property
    def _stages(self) -> dict[int, tuple[int, int]]:
        """Stride → number of blocks up to there, and channels of the last one."""
        strides = accumulate(self.config.strides, mul, initial=2)
        next(strides)  # the stem's
        blocks = accumulate(ceil(self.config.depth_coefficient * n) for n in self.config.num_block_repeats)
        channels = map(self._scaled, self.config.out_channels)
        stages = dict(zip(strides, zip(blocks, channels, strict=True), strict=True))
        return {stride: stage for stride, stage in stages.items() if stride >= 4}

    @property
    def map_channels(self) -> tuple[int, ...]:
        return (*(channels for _, channels in list(self._stages.values())[:-1]), self.config.hidden_dim)

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(self._stages)

    def encode(self, model: PreTrainedModel, pixel_values: torch.Tensor, output_maps: bool) -> ModelOutput:
        return model.encoder(model.embeddings(pixel_values), output_hidden_states=output_maps)

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[blocks] for blocks, _ in list(self._stages.values())[:-1])


class MobileViTAdapter(_BatchNormAdapter):
    """MobileViT: convolutions with attention among them; the coarsest map is the last 1×1 convolution's.

    transformers resizes a map that does not cut into its attention's patches of 2×2 and resizes it back (sides that
    are no multiples of twice the stride): no edge is lost, but the result is a little blurred, which a warning says.
    """

    model_name = "MobileViTModel"
    incomplete = "those for segmentation leave out its last convolution, those for classification have it"

    @property
    def map_channels(self) -> tuple[int, ...]:
        return (*self.config.neck_hidden_sizes[2:5], self.config.neck_hidden_sizes[6])

    def encode(self, model: PreTrainedModel, pixel_values: torch.Tensor, output_maps: bool) -> ModelOutput:
        if not torch.compiler.is_compiling():
            height, width = pixel_values.shape[-2:]
            if any(-(-side // stride) % 2 for stride in self.map_strides[1:] for side in (height, width)):
                logger.warning_once(
                    f"mobilevit resizes and so blurs maps of an odd side, as it has for images of {height}×{width} "
                    f"pixels: multiples of {2 * self.stride} avoid that"
                )
        return super().encode(model, pixel_values, output_maps)

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(min(stride, self.config.output_stride) for stride in (4, 8, 16, 32))

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[1:4])


def _divisible(channels: float, divisor: int, least: int) -> int:
    """Round to a multiple of ``divisor``, but not more than 10 % down, as the mobile architectures scale widths."""
    scaled = max(least, int(channels + divisor / 2) // divisor * divisor)
    return scaled + divisor if scaled < 0.9 * channels else scaled
