"""What the adapters of encoders in stages of falling resolution share; one file each has its families.

`convolutional_encoders.py`: ResNet to MobileViT. `pyramid_encoders.py`: Swin, SegFormer's MiT, PVT.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .encoder_adapter import EncoderAdapter, EncoderOutput
from .errors import InputError


class HierarchicalAdapter(EncoderAdapter):
    """Encoders in stages: tokens are the positions of the last map, the class token is its global average.

    Attributes:
        per_stage: fields of the configuration that have one entry for each stage.
        final_norm: the module that class and patch tokens pass, but not the stage maps; None where there is none.
    """

    per_stage: tuple[str, ...] = ()
    final_norm: str | None = None

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        for first, other in zip(self.per_stage, self.per_stage[1:], strict=False):
            entries = [list(getattr(config, name)) for name in (first, other)]
            if len(entries[0]) != len(entries[1]):
                raise InputError(
                    f"{config.model_type} needs as many {first} as {other}, got {entries[0]} and {entries[1]}"
                )

    @property
    def width(self) -> int:
        return self.map_channels[-1]

    @property
    def stride(self) -> int:
        return self.map_strides[-1]

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        return () if self.final_norm is None else (self.final_norm,)

    def check_input(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, output_blocks: tuple[int, ...]
    ) -> None:
        """Raise `InputError` for a mask, for blocks, or for an image that would lose its edge."""
        self.refuse_mask(bool_masked_pos)
        self.check_blocks(output_blocks)
        if self.whole_patches:
            self.check_image_size(*pixel_values.shape[-2:])


class StageMapAdapter(HierarchicalAdapter):
    """Encoders whose transformers class gives stage maps B×C×h×w."""

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
        # Convolutions are faster with the channels innermost, and pass that layout on.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        output = self.encode(model, pixel_values, output_maps)
        last = output.last_hidden_state
        maps = (*self.finer_maps(output.hidden_states), last) if output_maps else ()
        tokens = last.flatten(2).transpose(1, 2)
        return EncoderOutput(
            self.normed(model, last.mean((2, 3))), self.normed(model, tokens), tuple(last.shape[-2:]), maps
        )

    def encode(self, model: PreTrainedModel, pixel_values: torch.Tensor, output_maps: bool) -> ModelOutput:
        """Return the last map, before the final norm, and the hidden states if maps are wanted."""
        return model(pixel_values, output_hidden_states=output_maps)

    def normed(self, model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
        """Apply the final norm to …×C features, if the architecture has one."""
        return features if self.final_norm is None else model.get_submodule(self.final_norm)(features)

    @abstractmethod
    def finer_maps(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Pick all stage maps but the last, finest first, from the model's hidden states."""


class ListedStagesAdapter(StageMapAdapter):
    """Encoders whose configuration lists depth and channels of every stage."""

    per_stage = ("depths", "hidden_sizes")

    @property
    def map_channels(self) -> tuple[int, ...]:
        return tuple(self.config.hidden_sizes)


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


def one_side(size: int | list[int] | tuple[int, ...]) -> int:
    """Return the side of a square that a configuration gives as one number or as two."""
    return size if isinstance(size, int) else size[0]
