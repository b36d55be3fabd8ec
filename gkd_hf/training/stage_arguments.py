"""The trainers' arguments for a recipe's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gkd_hf.errors import InputError
from gkd_hf.methods import METHODS
from gkd_hf.training.arguments import GKDDistillationArguments, GKDSegmentationArguments
from gkd_hf.training.one_stage import TEACHER_HEAD
from gkd_hf.training.recipe import DistillationRecipe, Recipe, StageRecipe

COPIED_SETTINGS = (
    "weight_decay",
    "gradient_accumulation_steps",
    "sync_batch_norm",
    "ema_decay",
    "activation_checkpointing",
    "save_steps",
    "logging_steps",
)
DISTILLATION_SETTINGS = (
    "min_learning_rate",
    "mask_probability",
    "mask_ratio",
    "token_weight",
    "feature_weight",
    "patch_weight",
    "query_warmup_steps",
    "attention_scale",
    "teacher_cache",
    "early_backward",
)


def device_batch(name: str, stage: StageRecipe, processes: int) -> int:
    """Images of a process's forward; raises `InputError` if the processes cannot share the global batch."""
    share = processes * stage.gradient_accumulation_steps
    if stage.batch_size % share:
        raise InputError(
            f"stages.{name}.batch_size {stage.batch_size} cannot be shared by {processes} process(es) × "
            f"{stage.gradient_accumulation_steps} accumulation step(s): choose a multiple of {share}"
        )
    return stage.batch_size // share


def method_of(recipe: Recipe, name: str) -> str:
    """The method by which the task stage, or the baseline of that name, is trained."""
    return recipe.method if name == "task" else name


def encoder_is_trained(recipe: Recipe, name: str) -> bool:
    """Whether the encoder learns the task with the head, in the task stage, a baseline, or for the teacher's head."""
    if name == TEACHER_HEAD:
        return False
    return name != "task" or METHODS[recipe.method].kind != "label_free" or not recipe.stages.task.freeze_encoder


def stage_arguments(
    recipe: Recipe, name: str, stage: StageRecipe, folder: Path, steps: int, processes: int
) -> GKDDistillationArguments | GKDSegmentationArguments:
    """The trainer's arguments of a stage or baseline.

    Args:
        recipe: the run. name: of the stage, or of the baseline that is trained in its place. stage: its keys.
        folder: for its checkpoints. steps: optimiser steps. processes: how many share the run.

    Raises:
        InputError: values that do not go together.
    """
    bf16 = stage.precision == "bf16" or (stage.precision == "auto" and torch.cuda.is_available())
    shared: dict[str, Any] = {key: getattr(stage, key) for key in COPIED_SETTINGS} | {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": device_batch(name, stage, processes),
        "dataloader_num_workers": stage.workers,
        "bf16": bf16,
        "torch_compile": stage.compile,
        "ddp_timeout": round(60 * recipe.timeout_minutes),
        "seed": recipe.seed,
    }
    if isinstance(stage, DistillationRecipe):
        settings = {key: getattr(stage, key) for key in DISTILLATION_SETTINGS}
        if recipe.method != "gkd":
            settings["query_warmup_steps"] = 0  # the other heads have no query branch to warm up
        return GKDDistillationArguments(
            learning_rate=stage.learning_rate,
            objective=METHODS[recipe.method].objective,
            # Several teachers each bring their own.
            teacher_sharding=recipe.teacher.sharding if recipe.teacher is not None else "auto",
            **settings,
            **shared,
        )
    frozen = not encoder_is_trained(recipe, name)
    if frozen and (recipe.baselines or name == TEACHER_HEAD):
        shared["activation_checkpointing"] = False  # meant for those: they train the encoder, too
    learning_rate = None if frozen else stage.baseline_learning_rate
    return GKDSegmentationArguments(
        learning_rate=learning_rate or stage.learning_rate,
        freeze_encoder=frozen,
        encoder_learning_rate=None if frozen else stage.baseline_encoder_learning_rate,
        window=stage.window,
        stride=stage.stride,
        window_batch_size=stage.window_batch_size,
        per_device_eval_batch_size=stage.window_batch_size,
        **shared,
    )
