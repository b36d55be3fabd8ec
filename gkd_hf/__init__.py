"""Generalizable Knowledge Distillation (arXiv 2603.02554) for the Hugging Face ecosystem.

Importing this package registers the student with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gkd_hf.auto_classes import register
from gkd_hf.errors import InputError

if TYPE_CHECKING:
    from gkd_hf.distillation.objective import GKDObjective, MSEObjective, ProteusObjective
    from gkd_hf.distillation.query_based import QuerySoftDistillation
    from gkd_hf.hub.model_card import GKDModelCard
    from gkd_hf.hub.push import push_run as push_to_hub
    from gkd_hf.models.configuration_gkd import GKDStudentConfig
    from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
    from gkd_hf.task_teacher import TaskTeacher
    from gkd_hf.teacher import GKDTeacher
    from gkd_hf.training.arguments import GKDDistillationArguments, GKDSegmentationArguments
    from gkd_hf.training.distillation_trainer import GKDDistillationTrainer
    from gkd_hf.training.one_stage_trainer import GKDOneStageTrainer
    from gkd_hf.training.segmentation_trainer import GKDSegmentationTrainer

__version__ = "0.1.0"

# What nothing here does without; said at once, and not by whichever module comes first.
_missing = [each for each in ("torch", "transformers") if each not in sys.modules and find_spec(each) is None]
if _missing:
    raise ImportError(
        f"gkd_hf needs {', '.join(_missing)}, which {sys.executable} does not have: activate the environment "
        "that ./scripts/quickstart sets up (source .venv/bin/activate), or install the checkout with pip install -e ."
    )

register()

# Models bring most of transformers, trainers accelerate and datasets, and even a configuration the list of all models:
# loaded when first asked for.
_LAZY = {
    "GKDDistillationArguments": "gkd_hf.training.arguments",
    "GKDDistillationTrainer": "gkd_hf.training.distillation_trainer",
    "GKDObjective": "gkd_hf.distillation.objective",
    "GKDOneStageTrainer": "gkd_hf.training.one_stage_trainer",
    "GKDSegmentationArguments": "gkd_hf.training.arguments",
    "GKDSegmentationTrainer": "gkd_hf.training.segmentation_trainer",
    "GKDModelCard": "gkd_hf.hub.model_card",
    "GKDStudentConfig": "gkd_hf.models.configuration_gkd",
    "GKDStudentForSemanticSegmentation": "gkd_hf.models.modeling_gkd",
    "GKDStudentModel": "gkd_hf.models.modeling_gkd",
    "GKDTeacher": "gkd_hf.teacher",
    "MSEObjective": "gkd_hf.distillation.objective",
    "ProteusObjective": "gkd_hf.distillation.objective",
    "QuerySoftDistillation": "gkd_hf.distillation.query_based",
    "TaskTeacher": "gkd_hf.task_teacher",
    "push_to_hub": "gkd_hf.hub.push",
}

__all__ = [
    "GKDDistillationArguments",
    "GKDDistillationTrainer",
    "GKDModelCard",
    "GKDObjective",
    "GKDOneStageTrainer",
    "GKDSegmentationArguments",
    "GKDSegmentationTrainer",
    "GKDStudentConfig",
    "GKDStudentForSemanticSegmentation",
    "GKDStudentModel",
    "GKDTeacher",
    "InputError",
    "MSEObjective",
    "ProteusObjective",
    "QuerySoftDistillation",
    "TaskTeacher",
    "push_to_hub",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), "push_run" if name == "push_to_hub" else name)
    raise AttributeError(f"module 'gkd_hf' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
