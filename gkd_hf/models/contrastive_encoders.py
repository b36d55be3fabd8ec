"""Adapters of the vision towers that were trained with a text tower: CLIP, SigLIP, SigLIP 2.

Of a checkpoint with both towers, the configuration is the vision tower's: see `loading.read_config`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .transformer_encoders import TransformerAdapter


class CLIPVisionAdapter(TransformerAdapter):
    """CLIP's vision tower. transformers applies its final norm to the class token only, here all tokens pass it."""

    model_name = "CLIPVisionModel"
    native_mask = False
    kernel = "embeddings.patch_embedding.weight"
    positions = "embeddings.position_embedding.weight"
    arguments = {"interpolate_pos_encoding": True}
    final_norm, norms_output = "post_layernorm", False


class SiglipVisionAdapter(TransformerAdapter):
    """SigLIP's vision tower, which is also that of SigLIP 2 at a fixed size.

    The class token is the mean of the patches: the tower has none, and its pooling head is left out.
    """

    model_name = "SiglipVisionModel"
    native_mask = False
    kernel = "embeddings.patch_embedding.weight"
    positions = "embeddings.position_embedding.weight"
    position_prefix, prefix = 0, 0
    arguments = {"interpolate_pos_encoding": True}
    final_norm = "post_layernorm"
    settings = {"vision_use_head": False}


class Siglip2VisionAdapter(SiglipVisionAdapter):
    """SigLIP 2's vision tower for any aspect ratio (NaFlex). It resamples its table of positions to every size."""

    model_name = "Siglip2VisionModel"
    kernel_layout = "channels_last"
    positions = None
    arguments = {"pixel_attention_mask": None}

    def run(self, model: PreTrainedModel, pixel_values: torch.Tensor, **arguments: Any) -> BaseModelOutput:
        # The model takes patches, each a row of pixels × channels, and the grid they lie on.
        side = self.stride
        patches = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        grid = (patches.shape[2], patches.shape[4])
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return model(patches, spatial_shapes=_OneGrid(*grid), **arguments)


class _OneGrid:
    """One grid for all images, in the place of the B×2 tensor of grids that the model reads image by image.

    It resamples its positions once then, and also where tensors have no values (`training.step_cost`).
    """

    shape = (1, 2)

    def __init__(self, height: int, width: int):
        self.size = [height, width]

    def __getitem__(self, image: int) -> _OneGrid:
        return self

    def tolist(self) -> list[int]:
        return self.size
