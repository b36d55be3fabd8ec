"""How a person follows a stage: one bar on a terminal, one line per log entry in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from gkd_hf.training.arguments import StageArguments


def bars_are_seen() -> bool:
    """Whether a bar is drawn in place: on a terminal or in a notebook. In a log every redrawing would be kept."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def no_bar() -> bool:
    """tqdm's `disable`."""
    return not bars_are_seen()


def stage_progress(title: str) -> TrainerCallback:
    """What shows a stage's progress here."""
    return StageProgress(title) if bars_are_seen() else StageLines(title)


def _figures(logs: dict[str, float]) -> dict[str, str]:
    """What decides whether to go on; every term stands in the trainer's log."""
    found = {"loss": [logs["loss"]]} if "loss" in logs else {}
    # Of several teachers all that are logged, in their order: self_weight=0.12/0.31.
    own = [value for name, value in logs.items() if name.rpartition("/")[2] == "self_weight"]
    found |= {"self_weight": own} if own else {}
    found |= {"lr": [logs["learning_rate"]]} if "learning_rate" in logs else {}
    return {name: "/".join(f"{value:.3g}" for value in values) for name, values in found.items()}


class StageProgress(ProgressCallback):
    """One progress bar that carries the loss, in place of a printed dictionary at every logging step."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(
        self, args: StageArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where a resumed run stands."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description_str(self.title)
            self.training_bar.update(state.global_step)
            self.current_step = self.training_bar.initial = state.global_step

    def on_log(
        self,
        args: StageArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss, attention on the own position and learning rate beside the bar."""
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(_figures(logs))


class StageLines(TrainerCallback):
    """The same as lines on stderr, one per log entry."""

    def __init__(self, title: str):
        self.title = title
        self._began, self._first = 0.0, 0

    def on_train_begin(
        self, args: StageArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock where a resumed run stands."""
        self._began, self._first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: StageArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print step, loss, attention on the own position, learning rate and time left."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        rate = done / max(time.monotonic() - self._began, 1e-9)
        figures = ", ".join(f"{name}={value}" for name, value in _figures(logs).items())
        print(
            f"[{self.title}] step {state.global_step}/{state.max_steps}, {figures}; {rate:.2f} steps/s, "
            f"{duration(left / rate) if rate else 'unknown time'} left",
            file=sys.stderr,
            flush=True,
        )


def duration(seconds: float) -> str:
    """`3 h 20 min`, `7 min 5 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
