"""A trained segmenter as one of transformers' own classes: the configuration and the renamed weights.

The heads are transformers' own modules already. What differs is the encoder: a segmentation model holds a backbone
class, not the plain model. One entry per architecture says how one becomes the other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Dinov2Config,
    DPTConfig,
    DPTForSemanticSegmentation,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from gkd_hf.errors import InputError
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation

State = dict[str, torch.Tensor]

VITS = ("vit", "dinov2")


class NotNativeError(Exception):
    """transformers has no class that gives this segmenter's logits; the message says why."""


@dataclass
class Backbone:
    """Configuration and weights of a transformers backbone that gives a student's stage maps."""

    config: PreTrainedConfig
    state: State


def to_native(segmenter: GKDStudentForSemanticSegmentation, image_size: int) -> PreTrainedModel:
    """Return the transformers model that gives the segmenter's class logits on square images of ``image_size``.

    Raises:
        NotNativeError: there is no such class.
        InputError: the installed transformers' class has other weights than this library knows.
    """
    head, kind = segmenter.config.decode_head["type"], segmenter.config.encoder_config.model_type
    if head not in HEADS:
        raise NotNativeError(f"transformers has no class for decode_head {head}")
    stride = segmenter.student.adapter.stride
    if image_size % stride:
        raise NotNativeError(
            f"image size {image_size} is not a multiple of the encoder's stride {stride}: the segmenter pads such "
            "images, transformers' classes do not"
        )
    model, state = HEADS[head](segmenter, kind, image_size)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"the installed transformers' {type(model).__name__} does not have the weights expected of it "
            f"({' '.join(str(error).split())[:200]}): use the version in scripts/constraints.txt"
        ) from error
    return model.eval()


# -- encoders ---------------------------------------------------------------------------------------------------------


def _in_stages(segmenter: GKDStudentForSemanticSegmentation, prefix: str = "", without: str | None = None) -> Backbone:
    """ResNet, ConvNeXt, Swin: all stages, and the norms of the stage maps where the architecture has them."""
    student = segmenter.student
    config = copy.deepcopy(student.encoder.config)
    config.out_features = config.stage_names[1:]  # the first is the stem
    if config.model_type in ("resnet", "convnext"):
        config.hidden_sizes = list(config.hidden_sizes)  # their backbones cannot do with the default tuple
    state = {prefix + key: value for key, value in student.encoder.state_dict().items()}
    if without is not None:
        state = {key: value for key, value in state.items() if not key.startswith(without)}
    for stage, norm in zip(config.out_features, segmenter.map_norms or (), strict=segmenter.map_norms is not None):
        state |= _prefixed(norm.state_dict(), f"hidden_states_norms.{stage}.")
    return Backbone(config, state)


def _resnet(segmenter: GKDStudentForSemanticSegmentation, image_size: int) -> Backbone:
    return _in_stages(segmenter)


def _convnext(segmenter: GKDStudentForSemanticSegmentation, image_size: int) -> Backbone:
    # The final norm is that of the pooled features, which a backbone does not have.
    return _in_stages(segmenter, without="layernorm.")


def _swin(segmenter: GKDStudentForSemanticSegmentation, image_size: int) -> Backbone:
    config, adapter = segmenter.config.encoder_config, segmenter.student.adapter
    for depth, stride in zip(config.depths, adapter.map_strides, strict=True):
        if depth > 1 and image_size // stride <= config.window_size:
            raise NotNativeError(
                f"at {image_size}² a stage of this Swin has maps of {image_size // stride}×{image_size // stride}, no "
                f"larger than its window of {config.window_size}: there transformers' SwinBackbone shifts the "
                "window and SwinModel does not"
            )
    return _in_stages(segmenter, prefix="swin.")


def _map_layers(segmenter: GKDStudentForSemanticSegmentation) -> list[int]:
    layers = list(segmenter.student.adapter.map_layers)
    if len(set(layers)) < len(layers):
        raise NotNativeError(
            f"the decode head reads blocks {layers} of this shallow encoder, and transformers gives each block once"
        )
    return layers


def _dinov2(segmenter: GKDStudentForSemanticSegmentation, image_size: int) -> Backbone:
    encoder = segmenter.student.encoder
    config = copy.deepcopy(encoder.config)
    config.out_indices = _map_layers(segmenter)
    config.apply_layernorm, config.reshape_hidden_states = segmenter.config.norm_feature_maps, True
    return Backbone(config, encoder.state_dict())


