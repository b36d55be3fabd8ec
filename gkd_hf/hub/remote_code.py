"""A segmenter that transformers has no class for: its folder carries this library's model files as remote code."""

from __future__ import annotations

import shutil
from pathlib import Path

from gkd_hf.models import modeling_gkd
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation

AUTO_MAP = {
    "AutoConfig": "configuration_gkd.GKDStudentConfig",
    "AutoModel": "modeling_gkd.GKDStudentModel",
    "AutoModelForSemanticSegmentation": "modeling_gkd.GKDStudentForSemanticSegmentation",
}


def model_files() -> list[Path]:
    """The modules that such a folder needs: they import one another relatively, else only torch and transformers."""
    folder = Path(modeling_gkd.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def save_with_code(segmenter: GKDStudentForSemanticSegmentation, folder: Path) -> None:
    """Save configuration, weights and code, which the Auto classes load with ``trust_remote_code=True``.

    Where ``gkd_hf`` is imported its own classes are used and the flag is not needed.
    """
    segmenter.config.auto_map = dict(AUTO_MAP)
    segmenter.save_pretrained(folder)
    for path in model_files():
        shutil.copyfile(path, folder / path.name)
