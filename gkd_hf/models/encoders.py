"""One adapter for every vision encoder: a transformers model → class token, patch tokens, grid, stage maps.

Teacher and student both go through here, so nothing else in the library asks which architecture it holds. An adapter
is stateless: it describes an architecture and runs a plain transformers model, which stays what it was (a distilled
ResNet-50 is a ``ResNetModel``).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .contrastive_encoders import CLIPVisionAdapter, Siglip2VisionAdapter, SiglipVisionAdapter
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
from .timm_encoders import TimmAdapter
from .transformer_encoders import (
    DeiTAdapter,
    Dinov2Adapter,
    Dinov2WithRegistersAdapter,
    DINOv3ViTAdapter,
    IJepaAdapter,
    RadioAdapter,
    ViTAdapter,
)

__all__ = [
    "ADAPTERS",
    "EncoderAdapter",
    "EncoderOutput",
    "adapter_for",
    "common_grid",
    "grid_owner",
    "mask_image",
    "resample_geometry",
    "resample_tokens",
]

ADAPTERS: dict[str, type[EncoderAdapter]] = {
    "clip_vision_model": CLIPVisionAdapter,
    "convnext": ConvNextAdapter,
    "convnextv2": ConvNextV2Adapter,
    "deit": DeiTAdapter,
    "dinov2": Dinov2Adapter,
    "dinov2_with_registers": Dinov2WithRegistersAdapter,
    "dinov3_convnext": DINOv3ConvNextAdapter,
    "dinov3_vit": DINOv3ViTAdapter,
    "efficientnet": EfficientNetAdapter,
    "ijepa": IJepaAdapter,
    "mobilenet_v1": MobileNetV1Adapter,
    "mobilenet_v2": MobileNetV2Adapter,
    "mobilevit": MobileViTAdapter,
    "pvt_v2": PvtV2Adapter,
    "radio": RadioAdapter,
    "resnet": ResNetAdapter,
    "segformer": SegformerAdapter,
    "siglip2_vision_model": Siglip2VisionAdapter,
    "siglip_vision_model": SiglipVisionAdapter,
    "swin": SwinAdapter,
    "swinv2": Swinv2Adapter,
    "timm_wrapper": TimmAdapter,
    "vit": ViTAdapter,
}


def adapter_class(kind: str) -> type[EncoderAdapter]:
    """Return the adapter of a model type; raise `InputError` naming what is supported, or what has to be installed."""
    if kind not in ADAPTERS:
        raise InputError(
            f"encoders of type '{kind}' are not supported{nearest(kind, ADAPTERS)} "
            f"(supported: {', '.join(sorted(ADAPTERS))})"
        )
    check_installed(kind)
    return ADAPTERS[kind]


def check_installed(kind: str) -> None:
    """Raise `InputError` if a model type needs a package that is not installed, or that cannot be imported."""
    extra = ADAPTERS[kind].extra if kind in ADAPTERS else None
    if extra is None:
        return
    if find_spec(extra) is None:
        raise InputError(f"encoders of type {kind} need {extra}, which is not installed: pip install gkd_hf[{extra}]")
    try:
        import_module(extra)
    except Exception as error:  # whatever a package of native code raises that was built for another torch
        raise InputError(
            f"encoders of type {kind} need {extra}, which is installed and cannot be imported (is torchvision the one "
            f"made for torch {torch.__version__}?): {' '.join(str(error).split())[:200]}"
        ) from error


def adapter_for(config: PreTrainedConfig) -> EncoderAdapter:
    """Return the adapter of an encoder configuration; raise `InputError` as `adapter_class` does."""
    return adapter_class(config.model_type)(config)


def vision_tower(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a model's vision tower, if it is one of images and text, or the one given."""
    if config.model_type in ADAPTERS or "vision_config" not in config.sub_configs:
        return config
    tower = config.vision_config
    return tower if tower.model_type in ADAPTERS else config


def grid_owner(student: EncoderAdapter, teacher: EncoderAdapter) -> EncoderAdapter:
    """Return whose grid of tokens the two are compared on."""
    return student if student.owns_grid else teacher


def common_grid(student: EncoderAdapter, teacher: EncoderAdapter, image_size: int) -> tuple[int, int]:
    """Return the (h, w) grid of tokens on which the two are compared on square images of ``image_size`` pixels."""
    return (max(1, round(image_size / grid_owner(student, teacher).stride)),) * 2


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
    their stages. Positions that are learned for no one size (DINOv3, RADIO, SigLIP 2, CNNs) stay as they are.

    Raises:
        InputError: the encoder cannot take images of that size, or another patch size is asked of a CNN or Swin.
    """
    adapter = adapter_for(encoder.config)
    config = adapter.in_geometry(image_size, patch_size)
    if adapter.fits(image_size, patch_size):
        return encoder
    target = adapter_for(config)
    state = encoder.state_dict()
    kernel = adapter.kernel_maps(state[adapter.kernel])
    state[adapter.kernel] = target.kernel_of(_resize(kernel, target.stride))
    if adapter.fixed_grid:
        positions = state[adapter.positions]  # …×(prefix + g·g)×C
        prefix, patches = positions.split((adapter.position_prefix, positions.shape[-2] - adapter.position_prefix), -2)
        grid = round(patches.shape[-2] ** 0.5)
        maps = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        maps = _resize(maps, image_size // target.stride, adapter.antialias)
        patches = maps.flatten(2).transpose(1, 2).reshape(*positions.shape[:-2], -1, positions.shape[-1])
        state[adapter.positions] = torch.cat([prefix, patches], dim=-2)
    with no_init_weights():  # not on the meta device: buffers that are in no state have to be computed
        rebuilt = target.build()
    rebuilt.load_state_dict(state, assign=True)
    for parameter, old in zip(rebuilt.parameters(), encoder.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    return rebuilt.to(encoder.device).train(encoder.training)


def _resize(maps: torch.Tensor, size: int, antialias: bool = False) -> torch.Tensor:
    if maps.shape[-1] == size:
        return maps
    resized = F.interpolate(maps.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=antialias)
    return resized.to(maps.dtype)
