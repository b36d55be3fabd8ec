"""The recipe of a run: its keys, their types and their defaults.

Nothing heavy is imported here beyond the package itself, so that a mistake in a recipe is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from gkd_hf.data.domains import Domain, domain, domain_names
from gkd_hf.data.toy_city_styles import SOURCE_STYLE
from gkd_hf.methods import ONE_STAGE_METHODS, compares_logits, uses_teacher

KD_TARGETS = ("features", "logits")
PRECISIONS = ("auto", "fp32", "bf16")
MAX_SEED = 2**32 - 1  # NumPy's


@dataclass
class StudentRecipe:
    """The encoder to distil: a Hub id, a folder, or a configuration given in place (a mapping with `model_type`)."""

    encoder: Any = MISSING
    pretrained: bool = True  # False: random weights in the architecture of that id or folder
    freeze_batch_norm: bool = False  # never train in batch statistics: for weights whose own were folded away
    revision: str | None = None  # commit, tag or branch of a Hub id; None: its main branch


@dataclass
class TeacherRecipe:
    """The frozen foundation model: a Hub id, a folder, or `toy` for the teacher that ships with the package."""

    name: str = MISSING
    geometry: str = "native"
    revision: str | None = None  # as the student's
    sharding: str = "auto"  # over the processes: always, never, or auto: from 500 million parameters on
    standardise: bool | None = None  # its tokens, to mean 0 and deviation 1 per channel; None: if it is one of several


@dataclass
class WeightedTeacherRecipe(TeacherRecipe):
    """One of several teachers."""

    weight: float = 1.0  # of its losses


@dataclass
class StageRecipe:
    """What all stages share. `batch_size` is global: over all processes and accumulation steps."""

    data: str = MISSING  # a domain, or several that are mixed, joined by "+": gtav+synthia
    image_size: int = MISSING
    batch_size: int = MISSING
    weights: list[float] | None = None  # how often each of several domains is drawn; None: by its number of images
    patch_size: int | None = None  # None: the encoder's own
    epochs: float | None = None  # either epochs or max_steps
    max_steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.05
    gradient_accumulation_steps: int = 1
    sync_batch_norm: bool = False
    precision: str = "auto"  # bf16 on a GPU, fp32 elsewhere
    compile: bool = False  # torch.compile of what is trained, and of the teacher
    activation_checkpointing: bool = False  # recompute the student's activations in the backward pass: less memory
    ema_decay: float | None = None  # give the moving average of the weights; None: the last ones
    save_steps: int = 1000
    logging_steps: int = 50
    workers: int = 2

    @property
    def domains(self) -> tuple[str, ...]:
        """The domain that the stage reads, or all that are mixed."""
        return domain_names(self.data)

    def steps(self, train_images: int | None) -> int | None:
        """Optimiser steps of the stage; None where `epochs` is given and the number of images is not known."""
        if self.max_steps is not None:
            return self.max_steps
        return None if train_images is None else math.ceil(self.epochs * train_images / self.batch_size)


@dataclass
class DistillationRecipe(StageRecipe):
    """A label-free stage. Defaults are the paper's (arXiv 2603.02554); learning rate None = 5e-4 · batch / 512."""

    min_learning_rate: float = 1e-5
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    rand_augment: bool = True
    erase_probability: float = 0.25
    views: int | None = None  # fixed augmentations of each image, which passes take in turn; None: a new one each time
    teacher_cache: str | None = None  # folder that keeps the teacher's tokens of these views, for other runs, too
    early_backward: bool | None = None  # the first view's backward pass before the second's forward; None: on GPUs
    mask_probability: float = 0.5
    mask_ratio: float = 0.5
    token_weight: float = 1.0
    feature_weight: float = 1.0
    patch_weight: float = 1.0
    query_warmup_steps: int = 0
    attention_scale: float = 1.0
    carry_heads: bool = True  # start from the heads of the stage before, if there is one


@dataclass
class TaskRecipe(StageRecipe):
    """The task stage: the decode head on a frozen encoder, and how the domains are evaluated with it."""

    learning_rate: float | None = 1e-4
    label_fraction: float = 1.0  # train on this fraction of each domain's labelled images; 1/16 may be written as such
    label_seed: int = 0  # which images these are; those of a smaller fraction are among those of a larger one
    decode_head: Any = "mask2former"  # or a mapping with `type` and the options of that head
    norm_feature_maps: bool = False  # stage maps of a ViT after its final norm; the paper takes them before it
    short_sides: list[int] | None = None  # None: 0.5, 0.6, …, 2.0 times image_size, as the paper's 256 … 1024
    max_class_fraction: float = 0.75
    photometric: bool = True
    window: int = 512
    stride: int = 341
    window_batch_size: int = 4
    evaluation_images: int | None = None  # at most so many of each domain
    # Of gkd, mse and proteus: False lets the distilled encoder learn the task, too. It has no effect on other methods
    # and on baselines, which always train it.
    freeze_encoder: bool = True
    # Where the encoder is trained, too (baselines, one-stage methods, method none, freeze_encoder: false):
    baseline_learning_rate: float | None = None  # of the head; None: learning_rate
    baseline_encoder_learning_rate: float = 1e-5


@dataclass
class StagesRecipe:
    """The stages in their order; one that is left out is skipped."""

    task_agnostic: DistillationRecipe | None = None
    domain_agnostic: DistillationRecipe | None = None
    task: TaskRecipe | None = None

    def __iter__(self) -> Iterator[tuple[str, StageRecipe]]:
        for entry in dataclasses.fields(self):
            stage = self.__dict__[entry.name]
            if stage is not None:
                yield entry.name, stage

    def distillation(self) -> Iterator[tuple[str, DistillationRecipe]]:
        """The label-free stages that are present, in order."""
        for name, stage in self:
            if isinstance(stage, DistillationRecipe):
                yield name, stage


