"""Decode heads: stage maps of an encoder → class logits per pixel, and the loss against a label map.

All heads answer the same call: ``head(maps, labels)`` with maps B×C_i×h_i×w_i, finest first, and labels B×H×W of
train ids, returns `HeadOutput`. Ignored pixels never count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from .configuration_gkd import DECODE_HEADS
from .errors import InputError, nearest
from .head_output import HeadOutput, with_cross_entropy
from .native_heads import build_dpt, build_upernet


class LinearHead(nn.Module):
    """A linear classifier of every position: all stage maps at the finest map's size, batch norm, 1×1 convolution.

    Args:
        channels: of the stage maps. num_labels: K. ignore_index: label left out of the cross-entropy.
    """

    def __init__(self, channels: tuple[int, ...], num_labels: int, ignore_index: int):
        super().__init__()
        self.ignore_index = ignore_index
        self.norm = nn.BatchNorm2d(sum(channels))
        self.classifier = nn.Conv2d(sum(channels), num_labels, kernel_size=1)

    def forward(self, maps: tuple[torch.Tensor, ...], labels: torch.Tensor | None = None) -> HeadOutput:
        size = maps[0].shape[-2:]
        resized = [maps[0]] + [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps[1:]]
        logits = self.classifier(self.norm(torch.cat(resized, dim=1)))
        return with_cross_entropy(logits, labels, self.ignore_index)


class Mask2FormerHead(Mask2FormerPreTrainedModel):
    """Mask2Former's pixel decoder, transformer module, matcher and loss (arXiv 2112.01527), as transformers has them.

    A plain ViT gives four maps of one size; they are resized ×4, ×2, ×1, ×½. A CNN's stages are taken as they are.
    """

    pyramid_scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, config: Mask2FormerConfig, channels: tuple[int, ...], ignore_index: int):
        super().__init__(config)
        self.ignore_index = ignore_index
        self.weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=list(channels))
        self.transformer_module = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.criterion = Mask2FormerLoss(config=config, weight_dict=self.weights)
        self.post_init()

    def forward(self, maps: tuple[torch.Tensor, ...], labels: torch.Tensor | None = None) -> HeadOutput:
        if len({m.shape[-2:] for m in maps}) == 1:
            maps = tuple(
                m if scale == 1 else F.interpolate(m, scale_factor=scale, mode="bilinear", align_corners=False)
                for m, scale in zip(maps, self.pyramid_scales, strict=True)
            )
        pixels = self.pixel_decoder(list(maps), output_hidden_states=False)
        decoded = self.transformer_module(
            multi_scale_features=pixels.multi_scale_features,
            mask_features=pixels.mask_features,
            output_hidden_states=True,
            output_attentions=False,
        )
        classes = [self.class_predictor(state.transpose(0, 1)) for state in decoded.intermediate_hidden_states]
        masks = decoded.masks_queries_logits
        # Semantic inference: Σ_q softmax(class)[:-1] · sigmoid(mask).
        logits = torch.einsum("bqk,bqhw->bkhw", classes[-1].softmax(-1)[..., :-1], masks[-1].sigmoid())
        if labels is None:
            return HeadOutput(logits)
        loss, terms = self._loss(classes, masks, labels)
        return HeadOutput(logits, loss, terms)

    # Which classes an image has, and the matching on the host, are nothing to compile: every batch would be new.
    @torch.compiler.disable
    def _loss(
        self, classes: list[torch.Tensor], masks: tuple[torch.Tensor, ...], labels: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted loss summed over decoder layers, and the last layer's terms unweighted."""
        class_labels, mask_labels = [], []
        for label in labels:
            present = label.unique()
            present = present[present != self.ignore_index]
            class_labels.append(present)
            mask_labels.append((label[None] == present[:, None, None]).float())
        if not any(len(present) for present in class_labels):
            # Nothing is labelled in this batch: no gradient, but every parameter stays in the graph, and the other
            # processes, which average the number of masks once per prediction, are not left waiting.
            for _ in classes:
                self.criterion.get_num_masks([], labels.device)
            nothing = sum((c.sum() + m.sum()) * 0 for c, m in zip(classes, masks, strict=True))
            return nothing, {name.removeprefix("loss_"): nothing.detach() for name in self.weights}
        with torch.autocast(labels.device.type, enabled=False):
            losses = self.criterion(
                masks_queries_logits=masks[-1].float(),
                class_queries_logits=classes[-1].float(),
                mask_labels=mask_labels,
                class_labels=class_labels,
                auxiliary_predictions=[
                    {"masks_queries_logits": m.float(), "class_queries_logits": c.float()}
                    for m, c in zip(masks[:-1], classes[:-1], strict=True)
                ],
            )
        total = sum(
            weight * value for name, weight in self.weights.items() for key, value in losses.items() if name in key
        )
        return total, {name.removeprefix("loss_"): losses[name].detach() for name in self.weights}


def build_decode_head(
    settings: dict[str, Any], channels: tuple[int, ...], strides: tuple[int, ...], num_labels: int, ignore_index: int
) -> nn.Module:
    """Return the decode head that ``settings`` (``type`` and that head's options) describes.

    Raises:
        InputError: an unknown type or option, or stage maps that do not suit the head.
    """
    options = dict(settings)
    kind = options.pop("type", None)
    if kind not in DECODE_HEADS:
        hint = nearest(kind, DECODE_HEADS)
        raise InputError(f"unknown decode_head '{kind}'{hint} (there are: {', '.join(DECODE_HEADS)})")
    if kind == "linear":
        if options:
            raise InputError(f"decode_head linear has no options, got {', '.join(options)}")
        return LinearHead(channels, num_labels, ignore_index)
    if kind == "upernet":
        return build_upernet(options, channels, num_labels, ignore_index)
    if kind == "dpt":
        return build_dpt(options, channels, strides, num_labels, ignore_index)
    if len(channels) < 3:
        raise InputError(f"decode_head mask2former needs three stage maps or more, the encoder has {len(channels)}")
    if len(set(strides)) == 1:
        strides = tuple(round(strides[0] / scale) for scale in Mask2FormerHead.pyramid_scales)
    known = set(Mask2FormerConfig().to_dict())
    for name in options:
        if name not in known:
            raise InputError(f"decode_head mask2former has no option '{name}'{nearest(name, known)}")
    # transformers counts the prediction from the bare queries as a decoder layer: its 10 are the paper's 9.
    # The pixel decoder adds one FPN level per halving between its three levels and the mask features' stride.
    geometry = {"feature_strides": list(strides), "common_stride": strides[0] if len(strides) > 3 else strides[-3]}
    try:
        config = Mask2FormerConfig(num_labels=num_labels, ignore_value=ignore_index, **(geometry | options))
        return Mask2FormerHead(config, channels, ignore_index)
    except Exception as error:  # the strict configuration classes and the modules raise types of their own
        raise InputError(f"bad decode_head mask2former: {' '.join(str(error).split())}") from error
