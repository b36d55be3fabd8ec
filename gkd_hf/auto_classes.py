"""The student in transformers' Auto classes; what its models are made of is imported when one of them is wanted."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from gkd_hf.models.configuration_gkd import GKDStudentConfig

MODELING = "gkd_hf.models.modeling_gkd"


class ModelOnUse:
    """Stands for a model class in an Auto class, which asks it for ``from_pretrained`` or ``_from_config``.

    ``import gkd_hf`` would otherwise take two to three times as long as transformers itself, most of it for what only
    models need. From the first use on the class itself is registered.

    Args:
        auto_class: where it is registered. name: of the model class.
    """

    config_class = GKDStudentConfig

    def __init__(self, auto_class: type, name: str):
        self._auto_class = auto_class
        self.__name__ = name  # pipelines tell their users by it what they support
        auto_class.register(GKDStudentConfig, self)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked of every object, as when it is copied or pickled
            raise AttributeError(attribute)
        model_class = getattr(import_module(MODELING), self.__name__)
        self._auto_class.register(GKDStudentConfig, model_class, exist_ok=True)
        return getattr(model_class, attribute)


def register() -> None:
    """Make the student known to AutoConfig, AutoModel and AutoModelForSemanticSegmentation."""
    AutoConfig.register(GKDStudentConfig.model_type, GKDStudentConfig)
    ModelOnUse(AutoModel, "GKDStudentModel")
    ModelOnUse(AutoModelForSemanticSegmentation, "GKDStudentForSemanticSegmentation")
