"""The teacher: a frozen vision foundation model with its own normalisation and its own idea of geometry."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from gkd_hf.errors import InputError, nearest
from gkd_hf.models.encoders import EncoderOutput, adapter_for, resample_geometry
from gkd_hf.models.loading import load_encoder

GEOMETRIES = ("native", "resample_patch_embed")


class GKDTeacher(nn.Module):
    """A frozen encoder that gives class and patch tokens after its final norm.

    It never trains, never enters train mode, and belongs to no checkpoint: trainers hold it beside their model.

    Args:
        source: a Hub id, a folder, a configuration, or a mapping with ``model_type`` and the configuration's fields.
        geometry: how its patches are brought onto the student's grid. ``native`` resizes the image so that the
            teacher's own patches fall on that grid (512/16 = 448/14); ``resample_patch_embed`` shows it the student's
            image and resizes its patch kernels and positions instead.
        pretrained: read the weights of an id or folder.
        revision: commit, tag or branch of a Hub id.

    Raises:
        InputError: unknown geometry or architecture, unreadable source, weights for less than 95 % of the tensors.
    """

    def __init__(
        self,
        source: str | os.PathLike | PreTrainedConfig | dict[str, Any],
        *,
        geometry: Literal["native", "resample_patch_embed"] = "native",
        pretrained: bool = True,
        revision: str | None = None,
    ):
        super().__init__()
        if geometry not in GEOMETRIES:
            hint = nearest(geometry, GEOMETRIES)
            raise InputError(f"unknown teacher geometry '{geometry}'{hint} (there are: {', '.join(GEOMETRIES)})")
        self.geometry = geometry
        self.encoder, mean, std = load_encoder(source, pretrained=pretrained, revision=revision)
        self.adapter = adapter_for(self.encoder.config)
        self._original = (self.encoder,)  # in a tuple, so that it is no sub-module
        if geometry == "resample_patch_embed" and not self.adapter.fixed_grid:
            raise InputError(
                "teacher geometry resample_patch_embed needs patch kernels and positions to resample, "
                f"{self.encoder.config.model_type} has none: use geometry native"
            )
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def width(self) -> int:
        """Channels C_t of the tokens."""
        return self.adapter.width

    def train(self, mode: bool = True) -> GKDTeacher:
        """Stay in eval mode, whatever is asked: dropout or batch statistics would make it another teacher."""
        return super().train(False)

    def grid_for(self, image_size: int) -> tuple[int, int]:
        """The grid this teacher gives an ``image_size``² image by itself, resized to the nearest multiple."""
        cells = max(1, round(image_size / self.adapter.stride))
        return cells, cells

    def fit_geometry(self, image_size: int, grid: tuple[int, int]) -> None:
        """Prepare for square student images of ``image_size`` pixels whose tokens lie on ``grid``.

        Only ``resample_patch_embed`` has something to do: kernels of image_size / grid pixels.

        Raises:
            InputError: the grid does not divide the image, so that no whole patch gives it.
        """
        if self.geometry == "native":
            return
        if image_size % grid[0] or grid[0] != grid[1]:
            raise InputError(
                f"the teacher's tokens cannot be resampled to a {grid[0]}×{grid[1]} grid of a {image_size}² image: "
                f"{image_size} is not a multiple of {grid[0]} (choose an image size that is, or geometry native)"
            )
        patch_size = image_size // grid[0]
        if (self.encoder.config.image_size, self.adapter.stride) == (image_size, patch_size):
            return
        # Always from the original: what was resampled before has lost detail.
        original = self._original[0].to(self.image_mean.device)
        self.encoder = resample_geometry(original, image_size, patch_size)
        self.adapter = adapter_for(self.encoder.config)

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], image_mean: torch.Tensor, image_std: torch.Tensor
    ) -> EncoderOutput:
        """Encode the student's own pixels.

        Args:
            pixel_values: B×3×H×W, normalised with the student's ``image_mean`` and ``image_std`` (1×3×1×1).
            grid: (h, w) that the patch tokens must lie on.

        Returns:
            cls B×C_t and patches B×(h·w)×C_t.

        Raises:
            InputError: the teacher's tokens do not lie on that grid.
        """
        pixels = (pixel_values * image_std + image_mean - self.image_mean) / self.image_std
        size = (grid[0] * self.adapter.stride, grid[1] * self.adapter.stride)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
        output = self.adapter.forward(self.encoder, pixels)
        if output.grid != tuple(grid):
            raise InputError(f"the teacher's tokens lie on a {output.grid} grid, the student's on {tuple(grid)}")
        return output
