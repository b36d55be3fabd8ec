"""Time several ways of doing the same thing in turn, so that whatever else the machine does disturbs all alike."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gkd_hf.errors import InputError


def check_device(device: str, precision: str = "fp32") -> None:
    """Raise `InputError` for a device that is unknown or not here, or a precision but "fp32" and "bf16"."""
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision is '{precision}': give fp32 or bf16")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device is '{device}': give cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, and torch finds no CUDA device here: give cpu")


def use_threads(threads: int) -> None:
    """Let torch take so many threads on the CPU; raises `InputError` for less than one."""
    if threads < 1:
        raise InputError(f"threads is {threads}: give 1 or more")
    torch.set_num_threads(threads)


def say(line: str) -> None:
    """Tell on stderr what is being measured: minutes pass between the figures on stdout."""
    print(line, file=sys.stderr, flush=True)


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed_in_turn(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Call each arm once a round, in turn, every second round in the opposite order.

    Args:
        arms: what is timed, by name. rounds: timed calls of each. warmup: calls of each before, not timed.
        device: waited for before and after every call.

    Returns:
        Seconds of every call by arm, in the order of the rounds: the i-th of two arms were measured next to each
        other, so their ratios are those of one moment.

    Raises:
        InputError: rounds below 1 or a negative warm-up.
    """
    if rounds < 1 or warmup < 0:
        raise InputError(f"rounds is {rounds} and warmup {warmup}: give 1 round or more, and a warm-up of 0 or more")
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            synchronise(device)
            began = time.perf_counter()
            arms[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> float:
    """Return the median over the rounds of ``slower`` / ``faster``: > 1 where the second is the faster one."""
    return statistics.median(_ratios(slower, faster))


def ratio_range(slower: list[float], faster: list[float]) -> list[float]:
    """Return the least and the greatest of the rounds' ratios, of which `ratio` is the median."""
    ratios = _ratios(slower, faster)
    return [min(ratios), max(ratios)]


def _ratios(slower: list[float], faster: list[float]) -> list[float]:
    return [a / b for a, b in zip(slower, faster, strict=True)]


def machine(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return what a figure was measured on: the device's name, threads, and the versions of Python and torch."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
