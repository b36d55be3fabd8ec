"""The demo's models, and the demo as a Space on the Hub."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCard, SpaceCardData
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from gkd_hf.data import toy_city
from gkd_hf.errors import InputError
from gkd_hf.hub.segmenters import folder_of, load_segmenter
from gkd_hf.hub.upload import check_repo_id, patiently, usable_token
from gkd_hf.models.pull import CONFIGURATION

if TYPE_CHECKING:
    from gkd_hf.hub.space_app import Segmenter

APP = Path(__file__).with_name("space_app.py")
REQUIREMENTS = ("numpy", "pillow", "scipy", "torch", "transformers>=5.23")
TOY_STYLES = ("clear_day", "night", "fog", "other_city")


def gradio_version() -> str:
    """The installed gradio's version; raises `InputError` if there is none."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("the demo needs gradio: pip install gradio") from error


def load_segmenters(
    sources: Sequence[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> list[Segmenter]:
    """Load folders and Hub ids for the demo's page, each with a short name of its own.

    Raises:
        InputError: gradio is missing, the same source twice, no segmenter with a preprocessor there, or the code of
            either would have to be run without ``trust_remote_code``.
    """
    gradio_version()
    from gkd_hf.hub.space_app import Segmenter

    if len(set(sources)) < len(sources):
        raise InputError(f"the same segmenter is named twice: {', '.join(sources)}")
    names = [_short_name(source) for source in sources]
    loaded = []
    for source, name in zip(sources, names, strict=True):
        model, processor, _ = _load(source, revision, trust_remote_code)
        loaded.append(Segmenter(name if names.count(name) == 1 else source, model, processor))
    return loaded


def _load(source: str, revision: str | None, trust_remote_code: bool) -> tuple[PreTrainedModel, Any, Path]:
    """Model and processor of one commit, and the folder, of the cache for a Hub id, of the configuration."""
    folder = folder_of(source, revision, (*CONFIGURATION, *(("*.py",) if trust_remote_code else ())))
    commit = None if os.path.isdir(source) else folder.name
    model = load_segmenter(source, revision=commit, trust_remote_code=trust_remote_code)
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        if "auto_map" in settings and not trust_remote_code:
            raise InputError(
                f"the preprocessor of '{source}' comes with code of its own, which would run on this machine: read "
                "it, then allow it with trust_remote_code (on the command line --trust-remote-code)"
            )
        # Never None, with which transformers would ask on the terminal.
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        if not (folder / "preprocessor_config.json").is_file():
            raise InputError(
                f"'{source}' has no preprocessor_config.json, so nobody knows how it wants its pictures"
            ) from error
        raise InputError(
            f"cannot read the preprocessor of '{source}': {str(error).strip().splitlines()[0]}"
        ) from error
    return model, processor, folder


def toy_examples(folder: str | os.PathLike) -> list[Path]:
    """Render four toy-city pictures, by day and in worlds that its models have not seen, into ``folder``."""
    paths = []
    for number, style in enumerate(TOY_STYLES):
        images, _ = toy_city.render(style, 1, size=512, seed=11, start=number)
        paths.append(Path(folder) / f"{number}_{style}.png")
        Image.fromarray(images[0]).save(paths[-1])
    return paths


def push_space(
    repo_id: str,
    models: Sequence[str],
    *,
    trust_remote_code: bool = False,
    private: bool = True,
    token: str | None = None,
    examples: Sequence[Path] = (),
) -> str:
    """Create or update a Gradio Space with the demo's page for ``models``, as one commit.

    The Space keeps to the commits that the models are at now, so that no code or weights come into it unseen.

    Args:
        repo_id: ``org/name`` of the Space. models: Hub ids.
        trust_remote_code: let the Space run code that comes with the models.
        private: whether a new Space is. token: None takes HF_TOKEN or what ``hf auth login`` stored.
        examples: PNG files that visitors can click on.

    Returns:
        URL of the Space.

    Raises:
        InputError: bad ids, a model that is a folder, is not there or would need its code, or the push failed.
    """
    check_repo_id(repo_id)
    pinned = []
    for model in models:
        if os.path.isdir(model):
            raise InputError(f"a Space can only load models from the Hub, '{model}' is a folder: push it first")
        check_repo_id(model)
        loaded, _, folder = _load(model, None, trust_remote_code)
        pinned.append({"id": model, "revision": folder.name})
        if getattr(loaded.config, "auto_map", None) and not trust_remote_code:
            raise InputError(f"'{model}' comes with code of its own: allow the Space to run it, --trust-remote-code")
    card = SpaceCardData(
        title="Segmenters side by side",
        sdk="gradio",
        sdk_version=gradio_version(),
        app_file="app.py",
        models=list(models),
        emoji="🚦",
        colorFrom="green",
        colorTo="indigo",
        pinned=False,
    )
    text = (
        f"---\n{card.to_yaml()}\n---\n\nSegments a picture with {' and '.join(models)} and shows where they differ.\n"
    )
    settings = {"models": pinned, "trust_remote_code": trust_remote_code}
    files = {
        "app.py": APP.read_bytes(),
        "requirements.txt": "".join(f"{line}\n" for line in REQUIREMENTS).encode(),
        "models.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "README.md": str(SpaceCard(text)).encode(),
    }
    files |= {f"examples/{path.name}": path.read_bytes() for path in examples}
    api = HfApi(token=usable_token(token), library_name="gkd_hf")

    def push() -> str:
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo_id, operations, repo_type="space", commit_message="Upload the side-by-side demo")
        return str(url)

    return patiently(repo_id, push)


def _short_name(source: str) -> str:
    """The run's name for RUN_DIR/segmenter, the folder's for another, a Hub id as it is."""
    if not os.path.isdir(source):
        return source
    path = Path(source).resolve()
    return path.parent.name if path.name == "segmenter" else path.name
