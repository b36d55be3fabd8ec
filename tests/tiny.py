"""Encoders that fit in a test: every architecture with a handful of channels, by the fields of its configuration."""

from __future__ import annotations

from typing import Any

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
}

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
