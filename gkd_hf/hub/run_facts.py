"""What a run tells about itself for its model cards: settings, command, stages, versions, where things came from."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gkd_hf.errors import InputError
from gkd_hf.hub.native import Exported
from gkd_hf.hub.short_paths import shortened, shortened_yaml

FACTS_NAME = "card.json"


@dataclass
class StageFacts:
    """How a stage went. `seconds` are those since it was last started, `losses` the means over the last log period."""

    steps: int
    batch_size: int
    learning_rate: float
    seconds: float
    losses: dict[str, float]
    precision: str
    hardware: str


@dataclass
class ArtefactFacts:
    """What was exported (as in `Exported`), its parameters, the side of its preprocessor's images, its head's type."""

    architecture: str
    auto_class: str
    native: bool
    reason: str
    max_difference: float | None
    limits: str
    image_size: int
    parameters: int
    decode_head: str = ""

    @classmethod
    def of(cls, exported: Exported, model: PreTrainedModel, image_size: int, decode_head: str = "") -> ArtefactFacts:
        """The facts of what was exported of a model."""
        return cls(
            exported.architecture,
            exported.auto_class,
            exported.native,
            exported.reason,
            exported.max_difference,
            exported.limits,
            image_size,
            sum(parameter.numel() for parameter in model.parameters()),
            decode_head,
        )


@dataclass
class RunFacts:
    """Everything about a run that its cards tell and report.json does not.

    Attributes:
        settings: the resolved recipe as plain values; {} where a trainer was used without one.
        command: what was typed. stages: by name, baselines included, in the order they ran.
        commits: resolved Hub commits of `student`, `teacher` (or `teachers[0]` …) and `data.DOMAIN`, where
            known.
        versions: by package. encoder, segmenter: what was exported.
        readmes: SHA-256 of the cards as written last, so that one that was edited by hand is not written over.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    stages: dict[str, StageFacts] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    encoder: ArtefactFacts | None = None
    segmenter: ArtefactFacts | None = None
    readmes: dict[str, str] = field(default_factory=dict)

    def save(self, run_dir: str | os.PathLike) -> None:
        """Write card.json, whole or not at all."""
        path = Path(run_dir) / FACTS_NAME
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, run_dir: str | os.PathLike) -> RunFacts:
        """Read card.json; raises `InputError` if it is missing or broken."""
        path = Path(run_dir) / FACTS_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["stages"] = {name: StageFacts(**facts) for name, facts in content["stages"].items()}
            for name in ("encoder", "segmenter"):
                content[name] = ArtefactFacts(**content[name]) if content[name] else None
            return cls(**content)
        except FileNotFoundError as error:
            raise InputError(
                f"{path} is missing: the run has not come to its end; the command that began it goes on with it"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read: the command that began the run writes it again") from error


class StageRecorder(TrainerCallback):
    """Collects what a card tells about a stage while it is trained."""

    def __init__(self) -> None:
        self.facts: StageFacts | None = None
        self._began = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the facts."""
        self.read(args, state)

    def read(self, args: TrainingArguments, state: TrainerState) -> StageFacts:
        """Take the facts from a trainer's arguments and state, also where it was resumed at its last step."""
        last = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        accelerator = args.device.type
        name = torch.cuda.get_device_name(args.device) if accelerator == "cuda" else accelerator.upper()
        self.facts = StageFacts(
            steps=state.global_step,
            batch_size=args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
            learning_rate=args.learning_rate,
            seconds=round(time.monotonic() - self._began, 1),
            losses={key: value for key, value in last.items() if key == "loss" or key.startswith("loss_")},
            precision="bf16" if args.bf16 else "fp32",
            hardware=f"{args.world_size} × {name}",
        )
        return self.facts


def command_line(argv: Sequence[str], processes: int) -> str:
    """The command that gave `argv`, for others to repeat: their paths are not this machine's.

    "" if `argv` is not that of scripts/run_gkd.py, as in a notebook.
    """
    if Path(argv[0]).name != "run_gkd.py":
        return ""
    # Without --multi_gpu, Accelerate starts a single process where there is no GPU; with it, as many as are wanted.
    launcher = f"accelerate launch --multi_gpu --num_processes {processes}" if processes > 1 else "python"
    arguments = []
    for argument in argv[1:]:
        key, equals, value = argument.partition("=")
        arguments.append(f"{key}={shortened_yaml(value)}" if equals else _recipe_name(argument))
    return " ".join([launcher, "scripts/run_gkd.py", *map(shlex.quote, arguments)])


def _recipe_name(argument: str) -> str:
    path = Path(argument)
    if path.parts[-3:-1] == ("scripts", "recipes"):
        return "/".join(path.parts[-3:])
    return shortened(argument)
