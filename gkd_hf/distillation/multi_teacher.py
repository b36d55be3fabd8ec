"""Several teachers at once: heads of its own for each, of standardised tokens, and one weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gkd_hf.distillation.objective import MSEObjective
from gkd_hf.distillation.standardise import TokenStandardisation
from gkd_hf.errors import InputError


class MultiTeacherObjective(nn.Module):
    """One stage-1 objective per teacher: total = Σ_k weight_k · total_k.

    State-dict keys are ``objectives.K.…``, those of the K-th teacher's objective, and ``standardise.K.…``, the
    statistics of its tokens where they are standardised. What a teacher's heads query, and what they are to give, are
    then its standardised tokens.

    Args:
        objectives: one per teacher. names: of the teachers, which tell their losses apart; the only one may be "".
        weights: of their totals, > 0; None is 1 for each. standardised: whose tokens are standardised; None is all.

    Raises:
        InputError: no teacher, names that are not unique, a weight that is not positive, lengths that differ.
    """

    def __init__(
        self,
        objectives: Sequence[MSEObjective],
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        standardised: Sequence[bool] | None = None,
    ):
        super().__init__()
        count = len(objectives)
        weights = (1.0,) * count if weights is None else tuple(float(weight) for weight in weights)
        standardised = (True,) * count if standardised is None else tuple(standardised)
        if count == 0 or {len(names), len(weights), len(standardised)} != {count}:
            raise InputError(
                f"{count} objective(s), {len(names)} name(s), {len(weights)} weight(s) and {len(standardised)} "
                "switch(es) for standardising do not fit together: give one of each per teacher"
            )
        if len(set(names)) < count or (count > 1 and "" in names):
            raise InputError(f"teachers need names of their own, got {', '.join(map(repr, names))}")
        if not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"the teachers' weights must be more than 0 and finite, got {weights}")
        self.names, self.weights = tuple(names), weights
        self.objectives = nn.ModuleList(objectives)
        widths = [objective.patch.value.proj.out_features for objective in objectives]
        self.standardise = nn.ModuleDict(
            {str(k): TokenStandardisation(widths[k]) for k in range(count) if standardised[k]}
        )

    def forward(
        self,
        student_patches: torch.Tensor,
        student_patches_masked: torch.Tensor,
        student_cls: torch.Tensor,
        teacher_patches: Sequence[torch.Tensor],
        teacher_cls: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            student_patches, student_patches_masked, student_cls, mask: as the objectives take them.
            teacher_patches: B×N×C_k of each teacher k, all on one grid. teacher_cls: B×C_k of each.

        Returns:
            ``total``, the weighted sum, and unweighted what each objective returns, as ``NAME/total``,
            ``NAME/feature`` and so on; of a single teacher without a name, as ``feature`` and so on.
        """
        views = (student_patches, student_patches_masked, student_cls)
        return self._summed(
            teacher_patches, teacher_cls, lambda own, patches, cls: own(*views, patches, cls, mask=mask)
        )

    def whole_view(
        self,
        student_patches: torch.Tensor,
        student_cls: torch.Tensor,
        teacher_patches: Sequence[torch.Tensor],
        teacher_cls: Sequence[torch.Tensor],
        shown: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute what the whole images contribute to the losses; see `MSEObjective.whole_view`."""
        views = (student_patches, student_cls)
        return self._summed(
            teacher_patches, teacher_cls, lambda own, patches, cls: own.whole_view(*views, patches, cls, shown)
        )

    def masked_view(
        self,
        student_patches: torch.Tensor,
        teacher_patches: Sequence[torch.Tensor],
        teacher_cls: Sequence[torch.Tensor],
        mask_rows: torch.Tensor,
        masks: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute what the masked views contribute to the losses; see `MSEObjective.masked_view`."""
        return self._summed(
            teacher_patches,
            teacher_cls,
            lambda own, patches, cls: own.masked_view(student_patches, patches, cls, mask_rows, masks),
        )

    def _summed(
        self,
        teacher_patches: Sequence[torch.Tensor],
        teacher_cls: Sequence[torch.Tensor],
        compute: Callable[[MSEObjective, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """Compute each teacher's losses from its standardised tokens; return them by name, and the weighted sum."""
        losses: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=teacher_patches[0].device)
        for k, (patches, cls) in enumerate(zip(teacher_patches, teacher_cls, strict=True)):
            if str(k) in self.standardise:
                patches, cls = self.standardise[str(k)](patches, cls)
            own = compute(self.objectives[k], patches, cls)
            total = total + self.weights[k] * own["total"]
            losses |= self._named(k, own)
        return losses | {"total": total}

    def attention_statistics(
        self, student: torch.Tensor, teacher_patches: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Describe the attention over each teacher's tokens, as ``NAME/…``; see `GKDObjective.attention_statistics`.

        Args:
            student: B×N×C_s, one or two samples. teacher_patches: N×C_k of at least as many, of each teacher.
        """
        found: dict[str, torch.Tensor] = {}
        for k, patches in enumerate(teacher_patches):
            patches = patches[: len(student)]
            if str(k) in self.standardise:
                patches = self.standardise[str(k)].patches(patches)
            found |= self._named(k, self.objectives[k].attention_statistics(student, patches))
        return found

    def unfitted(self) -> list[tuple[int, TokenStandardisation]]:
        """The teachers, by place, whose tokens' statistics are still to be estimated."""
        return [(int(k), own) for k, own in self.standardise.items() if not own.images.item()]

    def _named(self, k: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{self.names[k]}/{name}" if self.names[k] else name: value for name, value in values.items()}
