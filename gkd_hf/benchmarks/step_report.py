"""A measured step for a reader: the arms side by side, and a profile of the trainer's own steps by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from gkd_hf.benchmarks.step import PARTS, StepSettings, arms_of
from gkd_hf.benchmarks.timing import synchronise

STEPS = 10
STEP = "a whole step"  # its name in the profile
OPERATORS = 25  # rows of the profile's table
# What makes the host wait for a device, by the operators' and the CUDA runtime's names.
WAITING = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
COPYING = ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "Memcpy DtoH", "Memcpy HtoD")


def table(result: dict[str, Any]) -> str:
    """Return what `step.measure` returns as lines to read."""
    names = list(result["step_ms"])
    lines = [f"{'':<22}" + "".join(f"{name:>12}" for name in names)]

    def row(title: str, values: list[float]) -> None:
        lines.append(f"{title:<22}" + "".join(f"{value:>12.1f}" for value in values))

    row("step, ms", [result["step_ms"][name] for name in names])
    for part in PARTS:
        row(f"  {part}, ms", [result["parts_ms"][name][part] for name in names])
    row("peak memory, MiB", [result["peak_mb_by_arm"][name] for name in names])
    row("kept for backward, MiB", [result["activation_mb"][name] for name in names])
    (least, most), (lowest, highest) = result["speedup_range"], result["over_floor_range"]
    lines.append(
        f"{result['images_per_s']:.2f} images/s; {result['speedup']:.3f} times the reference's speed "
        f"({least:.2f} to {most:.2f} over the rounds), {result['over_floor']:.3f} times the floor's time "
        f"({lowest:.2f} to {highest:.2f})"
    )
    lines.append(
        f"relative difference of the losses {result['loss_difference']:.1e}, of the gradients "
        f"{result['gradient_difference']:.1e}"
    )
    if result["mfu"] is not None:
        lines.append(f"model FLOPs utilisation {100 * result['mfu']:.1f} %")
    return "\n".join(lines)


def profiled(settings: StepSettings) -> tuple[str, dict[str, float]]:
    """Profile ten steps of the trainer, after two that are not.

    Returns:
        A table by operator, and for each name of `WAITING` and `COPYING` that was met its calls per step. The
        profiler's own wait for the device, at its end, stands in the table alone.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    with arms_of(settings) as arms:
        ours = arms["ours"]
        del arms["reference"], arms["floor"]
        for _ in range(2):
            ours.step()
        synchronise(ours.trainer.args.device)
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                with record_function(STEP):
                    ours.step()
    averages = profiler.key_averages()
    found = calls_a_step(profiler.events())
    order = f"self_{settings.device}_time_total"
    lines = [averages.table(sort_by=order, row_limit=OPERATORS, max_name_column_width=60)]
    lines += [f"{calls:8.1f} calls of {name} a step" for name, calls in found.items()]
    return "\n".join(lines), found


def calls_a_step(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Return for each name of `WAITING` and `COPYING` that was met its calls per step.

    What the host waits for after its last step is left out: that is the profiler, which lets the device finish. Copies
    by the device count whenever they run.
    """
    steps = [event for event in events if event.name == STEP and event.device_type == DeviceType.CPU]
    end = max(event.time_range.end for event in steps)
    found = dict.fromkeys((*WAITING, *COPYING), 0)
    for event in events:
        for name in found:
            if event.name.startswith(name) and (name in COPYING or event.time_range.start <= end):
                found[name] += 1
    return {name: calls / len(steps) for name, calls in found.items() if calls}
