"""What a recipe would do, told without network, data or training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from gkd_hf.data.shards import is_hub_id
from gkd_hf.distillation.objective import OBJECTIVES
from gkd_hf.distillation.one_stage import check_method
from gkd_hf.distillation.token_store import token_bytes
from gkd_hf.errors import InputError
from gkd_hf.hub.repo_names import RepoNames
from gkd_hf.methods import METHODS, ONE_STAGE_METHODS
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.encoders import adapter_for, common_grid
from gkd_hf.models.loading import config_from_mapping, read_config
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.training.arguments import REFERENCE_BATCH
from gkd_hf.training.one_stage import TEACHER_HEAD
from gkd_hf.training.recipe import (
    DistillationRecipe,
    Recipe,
    StageRecipe,
    TaskRecipe,
    WeightedTeacherRecipe,
    recipe_domain,
)
from gkd_hf.training.recipe_data import TOY_TEACHER, is_rendered, task_label_space, train_images
from gkd_hf.training.stage_arguments import device_batch, encoder_is_trained

_DINOV2 = {"model_type": "dinov2", "image_size": 518, "patch_size": 14}
_REGISTERS = _DINOV2 | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
_DINOV3 = {"model_type": "dinov3_vit", "num_register_tokens": 4}
_DEIT = {"model_type": "vit", "image_size": 224, "patch_size": 16}
_SWIN = {"model_type": "swin"}
_SWIN_BASE = {"embed_dim": 128, "num_heads": [4, 8, 16, 32]}
_CONVNEXT = {"model_type": "convnext"}
_RESNET = {"model_type": "resnet", "embedding_size": 64}
_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
_BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}


def _vit(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def _dinov2(width: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


# Architectures of the Hub ids that recipes commonly name, so that parameters can be counted without asking the Hub.
KNOWN_ENCODERS: dict[str, dict[str, Any]] = {
    "facebook/convnext-tiny-224": _CONVNEXT | {"depths": [3, 3, 9, 3]},
    "facebook/convnext-small-224": _CONVNEXT | {"depths": [3, 3, 27, 3]},
    "facebook/convnext-base-224": _CONVNEXT | {"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
    "facebook/dinov2-small": _DINOV2 | _dinov2(384, 12, 6),
    "facebook/dinov2-base": _DINOV2 | _dinov2(768, 12, 12),
    "facebook/dinov2-large": _DINOV2 | _dinov2(1024, 24, 16),
    "facebook/dinov2-giant": _DINOV2 | _dinov2(1536, 40, 24) | {"use_swiglu_ffn": True},
    "facebook/dinov2-with-registers-small": _REGISTERS | _dinov2(384, 12, 6),
    "facebook/dinov2-with-registers-base": _REGISTERS | _dinov2(768, 12, 12),
    "facebook/dinov2-with-registers-large": _REGISTERS | _dinov2(1024, 24, 16),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _DINOV3 | _vit(384, 12, 6),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _DINOV3 | _vit(768, 12, 12),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _DINOV3 | _vit(1024, 24, 16),
    "facebook/deit-tiny-patch16-224": _DEIT | _vit(192, 12, 3),
    "facebook/deit-small-patch16-224": _DEIT | _vit(384, 12, 6),
    "facebook/deit-base-patch16-224": _DEIT | _vit(768, 12, 12),
    "microsoft/resnet-18": _RESNET | _BASIC | {"depths": [2, 2, 2, 2]},
    "microsoft/resnet-34": _RESNET | _BASIC | {"depths": [3, 4, 6, 3]},
    "microsoft/resnet-50": _RESNET | _BOTTLENECK | {"depths": [3, 4, 6, 3]},
    "microsoft/resnet-101": _RESNET | _BOTTLENECK | {"depths": [3, 4, 23, 3]},
    "microsoft/swin-tiny-patch4-window7-224": _SWIN | {"depths": [2, 2, 6, 2]},
    "microsoft/swin-small-patch4-window7-224": _SWIN | {"depths": [2, 2, 18, 2]},
    "microsoft/swin-base-patch4-window7-224": _SWIN | _SWIN_BASE | {"depths": [2, 2, 18, 2]},
}


@dataclass
class PlannedEncoder:
    """An encoder of the recipe: how it is named, its configuration if that is known here, whether it is downloaded."""

    name: str
    config: PreTrainedConfig | None
    downloaded: bool

    @property
    def parameters(self) -> int | None:
        """Number of parameters, None if the architecture is not known here."""
        if self.config is None:
            return None
        with torch.device("meta"):
            return count(adapter_for(self.config).build())


def plan(recipe: Recipe) -> str:
    """Return the plan of a recipe as text: stages, steps, batch, learning rates, parameters, downloads, folders.

    Raises:
        InputError: what is wrong can be told without network and data, for example an unknown architecture.
    """
    student = planned_encoder(recipe.student.encoder, recipe.student.pretrained)
    teachers = planned_teachers(recipe)
    lines = [f"Plan of {recipe.output_dir} (method {recipe.method}, seed {recipe.seed})", ""]
    lines += _encoder_lines("student", student)
    for encoder, given in zip(teachers, recipe.used_teachers.values(), strict=True):
        weight = f", weight {given.weight:g}" if isinstance(given, WeightedTeacherRecipe) else ""
        lines += _encoder_lines("teacher (frozen)", encoder, f", geometry {given.geometry}{weight}")
    for name, stage in recipe.stages:
        try:
            lines += ["", *_stage_lines(recipe, name, stage, student, teachers)]
        except InputError as error:
            where = f"stages.{name}"
            raise InputError(str(error) if where in str(error) else f"{where}: {error}") from error
    lines += ["", *_evaluation_lines(recipe), "", *_data_lines(recipe), ""]
    lines += _download_lines(recipe, [student, *teachers])
    lines += ["", *_output_lines(recipe)]
    return "\n".join(lines)


def planned_teachers(recipe: Recipe) -> list[PlannedEncoder]:
    """The teachers that the recipe's methods learn from; see `planned_encoder`."""
    return [planned_encoder(teacher.name, True) for teacher in recipe.used_teachers.values()]


