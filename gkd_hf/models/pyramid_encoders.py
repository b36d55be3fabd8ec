"""Adapters of the attention pyramids: Swin, Swin V2, SegFormer's Mix Transformer, PVT v2."""

from __future__ import annotations

from itertools import accumulate
from math import lcm
from operator import mul

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .encoder_adapter import EncoderOutput, whole
from .errors import InputError
from .hierarchical_encoders import HierarchicalAdapter, ListedStagesAdapter, MapNorm, one_side


class _WindowAdapter(HierarchicalAdapter):
    """Attention in windows, any number of stages; the stage maps are taken before each stage's downsampling.

    Its own mask token would stand on the grid of the first stage, while tokens live on the last: the image is masked.
    """

    whole_patches = True
    constructor = {"add_pooling_layer": False}
    per_stage = ("depths", "num_heads")
    final_norm = "layernorm"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.use_absolute_embeddings:
            raise InputError(
                f"{config.model_type} with use_absolute_embeddings is not supported: it would take one image size only"
            )

    @property
    def map_channels(self) -> tuple[int, ...]:
        return tuple(self.config.embed_dim * 2**stage for stage in range(len(self.config.depths)))

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(one_side(self.config.patch_size) * 2**stage for stage in range(len(self.config.depths)))

    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
        output_blocks: tuple[int, ...] = (),
    ) -> EncoderOutput:
        self.check_input(pixel_values, bool_masked_pos, output_blocks)
        self.forget_sizes(model)
        embeddings, grid = model.embeddings(pixel_values)
        output = model.encoder(
            embeddings,
            grid,
            output_hidden_states=output_maps,
            output_hidden_states_before_downsampling=output_maps,
        )
        tokens = model.layernorm(output.last_hidden_state)
        grid = (pixel_values.shape[-2] // self.stride, pixel_values.shape[-1] // self.stride)
        maps = tuple(output.reshaped_hidden_states[1:]) if output_maps else ()  # the first is the stem's
        return EncoderOutput(tokens.mean(1), tokens, grid, maps)

    def forget_sizes(self, model: PreTrainedModel) -> None:
        """Undo what the model keeps of the images it saw."""


class SwinAdapter(_WindowAdapter):
    """Swin."""

    model_name = "SwinModel"

    def map_norms(self) -> nn.ModuleList:
        return nn.ModuleList(MapNorm(c, eps=1e-5, layout=torch.contiguous_format) for c in self.map_channels)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        height, width = super().padded_size(height, width)
        least = self.config.window_size * self.stride
        return torch.sym_max(height, least), torch.sym_max(width, least)

    def check_image_size(self, height: int, width: int) -> None:
        """Also raise `InputError` if the last map would be smaller than a window, for which Swin has no attention."""
        super().check_image_size(height, width)
        least = self.config.window_size * self.stride
        if min(height, width) < least:
            raise InputError(
                f"swin with windows of {self.config.window_size} needs images of {least} pixels or more along both "
                f"axes, got {height}×{width}"
            )

    def forget_sizes(self, model: PreTrainedModel) -> None:
        # A block that has once seen a map of one window stops shifting for good; what an image gives must not
        # depend on the images before it.
        for stage in model.encoder.layers:
            for index, block in enumerate(stage.blocks):
                block.window_size = self.config.window_size
                block.shift_size = 0 if index % 2 == 0 else self.config.window_size // 2


class Swinv2Adapter(_WindowAdapter):
    """Swin V2.

    Its windows are as large, and shifted, as ``image_size`` of the configuration wants it, whatever the image: that
    is what the position biases were learned for. A map that does not cut into windows is padded for the attention.
    """

    model_name = "Swinv2Model"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.pretrained_window_sizes is not None and len(config.pretrained_window_sizes) < len(config.depths):
            raise InputError(
                f"swinv2 needs as many pretrained_window_sizes as depths, got {list(config.pretrained_window_sizes)} "
                f"and {list(config.depths)}"
            )
        if one_side(config.image_size) < self.stride:
            raise InputError(
                f"swinv2 with {len(config.depths)} stages needs an image_size of {self.stride} or more to lay out "
                f"its windows, got {config.image_size}"
            )


class _ReducedAttentionAdapter(ListedStagesAdapter):
    """Overlapping patches, and attention whose keys and values are on a coarser grid, by a factor for each stage."""

    whole_patches = True
    per_stage = (
        *ListedStagesAdapter.per_stage,
        *("sr_ratios", "patch_sizes", "strides", "num_attention_heads", "mlp_ratios"),
    )

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if len(config.depths) != config.num_encoder_blocks:
            raise InputError(
                f"{config.model_type} needs num_encoder_blocks ({config.num_encoder_blocks}) depths, got "
                f"{list(config.depths)}"
            )

    @property
    def map_strides(self) -> tuple[int, ...]:
        return tuple(accumulate(self.config.strides, mul))

    @property
    def reductions(self) -> tuple[int, ...]:
        """Positions per key along one axis, for each stage."""
        return tuple(self.config.sr_ratios)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        multiple = lcm(self.stride, *map(mul, self.map_strides, self.reductions))
        return whole(height, multiple), whole(width, multiple)

    def check_image_size(self, height: int, width: int) -> None:
        """Also raise `InputError` if a stage would give its attention no keys for the edge of its map."""
        super().check_image_size(height, width)
        for stage, (stride, reduction) in enumerate(zip(self.map_strides, self.reductions, strict=True), 1):
            if height % (stride * reduction) or width % (stride * reduction):
                raise InputError(
                    f"{self.config.model_type} with sr_ratios {list(self.reductions)} needs images of a multiple of "
                    f"{stride * reduction} pixels, else stage {stage} has no keys for their edge, got {height}×{width}"
                )

    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(hidden_states[:-1])


class SegformerAdapter(_ReducedAttentionAdapter):
    """SegFormer's encoder, the Mix Transformer (MiT). Every stage ends with a norm, which its map has passed."""

    model_name = "SegformerModel"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if not config.reshape_last_stage:
            raise InputError("segformer needs reshape_last_stage: true, or its last stage gives no map")


class PvtV2Adapter(_ReducedAttentionAdapter):
    """PVT v2. Every stage ends with a norm, which its map has passed."""

    model_name = "PvtV2Model"
    layer_classes = ("PvtV2BlockLayer",)

    @property
    def reductions(self) -> tuple[int, ...]:
        # Linear attention pools its keys to 7×7, whatever the map.
        return (1,) * len(self.config.depths) if self.config.linear_attention else tuple(self.config.sr_ratios)
