"""Configuration of a distilled student: its encoder, its decode head, its labels and the statistics of its images."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

DECODE_HEADS = ("linear", "mask2former", "upernet", "dpt")


class GKDStudentConfig(PreTrainedConfig):
    """Everything needed to rebuild a student (GKD, arXiv 2603.02554).

    Args:
        encoder_config: configuration of the inner transformers encoder, which is copied, or its fields as a mapping.
        decode_head: fields of the decode head: ``type`` ("linear", "mask2former", "upernet" or "dpt") and that head's
            options. Only the segmenter has one.
        image_mean, image_std: RGB statistics of [0, 1] pixels that the encoder's input is normalised with.
        norm_feature_maps: give a ViT's stage maps to the decode head after its final norm (not so in the paper).
        freeze_batch_norm: keep the encoder's batch norms in eval mode while training; for weights whose statistics
            were folded into the convolutions, which batch statistics would undo.
        semantic_loss_ignore_index: label that neither the loss nor the metric counts.
    """

    model_type = "gkd_student"
    sub_configs = {"encoder_config": AutoConfig}

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        decode_head: dict[str, Any] | None = None,
        image_mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD),
        norm_feature_maps: bool = False,
        freeze_batch_norm: bool = False,
        semantic_loss_ignore_index: int = 255,
        **kwargs: Any,
    ):
        if encoder_config is None:
            encoder_config = {"model_type": "resnet"}
        if isinstance(encoder_config, dict):
            fields = dict(encoder_config)
            encoder_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        # A copy: transformers writes into configurations that are part of another, and this may be a live model's.
        self.encoder_config = copy.deepcopy(encoder_config)
        self.decode_head = dict(decode_head) if decode_head else None
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.norm_feature_maps = norm_feature_maps
        self.freeze_batch_norm = freeze_batch_norm
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)
