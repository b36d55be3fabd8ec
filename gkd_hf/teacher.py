"""The teacher: a frozen vision foundation model with its own normalisation and its own idea of geometry."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from transformers import PreTrainedConfig

from gkd_hf.errors import InputError, nearest
from gkd_hf.models.encoder_adapter import lay_out_plainly
from gkd_hf.models.encoders import EncoderOutput, adapter_for, resample_geometry
from gkd_hf.models.loading import load_encoder
from gkd_hf.teacher_settings import GEOMETRIES, SHARDINGS, named_source

LARGE = 500_000_000  # parameters from which on sharding pays: in bf16 they are a gigabyte on every device


class GKDTeacher(nn.Module):
    """A frozen encoder that gives class and patch tokens after its final norm.

    It never trains, never enters train mode, and belongs to no checkpoint: trainers hold it beside their model. Its
    weights may be bf16 (`halve`) and shared out to the processes (`shard`).

    Args:
        source: a Hub id, a folder, a configuration, or a mapping with ``model_type`` and the configuration's fields.
        geometry: how its patches are brought onto the student's grid. ``native`` resizes the image so that the
            teacher's own patches fall on that grid (512/16 = 448/14); ``resample_patch_embed`` shows it the student's
            image and resizes its patch kernels and positions instead.
        pretrained: read the weights of an id or folder.
        revision: commit, tag or branch of a Hub id.
        weight: of its losses beside those of other teachers, > 0.
        standardise: bring its tokens to mean 0 and deviation 1 per channel; None: if it is one of several.
        sharding: "auto", "always" or "never"; None: what the trainer's arguments say.

    Attributes:
        source: the folder or Hub id, and its revision; None for a configuration.

    Raises:
        InputError: a weight that is not positive, unknown sharding, geometry or architecture, unreadable source,
            weights that lack a tensor of the encoder.
    """

    def __init__(
        self,
        source: str | os.PathLike | PreTrainedConfig | dict[str, Any],
        *,
        geometry: Literal["native", "resample_patch_embed"] = "native",
        pretrained: bool = True,
        revision: str | None = None,
        weight: float = 1.0,
        standardise: bool | None = None,
        sharding: Literal["auto", "always", "never"] | None = None,
    ):
        super().__init__()
        if not 0 < weight < math.inf:
            raise InputError(f"a teacher's weight must be more than 0 and finite, got {weight}")
        if sharding not in (None, *SHARDINGS):
            raise InputError(f"unknown teacher sharding '{sharding}' (there are: {', '.join(SHARDINGS)})")
        self.weight, self.standardise, self.sharding = float(weight), standardise, sharding
        self.source = named_source(source, revision)
        if geometry not in GEOMETRIES:
            hint = nearest(geometry, GEOMETRIES)
            raise InputError(f"unknown teacher geometry '{geometry}'{hint} (there are: {', '.join(GEOMETRIES)})")
        self.geometry = geometry
        self.encoder, mean, std = load_encoder(source, pretrained=pretrained, revision=revision)
        self.adapter = adapter_for(self.encoder.config)
        self._original = (self.encoder,)  # in a tuple, so that it is no sub-module
        if geometry == "resample_patch_embed" and self.adapter.kernel is None:
            raise InputError(
                "teacher geometry resample_patch_embed needs patch kernels and positions to resample, "
                f"{self.encoder.config.model_type} has none: use geometry native"
            )
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def called(self) -> str:
        """What its encoder is called: a Hub id, a folder, or the architecture of one given by its configuration."""
        return self.encoder.config.name_or_path or self.encoder.config.model_type

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

    @property
    def large(self) -> bool:
        """Whether it is so large that several processes had better share it."""
        return sum(parameter.numel() for parameter in self.encoder.parameters()) >= LARGE

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return isinstance(self, FSDPModule)

    @property
    def halved(self) -> bool:
        """Whether weights are bf16."""
        return any(parameter.dtype == torch.bfloat16 for parameter in self.encoder.parameters())

    def halve(self) -> None:
        """Keep the weights in bf16, for training in bf16; batch norms, whose statistics it would spoil, in fp32."""
        if self.sharded:
            raise InputError("a sharded teacher keeps its precision: halve it before it is sharded")
        for encoder in dict.fromkeys((*self._original, self.encoder)):
            for module in encoder.modules():
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(torch.bfloat16)

    def place(self, device: torch.device | str) -> None:
        """Put the whole teacher on a device, its weights laid out in memory as that computes fastest."""
        self.to(device)
        self.adapter.lay_out(self)

    def shard(self, mesh: DeviceMesh | None = None) -> None:
        """Share the weights out over the processes, layer by layer; a layer is whole only while it computes.

        From here on the geometry is fixed and a forward is a collective: every process must take part in each. The
        weights may still be in the host's memory; each process moves one layer at a time to the mesh's device and
        keeps its part, so that the whole teacher is never on one device.

        Args:
            mesh: of one dimension; None takes all processes on the default device.
        """
        if self.sharded:
            return
        self._original = ()  # it would keep all weights alive
        lay_out_plainly(self)
        layers = self.adapter.sharded_layers(self.encoder)
        settings: dict[str, Any] = {"reshard_after_forward": True} | ({"mesh": mesh} if mesh is not None else {})
        for module in reversed(list(self.encoder.modules())):  # inner layers before those around them
            if type(module).__name__ in layers:
                fully_shard(module, **settings)
        fully_shard(self, **settings)

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
        if self.adapter.fits(image_size, patch_size):
            return
        if self.sharded:
            raise InputError(
                f"the teacher was sharded for images of {self.adapter.image_size or 'any'} pixels in patches of "
                f"{self.adapter.stride} and cannot be resampled to {image_size} any more: give images of one size, "
                "or set teacher_sharding to never"
            )
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
        output = self.adapter.forward(self.encoder, self.pixels_for(pixel_values, grid, image_mean, image_std))
        self.check_grid(output.grid, grid)
        return output

    def pixels_for(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], image_mean: torch.Tensor, image_std: torch.Tensor
    ) -> torch.Tensor:
        """Return a student's pixels in this teacher's normalisation and precision, at the size that gives ``grid``."""
        pixels = (pixel_values * image_std + image_mean - self.image_mean) / self.image_std
        size = (grid[0] * self.adapter.stride, grid[1] * self.adapter.stride)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
        return pixels.to(self.encoder.dtype)

    def check_grid(self, own: tuple[int, int], grid: tuple[int, int]) -> None:
        """Raise `InputError` if tokens do not lie on the grid they are wanted on."""
        if tuple(own) != tuple(grid):
            raise InputError(f"the teacher's tokens lie on a {own} grid, the student's on {tuple(grid)}")


def short_names(called: Sequence[str]) -> list[str]:
    """Return unique short names of teachers: the last part of folder or Hub id, numbered where it is not the only one.

    `["facebook/dinov2-base", "/a/vit", "/b/vit"]` → `["dinov2-base", "vit-1", "vit-2"]`.
    """
    plain = [Path(name).name or name for name in called]
    counts, names = Counter(plain), []
    for name in plain:
        number, own = 1, name
        while counts[name] > 1 and (own == name or own in names or own in plain):
            own, number = f"{name}-{number}", number + 1
        names.append(own)
    return names
