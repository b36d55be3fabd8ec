"""The student: an encoder that is distilled, and the segmenter built on it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, SemanticSegmenterOutput

from .configuration_gkd import GKDStudentConfig
from .decode_heads import build_decode_head
from .encoders import adapter_for, mask_image, resample_geometry
from .errors import InputError
from .loading import load_encoder


@dataclass
class GKDStudentOutput(ModelOutput):
    """What the student says of B images.

    Attributes:
        last_hidden_state: B×N×C patch tokens. pooler_output: B×C class token.
        grid: (h, w), h·w = N. feature_maps: stage maps B×C_i×h_i×w_i, finest first, if asked for.
        blocks: B×N×C patch tokens after single blocks, if asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    blocks: tuple[torch.Tensor, ...] | None = None


@dataclass
class GKDSegmenterOutput(SemanticSegmenterOutput):
    """transformers' `SemanticSegmenterOutput`, the loss by its named terms, and the student's output if asked for."""

    loss_terms: dict[str, torch.Tensor] | None = None
    student: GKDStudentOutput | None = None


class GKDStudentPreTrainedModel(PreTrainedModel):
    """What the student models share: their configuration and the initialisation of what is theirs."""

    config_class = GKDStudentConfig
    base_model_prefix = "student"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def get_input_embeddings(self) -> None:
        """Pixels have no table of embeddings; Accelerate asks for it when it shards."""
        return None

    def lay_out(self) -> None:
        """Lay weights out in memory as the device they are on computes fastest; a CNN's on a GPU, values stay.

        Trainers do it. Otherwise call it after ``to(device)``; a model that FSDP2 is to shard must not be laid out so.
        """
        self.base_model.adapter.lay_out(self)

    def check_activation_checkpointing(self) -> None:
        """Raise `InputError` if nothing that is trained here can compute its activations a second time."""
        if not _recomputable(self):
            kind = self.config.encoder_config.model_type
            raise InputError(f"activation_checkpointing is not possible with a {kind}: leave it out")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The encoder and transformers' own heads are PreTrainedModels and initialise themselves.
        if isinstance(module, GKDStudentModel) and module.mask_pixel is not None:
            nn.init.zeros_(module.mask_pixel)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


