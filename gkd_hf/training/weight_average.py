"""The exponential moving average of a model's weights: what a training gives if it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from gkd_hf.errors import InputError

AVERAGE_NAME = "ema.safetensors"
_WRAPPED = "_checkpoint_wrapped_module."


class WeightAverage(TrainerCallback):
    """Follows a model's trainable weights and its floating-point buffers after each optimiser step.

    average ← d·average + (1 − d)·weights, with d = min(decay, (1 + t) / (10 + t)) at step t, so that a short training
    is not an average of its random beginning. It is kept in fp32, on sharded parameters as their shards. Every process
    computes the same from the same weights, so nothing is communicated but in `save` and `load`.

    Args:
        model: as it is trained; it may be sharded in place between this and the first step. decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._decay = decay
        self._average: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Forget what was averaged: a training begins, or has given its average to the model."""
        self._average = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin with the weights as they are, unless a checkpoint has told where the average stands."""
        if not self._average:
            self._average = {name: _copy(tensor) for name, tensor in self._followed()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the step that was taken."""
        decay = min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        followed = dict(self._followed())
        with torch.no_grad():
            torch._foreach_lerp_(
                [_local(self._average[name]) for name in followed],
                [_local(tensor).float() for tensor in followed.values()],
                1 - decay,
            )

    def restart(self, prefixes: tuple[str, ...]) -> None:
        """Give the weights whose names begin so their present values: those before were of something else."""
        for name, tensor in self._followed():
            if name.startswith(prefixes):
                self._average[name] = _copy(tensor)

    @torch.no_grad()
    def give(self) -> None:
        """Put the average into the model; does nothing before the first step and once it is forgotten."""
        if not self._average:
            return
        for name, tensor in self._followed():
            _local(tensor).copy_(_local(self._average[name]))

    @contextmanager
    def given(self) -> Iterator[None]:
        """The average, if there is one, is in the model in this context, and what was there before afterwards."""
        kept = {name: _local(tensor).detach().clone() for name, tensor in self._followed()}
        self.give()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._followed():
                    _local(tensor).copy_(kept[name])

    def save(self, folder: str | os.PathLike, is_main: bool) -> None:
        """Write the average, whole, to a checkpoint. Every process calls it, the main one writes."""
        whole = {}
        for name, tensor in self._average.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_main:
                whole[name] = full.cpu().contiguous()
        if is_main:
            save_file(whole, Path(folder) / AVERAGE_NAME)

    def load(self, folder: str | os.PathLike) -> None:
        """Go on with the average of a checkpoint, which another number of processes may have written.

        Raises:
            InputError: it has none, or one of another model.
        """
        path = Path(folder) / AVERAGE_NAME
        try:
            whole = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot resume from '{folder}': {AVERAGE_NAME} is missing or broken; was it trained without "
                "ema_decay? Leave that out, or start again in another output folder"
            ) from error
        followed = dict(self._followed())
        shapes = {name: tuple(tensor.shape) for name, tensor in followed.items()}
        if {name: tuple(tensor.shape) for name, tensor in whole.items()} != shapes:
            raise InputError(f"cannot resume from '{folder}': {AVERAGE_NAME} holds the weights of another model")
        for name, tensor in followed.items():
            if isinstance(tensor, DTensor):
                value = whole[name].to(tensor.device)
                self._average[name] = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            else:  # laid out in memory as the weights are, which lets them be averaged in one pass
                self._average[name] = torch.empty_like(tensor, dtype=whole[name].dtype).copy_(whole[name])

    def _followed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Under the names that a model has without activation checkpointing, whose wrappers add to them."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield name.replace(_WRAPPED, ""), parameter.detach()
        for name, buffer in self._model.named_buffers():
            if buffer.is_floating_point():
                yield name.replace(_WRAPPED, ""), buffer


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
