"""Adapters of the vision transformers with a class token and one grid: ViT and DINOv2."""

from __future__ import annotations

import torch
from transformers import Dinov2Model, PreTrainedModel, ViTModel

from .encoder_adapter import EncoderAdapter, EncoderOutput


class _TransformerAdapter(EncoderAdapter):
    """Vision transformers with a class token, a final LayerNorm and a native mask token."""

    native_mask = True
    fixed_grid = True
    whole_patches = True
    final_norm = "layernorm"

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def stride(self) -> int:
        patch = self.config.patch_size
        return patch if isinstance(patch, int) else patch[0]

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def map_layers(self) -> tuple[int, ...]:
        """Blocks whose outputs are the stage maps: 4, 6, 8, 12 of 12; 8, 12, 16, 24 of 24 (GKD, arXiv 2603.02554)."""
        depth = self.config.num_hidden_layers
        return tuple(max(1, round(depth * part)) for part in (1 / 3, 1 / 2, 2 / 3, 1))

    @property
    def map_channels(self) -> tuple[int, ...]:
        return (self.width,) * 4

    @property
    def map_strides(self) -> tuple[int, ...]:
        return (self.stride,) * 4

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        return ("embeddings.mask_token",) if norm_maps else ("embeddings.mask_token", "layernorm")

    # The keyword that lets the model resample its positions to another image size; DINOv2 does so by itself.
    any_size: dict[str, bool] = {}

    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
        output_blocks: tuple[int, ...] = (),
    ) -> EncoderOutput:
        self.check_blocks(output_blocks)
        self.check_image_size(*pixel_values.shape[-2:])
        grid = (pixel_values.shape[-2] // self.stride, pixel_values.shape[-1] // self.stride)
        wanted = output_maps or bool(output_blocks)
        output = model(pixel_values, bool_masked_pos=bool_masked_pos, output_hidden_states=wanted, **self.any_size)
        tokens = output.last_hidden_state
        maps = ()
        if output_maps:
            # hidden_states[0] is the embedding; entry i is block i's output, before the final norm.
            states = [output.hidden_states[layer] for layer in self.map_layers]
            if norm_maps:
                states = [model.layernorm(state) for state in states]
            maps = tuple(state[:, 1:].transpose(1, 2).unflatten(2, grid) for state in states)
        blocks = tuple(output.hidden_states[block][:, 1:] for block in output_blocks)
        return EncoderOutput(tokens[:, 0], tokens[:, 1:], grid, maps, blocks)


class ViTAdapter(_TransformerAdapter):
    """ViT, DeiT without its distillation token, DINO (model type ``vit``)."""

    model_class = ViTModel
    constructor = {"add_pooling_layer": False, "use_mask_token": True}
    any_size = {"interpolate_pos_encoding": True}
    norm_epsilon = 1e-6  # DeiT's and DINO's; their conversions say 1e-12

    def plain_state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Drop the mask token, which only serves distillation, and add a pooler: the tanh of the class token.

        ``AutoModel`` gives a ViT a pooler in any case, and without weights here it would get random ones.
        """
        state = {key: value for key, value in model.state_dict().items() if not key.endswith("mask_token")}
        like = {"dtype": model.layernorm.weight.dtype, "device": model.layernorm.weight.device}
        state["pooler.dense.weight"] = torch.eye(self.config.pooler_output_size, self.width, **like)
        state["pooler.dense.bias"] = torch.zeros(self.config.pooler_output_size, **like)
        return state


class Dinov2Adapter(_TransformerAdapter):
    """DINOv2 without registers."""

    model_class = Dinov2Model