class GKDStudentModel(GKDStudentPreTrainedModel):
    """Any supported transformers vision encoder, ready to be distilled.

    ``encoder`` is the plain transformers model; saving it gives a checkpoint that needs nothing of this library.
    """

    def __init__(self, config: GKDStudentConfig):
        super().__init__(copy.deepcopy(config))  # it will follow the encoder, and the caller's stays as it is
        self.adapter = adapter_for(self.config.encoder_config)
        self.encoder = self.adapter.build()
        self.config.encoder_config = self.encoder.config
        # 0 is the mean colour of normalised pixels.
        self.mask_pixel = None if self.adapter.native_mask else nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.post_init()
        self._no_split_modules = self.adapter.sharded_layers(self.encoder)

    @classmethod
    def from_encoder(
        cls,
        source: str | os.PathLike | PreTrainedConfig | dict[str, Any],
        *,
        pretrained: bool = True,
        revision: str | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        freeze_batch_norm: bool = False,
    ) -> GKDStudentModel:
        """Make a student of an encoder.

        Args:
            source: a Hub id, a folder, a configuration, or a mapping of its fields with ``model_type``.
            pretrained: read the weights of an id or folder; False keeps random weights.
            revision: commit, tag or branch of a Hub id.
            image_size, patch_size: resample patch kernels and positions to this geometry.
            freeze_batch_norm: keep batch norms in eval mode while training (see `GKDStudentConfig`).

        Raises:
            InputError: unsupported architecture, unreadable source, weights that lack a tensor of the encoder, or an
                image size that is not a multiple of the patch size.
        """
        encoder, mean, std = load_encoder(source, pretrained=pretrained, revision=revision)
        config = GKDStudentConfig(
            encoder_config=encoder.config, image_mean=mean, image_std=std, freeze_batch_norm=freeze_batch_norm
        )
        student = cls(config)
        student._replace_encoder(encoder)
        if image_size is not None or patch_size is not None:
            student.set_geometry(image_size or student.adapter.image_size or patch_size, patch_size)
        return student

    def train(self, mode: bool = True) -> GKDStudentModel:
        """Set training mode, but leave frozen batch norms in eval mode."""
        super().train(mode)
        if self.config.freeze_batch_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def set_geometry(self, image_size: int, patch_size: int | None = None) -> None:
        """Resample patch kernels and positions for square images of ``image_size`` pixels (nothing for CNNs).

        Raises:
            InputError: the image does not cut into whole patches.
        """
        self._replace_encoder(resample_geometry(self.encoder, image_size, patch_size))

    def _replace_encoder(self, encoder: PreTrainedModel) -> None:
        self.encoder = encoder
        self.config.encoder_config = encoder.config
        self.adapter = adapter_for(encoder.config)
        self._no_split_modules = self.adapter.sharded_layers(encoder)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        mask_grid: tuple[int, int] | None = None,
        output_maps: bool = False,
        output_blocks: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> GKDStudentOutput:
        """Encode B×3×H×W normalised pixels.

        Args:
            bool_masked_pos: B×N, True where a patch is hidden from the student.
            mask_grid: (h, w) of ``bool_masked_pos``; needed by encoders without a mask token, whose image is masked.
            output_maps: also return the stage maps.
            output_blocks: also return the patch tokens after these blocks, counted from 1 (transformers of one
                resolution).
        """
        if bool_masked_pos is not None and not self.adapter.native_mask:
            if mask_grid is None:
                raise InputError(f"mask_grid is needed to mask the image of a {self.config.encoder_config.model_type}")
            pixel_values = mask_image(pixel_values, bool_masked_pos, mask_grid, self.mask_pixel)
            bool_masked_pos = None
        output = self.adapter.forward(
            self.encoder, pixel_values, bool_masked_pos, output_maps, self.config.norm_feature_maps, output_blocks
        )
        maps, blocks = output.maps if output_maps else None, output.blocks or None
        return GKDStudentOutput(output.patches, output.cls, output.grid, maps, blocks)

    def save_encoder(self, folder: str | os.PathLike) -> None:
        """Save the plain encoder, which ``AutoModel.from_pretrained(folder)`` loads without this library."""
        self.encoder.save_pretrained(folder, state_dict=self.adapter.plain_state(self.encoder))


