"""What every encoder adapter answers, and what an encoder says of a batch of images."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import InputError

CHANNELS_LAST_ON = ("cuda",)  # oneDNN lays weights out anew by itself: on a CPU nothing is gained


@dataclass
class EncoderOutput:
    """What an encoder says of B images of H×W pixels.

    Attributes:
        cls: B×C, the class token after the final norm (ViTs) or the global average of the last map (the others).
        patches: B×N×C, the patch tokens or the last map's positions, row by row, after the final norm if there is one.
        grid: (h, w) with h·w = N.
        maps: stage maps B×C_i×h_i×w_i for a decode head, finest first; empty unless asked for.
        blocks: B×N×C patch tokens after the blocks asked for, before the final norm; empty unless asked for.
    """

    cls: torch.Tensor
    patches: torch.Tensor
    grid: tuple[int, int]
    maps: tuple[torch.Tensor, ...] = ()
    blocks: tuple[torch.Tensor, ...] = ()


class EncoderAdapter(ABC):
    """Base of the adapters: one architecture, described in one place.

    Attributes:
        model_name: the transformers class that is trained and saved, `model_class`.
        native_mask: whether the model takes ``bool_masked_pos``; where it does not, the image is masked.
        kernel: name of the tensor that turns patches into tokens, where it can be resampled to another patch size.
        kernel_layout: "convolution" (C×3×P×P), "channels_first" (C×3PP) or "channels_last" (C×PP3).
        positions: name of the positions learned for one image size, which are resampled when it changes.
        position_prefix: number of positions before those of the patches.
        antialias: whether positions are resampled with antialiasing.
        whole_patches: whether an image has to cut into whole patches; plain convolutions take any size.
        norm_epsilon: of the encoder's LayerNorms, where transformers' default is not what it was trained with.
        layer_classes: classes of the layers that are cut over processes one by one, where transformers names none or
            such small ones that they would travel singly.
        optional: endings of the names of tensors that a checkpoint may lack: transformers sets them as it should.
        incomplete: which of its checkpoints are known to lack some of the encoder, "" if none are.
        channels_last: whether the model is made of convolutions that a GPU computes faster with the channels innermost
            in memory, see `lay_out`.
        extra: the package that transformers needs for this architecture, and the extra of this library that brings it.
    """

    model_name: str
    native_mask = False
    kernel: str | None = None
    kernel_layout = "convolution"
    positions: str | None = None
    position_prefix = 0
    antialias = False
    whole_patches = False
    norm_epsilon: float | None = None
    layer_classes: tuple[str, ...] = ()
    constructor: dict[str, bool] = {}
    # A mask token is new by design, and a count of batches is no knowledge.
    optional: tuple[str, ...] = ("mask_token", "num_batches_tracked")
    incomplete = ""
    channels_last = False
    extra: str | None = None

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The transformers class that is trained and saved; each is imported when it is first asked for."""
        return getattr(transformers, self.model_name)

    def adjust(self, **fields: Any) -> None:
        """Set fields of ``config``, in a copy if they differ: the one given may be that of a live model."""
        if any(getattr(self.config, name) != value for name, value in fields.items()):
            self.config = copy.deepcopy(self.config)
            for name, value in fields.items():
                setattr(self.config, name, value)

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation (RGB, of [0, 1] pixels) of a model that normalises them itself; None for the others.

        Adapters take normalised pixels all the same, so that 0 is the mean colour everywhere: padding, erased and
        masked places rely on it.
        """
        return None

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the least (height, width) in pixels, no smaller than the one given, that the model loses no edge of.

        Of symbolic sizes, too, as a tracer has them.
        """
        return whole(height, self.stride), whole(width, self.stride)

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels C of ``cls`` and ``patches``."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels per patch token along one axis."""

    @property
    def fixed_grid(self) -> bool:
        """Whether positions are learned for a grid, so that they have to be resampled when the image size changes."""
        return self.positions is not None

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the square images that positions are learned for; None if they are for no one size."""
        return self.config.image_size if self.fixed_grid else None

    @property
    def owns_grid(self) -> bool:
        """Whether a student of this kind dictates the grid on which the losses live; elsewhere the teacher does.

        It does where its tokens are tied to their places: it masks them itself, or learned a position for each.
        """
        return self.native_mask or self.fixed_grid

    @property
    def num_blocks(self) -> int | None:
        """Number of blocks on the grid of the patch tokens, all of one width; None where there are no such blocks."""
        return None

    @property
    @abstractmethod
    def map_channels(self) -> tuple[int, ...]:
        """Channels C_i of the stage maps."""

    @property
    @abstractmethod
    def map_strides(self) -> tuple[int, ...]:
        """Pixels per position of each stage map along one axis."""

    def build(self) -> PreTrainedModel:
        """Return the model with random weights."""
        return self.model_class(self.config, **self.constructor)

    def lay_out(self, model: nn.Module) -> None:
        """Lay the weights of a model with this encoder out as the device they are on computes fastest, in place.

        Those of 2-D convolutions get torch's memory format ``channels_last``, if the architecture gains by it, on
        CUDA devices: activations have it already, and each pass would lay every weight out anew. Values, shapes and
        the parameters themselves stay. FSDP2 shards contiguous weights alone: see `lay_out_plainly`.
        """
        device = next(model.parameters()).device
        if self.channels_last and device.type in CHANNELS_LAST_ON:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.data = module.weight.data.to(memory_format=torch.channels_last)

    def sharded_layers(self, model: PreTrainedModel) -> set[str]:
        """Return the names of the classes in ``model`` whose modules are sharded as one each."""
        wanted = set(self.layer_classes or self.model_class._no_split_modules or ())
        return wanted & {type(module).__name__ for module in model.modules()}

    @abstractmethod
    def forward(
        self,
        model: PreTrainedModel,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_maps: bool = False,
        norm_maps: bool = False,
        output_blocks: tuple[int, ...] = (),
    ) -> EncoderOutput:
        """Run ``model`` on B×3×H×W pixels.

        Args:
            bool_masked_pos: B×N, only for adapters with ``native_mask``.
            norm_maps: pass the stage maps through the final norm (ViTs only; elsewhere it fits the last map alone).
            output_blocks: blocks whose patch tokens are wanted too, counted from 1 to ``num_blocks``.

        Raises:
            InputError: an image that does not cut into whole patches, a mask without ``native_mask``, or blocks that
                there are not.
        """

    def map_norms(self) -> nn.ModuleList | None:
        """Return new norms for the stage maps, one each, where transformers' own backbone class has them.

        They are no part of the encoder: a decode head learns them with itself.
        """
        return None

    def beside_maps(self, norm_maps: bool = False) -> tuple[str, ...]:
        """Return the names of the parameters and modules that only tokens pass, no stage map; see `forward`."""
        return ()

    def plain_state(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return the weights as ``AutoModel`` wants them, which builds ``model_class`` without ``constructor``."""
        return model.state_dict()

    def fits(self, image_size: int, patch_size: int | None = None) -> bool:
        """Whether the model is made for square images of that size, cut into patches of that size (None: its own)."""
        return self.image_size in (None, image_size) and patch_size in (None, self.stride)

    def in_geometry(self, image_size: int, patch_size: int | None = None) -> PreTrainedConfig:
        """Return the configuration for square images and patches (None: as they are) of these sizes in pixels.

        Raises:
            InputError: the encoder cannot take images of that size, or its patch size cannot be changed.
        """
        if self.kernel is None and patch_size not in (None, self.stride):
            raise InputError(f"{self.config.model_type} has no patch size to change (asked for {patch_size})")
        config = copy.deepcopy(self.config)
        if self.kernel is not None:
            config.patch_size = patch_size or self.stride
        if self.fixed_grid:
            config.image_size = image_size
        if self.whole_patches:
            type(self)(config).check_image_size(image_size, image_size)
        return config

    def kernel_maps(self, kernel: torch.Tensor) -> torch.Tensor:
        """Return a kernel of any layout as C×3×P×P."""
        if self.kernel_layout == "convolution":
            return kernel
        side = self.kernel_side(kernel.shape)
        if self.kernel_layout == "channels_first":
            return kernel.unflatten(1, (-1, side, side))
        return kernel.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)

    def kernel_of(self, maps: torch.Tensor) -> torch.Tensor:
        """Return C×3×P×P as a kernel of this encoder's layout."""
        if self.kernel_layout == "convolution":
            return maps
        return (maps if self.kernel_layout == "channels_first" else maps.permute(0, 2, 3, 1)).flatten(1)

    def kernel_side(self, shape: Sequence[int]) -> int:
        """Return the patch size P of a kernel of that shape."""
        return (
            shape[-1] if self.kernel_layout == "convolution" else round((shape[1] / self.config.num_channels) ** 0.5)
        )

    def refuse_mask(self, bool_masked_pos: torch.Tensor | None) -> None:
        """Raise `InputError` if there is a mask."""
        if bool_masked_pos is not None:
            raise InputError(f"{self.config.model_type} has no mask token: mask the image instead")

    def check_blocks(self, blocks: tuple[int, ...]) -> None:
        """Raise `InputError` if these blocks, counted from 1, are not all there."""
        kind, depth = self.config.model_type, self.num_blocks
        if blocks and depth is None:
            raise InputError(
                f"{kind} has no blocks on one grid whose tokens could be taken (asked for blocks "
                f"{', '.join(map(str, blocks))}): only vision transformers of one resolution have them"
            )
        for block in blocks:
            if not 1 <= block <= depth:
                raise InputError(f"{kind} has blocks 1 to {depth}, block {block} was asked for")

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `InputError` if an H×W image does not cut into whole patches (edge pixels would be dropped)."""
        for name, size in (("height", height), ("width", width)):
            if size < self.stride or size % self.stride:
                best = max(1, round(size / self.stride)) * self.stride
                raise InputError(
                    f"image {name} {size} is not a multiple of the patch size {self.stride} of "
                    f"{self.config.model_type}; the nearest size that is: {best}"
                )


def lay_out_plainly(model: nn.Module) -> None:
    """Make all parameters contiguous again, in place, whatever `EncoderAdapter.lay_out` made of them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def whole(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return (size + multiple - 1) // multiple * multiple
