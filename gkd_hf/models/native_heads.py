"""UPerNet and DPT as transformers has them, so that a trained segmenter can become one of its own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DPTConfig, UperNetConfig
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTPreTrainedModel, DPTSemanticSegmentationHead
from transformers.models.upernet.modeling_upernet import UperNetHead, UperNetPreTrainedModel

from .errors import InputError, nearest
from .head_output import HeadOutput, with_cross_entropy

UPERNET_OPTIONS = ("hidden_size", "pool_scales")
DPT_OPTIONS = (
    "neck_hidden_sizes",
    "reassemble_factors",
    "fusion_hidden_size",
    "use_batch_norm_in_fusion_residual",
    "use_bias_in_fusion_residual",
    "semantic_classifier_dropout",
)


class UperNetDecodeHead(UperNetPreTrainedModel):
    """UPerNet (arXiv 1807.10221) without its auxiliary head; stage maps are taken as they are, also those of a ViT."""

    def __init__(self, config: UperNetConfig, channels: tuple[int, ...]):
        super().__init__(config)
        self.head = UperNetHead(config, in_channels=list(channels))
        self.post_init()

    def forward(self, maps: tuple[torch.Tensor, ...], labels: torch.Tensor | None = None) -> HeadOutput:
        self._check_batch(len(maps[0]))
        return with_cross_entropy(self.head(maps), labels, self.config.loss_ignore_index)

    def _check_batch(self, images: int) -> None:
        # A single value per channel has no batch statistics; synchronised norms count the other devices' too.
        local = any(isinstance(module, nn.BatchNorm2d) for module in self.head.psp_modules.modules())
        if self.training and images == 1 and 1 in self.config.pool_scales and local:
            raise InputError(
                "decode_head upernet cannot be trained with one image per device: its batch norms need two or more "
                "(raise batch_size, lower gradient_accumulation_steps, or give pool_scales without 1)"
            )


class DPTDecodeHead(DPTPreTrainedModel):
    """DPT (arXiv 2103.13413) without its auxiliary head, on four maps of one grid; the class token is not read."""

    def __init__(self, config: DPTConfig):
        super().__init__(config)
        self.neck = DPTNeck(config)
        self.head = DPTSemanticSegmentationHead(config)
        self.post_init()

    def forward(self, maps: tuple[torch.Tensor, ...], labels: torch.Tensor | None = None) -> HeadOutput:
        height, width = maps[0].shape[-2:]
        # The neck wants tokens and drops the first one.
        states = [F.pad(m.flatten(2).transpose(1, 2), (0, 0, 1, 0)) for m in maps]
        logits = self.head(self.neck(states, patch_height=height, patch_width=width))
        return with_cross_entropy(logits, labels, self.config.semantic_loss_ignore_index)


def build_upernet(
    options: dict[str, Any], channels: tuple[int, ...], num_labels: int, ignore_index: int
) -> UperNetDecodeHead:
    """Return a UPerNet head for stage maps of these channels; raise `InputError` for a bad option."""
    _no_unknown_options("upernet", options, UPERNET_OPTIONS)
    scales = options.get("pool_scales", ())
    if not isinstance(scales, list | tuple) or any(not isinstance(scale, int) or scale < 1 for scale in scales):
        raise InputError(f"bad decode_head upernet: pool_scales is {scales!r}, whole numbers of 1 or more are needed")
    fixed = {"num_labels": num_labels, "loss_ignore_index": ignore_index, "use_auxiliary_head": False}
    try:
        return UperNetDecodeHead(UperNetConfig(**fixed, **options), channels)
    except Exception as error:  # the strict configuration classes and the modules raise types of their own
        raise InputError(f"bad decode_head upernet: {' '.join(str(error).split())}") from error


def build_dpt(
    options: dict[str, Any], channels: tuple[int, ...], strides: tuple[int, ...], num_labels: int, ignore_index: int
) -> DPTDecodeHead:
    """Return a DPT head; raise `InputError` for a bad option or stage maps that are not four of one grid."""
    _no_unknown_options("dpt", options, DPT_OPTIONS)
    if len(channels) != 4 or len(set(strides)) > 1 or len(set(channels)) > 1:
        raise InputError(
            "decode_head dpt needs the four stage maps of one grid that a vit or dinov2 gives; this encoder's maps "
            f"have strides {', '.join(map(str, strides))}: use upernet or mask2former"
        )
    for name in ("neck_hidden_sizes", "reassemble_factors"):
        values = options.get(name, (1,) * 4)
        if (
            not isinstance(values, list | tuple)
            or len(values) != 4
            or not all(isinstance(value, int | float) and value > 0 for value in values)
        ):
            raise InputError(f"bad decode_head dpt: {name} is {values!r}, four numbers above 0 are needed")
    fixed = {
        "hidden_size": channels[0],
        "num_labels": num_labels,
        "semantic_loss_ignore_index": ignore_index,
        "readout_type": "ignore",
        "use_auxiliary_head": False,
    }
    try:
        return DPTDecodeHead(DPTConfig(**fixed, **options))
    except Exception as error:  # the strict configuration classes and the modules raise types of their own
        raise InputError(f"bad decode_head dpt: {' '.join(str(error).split())}") from error


def _no_unknown_options(head: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            hint = nearest(name, known) or f" (there are: {', '.join(known)})"
            raise InputError(f"decode_head {head} has no option '{name}'{hint}")