class GKDStudentForSemanticSegmentation(GKDStudentPreTrainedModel):
    """A student and a decode head. ``freeze_encoder`` makes it the second stage of GKD: only the head learns.

    ``map_norms`` are the norms on the stage maps that transformers' backbones of some encoders have (ConvNeXt, Swin);
    they belong to the head's side.
    """

    def __init__(self, config: GKDStudentConfig):
        super().__init__(config)
        if config.decode_head is None:
            raise InputError("a segmenter needs decode_head in its configuration, for example {'type': 'linear'}")
        self.student = GKDStudentModel(config)
        self.config = config = self.student.config  # one for both
        adapter = self.student.adapter
        self.map_norms = adapter.map_norms()
        self.decode_head = build_decode_head(
            config.decode_head,
            adapter.map_channels,
            adapter.map_strides,
            config.num_labels,
            config.semantic_loss_ignore_index,
        )
        self.encoder_frozen = False
        self.post_init()
        self._no_split_modules = self.student._no_split_modules  # the head is sharded with what is left

    @classmethod
    def from_student(
        cls,
        student: GKDStudentModel,
        *,
        num_labels: int,
        decode_head: str | dict[str, Any] = "linear",
        id2label: dict[int, str] | None = None,
        norm_feature_maps: bool = False,
    ) -> GKDStudentForSemanticSegmentation:
        """Put a new decode head on ``student``, which is taken over, not copied.

        Args:
            decode_head: "linear", "mask2former", "upernet", "dpt", or a mapping with ``type`` and that head's options.
            norm_feature_maps: see `GKDStudentConfig`.

        Raises:
            InputError: unknown decode head or option, or stage maps that do not suit it.
        """
        settings = {"type": decode_head} if isinstance(decode_head, str) else dict(decode_head)
        names = id2label or {index: f"LABEL_{index}" for index in range(num_labels)}
        config = GKDStudentConfig(
            encoder_config=student.config.encoder_config,
            decode_head=settings,
            image_mean=student.config.image_mean,
            image_std=student.config.image_std,
            freeze_batch_norm=student.config.freeze_batch_norm,
            norm_feature_maps=norm_feature_maps,
            id2label=names,
            label2id={name: index for index, name in names.items()},
        )
        segmenter = cls(config)
        segmenter.student = student
        segmenter._no_split_modules = student._no_split_modules
        segmenter.config.encoder_config = student.encoder.config
        student.config = segmenter.config
        return segmenter

    def freeze_encoder(self, frozen: bool = True, *, tokens_used: bool = False) -> None:
        """Keep the encoder in eval mode, without gradients and untouched by the optimiser; False undoes it.

        Args:
            tokens_used: whether a loss looks at the encoder's tokens, too: what only they pass is trained then.
        """
        self.encoder_frozen = frozen
        self.student.requires_grad_(not frozen)
        beside = () if tokens_used else self.student.adapter.beside_maps(self.config.norm_feature_maps)
        unused = tuple(f"encoder.{name}" for name in beside)
        for name, parameter in self.student.named_parameters():
            if name.startswith(unused) or name.endswith(("mask_token", "mask_pixel")):
                parameter.requires_grad_(False)  # engines that train in parallel want a gradient for all the others
        self.train(self.training)

    def check_activation_checkpointing(self) -> None:
        """See above; a frozen encoder keeps no activations, so only the decode head counts then."""
        if not self.encoder_frozen:
            super().check_activation_checkpointing()
        elif not _recomputable(self.decode_head):
            head = self.config.decode_head["type"]
            raise InputError(
                f"activation_checkpointing has nothing to save: the encoder is frozen, and decode_head {head} has no "
                "layers to compute again; leave it out"
            )

    def train(self, mode: bool = True) -> GKDStudentForSemanticSegmentation:
        """Set training mode, but leave a frozen encoder in eval mode."""
        super().train(mode)
        if self.encoder_frozen:
            self.student.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_student: bool = False,
        output_blocks: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> GKDSegmenterOutput:
        """Segment B×3×H×W normalised pixels of any size (but timm's encoders for one size take none above that).

        Images that the encoder would lose an edge of are padded below and on the right with 0, the mean colour, to the
        least size that it takes whole, and the padding's logits are cut away.

        Args:
            labels: B×H×W train ids, 255 ignored; gives a loss.
            output_student: also return what the student says of the images, as padded.
            output_blocks: see `GKDStudentModel.forward`.

        Returns:
            logits B×K×h×w at the head's stride (resize them to the image), or B×K×H×W if the image was padded, and
            the loss with its terms.
        """
        height, width = pixel_values.shape[-2:]
        rows, columns = self.student.adapter.padded_size(height, width)
        padding = (0, columns - width, 0, rows - height)
        padded = any(padding)
        if padded:
            pixel_values = F.pad(pixel_values, padding)
            if labels is not None:
                labels = F.pad(labels, padding, value=self.config.semantic_loss_ignore_index)
        with torch.no_grad() if self.encoder_frozen else nullcontext():
            student = self.student(pixel_values, output_maps=True, output_blocks=output_blocks)
        maps = student.feature_maps
        if self.map_norms is not None:
            maps = tuple(norm(m) for norm, m in zip(self.map_norms, maps, strict=True))
        head = self.decode_head(maps, labels)
        logits = head.logits
        if padded:
            # Only whole pixels can be cut away, so the logits go to the image's size first.
            logits = F.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)
            logits = logits[..., :height, :width]
        return GKDSegmenterOutput(
            loss=head.loss,
            logits=logits,
            loss_terms=head.terms or None,
            student=student if output_student else None,
        )


def _recomputable(module: nn.Module) -> bool:
    # how transformers marks the layers that can
    return any(hasattr(layer, "gradient_checkpointing") for layer in module.modules())


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms normalise with the batch's statistics but not remember them, while the context lasts."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    training = [norm for norm in norms if norm.training]
    for norm in training:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in training:
            norm.track_running_stats = True