_VIT_TO_DINOV2 = (
    (r"^layers\.", "encoder.layer."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)


def _vit(segmenter: GKDStudentForSemanticSegmentation, image_size: int) -> Backbone:
    """A ViT is a DINOv2 whose LayerScale is 1; transformers has no backbone class for the ViT itself."""
    encoder = segmenter.student.encoder
    vit = encoder.config
    if vit.intermediate_size % vit.hidden_size:
        raise NotNativeError(
            f"a Dinov2Backbone's hidden MLP width is a whole multiple of its width, this ViT's is "
            f"{vit.intermediate_size} for {vit.hidden_size}"
        )
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "hidden_dropout_prob")
    same += ("attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "image_size", "patch_size")
    same += ("num_channels", "qkv_bias")
    config = Dinov2Config(
        **{name: value for name, value in vit.to_dict().items() if name in same},
        mlp_ratio=vit.intermediate_size // vit.hidden_size,
        layerscale_value=1.0,
        use_mask_token=False,
        out_indices=_map_layers(segmenter),
        apply_layernorm=segmenter.config.norm_feature_maps,
        reshape_hidden_states=True,
    )
    state = _renamed(encoder.state_dict(), _VIT_TO_DINOV2)
    del state["embeddings.mask_token"]
    for layer in range(vit.num_hidden_layers):
        for scale in ("layer_scale1", "layer_scale2"):
            state[f"encoder.layer.{layer}.{scale}.lambda1"] = torch.ones(vit.hidden_size)
    return Backbone(config, state)


BACKBONES: dict[str, Callable[[GKDStudentForSemanticSegmentation, int], Backbone]] = {
    "convnext": _convnext,
    "dinov2": _dinov2,
    "resnet": _resnet,
    "swin": _swin,
    "vit": _vit,
}


def _backbone(segmenter: GKDStudentForSemanticSegmentation, kind: str, image_size: int) -> Backbone:
    if kind not in BACKBONES:
        raise NotNativeError(f"for {kind} no conversion to transformers' backbone classes is known here")
    return BACKBONES[kind](segmenter, image_size)


# -- heads ------------------------------------------------------------------------------------------------------------


def _labels(segmenter: GKDStudentForSemanticSegmentation) -> dict[str, Any]:
    return {"id2label": dict(segmenter.config.id2label), "label2id": dict(segmenter.config.label2id)}


def _upernet(
    segmenter: GKDStudentForSemanticSegmentation, kind: str, image_size: int
) -> tuple[PreTrainedModel, State]:
    backbone = _backbone(segmenter, kind, image_size)
    head = segmenter.decode_head
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=head.config.hidden_size,
        pool_scales=head.config.pool_scales,
        use_auxiliary_head=False,
        loss_ignore_index=head.config.loss_ignore_index,
        **_labels(segmenter),
    )
    state = _prefixed(backbone.state, "backbone.") | _prefixed(head.head.state_dict(), "decode_head.")
    return UperNetForSemanticSegmentation(config), state


def _mask2former(
    segmenter: GKDStudentForSemanticSegmentation, kind: str, image_size: int
) -> tuple[PreTrainedModel, State]:
    if kind in VITS:
        raise NotNativeError(f"transformers' Mask2Former does not make a pyramid of the maps of a {kind}")
    backbone = _backbone(segmenter, kind, image_size)
    head = segmenter.decode_head
    config = copy.deepcopy(head.config)
    config.backbone_config = backbone.config
    config.id2label, config.label2id = _labels(segmenter).values()
    names = (
        (r"^pixel_decoder\.", "model.pixel_level_module.decoder."),
        (r"^transformer_module\.", "model.transformer_module."),
    )
    state = _prefixed(backbone.state, "model.pixel_level_module.encoder.") | _renamed(head.state_dict(), names)
    return Mask2FormerForUniversalSegmentation(config), state


_DPT_LAYER = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^layers\.", "encoder.layer."),
)


def _dpt(segmenter: GKDStudentForSemanticSegmentation, kind: str, image_size: int) -> tuple[PreTrainedModel, State]:
    if kind not in ("vit", "dinov2"):
        raise NotNativeError(f"transformers' DPT has the blocks of ViT and DINOv2, not those of {kind}")
    if segmenter.config.norm_feature_maps:
        raise NotNativeError("transformers' DPT does not pass the stage maps through the final norm")
    layers = _map_layers(segmenter)
    # DPT resamples positions bilinearly, the encoder bicubically: they must already be those of the image size.
    segmenter.student.set_geometry(image_size)
    student, head = segmenter.student, segmenter.decode_head
    encoder = student.encoder.config
    state = {key: value for key, value in student.encoder.state_dict().items() if not key.endswith("mask_token")}
    if kind == "dinov2":
        if encoder.use_swiglu_ffn:
            raise NotNativeError("transformers' DPT has no SwiGLU, which this DINOv2 uses")
        state = _without_layer_scale(state, encoder.num_hidden_layers)
        intermediate = int(encoder.hidden_size * encoder.mlp_ratio)
    else:
        intermediate = encoder.intermediate_size
    settings = head.config.to_dict()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"):
        settings[name] = getattr(encoder, name)
    for name in ("num_channels", "qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        settings[name] = getattr(encoder, name)
    settings |= {
        "intermediate_size": intermediate,
        "image_size": image_size,
        "patch_size": student.adapter.stride,
        "backbone_out_indices": [layer - 1 for layer in layers],
    }
    config = DPTConfig(**(settings | _labels(segmenter)))
    state = _prefixed(_renamed(state, _DPT_LAYER), "dpt.") | head.state_dict()
    return DPTForSemanticSegmentation(config), state


def _without_layer_scale(state: State, layers: int) -> State:
    """Multiply the factors of DINOv2's LayerScale into the linear layers before them."""
    state = dict(state)
    for index in range(layers):
        for scale, linear in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
            factors = state.pop(f"encoder.layer.{index}.{scale}.lambda1")
            weight, bias = (f"encoder.layer.{index}.{linear}.{name}" for name in ("weight", "bias"))
            state[weight], state[bias] = state[weight] * factors[:, None], state[bias] * factors
    return state


HEADS: dict[str, Callable[[GKDStudentForSemanticSegmentation, str, int], tuple[PreTrainedModel, State]]] = {
    "dpt": _dpt,
    "mask2former": _mask2former,
    "upernet": _upernet,
}


def _prefixed(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def _renamed(state: Mapping[str, torch.Tensor], names: tuple[tuple[str, str], ...]) -> State:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
