"""The means of named losses between two logs, and the first of them that was not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch


class LossWatch:
    """Sums up losses where they are: nothing is read back from the device before somebody asks."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first_bad: dict[str, torch.Tensor] | None = None

    def add(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """Add the losses of a micro batch, scalars with ``total`` among them, of the ``step``-th optimiser step."""
        losses = {name: value.detach().float() for name, value in losses.items()}
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        finite = torch.isfinite(losses["total"])
        found = losses | {"step": torch.full_like(losses["total"], step)}
        if self._first_bad is None:
            self._first_bad = {name: torch.zeros_like(value) for name, value in found.items()}
        unset = self._first_bad["step"] == 0
        for name, value in found.items():
            old = self._first_bad.get(name, torch.zeros_like(value))
            self._first_bad[name] = torch.where(unset & ~finite, value, old)

    def first_not_finite(self) -> str | None:
        """Return the step and the terms of the first total that was not finite, None if there was none."""
        if self._first_bad is None or not (step := int(self._first_bad["step"].item())):
            return None
        terms = ", ".join(f"{name} {value.item():.4g}" for name, value in self._first_bad.items() if name != "step")
        return f"step {step} ({terms})"

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the means since the last call, by name in alphabetical order, and begin anew.

        Args:
            reduce: takes this process's means to those of all; not called, and nothing returned, without losses.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = reduce(torch.stack([self._sums[name] / self._counts[name] for name in names]))
        self._sums, self._counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))
