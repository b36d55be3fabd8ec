"""Adapters of the vision transformers of one resolution: what they share, and ViT, DeiT, I-JEPA, DINO, RADIO.

A new architecture of this kind is a class that names its parts: see `TransformerAdapter`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from .encoder_adapter import EncoderAdapter, EncoderOutput
from .errors import InputError


class TransformerAdapter(EncoderAdapter):
    """Vision transformers of one resolution. What a subclass does not say is as in a ViT.

    Their first tokens are no patches: class tokens, registers. Images may be of any height and width that cut into
    whole patches; transformers resamples positions that were learned for other sizes as it runs.

    Attributes:
        prefix: number of tokens before those of the patches.
        arguments: keywords of the model's forward.
        final_norm: name of the norm after the last block, None where there is none.
        norms_output: whether the model's ``last_hidden_state`` has passed it.
        mask_token: its name, where ``native_mask``.
        pooler: whether ``AutoModel`` gives the model a pooler, which is not trained here.
        settings: of the configuration, where this library needs other ones than a checkpoint brings.
    """

    native_mask = True
    whole_patches = True
    owns_grid = True
    kernel = "embeddings.patch_embeddings.projection.weight"
    positions = "embeddings.position_embeddings"
    position_prefix = 1
    prefix = 1
    arguments: dict[str, Any] = {}
    final_norm: str | None = "layernorm"
    norms_output = True
    mask_token = "embeddings.mask_token"
    pooler = False
    settings: dict[str, Any] = {}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.adjust(**self.settings)
        fields = config.to_dict()
        for name in ("image_size", "patch_size"):
            sides = fields.get(name)
            if isinstance(sides, list | tuple):
                if len(set(sides)) != 1:
                    raise InputError(
                        f"{config.model_type} with {name} {list(sides)} is not supported: transformers resamples the "
                        "positions of square images and patches only"
                    )
                self.adjust(**{name: sides[0]})

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def stride(self) -> int:
        return self.config.patch_size

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def map_layers(self) -> tuple[int, ...]:
        """Blocks whose outputs are the stage maps: 4, 6, 8, 12 of 12; 8, 12, 16, 24 of 24 (GKD, arXiv 2603.02554)."""
        return tuple(max(1, round(self.num_blocks * part)) for part in (1 / 3, 1 / 2, 2 / 3, 1))

    @property
    def map_channels(self) -> tuple[int, ...]:
        return (self.width,) * 4

    @property
    def map_strides(self) -> tuple[int, ...]:
        return (self.stride,) * 4

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        mask = (self.mask_token,) if self.native_mask else ()
        return mask if norm_maps or self.final_norm is None else (*mask, self.final_norm)

    def plain_state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Drop a mask token that ``AutoModel`` does not build, and add the pooler that it does.

        The pooler is the tanh of the class token; without weights here it would get random ones.
        """
        state = model.state_dict()
        if "use_mask_token" in self.constructor:
            del state[self.mask_token]
        if self.pooler:
            weight = state[f"{self.final_norm}.weight"]
            like = {"dtype": weight.dtype, "device": weight.device}
            state["pooler.dense.weight"] = torch.eye(self.config.pooler_output_size, self.width, **like)
            state["pooler.dense.bias"] = torch.zeros(self.config.pooler_output_size, **like)
        return state

    def run(self, model: PreTrainedModel, pixel_values: torch.Tensor, **arguments: Any) -> BaseModelOutput:
        """Run the model on B×3×H×W pixels that cut into whole patches."""
        return model(pixel_values, **arguments)

    def class_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return B×C of B×(prefix+N)×C: the class token, or the mean of the patches where there is none."""
        return tokens[:, 0] if self.prefix else tokens.mean(1)

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
        arguments = dict(self.arguments)
        if self.native_mask:
            arguments["bool_masked_pos"] = bool_masked_pos
        else:
            self.refuse_mask(bool_masked_pos)
        output = self.run(model, pixel_values, output_hidden_states=output_maps or bool(output_blocks), **arguments)
        norm = torch.nn.Identity() if self.final_norm is None else model.get_submodule(self.final_norm)
        tokens = output.last_hidden_state if self.norms_output else norm(output.last_hidden_state)
        maps = ()
        if output_maps:
            # hidden_states[0] is the embedding; entry i is block i's output, before the final norm.
            states = [output.hidden_states[layer] for layer in self.map_layers]
            if norm_maps:
                states = [norm(state) for state in states]
            maps = tuple(state[:, self.prefix :].transpose(1, 2).unflatten(2, grid) for state in states)
        blocks = tuple(output.hidden_states[block][:, self.prefix :] for block in output_blocks)
        return EncoderOutput(self.class_token(tokens), tokens[:, self.prefix :], grid, maps, blocks)


class ViTAdapter(TransformerAdapter):
    """ViT, DeiT without its distillation token, DINO (model type ``vit``)."""

    model_name = "ViTModel"
    constructor = {"add_pooling_layer": False, "use_mask_token": True}
    arguments = {"interpolate_pos_encoding": True}
    norm_epsilon = 1e-6  # DeiT's and DINO's; their conversions say 1e-12
    pooler = True


class DeiTAdapter(ViTAdapter):
    """DeiT with a distillation token, which attends like a register: its own output is dropped (METHOD of GKD)."""

    model_name = "DeiTModel"
    prefix = 2
    position_prefix = 2


class IJepaAdapter(ViTAdapter):
    """I-JEPA, which has no class token: it is the mean of the patches."""

    model_name = "IJepaModel"
    prefix = 0
    position_prefix = 0
    pooler = False


class Dinov2Adapter(TransformerAdapter):
    """DINOv2 without registers."""

    model_name = "Dinov2Model"

    @property
    def native_mask(self) -> bool:
        return self.config.use_mask_token


class Dinov2WithRegistersAdapter(TransformerAdapter):
    """DINOv2 with registers, which come between class token and patches and have no positions."""

    model_name = "Dinov2WithRegistersModel"
    antialias = True  # its authors resample its positions so

    @property
    def prefix(self) -> int:
        return 1 + self.config.num_register_tokens


class DINOv3ViTAdapter(TransformerAdapter):
    """DINOv3 ViT: rotary positions, computed for every size; registers.

    In train mode transformers shifts, stretches and rescales the coordinates of its patches at random, anew in every
    call (``pos_embed_rescale`` and its like). Here they are always the exact ones: GKD wants the tokens of an image
    that is not masked to be the same in both of the student's passes. What is saved does not change.
    """

    model_name = "DINOv3ViTModel"
    kernel = "embeddings.patch_embeddings.weight"
    positions = None
    final_norm = "norm"

    @property
    def prefix(self) -> int:
        return 1 + self.config.num_register_tokens

    def run(self, model: PreTrainedModel, pixel_values: torch.Tensor, **arguments: Any) -> BaseModelOutput:
        if model.rope_embeddings.training:
            model.rope_embeddings.eval()  # all that its mode decides; it holds no weights
        return super().run(model, pixel_values, **arguments)


class RadioAdapter(TransformerAdapter):
    """RADIO: several class tokens, registers, no final norm, its own normalisation of pixels in [0, 1].

    That one is undone before it, so that this encoder takes normalised pixels as the others do. Its positions are one
    table that it resamples to every size by itself. The class token is the mean of those that make its summary.
    """

    model_name = "RadioModel"
    native_mask = False
    # Numbers of the configuration, though transformers keeps them among the weights.
    optional = (*TransformerAdapter.optional, "norm_mean", "norm_std", "summary_idxs")
    kernel, kernel_layout = "embeddings.patch_projection.weight", "channels_first"
    positions = None
    final_norm = None

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.video_temporal_patch_size is not None:
            raise InputError("radio with video_temporal_patch_size is not supported: choose a checkpoint for images")

    @property
    def prefix(self) -> int:
        return self.config.num_summary_tokens

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.config.norm_mean), tuple(self.config.norm_std)

    def run(self, model: PreTrainedModel, pixel_values: torch.Tensor, **arguments: Any) -> BaseModelOutput:
        mean, std = (pixel_values.new_tensor(values).view(3, 1, 1) for values in self.pixel_statistics)
        return super().run(model, pixel_values * std + mean, **arguments)

    def class_token(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, self.config.summary_idxs].mean(1)

    def in_geometry(self, image_size: int, patch_size: int | None = None) -> PreTrainedConfig:
        config = super().in_geometry(image_size, patch_size)
        # As many positions as before: the configuration counts them in patches of a largest image.
        config.max_img_size = self.config.max_img_size // self.stride * config.patch_size
        config.patch_dim = config.num_channels * config.patch_size**2
        return config
