"""Encoders that fit in a test: every architecture with a handful of channels, by the fields of its configuration."""

from __future__ import annotations

from typing import Any

_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 3,
    "depths": [1, 1, 1],
    "hidden_sizes": [8, 16, 24],
    "num_attention_heads": [1, 2, 2],
    "sr_ratios": [4, 2, 1],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "mlp_ratios": [2, 2, 2],
    "drop_path_rate": 0.0,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {
        "model_type": "vit",
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    },
    "mobilenet_v2": {"model_type": "mobilenet_v2", "depth_multiplier": 0.25},
    "convnext": {"model_type": "convnext", "num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]},
    "swin": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [2, 2, 2],
        "num_heads": [2, 2, 4],
        "window_size": 2,
        "mlp_ratio": 2.0,
    },
    "convnextv2": {"model_type": "convnextv2", "num_stages": 3, "hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]},
    "dinov3_convnext": {
        "model_type": "dinov3_convnext",
        "hidden_sizes": [8, 16, 24],
        "depths": [1, 1, 1],
        "layer_scale_init_value": 0.5,
    },
    "mobilenet_v1": {"model_type": "mobilenet_v1", "depth_multiplier": 0.0625},
    "efficientnet": {
        "model_type": "efficientnet",
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
        "drop_connect_rate": 0.0,
    },
    "mobilevit": {
        "model_type": "mobilevit",
        "hidden_sizes": [16, 16, 24],
        "neck_hidden_sizes": [8, 8, 8, 16, 16, 24, 48],
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
    },
    "swinv2": {
        "model_type": "swinv2",
        "embed_dim": 8,
        "depths": [2, 2, 2],
        "num_heads": [2, 2, 4],
        "window_size": 2,
        "mlp_ratio": 2.0,
        "image_size": 64,
        "drop_path_rate": 0.0,
    },
    "segformer": {"model_type": "segformer", **_PYRAMID},
    "pvt_v2": {"model_type": "pvt_v2", **_PYRAMID},
}

_TRANSFORMER: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
_TOWER: dict[str, Any] = _TRANSFORMER | {"intermediate_size": 48, "image_size": 32}

# What would only cost time where every encoder goes through the same code of ours.
MORE_ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model"} | _TOWER,
    "deit": {"model_type": "deit"} | _TOWER,
    "dinov2_giant": {"model_type": "dinov2", "use_swiglu_ffn": True, "mlp_ratio": 2, "image_size": 32} | _TRANSFORMER,
    "dinov2_registers": {"model_type": "dinov2_with_registers", "image_size": 32, "mlp_ratio": 2} | _TRANSFORMER,
    "dinov3_vit": {"model_type": "dinov3_vit", "num_register_tokens": 2, "use_gated_mlp": True} | _TOWER,
    "ijepa": {"model_type": "ijepa"} | _TOWER,
    "radio": {"model_type": "radio", "max_img_size": 64, "num_registers": 2, "mlp_ratio": 2.0} | _TRANSFORMER,
    "siglip": {"model_type": "siglip_vision_model"} | _TOWER,
    "siglip2": {"model_type": "siglip2_vision_model", "num_patches": 16, "intermediate_size": 48} | _TRANSFORMER,
}

EVERY_ENCODER: dict[str, dict[str, Any]] = ENCODERS | MORE_ENCODERS

MASK2FORMER: dict[str, Any] = {
    "type": "mask2former",
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_attention_heads": 2,
    "num_queries": 10,
    "train_num_points": 64,
}

UPERNET: dict[str, Any] = {"type": "upernet", "hidden_size": 16, "pool_scales": [1, 2]}

DPT: dict[str, Any] = {"type": "dpt", "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