@dataclass
class ToyCityRecipe:
    """How many scenes are rendered for each toy-city domain, and at which size."""

    size: int = 64
    pool_images: int = 12000  # unlabelled use, style `pool`
    train_images: int = 1500  # every other style that is trained on
    test_images: int = 300
    seed: int = 0


@dataclass
class DataRecipe:
    """Where data is: domain → folder of parquet shards or Hub id; label map by name or {stored id: train id}."""

    roots: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)  # domain → commit, tag or branch of its Hub id
    label_maps: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)  # of the label space, where the source is `custom`
    toy_city: ToyCityRecipe = field(default_factory=ToyCityRecipe)


@dataclass
class HubRecipe:
    """Where the result is published. The token is never here: it comes from `hf auth login` or HF_TOKEN."""

    repo_id: str | None = None  # org/name of the encoder; the segmenter's is org/name-SOURCE. None: not published
    private: bool = True
    license: str | None = None  # the Hub's licence id; None: derived from teacher and data


@dataclass
class KDRecipe:
    """Plain knowledge distillation: the mean squared error of features, or Hinton's divergence of logits."""

    target: str = "features"  # or logits
    weight: float = 1.0
    temperature: float = 1.0  # of the logits' softmax


@dataclass
class CWDRecipe:
    """Channel-wise distillation (ICCV 2021): a softmax over space for each channel."""

    logits_weight: float = 3.0
    feature_weight: float = 50.0
    logits_temperature: float = 4.0
    feature_temperature: float = 4.0


@dataclass
class AfDCDRecipe:
    """Augmentation-free dense contrastive distillation (NeurIPS 2023)."""

    logits_weight: float = 1.0
    feature_weight: float = 4e-5
    contrast_weight: float = 1e-3
    logits_temperature: float = 1.0
    contrast_temperature: float = 0.07
    mask_ratio: float = 0.75
    pool: int = 4
    patch: int = 4
    groups: int = 16


@dataclass
class ViTKDRecipe:
    """ViTKD: the first two blocks are mimicked, the last one is generated from a part of its tokens."""

    mimic_weight: float = 3e-5
    generation_weight: float = 3e-6
    mask_ratio: float = 0.5


@dataclass
class Recipe:
    """A whole run. See `scripts/recipes/` for examples."""

    student: StudentRecipe = field(default_factory=StudentRecipe)
    teacher: TeacherRecipe | None = None
    teachers: list[WeightedTeacherRecipe] | None = None  # several, in place of teacher, for the label-free stages
    method: str = "gkd"
    stages: StagesRecipe = field(default_factory=StagesRecipe)
    evaluate: list[str] = field(default_factory=list)
    source_test: bool = True  # also evaluate the held-out split of the source
    baselines: list[str] = field(default_factory=list)
    kd: KDRecipe = field(default_factory=KDRecipe)
    cwd: CWDRecipe = field(default_factory=CWDRecipe)
    af_dcd: AfDCDRecipe = field(default_factory=AfDCDRecipe)
    vitkd: ViTKDRecipe = field(default_factory=ViTKDRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    hub: HubRecipe = field(default_factory=HubRecipe)
    output_dir: str = MISSING
    seed: int = 0
    timeout_minutes: float = 30  # how long processes wait for one that does not answer

    @property
    def all_teachers(self) -> dict[str, TeacherRecipe]:
        """The teacher, or the several that there are, by key: `teacher`, or `teachers[0]` and so on."""
        if self.teachers is not None:
            return {f"teachers[{number}]": each for number, each in enumerate(self.teachers)}
        return {} if self.teacher is None else {"teacher": self.teacher}

    @property
    def used_teachers(self) -> dict[str, TeacherRecipe]:
        """Those of `all_teachers` that the method or a baseline learns from: all or none."""
        used = uses_teacher((self.method, *self.baselines), any(True for _ in self.stages.distillation()))
        return self.all_teachers if used else {}

    @property
    def needs_teacher_head(self) -> bool:
        """Whether a one-stage method compares logits, which the teacher gives with a head learnt on the source."""
        return any(compares_logits(name, self.method_settings(name)) for name in self.one_stage)

    @property
    def one_stage(self) -> list[str]:
        """The one-stage methods that the run trains, as its own or as baselines."""
        return [name for name in (self.method, *self.baselines) if name in ONE_STAGE_METHODS]

    def method_settings(self, method: str) -> dict[str, Any]:
        """The fields of a one-stage method."""
        return dataclasses.asdict(self.__dict__[method])

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as written to recipe.yaml and the report."""
        return dataclasses.asdict(self)

    def save(self, folder: str | os.PathLike) -> None:
        """Write recipe.yaml: what was run, every default included."""
        path = Path(folder) / "recipe.yaml"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, path)


def recipe_domain(name: str) -> Domain:
    """`domain(name)`, and `custom:anything` for several data sets of the user's own."""
    name = canonical_name(name)
    base, _, own_name = name.partition(":")
    if base == "custom" and own_name:
        return dataclasses.replace(domain(base), name=name)
    return domain(name)


def canonical_name(name: str) -> str:
    """The one name of a domain: `toy_city:clear_day` is `toy_city`, whose style that is."""
    return "toy_city" if name == f"toy_city:{SOURCE_STYLE}" else name
