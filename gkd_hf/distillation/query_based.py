"""Heads that carry student tokens into the teacher's space: query-based soft distillation, and a plain projection."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn import functional as F

logger = logging.getLogger(__name__)

ALIGNMENT = 8  # channels of which CUDA's fused attention takes multiples
_looked_at: set[tuple[torch.device, torch.dtype, int]] = set()


class Projection(nn.Module):
    """LayerNorm (eps 1e-5), then a linear map with bias: B×K×C_s → B×K×C_t."""

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(student_dim, eps=1e-5)
        self.proj = nn.Linear(student_dim, teacher_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(tokens))


class ProjectionDistillation(nn.Module):
    """LN + Linear head (the "MSE" row of GKD's ablation): the value branch of `QuerySoftDistillation` alone."""

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        self.value = Projection(student_dim, teacher_dim)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the value of B×K×C_s student tokens, B×K×C_t; the teacher is not looked at."""
        return self.value(student)


class QuerySoftDistillation(ProjectionDistillation):
    """Query-based soft distillation, QSD (GKD, arXiv 2603.02554).

    Student tokens query the teacher's: q = W_q·LN(s), v = W_v·LN(s), k = t, and the output is softmax(q·kᵀ·scale)·v:
    one head, no output projection, no residual. The value comes from the *student*, so attention decides how its
    tokens are mixed to resemble the teacher's.

    Args:
        student_dim: C_s. teacher_dim: C_t.
        scale: factor on the logits. The paper has none (1.0); 1/√C_t keeps the softmax soft on random students.
    """

    def __init__(self, student_dim: int, teacher_dim: int, scale: float = 1.0):
        super().__init__(student_dim, teacher_dim)
        self.query = Projection(student_dim, teacher_dim)
        self.scale = scale
        self.query_enabled = True

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Mix B×K×C_s student tokens by their likeness to B×K×C_t teacher tokens; returns B×K×C_t."""
        value = self.value(student)
        if teacher.shape[1] == 1:
            return value  # attention over one key is 1: the query branch could never learn
        if not self.query_enabled:
            # Every parameter stays in the graph, as gradient reduction over processes expects.
            return value + 0.0 * sum(parameter.sum() for parameter in self.query.parameters())
        query = self.query(student)
        return fused_attention(query, teacher.to(query.dtype), value, self.scale)

    @torch.no_grad()
    def start_query_from_value(self) -> None:
        """Copy the value branch, which resembles the teacher by now, into the query branch, and switch that on."""
        self.query.load_state_dict(self.value.state_dict())
        self.query_enabled = True

    @torch.no_grad()
    def attention_statistics(self, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
        """Describe the attention of a few samples (it is materialised: pass one or two).

        Returns:
            attention_entropy: mean entropy in nats (0 is one-hot, ln K uniform). self_weight: mean weight of a
            position on itself (1/K is no better than chance). logit_std: standard deviation of the logits over keys.
        """
        logits = self.query(student).float() @ teacher.float().transpose(1, 2) * self.scale
        attention = logits.softmax(-1)
        entropy = -(attention * attention.clamp_min(1e-12).log()).sum(-1).mean()
        self_weight = attention.diagonal(dim1=1, dim2=2).mean()
        return {"attention_entropy": entropy, "self_weight": self_weight, "logit_std": logits.std(-1).mean()}


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Return softmax(q·kᵀ·scale)·v of B×K×C tensors by a kernel that never holds the B×K×K matrix.

    On the CPU one kernel takes every width C. On CUDA flash attention takes heads of up to 256 channels and the
    memory-efficient kernel wider ones, both of a multiple of 8: other widths are filled up with zeros, which change
    neither the products nor what is kept of the output. Where there is no such kernel all the same, it is said once.
    """
    width = query.shape[-1]
    filled = -width % ALIGNMENT
    # A head axis of one lets the fused kernels take it.
    heads = [F.pad(tensor[:, None], (0, filled)) if filled else tensor[:, None] for tensor in (query, key, value)]
    if query.device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_unless_fused(*heads)
    # Not [:, 0], whose backward pass copies the gradient into zeros.
    mixed = F.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
    return mixed[..., :width] if filled else mixed


def _warn_unless_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    dtype = (
        torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    )
    kind = (query.device, dtype, query.shape[-1])
    if kind in _looked_at:
        return
    _looked_at.add(kind)
    params = SDPAParams(query.to(dtype), key.to(dtype), value.to(dtype), None, 0.0, False, False)
    if not (can_use_flash_attention(params) or can_use_efficient_attention(params) or can_use_cudnn_attention(params)):
        logger.warning(
            "There is no fused attention of %d channels in %s on %s: the heads will hold B×%d×%d matrices, forward "
            "and backward.",
            query.shape[-1],
            dtype,
            query.device,
            query.shape[-2],
            query.shape[-2],
        )
