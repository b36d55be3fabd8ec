"""The student in transformers' Auto classes, as soon as these are imported; its models, when one of them is wanted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGURATION = "gkd_hf.models.configuration_gkd"
MODELING = "gkd_hf.models.modeling_gkd"
CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


class ModelOnUse:
    """Stands for a model class in an Auto class, which asks it for ``from_pretrained`` or ``_from_config``.

    ``import gkd_hf`` would otherwise take two to three times as long as transformers itself, most of it for what only
    models need. From the first use on the class itself is registered.

    Args:
        auto_class: where it is registered. name: of the model class. config_class: of its configurations.
    """

    def __init__(self, auto_class: type, name: str, config_class: type):
        self._auto_class, self.config_class = auto_class, config_class
        self.__name__ = name  # pipelines tell their users by it what they support
        auto_class.register(config_class, self, exist_ok=True)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked of every object, as when it is copied or pickled
            raise AttributeError(attribute)
        model_class = getattr(import_module(MODELING), self.__name__)
        self._auto_class.register(self.config_class, model_class, exist_ok=True)
        return getattr(model_class, attribute)


class _Registry(MetaPathFinder):
    """Registers the student whenever a module of the Auto classes has been imported, in whatever order that happens.

    Python asks it for every module first. It has the other finders find those that it waits for, and acts when they
    have been executed.
    """

    def __init__(self) -> None:
        self._executed: set[str] = set()
        self._finding: str | None = None
        # In the order in which they are registered: models go with a configuration that is known.
        self._registrations = {CONFIGURATIONS: self._configuration, MODELS: self._models}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (CONFIGURATION, CONFIGURATIONS, MODELS) or self._finding == fullname:
            return None
        self._finding = fullname
        try:
            # Found by path, as a module that is reloaded would only be looked up by name.
            spec = next(filter(None, (each.find_spec(fullname, path, target) for each in self._others())), None)
        finally:
            self._finding = None
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # its own is there again
            self._executed.discard(fullname)
            loader.exec_module(module)
            self.note(fullname)

        loader.exec_module = execute_and_register
        return spec

    def _others(self) -> list[Any]:
        return [finder for finder in sys.meta_path if finder is not self]

    def note(self, executed: str) -> None:
        """Register what can be, now that a module has been executed."""
        self._executed.add(executed)
        if CONFIGURATION not in sys.modules:
            import_module(CONFIGURATION)  # which comes back here
            return
        if CONFIGURATION not in self._executed:
            return  # it is being imported, and has asked for what has just been executed
        for name, registration in self._registrations.items():
            if name in self._executed and executed in (name, CONFIGURATION):
                registration(sys.modules[name], sys.modules[CONFIGURATION].GKDStudentConfig)

    @staticmethod
    def _configuration(module: ModuleType, config_class: Any) -> None:
        module.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

    @staticmethod
    def _models(module: ModuleType, config_class: Any) -> None:
        ModelOnUse(module.AutoModel, "GKDStudentModel", config_class)
        ModelOnUse(module.AutoModelForSemanticSegmentation, "GKDStudentForSemanticSegmentation", config_class)


def register() -> None:
    """Make the student known to AutoConfig, AutoModel and AutoModelForSemanticSegmentation.

    To import these takes transformers a fifth of the time that it takes itself, for a search through all its models.
    Who imports gkd_hf and asks for none of them does not wait for it.
    """
    if any(isinstance(finder, _Registry) for finder in sys.meta_path):
        return  # gkd_hf is being reloaded
    registry = _Registry()
    sys.meta_path.insert(0, registry)
    for name in (CONFIGURATIONS, MODELS):
        if name in sys.modules:
            import_module(name)  # waits for another thread that is importing it
            registry.note(name)
