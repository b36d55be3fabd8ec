"""What `--plan --gpus` is asked, read before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gkd_hf.errors import InputError


@dataclass(frozen=True)
class ScaleQuestion:
    """What `--plan` is asked of the machine.

    Args:
        gpus: number of GPUs. memory: GB (10⁹ bytes) of each. tflops: 10¹² operations per second that one reaches at
            best in the stage's precision (312: an A100 in bf16). utilisation: part of that which a run gets.
    """

    gpus: int
    memory: float = 80.0
    tflops: float = 312.0
    utilisation: float = 0.35

    @classmethod
    def read(cls, gpus: str, memory: str | None, tflops: str | None, utilisation: str | None) -> ScaleQuestion:
        """Read the values of the command line.

        Raises:
            InputError: a value that is no number, or outside its range.
        """
        number = _number("--gpus", gpus, "a whole number from 1 to 100000")
        if number != int(number) or not 1 <= number <= 100_000:
            raise InputError(f"--gpus is {gpus}: give a whole number from 1 to 100000")
        values = {}
        for option, text, limit in (
            ("--memory", memory, 10_000),
            ("--gpu-tflops", tflops, 100_000),
            ("--utilisation", utilisation, 1),
        ):
            if text is not None:
                value = _number(option, text, f"a number above 0, at most {limit}")
                if not 0 < value <= limit:
                    raise InputError(f"{option} is {text}: give a number above 0, at most {limit}")
                values[option.split("-")[-1]] = value
        return cls(int(number), **values)


def _number(option: str, text: str, wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{option} is {text}: give {wanted}")
    return value