def planned_encoder(source: str | Mapping[str, Any], pretrained: bool) -> PlannedEncoder:
    """Find an encoder's configuration without network: given in place, in a folder, or of a well-known Hub id.

    Raises:
        InputError: bad configuration, or an architecture that is not supported.
    """
    if isinstance(source, Mapping):
        return PlannedEncoder(
            f"{source.get('model_type')} given in the recipe", config_from_mapping(dict(source)), False
        )
    if source == "toy":
        source, name = str(TOY_TEACHER), "toy (ships with the package)"
    else:
        name = source
    if os.path.isdir(source):
        config = read_config(Path(source), source)
        adapter_for(config)
        return PlannedEncoder(name, config, False)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"no encoder at '{source}': that folder does not exist (give a folder or a Hub id org/name)")
    known = KNOWN_ENCODERS.get(source)
    return PlannedEncoder(name, config_from_mapping(known) if known else None, pretrained)


def count(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def millions(number: int | None) -> str:
    """`22.10 M`, `1.4 k`, or that it is not known."""
    if number is None:
        return "unknown without the Hub"
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k"


def learning_rate(stage: StageRecipe) -> float:
    """The learning rate a stage starts with."""
    return stage.learning_rate or 5e-4 * stage.batch_size / REFERENCE_BATCH


def _encoder_lines(role: str, encoder: PlannedEncoder, note: str = "") -> list[str]:
    return [f"{role}: {encoder.name}, {millions(encoder.parameters)} parameters{note}"]


def _stage_lines(
    recipe: Recipe, name: str, stage: StageRecipe, student: PlannedEncoder, teachers: list[PlannedEncoder]
) -> list[str]:
    images = train_images(recipe, stage, ask_hub=False)
    steps = stage.steps(images)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    each = device_batch(name, stage, processes)
    amount = f"{stage.epochs:g} epochs" if stage.epochs is not None else f"max_steps {stage.max_steps}"
    known = "an unknown number of" if images is None else f"{images:,}"
    patch = f", patch size {stage.patch_size}" if stage.patch_size else ""
    passes = (
        ""
        if images is None or stage.epochs is not None
        else f", {stage.max_steps * stage.batch_size / images:.1f} passes"
    )
    shares = f" in shares of {', '.join(f'{weight:g}' for weight in stage.weights)}" if stage.weights else ""
    lines = [
        f"stage {name}: {stage.data}{shares}, {known} images, {stage.image_size}²{patch}",
        f"  steps: {'known once the images are counted' if steps is None else f'{steps:,}'} ({amount}{passes})",
        f"  effective batch: {stage.batch_size} = {each} per device × {processes} process(es) "
        f"× {stage.gradient_accumulation_steps} accumulation step(s)",
    ]
    if images is not None and stage.batch_size > images:
        lines.append(f"  NOTE: a batch of {stage.batch_size} is more than the {images:,} images there are")
    if isinstance(stage, DistillationRecipe):
        end = min(stage.min_learning_rate, learning_rate(stage))
        lines.append(f"  learning rate: {learning_rate(stage):.3g}, cosine to {end:.3g}; no labels are read")
        if stage.query_warmup_steps:
            lines.append(
                f"  query branches off for {stage.query_warmup_steps} steps, then copies of the value branches"
            )
        if steps is not None and stage.query_warmup_steps >= steps and recipe.method == "gkd":
            lines.append("  NOTE: the stage ends before its query branches begin: it is trained as method mse")
        lines += _view_lines(stage, images, steps, student, teachers)
        frozen = "the teacher" if len(teachers) == 1 else "the teachers"
        lines.append(f"  trainable: {_distillation_parameters(recipe, stage, student, teachers)}; frozen: {frozen}")
    else:
        lines += _task_lines(recipe, stage, student)
        _check_one_stage(recipe, stage, student, teachers)
    return lines


def _view_lines(
    stage: DistillationRecipe,
    images: int | None,
    steps: int | None,
    student: PlannedEncoder,
    teachers: list[PlannedEncoder],
) -> list[str]:
    """Fixed views, what keeping the teachers' tokens of all of them takes on disk, and whether any comes back."""
    if stage.views is None:
        return []
    lines = [f"  views: {stage.views} fixed one(s) of each image, in turn from pass to pass"]
    if stage.teacher_cache is None:
        return lines
    size = "size unknown without the Hub"
    configs = [encoder.config for encoder in (student, *teachers)]
    if images is not None and None not in configs:
        adapters = [adapter_for(config) for config in (_in_geometry(student, stage), *configs[1:])]
        height, width = common_grid(*adapters[:2], stage.image_size)
        each = sum(token_bytes(height * width, adapter.width) for adapter in adapters[1:])
        total = each * images * stage.views / 1e9
        size = f"{total:,.0f}" if total >= 1000 else f"{total:.3g}"
        size += f" GB = {each / 1e6:.3g} MB × {images:,} images × {stage.views}"
    lines.append(f"  teacher cache: {stage.teacher_cache}, {size}, once every view was seen")
    if images is None or steps is None:
        return lines
    passes = steps * stage.batch_size / images
    # Whole steps: as many epochs as there are views may reach over their end by less than a batch.
    if stage.batch_size * (steps - 1) < images * stage.views:
        lines.append(
            f"  NOTE: {passes:.3g} passes over {stage.views} view(s) see none of them twice: this stage finds nothing "
            "in its cache unless an earlier one kept it; give fewer views or more epochs"
        )
    else:
        lines.append(
            f"    each view is seen {passes / stage.views:.3g} times; the first computes, so the cache pays from 2 on"
        )
    return lines


def _check_one_stage(
    recipe: Recipe, stage: TaskRecipe, student: PlannedEncoder, teachers: list[PlannedEncoder]
) -> None:
    """Refuse one-stage methods that these two encoders cannot have, where both are known."""
    if not recipe.one_stage or student.config is None or teachers[0].config is None:
        return
    own, teacher = adapter_for(student.config), adapter_for(teachers[0].config)
    for name in recipe.one_stage:
        grid = common_grid(own, teacher, stage.image_size)
        check_method(name, own, teacher, grid, **recipe.method_settings(name))


def _task_lines(recipe: Recipe, stage: TaskRecipe, student: PlannedEncoder) -> list[str]:
    """How head and encoder are trained, by the run's own method and by each baseline."""
    head_rate = stage.baseline_learning_rate or learning_rate(stage)
    end_to_end = f"learning rate {head_rate:.3g} (head), {stage.baseline_encoder_learning_rate:.3g} (encoder)"
    lines = []
    if stage.label_fraction < 1:
        drawn = f"drawn with label_seed {stage.label_seed}"
        lines.append(f"  labels: of a fixed {stage.label_fraction:g} of the images, {drawn}")
    if encoder_is_trained(recipe, "task"):
        lines.append(f"  {end_to_end}, polynomial (power 0.9) to 0; encoder and head are trained together")
        if METHODS[recipe.method].kind != "label_free":
            lines.append(f"  method {recipe.method}: {METHODS[recipe.method].student}; label-free stages are left out")
    else:
        lines.append(f"  learning rate: {learning_rate(stage):.3g}, polynomial (power 0.9) to 0")
        lines.append(f"  {_task_parameters(recipe, stage, student)}")
    if recipe.needs_teacher_head:
        lines.append(f"{TEACHER_HEAD}: the same head on the frozen teacher, for as many steps, to compare logits")
    for baseline in recipe.baselines:
        how = METHODS[baseline].student
        lines.append(f"baseline {baseline}: the same student and head for as many steps, {how}; {end_to_end}")
    return lines


def _in_geometry(encoder: PlannedEncoder, stage: StageRecipe) -> PreTrainedConfig:
    """The student's configuration at a stage's image and patch size, on which its positions and kernels depend."""
    return adapter_for(encoder.config).in_geometry(stage.image_size, stage.patch_size)


def _distillation_parameters(
    recipe: Recipe, stage: DistillationRecipe, student: PlannedEncoder, teachers: list[PlannedEncoder]
) -> str:
    if any(encoder.config is None for encoder in (student, *teachers)):
        return "the student and its heads (sizes unknown without the Hub)"
    kind = OBJECTIVES[METHODS[recipe.method].objective]
    with torch.device("meta"):
        body = GKDStudentModel(GKDStudentConfig(encoder_config=_in_geometry(student, stage)))
        if stage.activation_checkpointing:
            body.check_activation_checkpointing()
        width = adapter_for(student.config).width
        heads = nn.ModuleList(kind(width, adapter_for(teacher.config).width) for teacher in teachers)
    return f"student {millions(count(body))} + heads {millions(count(heads, trainable_only=True))}"


def _task_parameters(recipe: Recipe, stage: TaskRecipe, student: PlannedEncoder) -> str:
    if student.config is None:
        return "trainable: the decode head; frozen: the encoder (sizes unknown without the Hub)"
    classes = len(task_label_space(recipe).classes)
    with torch.device("meta"):
        segmenter = GKDStudentForSemanticSegmentation.from_student(
            GKDStudentModel(GKDStudentConfig(encoder_config=_in_geometry(student, stage))),
            num_labels=classes,
            decode_head=stage.decode_head,
        )
    if stage.activation_checkpointing:
        segmenter.freeze_encoder(not recipe.baselines)  # a baseline trains the encoder too
        segmenter.check_activation_checkpointing()
    segmenter.freeze_encoder()
    trainable = count(segmenter, trainable_only=True)
    return (
        f"trainable: decode head {millions(trainable)} ({classes} classes); "
        f"frozen: encoder {millions(count(segmenter) - trainable)}"
    )


def _evaluation_lines(recipe: Recipe) -> list[str]:
    stage = recipe.stages.task
    if stage is None:
        return ["evaluation: none (no task stage)"]
    held_out = [name for name in stage.domains if "test" in recipe_domain(name).splits and name not in recipe.evaluate]
    own = f"{', '.join(held_out)} (held-out split), " if recipe.source_test and held_out else ""
    unseen = ", ".join(recipe.evaluate) or "no unseen domain"
    return [f"evaluation: {own}{unseen}; windows of {stage.window}, stride {stage.stride}"]


def _data_lines(recipe: Recipe) -> list[str]:
    trained = [name for _, stage in recipe.stages for name in stage.domains]
    names = dict.fromkeys([*trained, *recipe.evaluate])
    lines = ["data:"]
    for name in names:
        entry = recipe_domain(name)
        if is_rendered(recipe, name):
            place = f"rendered under {Path(recipe.output_dir) / 'data'}"
        elif name in recipe.data.roots:
            place = recipe.data.roots[name]
        else:
            place = (
                f"NOT GIVEN: needs data.roots.{name}=FOLDER_OR_HUB_ID"
                + (f" ({entry.home_page})" if entry.home_page else "")
                + ("; the published count stands in for it above" if name in trained and entry.train_images else "")
            )
        licence = f" · {entry.licence}" if entry.licence else ""
        lines.append(f"  {name}: {place}{licence}")
    return lines


def _download_lines(recipe: Recipe, encoders: list[PlannedEncoder]) -> list[str]:
    wanted = []
    for encoder in encoders:
        if encoder.downloaded:
            number = encoder.parameters
            size = "size unknown" if number is None else f"about {math.ceil(4 * number / 1e6)} MB"
            wanted.append(f"  {encoder.name}: {size}")
    wanted += [
        f"  {root}: data set of {name}, streamed"
        for name, root in recipe.data.roots.items()
        if is_hub_id(os.path.expanduser(root))
    ]
    return ["downloads (unless in the Hub cache):", *wanted] if wanted else ["downloads: nothing"]


def _output_lines(recipe: Recipe) -> list[str]:
    folder = Path(recipe.output_dir)
    lines = [f"written under {folder}:"]
    head = [TEACHER_HEAD] if recipe.needs_teacher_head else []
    lines += [f"  stages/{name}/: checkpoints, model" for name in [*head, *(name for name, _ in recipe.stages)]]
    lines += [f"  baselines/{name}/: checkpoints, model" for name in recipe.baselines]
    distilled = any(recipe.stages.distillation()) or recipe.method in ONE_STAGE_METHODS
    learns = recipe.stages.task is not None and encoder_is_trained(recipe, "task")
    trained = "trained" if learns else "untrained"
    lines += [f"  encoder/: the {'distilled' if distilled else trained} encoder, for AutoModel"]
    if recipe.stages.task is not None:
        lines += ["  segmenter/: encoder and head", "  report.json, report.md, report.png"]
    lines += ["  recipe.yaml: as resolved"]
    if recipe.hub.repo_id is not None:
        names = RepoNames.of(recipe.as_dict(), recipe.hub.repo_id)
        repos = ", ".join(name for name in (names.encoder, names.segmenter) if name)
        lines += [f"pushed to the Hub at the end: {repos} ({'private' if recipe.hub.private else 'public'} if new)"]
    return lines
