"""The methods that can be compared: GKD, its relatives, and what they are measured against (GKD, arXiv 2603.02554)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """A way to make a student segment.

    Attributes:
        title: its name in tables.
        kind: "label_free" distils without labels first and trains the decode head on the frozen student then;
            "one_stage" distils while encoder and head learn the task; "plain" has no teacher.
        student: what its student is, to end "X is the student …".
        trains: what is trained, and towards what; for a "label_free" one in its label-free stages.
        objective: of the label-free stages: qsd, mse or proteus.
    """

    title: str
    kind: Literal["label_free", "one_stage", "plain"]
    student: str
    trains: str
    objective: str | None = None


_BEFORE = "distilled before it learned the task"
_WHILE = "distilled while it learned the task, encoder and head together"
_TOKENS = "the student, to give the teacher's tokens"

METHODS = {
    "gkd": Method("GKD", "label_free", f"{_BEFORE} (query-based soft distillation)", _TOKENS, "qsd"),
    "mse": Method("MSE", "label_free", f"{_BEFORE} (LayerNorm and Linear heads)", _TOKENS, "mse"),
    "proteus": Method("Proteus", "label_free", f"{_BEFORE} (patch loss on masked patches alone)", _TOKENS, "proteus"),
    "kd": Method("KD", "one_stage", _WHILE, "student and head, by the labels and the teacher's features or logits"),
    "cwd": Method("CWD", "one_stage", _WHILE, "student and head, by the labels and the teacher's channel maps"),
    "af_dcd": Method("Af-DCD", "one_stage", _WHILE, "student and head, by the labels and contrasts with the teacher"),
    "vitkd": Method("ViTKD", "one_stage", _WHILE, "student and head, by the labels and the teacher's blocks"),
    "none": Method(
        "alone", "plain", "trained end to end, not distilled", "*alone*: the same student and head, end to end"
    ),
}
LABEL_FREE_METHODS = tuple(name for name, method in METHODS.items() if method.kind == "label_free")
ONE_STAGE_METHODS = tuple(name for name, method in METHODS.items() if method.kind == "one_stage")
FROZEN = "frozen"  # stands for a method where nothing was distilled: the encoder as it was
UNDISTILLED = "undistilled"  # as FROZEN, where the encoder learned the task with the head
# What can be trained beside a method for comparison, with the same task stage.
BASELINES = ("none", *ONE_STAGE_METHODS)


def method_title(name: str) -> str:
    """What a method is called in tables; one that is not of `METHODS`, as a trainer may be given, by its own name."""
    return METHODS[name].title if name in METHODS else name


def method_kind(name: str) -> Literal["label_free", "one_stage", "plain"]:
    """A method's kind; what is not of `METHODS` can only have been given to a trainer, that of one-stage methods."""
    return METHODS[name].kind if name in METHODS else "one_stage"


def uses_teacher(methods: Iterable[str], label_free_stages: bool) -> bool:
    """Whether any of a run's methods, baselines included, asks a teacher; label-free ones do in their stages alone."""
    kinds = {method_kind(name) for name in methods}
    return "one_stage" in kinds or (label_free_stages and "label_free" in kinds)


def compares_logits(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a method with these fields compares logits, which a teacher gives with a head learnt on the source."""
    if name == "kd":
        return settings.get("target") == "logits"
    return name in ("cwd", "af_dcd") and settings.get("logits_weight", 0) > 0


def encoder_learns_task(settings: Mapping[str, Any]) -> bool:
    """Whether a recipe, as plain values, lets the encoder learn the task with the head.

    Without a task stage, as where a trainer was used alone, a label-free method's encoder counts as frozen.
    """
    if method_kind(settings.get("method", "gkd")) != "label_free":
        return True
    task = (settings.get("stages") or {}).get("task") or {}
    return not task.get("freeze_encoder", True)
