"""One adapter for every vision encoder: a transformers model → class token, patch tokens, grid, stage maps.

Teacher and student both go through here, so nothing else in the library asks which architecture it holds. An adapter
is stateless: it describes an architecture and runs a plain transformers model, which stays what it was (a distilled
ResNet-50 is a ``ResNetModel``).
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .convolutional_encoders import (
    ConvNextAdapter,
    ConvNextV2Adapter,
    DINOv3ConvNextAdapter,
    EfficientNetAdapter,
    MobileNetV1Adapter,
    MobileNetV2Adapter,
    MobileViTAdapter,
    ResNetAdapter,
)
from .encoder_adapter import EncoderAdapter, EncoderOutput
from .errors import InputError, nearest
from .pyramid_encoders import PvtV2Adapter, SegformerAdapter, SwinAdapter, Swinv2Adapter
from .transformer_encoders import Dinov2Adapter, ViTAdapter

__all__ = [
    "ADAPTERS",
    "EncoderAdapter",
    "EncoderOutput",
    "adapter_for",
    "mask_image",
    "resample_geometry",
    "resample_tokens",
]

ADAPTERS: dict[str, type[EncoderAdapter]] = {
    "convnext": ConvNextAdapter,
    "convnextv2": ConvNextV2Adapter,
    "dinov2": Dinov2Adapter,
    "dinov3_convnext": DINOv3ConvNextAdapter,
    "efficientnet": EfficientNetAdapter,
    "mobilenet_v1": MobileNetV1Adapter,
    "mobilenet_v2": MobileNetV2Adapter,
    "mobilevit": MobileViTAdapter,
    "pvt_v2": PvtV2Adapter,
    "resnet": ResNetAdapter,
    "segformer": SegformerAdapter,
    "swin": SwinAdapter,
    "swinv2": Swinv2Adapter,
    "vit": ViTAdapter,
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
    their stages. Encoders without learned positions are returned as they are.

    Raises:
        InputError: the encoder cannot take images of that size, or another patch size is asked of a CNN or Swin.
    """
    adapter = adapter_for(encoder.config)
    if not adapter.fixed_grid:
        if patch_size is not None and patch_size != adapter.stride:
            raise InputError(f"{encoder.config.model_type} has no patch size to change (asked for {patch_size})")
        if adapter.whole_patches:
            adapter.check_image_size(image_size, image_size)
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
