"""Heads that carry student tokens into the teacher's space: query-based soft distillation, and a plain projection."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


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
        # A head axis of one lets the fused kernels take it, which never hold the K×K matrix.
        teacher = teacher.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query[:, None], teacher[:, None], value[:, None], scale=self.scale)
        return mixed[:, 0]

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
