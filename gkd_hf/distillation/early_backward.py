"""One part of a loss at a time, forward and backward: the activations of one part alone are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def backward_early(
    compute: Callable[[], dict[str, torch.Tensor]], parameters: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Compute losses, and the gradients of ``total`` at once, in place of the activations that a later backward needs.

    The backward pass of whatever ``total`` is added to hands those gradients on, times what ``total``'s own is. For
    whoever waits for gradients (accumulation, DDP's buckets) each parameter still gets one, at the usual time.

    Args:
        compute: gives named scalar losses, ``total`` among them.
        parameters: every tensor that ``total`` sends gradients to; one that is not used gets none.

    Returns:
        The losses; all but ``total`` without gradients.
    """
    losses: dict[str, torch.Tensor] = {}
    total = _Early.apply(compute, losses, *parameters)
    return losses | {"total": total}


class _Early(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[], dict[str, torch.Tensor]],
        losses: dict[str, torch.Tensor],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        with torch.enable_grad():
            found = compute()
        total = found["total"]
        losses.update({name: loss.detach() for name, loss in found.items()})
        gradients: Sequence[torch.Tensor | None] = [None] * len(parameters)
        if total.requires_grad:
            with _without_autocast(total.device.type):
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        ctx.save_for_backward(*gradients)
        return total.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not in place: autograd may have given two parameters the same tensor, or one an expanded scalar. There is
        # room: what was computed after this has gone through its backward pass before.
        return None, None, *(None if each is None else each * gradient for each in ctx.saved_tensors)


def _without_autocast(device: str) -> AbstractContextManager[None]:
    """Backward passes run outside of autocast, which would choose another precision for them."""
    available = torch.amp.autocast_mode.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()
