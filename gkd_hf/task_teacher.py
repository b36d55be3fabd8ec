"""The teacher of the one-stage methods: its tokens, single blocks and, with a head learnt on the source, logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gkd_hf.distillation.one_stage import Features
from gkd_hf.errors import InputError
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.teacher import GKDTeacher


class TaskTeacher(GKDTeacher):
    """A `GKDTeacher` that may have a decode head, so that it can also say what it would segment.

    Args:
        source: as of `GKDTeacher`. segmenter: a segmenter on this very encoder, frozen while its head was trained; the
            head is taken over. settings: those of `GKDTeacher`.

    Raises:
        InputError: what `GKDTeacher` raises, and a segmenter on another encoder or on other weights.

    Attributes:
        num_labels: classes K of the head; None without one.
    """

    def __init__(self, source: Any, segmenter: GKDStudentForSemanticSegmentation | None = None, **settings: Any):
        super().__init__(source, **settings)
        self.decode_head: nn.Module | None = None
        self.map_norms: nn.ModuleList | None = None
        self.norm_maps = False
        self.num_labels: int | None = None
        if segmenter is not None:
            own = self.encoder.config
            other = segmenter.config.encoder_config
            if (own.model_type, self.width) != (other.model_type, segmenter.student.adapter.width):
                raise InputError(
                    f"the teacher's head was learnt on a {other.model_type} of {segmenter.student.adapter.width} "
                    f"channels, the teacher is a {own.model_type} of {self.width}: give a head learnt on this teacher"
                )
            self._check_weights(segmenter)
            self.num_labels = segmenter.config.num_labels
            self.decode_head, self.map_norms = segmenter.decode_head, segmenter.map_norms
            self.norm_maps = segmenter.config.norm_feature_maps
            self.requires_grad_(False)
            self.eval()

    def _check_weights(self, segmenter: GKDStudentForSemanticSegmentation) -> None:
        others = segmenter.student.encoder.state_dict()
        for name, own in self.encoder.state_dict().items():
            other = others.get(name)
            if other is not None and own.is_meta:
                continue  # on paper nothing has a value
            if other is not None and other.shape != own.shape and self.geometry == "resample_patch_embed":
                continue  # kernels and positions that were resampled for the images the head was learnt on
            if other is None or not torch.equal(own, other.to(own)):
                raise InputError(
                    f"the teacher's head was learnt on other weights than '{self.called}' has ({name} differs): give "
                    "one that was learnt on this teacher, frozen"
                )

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compile in place, as every module can, also what `features` computes."""
        super().compile(*args, **settings)
        self._encode = torch.compile(self._encode, *args, **settings)

    @torch.no_grad()
    def features(
        self,
        pixel_values: torch.Tensor,
        grid: tuple[int, int],
        image_mean: torch.Tensor,
        image_std: torch.Tensor,
        blocks: tuple[int, ...] = (),
    ) -> Features:
        """Say of the student's own pixels what a one-stage method compares.

        Args:
            pixel_values: B×3×H×W, normalised with the student's ``image_mean`` and ``image_std`` (1×3×1×1).
            grid: (h, w) that the tokens must lie on. blocks: blocks whose tokens are wanted, counted from 1.

        Returns:
            Tokens B×(h·w)×C_t; logits B×K×h'×w' if there is a head.

        Raises:
            InputError: the teacher's tokens do not lie on that grid, or it has no such blocks.
        """
        features = self._encode(self.pixels_for(pixel_values, grid, image_mean, image_std), tuple(blocks))
        self.check_grid(features.grid, grid)
        return features

    def _encode(self, pixels: torch.Tensor, blocks: tuple[int, ...]) -> Features:
        with_head = self.decode_head is not None
        output = self.adapter.forward(self.encoder, pixels, None, with_head, self.norm_maps, blocks)
        logits = None
        if with_head:
            maps = output.maps
            if self.map_norms is not None:
                maps = tuple(norm(m) for norm, m in zip(self.map_norms, maps, strict=True))
            logits = self.decode_head(maps, None).logits
        return Features(output.patches, output.grid, output.blocks, logits)
